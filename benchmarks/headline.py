"""The figures of an evaluated sweep for docs/results.md: dose-response, predictions, arms, time.

    python benchmarks/headline.py --evaluation evals/reproduce --sweep runs/reproduce --predictions eval/predictions.yaml
    python benchmarks/headline.py --kind pretrained --evaluation evals/smollm2

Reads what `ds-stability sweep` and `ds-stability eval` wrote, computes nothing that the report does not, and writes
OUTPUT/KIND.json and FIGURES/KIND.png (the report's headline figure) and, of a sweep with arms, FIGURES/arms.png.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import common

from ds_stability.errors import UserError
from ds_stability.eval.report import Analysis, analyze, draw_figures
from ds_stability.eval.report_cells import Key, read_evaluation
from ds_stability.eval.trend import MINUS
from ds_stability.eval.verdict import bracket
from ds_stability.run_dir import write_atomic, write_json_atomic

KINDS = ("headline", "pretrained")
COLUMNS = {
    "entropy": Key("predictive_entropy", None, "held_out"),
    "high-freq. share": Key("high_frequency_share", "sample"),
    "greedy high-freq. share": Key("high_frequency_share", "greedy"),
    "distinct-2": Key("distinct_2", "sample"),
    "seq-rep-4": Key("seq_rep_4", "sample"),
    "greedy seq-rep-4": Key("seq_rep_4", "greedy"),
    "generation entropy": Key("generation_entropy", "sample"),
    "top-1 mass": Key("top1_mass", None, "held_out"),
    "cross-entropy": Key("cross_entropy", None, "held_out"),
    "train cross-entropy": Key("cross_entropy", None, "train"),
    "bits per byte": Key("bits_per_byte", None, "held_out"),
    "calibration gap": Key("calibration_gap", None, "held_out"),
    "minimal pairs": Key("minimal_pairs"),
    "Vendi score": Key("vendi_score", "sample"),
    "self-BLEU-4": Key("self_bleu_4", "sample"),
    "mode coverage": Key("mode_coverage", "sample"),
    "pass@1": Key("exact_match_pass_1", "sample"),
    "pass@8": Key("exact_match_pass_8", "sample"),
    "facts": Key("ds_facts_acc"),
    "cloze": Key("ds_cloze_acc"),
}
FIGURES = ("value", "ci_low", "ci_high", "sd", "difference", "difference_low", "difference_high", "difference_p", "seeds", "units",
           "note")  # fmt: skip
DOSE_COLUMNS = ("entropy", "high-freq. share", "distinct-2", "seq-rep-4", "top-1 mass", "cross-entropy", "bits per byte",
                "minimal pairs")  # fmt: skip
PRETRAINED_COLUMNS = ("entropy", "high-freq. share", "distinct-2", "greedy seq-rep-4", "bits per byte", "minimal pairs", "facts", "cloze",
                      "pass@1", "pass@8")  # fmt: skip
ARM_COLUMNS = ("entropy", "high-freq. share", "distinct-2", "cross-entropy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="headline")
    parser.add_argument("--evaluation", required=True, help="evals/NAME")
    parser.add_argument("--sweep", help="runs/NAME: for the time that training took")
    parser.add_argument("--predictions", help="predictions to judge")
    parser.add_argument("--output", default=str(common.REPOSITORY / "docs" / "results"))
    parser.add_argument("--figures", default=str(common.REPOSITORY / "docs" / "figures"))
    arguments = parser.parse_args()
    try:
        analysis = analyze(read_evaluation(Path(arguments.evaluation)), 0.0, arguments.predictions and Path(arguments.predictions))
    except UserError as error:
        parser.error(str(error))
    result = measurement(arguments.kind, analysis, Path(arguments.sweep) if arguments.sweep else None)
    write_json_atomic(Path(arguments.output) / f"{arguments.kind}.json", result)
    names = {"headline": f"{arguments.kind}.png", "arms": "arms.png"}
    for picture in draw_figures(analysis):
        if picture.name in names:
            write_atomic(Path(arguments.figures) / names[picture.name], picture.png)
            print(Path(arguments.figures) / names[picture.name])
    return 0


def measurement(kind: str, analysis: Analysis, sweep: Path | None) -> dict[str, Any]:
    """What docs/results/KIND.json holds."""
    cells = analysis.evaluation.cells
    gits = [git for cell in cells if (git := (cell.meta.get("run") or {}).get("git"))]
    suites = sorted({cell.meta["suite"]["name"] for cell in cells})
    seeds = {"training": sorted({cell.seed for cell in cells if cell.seed is not None}),
             "sampling": sorted({seed for cell in cells for seed in cell.meta["seeds"]})}  # fmt: skip
    settings = {"cells": len(cells), "incomplete": len(analysis.evaluation.incomplete), "suite": ", ".join(suites),
                "ranks": ", ".join(sorted({str(cell.meta["world_size"]) for cell in cells}))}  # fmt: skip
    times = training_times(sweep)
    evaluation_seconds = sum(sum(cell.meta["seconds"].values()) for cell in cells)
    result = common.describe_measurement(kind, seeds, settings)
    result |= {
        "seconds": (times["seconds"] if times else 0.0) + evaluation_seconds,
        "times": times, "evaluation_seconds": evaluation_seconds,
        "revisions": sorted({git["revision"] for git in gits}),
        "dirty_revisions": sorted({git["revision"] for git in gits if git["dirty"]}),
        "rows": group_figures(analysis),
        "trends": [trend.to_dict() for trend in analysis.trends if trend.key in COLUMNS.values()],
        "predictions": [{"id": item.prediction.id, "statement": item.prediction.statement, "arm": item.arm,
                         "outcome": item.outcome, "figures": item.figures} for item in analysis.judged],
        "sentences": analysis.sentences,
        "arms": [{**line["group"]._asdict(), "concentrates": line["concentrates"], "relative": line["relative"],
                  "adjusted_p": {str(key): p for key, p in line["adjusted"].items()}} for line in analysis.arms],
        "stability": [{name: value for name, value in row.items() if name != "ratios"} for row in analysis.stability],
    }  # fmt: skip
    return result


def training_times(sweep: Path | None) -> dict[str, Any] | None:
    """Of the attempts of a sweep that ended: their number, sum, median and extremes in seconds.

    Cells that the sweep no longer has do not count.
    """
    if sweep is None:
        return None
    lines = [json.loads(line) for line in (sweep / "attempts.jsonl").read_text(encoding="utf-8").splitlines()]
    manifest = sweep / "sweep.json"
    removed = {cell["id"] for cell in json.loads(manifest.read_text(encoding="utf-8"))["removed"]} if manifest.exists() else set()
    seconds = [line["seconds"] for line in lines if line["event"] == "end" and line["cell"] not in removed]
    return {"attempts": len(seconds), "seconds": sum(seconds), "median": statistics.median(seconds), "shortest": min(seconds),
            "longest": max(seconds)}  # fmt: skip


def group_figures(analysis: Analysis) -> list[dict[str, Any]]:
    """One row per architecture, arm and level: COLUMNS by their labels."""
    by_group: dict[tuple, dict[str, Any]] = {}
    labels = {key: label for label, key in COLUMNS.items()}
    for row in analysis.rows:
        label = labels.get(Key(row["metric"], row["decoding"], row["split"]))
        if label is None:
            continue
        group = (row["architecture"], row["arm"], row["level"])
        line = by_group.setdefault(group, {"architecture": group[0], "arm": group[1], "level": group[2], "figures": {}})
        line["figures"][label] = {name: row[name] for name in FIGURES}
    return list(by_group.values())


def dose_tables(result: dict[str, Any], arm: str = "feedback") -> dict[str, tuple[list[str], list[list[str]]]]:
    """Architecture -> (header, rows) of the dose-response arm; values with 95 % intervals over seeds and units."""
    tables = {}
    for architecture in dict.fromkeys(row["architecture"] for row in result["rows"] if row["arm"] == arm):
        rows = [row for row in result["rows"] if row["arm"] == arm and row["architecture"] == architecture]
        rows.sort(key=lambda row: row["level"])
        tables[architecture] = (["level", *DOSE_COLUMNS], [[f"{row['level']:g}", *cells(row, DOSE_COLUMNS)] for row in rows])
    return tables


def cells(row: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    return [interval(row["figures"].get(name)) for name in columns]


def interval(figure: dict[str, Any] | None) -> str:
    return "-" if figure is None or figure["value"] is None else bracket(figure["value"], figure["ci_low"], figure["ci_high"])


def difference(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["difference"] is None:
        return "-"
    return bracket(figure["difference"], figure["difference_low"], figure["difference_high"], "+")


def arms_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Differences of every arm and level to no feedback, paired by seed and unit."""
    found = {(row["architecture"], row["arm"], row["level"]): row for row in result["rows"]}
    several = {arm["architecture"] for arm in result["arms"] if arm["arm"] != "feedback"}
    rows = []
    for arm in result["arms"]:
        if arm["architecture"] not in several:
            continue
        row = found[arm["architecture"], arm["arm"], arm["level"]]
        differences = [difference(row["figures"].get(name)) for name in ARM_COLUMNS]
        rows.append([arm["arm"], f"{arm['level']:g}", *differences, interval(row["figures"].get("high-freq. share")), arm["concentrates"]])
    return ["arm", "level", *(f"{name}, difference" for name in ARM_COLUMNS), "high-freq. share", "concentrates"], rows


