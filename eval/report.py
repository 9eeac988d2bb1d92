"""The report of a sweep: one HTML page that opens from disk, with figures and tables beside it.

    evals/NAME/  results.parquet  tensorboard/  report/{index.html, figures/*.png, tables/*.csv}

Names and texts come from models and from disk: everything is escaped in the page, in its JSON and in the CSV files.
"""

import io
import json
import re
import shutil
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ds_stability.errors import UserError
from ds_stability.failures import storage_reason
from ds_stability.run_dir import write_atomic
from ds_stability.safe_text import safe_line

from . import report_curves, report_figures, report_forest, report_models
from .aggregate import (
    Group,
    group_rows,
    groups_of,
    keys_of,
    main_arm,
    results_frame,
)
from .arms import arms_table
from .comparison import Comparison, compare
from .predictions import load_predictions
from .records import REFERENCE
from .report_cells import UNTOUCHED, Cell, Evaluation, Key, read_evaluation
from .report_drawing import Picture
from .report_page import render
from .report_samples import collect
from .report_tables import ARM_KEYS, HEADLINE, csv_text, metric_family, metric_title
from .sentences import sentences
from .trend import Trend, adjust, trend
from .verdict import Facts, Judgement, judge

WARNINGS = 5  # of a kind, named on stderr
PREDICTION_FILES = ("predictions.yaml", "predictions.yml", "predictions.json")


@dataclass
class Analysis:
    """All that the page shows, before it is drawn."""

    evaluation: Evaluation
    groups: dict[Group, list[Cell]]
    arm: str | None
    rows: list[dict[str, Any]]
    trends: list[Trend]
    judged: list[Judgement]
    arms: list[dict[str, Any]]
    sentences: list[str]
    curves: dict[str, dict[float, dict]]
    stability: list[dict[str, Any]]
    comparison: Comparison
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def architectures(self) -> list[str]:
        return list(dict.fromkeys(group.architecture for group in self.groups if group.arm == self.arm and group.level is not None))

    @property
    def has_levels(self) -> bool:
        """Whether any architecture has two levels, so that there is a dose-response."""
        found = [group.architecture for group in self.groups if group.arm == self.arm and group.level is not None]
        return len(found) > len(set(found))

    @property
    def has_models(self) -> bool:
        """Whether models stand beside each other for themselves: without levels, or some that no run of ours made."""
        return not self.has_levels or any(not model.trained for model in self.comparison.models)


def write_report(folder: Path, output: Path | None = None, baseline_level: float = 0.0, predictions: Path | None = None) -> Path:
    """Read evals/NAME, write results.parquet, report/ and tensorboard/; the page's path. Errors as below."""
    return write_page(read_analysis(folder, baseline_level, predictions), output or folder / "report", baseline_level)


def read_analysis(folder: Path, baseline_level: float = 0.0, predictions: Path | None = None) -> Analysis:
    """The analysis of evals/NAME; cells that are left out, and what makes cells incomparable, are told on stderr.

    Raises:
        UserError: nothing to report on, or a wrong predictions file.
    """
    predictions = predictions or next((folder / name for name in PREDICTION_FILES if (folder / name).exists()), None)
    analysis = analyze(read_evaluation(folder), baseline_level, predictions)
    _warn([f"cell {cell.id} is left out: {cell.reason}" for cell in analysis.evaluation.incomplete], "cells are left out")
    _warn(analysis.evaluation.problems, "problems")
    return analysis


def _warn(texts: Sequence[str], what: str) -> None:
    for text in texts[:WARNINGS]:
        print(safe_line(f"warning: {text}"), file=sys.stderr)
    if len(texts) > WARNINGS:
        print(f"warning: {len(texts)} {what}; the page names all", file=sys.stderr)