def predictions_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [[item["id"], item["statement"], item["outcome"], "<br>".join(item["figures"])] for item in result["predictions"]]
    return ["", "prediction", "outcome", "figures"], rows


TRENDS = ("Slope per unit of level, mean over seeds with its 95 % interval, and of each seed; a test for a trend within seeds (Page's L, exact, two-sided), its "
          "p adjusted for all figures and architectures of one family (Holm); Spearman's rho over all runs as a description:")  # fmt: skip


def trends_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Slope and trend test of the dose-response table's figures; TRENDS says what they are."""
    labels = {key: label for label, key in COLUMNS.items()}
    rows = []
    for trend in result["trends"]:
        label = labels[Key(trend["metric"], trend["decoding"], trend["split"])]
        if label in DOSE_COLUMNS and trend["rho"] is not None:
            slope = "-" if trend["slope"] is None else bracket(trend["slope"], trend["slope_low"], trend["slope_high"], "+")
            by_seed = ", ".join(part.rsplit(": ", 1)[1] for part in trend["slopes"].split("; ") if part).replace("-", MINUS)
            rows.append([label, trend["architecture"], slope, by_seed or "-", _p(trend["p"]), _p(trend["p_adjusted"]),
                         f"{trend['rho']:.2f}".replace("-", MINUS), trend["shape"], trend["reversals"] or "-"])  # fmt: skip
    rows.sort(key=lambda row: DOSE_COLUMNS.index(row[0]))
    return ["figure", "architecture", "slope", "of each seed", "p (trend)", "adjusted p", "rho", "shape of the means", "turns back"], rows


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.1g}"


def pretrained_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One model a row, the untouched one first."""
    rows = sorted(result["rows"], key=lambda row: -1.0 if row["level"] is None else row["level"])
    return ["model", *PRETRAINED_COLUMNS], [
        ["untouched" if row["level"] is None else f"level {row['level']:g}", *cells(row, PRETRAINED_COLUMNS)] for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