def write_page(analysis: Analysis, output: Path, baseline_level: float = 0.0) -> Path:
    """results.parquet and tensorboard/ beside the cells, figures, tables and the page in `output`; the page's path.

    Raises:
        UserError: the folder cannot be written.
    """
    named = {} if analysis.has_levels else {cell.id: model.name for model in analysis.comparison.models for cell in model.cells}
    folder, samples = analysis.evaluation.folder, collect(analysis.evaluation, named)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # it prints control characters in names as they are
        pictures = draw_figures(analysis)
    place, advice = folder, "results.parquet and tensorboard/ go there whatever --output is: make it writable, or copy it"
    try:
        frame = io.BytesIO()
        results_frame(analysis.evaluation.cells).to_parquet(frame, index=False)
        write_atomic(folder / "results.parquet", frame.getvalue())
        write_tensorboard(analysis, folder / "tensorboard")
        place, advice = output, "give another --output"
        for picture in pictures:
            write_atomic(output / "figures" / f"{picture.name}.png", picture.png)
        for name, lines in tables(analysis).items():
            write_atomic(output / "tables" / f"{name}.csv", csv_text(lines))
        page = output / "index.html"
        write_atomic(page, render(analysis, pictures, samples, baseline_level))
    except OSError as error:
        if storage_reason(error) is not None:
            raise
        raise UserError(f"{place}: cannot be written ({error.strerror}); {advice}") from None
    return page


def analyze(evaluation: Evaluation, baseline_level: float = 0.0, predictions: Path | None = None) -> Analysis:
    """Groups, intervals, trends and verdicts of an evaluation."""
    expected = load_predictions(predictions) if predictions else []
    groups = groups_of(evaluation.cells)
    arm = main_arm(groups)
    architectures = list(dict.fromkeys(group.architecture for group in groups if group.arm == arm))
    rows: list[dict[str, Any]] = []
    trends: list[Trend] = []
    for key in keys_of(evaluation.cells):
        rows += group_rows(groups, key, baseline_level)
        found = [trend(architecture, arm, key, groups) for architecture in architectures if key.decoding != REFERENCE]
        trends += [item for item in found if item is not None]
    adjust(trends, metric_family)
    facts = Facts(rows, trends, arm, baseline_level, groups)
    judged = [judge(prediction, facts) for prediction in expected]
    arms = arms_table(facts, ARM_KEYS)
    runs = report_curves.read_runs(evaluation)
    return Analysis(evaluation, groups, arm, rows, trends, judged, arms, sentences(facts, judged, arms),
                    report_curves.curves(groups, runs, arm), report_curves.stability_rows(groups, runs), compare(groups), runs)  # fmt: skip


def draw_figures(analysis: Analysis) -> list[Picture]:
    """The headline figure first; each only where there is something to draw."""
    by_key: dict[Key, list[dict[str, Any]]] = {}
    for row in analysis.rows:
        if row["arm"] == analysis.arm and row["level"] is not None and row["value"] is not None and row["decoding"] != REFERENCE:
            by_key.setdefault(Key(row["metric"], row["decoding"], row["split"]), []).append(row)
    units = {key: rows[0]["unit"] for key, rows in by_key.items()}
    lines = reference_lines(analysis)
    panels = {key: report_figures.Panel(key, metric_title(key, units[key]), rows, lines.get(key, {}))
              for key, rows in by_key.items()}  # fmt: skip
    compared = report_models.figure(analysis.comparison) if analysis.has_models else None
    pictures = [] if compared is None else [compared]
    head = [key for key in HEADLINE if key in panels] or list(panels)[:8]
    interval = "Bars: 95 % intervals over seeds and prompts; small dots: single seeds."
    if head and analysis.has_levels:
        pictures.append(report_figures.dose_response(
            "headline", f"Dose-response of the headline measures, arm {analysis.arm}. {interval}", [panels[key] for key in head],
            analysis.architectures, inches=(2.3, 2.35), direct=True))  # fmt: skip
    families: dict[str, list[Key]] = {}
    for key in panels:
        families.setdefault(metric_family(key), []).append(key)
    for place, (family, keys) in enumerate(sorted(families.items()) if analysis.has_levels else [], start=1):
        pictures.append(report_figures.dose_response(
            f"dose-{place:02d}-{'-'.join(re.findall(r'[a-z0-9]+', family.lower()))[:40]}", f"{family}. {interval}",
            [panels[key] for key in keys], analysis.architectures, columns=5, inches=(2.0, 1.85)))  # fmt: skip
    if analysis.curves:
        caption = "Training curves by level: median over seeds, band from lowest to highest. Left: the weighted loss that is optimized; middle: plain cross-entropy; right: entropy of the predictions; all on training batches."
        pictures.append(report_figures.training_curves(analysis.curves, caption))
    main = [row for row in analysis.stability if row["arm"] == analysis.arm and row["level"] is not None]
    if main and analysis.has_levels:
        caption = "Variance ratio reached (settled: from 31 steps after warm-up) against asked, and how smooth training was, apart from the law. Bars: sd over seeds."
        pictures.append(report_figures.stability(main, analysis.architectures, caption))
    if analysis.has_levels and len({line["group"].arm for line in analysis.arms}) > 1:
        shown = [(key, metric_title(key, units.get(key))) for key in ARM_KEYS if any(line["rows"].get(key) for line in analysis.arms)]
        caption = "Every arm and level against the baseline of the same architecture, paired by seed and prompt. Bars: 95 % intervals."
        pictures.append(report_forest.arms(analysis.arms, shown, caption))
    return pictures


def reference_lines(analysis: Analysis) -> dict[Key, dict[str, float]]:
    """What to compare curves with: human text, models that no run of ours made, and the chance level."""
    lines: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    human: dict[str, list[float]] = defaultdict(list)
    for row in analysis.rows:
        if row["value"] is not None and row["decoding"] == REFERENCE:
            human[row["metric"]].append(row["value"])
        elif row["value"] is not None and row["arm"].startswith(UNTOUCHED):
            lines[Key(row["metric"], row["decoding"], row["split"])][row["arm"]].append(row["value"])
    for cell in analysis.evaluation.cells:
        for key, row in cell.rows.items():
            if (row.get("settings") or {}).get("chance") is not None:
                lines[key]["chance"].append(row["settings"]["chance"])
            if key.decoding and key.metric in human:
                lines[key]["human text"] = human[key.metric]
    return {key: {label: float(np.mean(values)) for label, values in found.items()} for key, found in lines.items()}


def tables(analysis: Analysis) -> dict[str, list[dict[str, Any]]]:
    """Lines of each CSV file."""
    predictions = [{"id": item.prediction.id, "statement": item.prediction.statement, "arm": item.arm, "outcome": item.outcome,
                    "figures": " | ".join(item.figures)} for item in analysis.judged]  # fmt: skip
    arms = [{**line["group"]._asdict(), "concentrates": line["concentrates"],
             **{f"{key} {name}": row[name] if row else None for key, row in line["rows"].items()
                for name in ("difference", "difference_low", "difference_high", "difference_p")},
             **{f"{key} adjusted p": p for key, p in line["adjusted"].items()}} for line in analysis.arms]  # fmt: skip
    cells = results_frame(analysis.evaluation.cells).astype(object)
    groups = [{name: json.dumps(value) if isinstance(value, dict) else value for name, value in row.items()} for row in analysis.rows]
    return {
        "groups": groups, "trends": [item.to_dict() for item in analysis.trends], "arms": arms, "predictions": predictions,
        "stability": [{name: value for name, value in row.items() if name != "ratios"} for row in analysis.stability],
        "models": [dict(zip(report_models.PAIR_COLUMNS, row, strict=True)) for row in report_models.pair_rows(analysis.comparison)],
        "cells": cells.where(cells.notna(), None).to_dict("records"),
        "incomplete": [item._asdict() for item in analysis.evaluation.incomplete],
    }  # fmt: skip


def write_tensorboard(analysis: Analysis, folder: Path) -> None:
    """One hparams entry per cell (level, architecture, arm, seed) with the headline measures; a former report's are replaced."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    keys = [key for key in HEADLINE if any(cell.value(key) is not None for cell in analysis.evaluation.cells)]
    for cell in analysis.evaluation.cells:
        values = {safe_line("/".join(filter(None, key)), 200): cell.value(key) for key in keys or keys_of([cell])[:8]}
        settings = {"level": "none" if cell.level is None else cell.level, "architecture": safe_line(cell.architecture, 200), "arm": safe_line(cell.arm, 200),
                    "seed": -1 if cell.seed is None else cell.seed}  # fmt: skip
        with SummaryWriter(str(folder / cell.folder.name)) as writer:
            writer.add_hparams(settings, {name: value for name, value in values.items() if value is not None}, run_name=".")
