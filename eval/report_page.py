"""The page of the report: what the template is given, and how data gets into it safely."""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from ds_stability.run_dir import package_versions, utc_now

from . import report_curves, report_models
from .report_cells import Evaluation
from .report_drawing import Picture
from .report_samples import clean, visible
from .report_tables import ARM_KEYS, HEADLINE, TABLE_COLUMNS, metric_title, table_rows
from .trend import MINUS, Trend
from .verdict import bracket, p_text

if TYPE_CHECKING:
    from .report import Analysis

TEMPLATE = "report_template.html.j2"


def render(analysis: "Analysis", pictures: Sequence[Picture], samples: dict[str, Any], baseline_level: float) -> str:
    """The page."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"number": number, "interval": lambda row: bracket(*row), "p_value": p_text, "spread": spread}
    evaluation = analysis.evaluation
    seeds = sorted({cell.seed for cell in evaluation.cells if cell.seed is not None})
    found = {(item.key, item.architecture): item for item in analysis.trends}
    headline = [(metric_title(key, None), [found.get((key, name)) for name in analysis.architectures])
                for key in HEADLINE if any((key, name) in found for name in analysis.architectures)]  # fmt: skip
    measured = [key for key in report_curves.STABILITY if any(row[key] is not None for row in analysis.stability)]
    values = {
        "name": evaluation.name, "made_at": utc_now(), "sentences": analysis.sentences, "judged": analysis.judged,
        "counts": {"cells": len(evaluation.cells), "architectures": len(analysis.architectures), "seeds": len(seeds)},
        "seeds": seeds, "arm": analysis.arm, "baseline_level": baseline_level,
        "incomplete": evaluation.incomplete, "problems": evaluation.problems,
        "arms": analysis.arms, "arm_keys": [(key, metric_title(key, None)) for key in ARM_KEYS],
        "arm_count": len({line["group"].arm for line in analysis.arms}),
        "stability": analysis.stability, "stability_keys": {key: report_curves.STABILITY[key] for key in measured},
        "has_levels": analysis.has_levels, "has_models": analysis.has_models, "models": analysis.comparison.models,
        "model_table": report_models.table(analysis.comparison), "model_sentences": report_models.sentences(analysis.comparison),
        "model_notes": report_models.table_notes(analysis.comparison), "pair_notes": report_models.pair_notes(analysis.comparison),
        "headline_trends": headline, "architectures": analysis.architectures,
        "settings": settings_rows(evaluation), "versions": package_versions(),
    }  # fmt: skip
    figures = [{"name": picture.name, "caption": picture.caption, "width": picture.size[0], "height": picture.size[1],
                "source": _embedded(picture.svg), "narrow": _embedded(picture.narrow), "narrow_width": picture.narrow_size[0],
                "narrow_height": picture.narrow_size[1]} for picture in pictures]  # fmt: skip
    data = {
        "results": {"columns": TABLE_COLUMNS, "rows": table_rows(analysis.rows)},
        "trends": {"columns": TREND_COLUMNS, "rows": [trend_row(item) for item in analysis.trends]},
        "samples": samples | {"arm": analysis.arm},
        **({"models": {"columns": report_models.PAIR_COLUMNS, "rows": report_models.pair_rows(analysis.comparison)}} if analysis.has_models else {}),
    }
    return environment.get_template(TEMPLATE).render(
        **values, figures={figure["name"]: figure for figure in figures},
        data={name: script_json(clean(value)) for name, value in data.items()},
    )  # fmt: skip


def _embedded(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _shown(value: Any) -> Any:
    """What every expression of the template becomes before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value if abs(value) > 1e-12 else 0:{sign}.3g}".replace("-", MINUS)  # below that it is rounding


def spread(value: float) -> str:
    return f"{value if abs(value) > 1e-12 else 0:.2g}"


TREND_COLUMNS = ["metric", "where", "arm", "architecture", "levels", "seeds", "slope", "low", "high", "p", "adjusted p", "comparisons", "shape of the means",
                 "turns back", "rho", "slope per seed", "test", "note"]  # fmt: skip


def trend_row(item: Trend) -> list[Any]:
    return [item.key.metric, item.key.where, item.arm, item.architecture, len(item.levels), item.seeds, item.slope.value, item.slope.low,
            item.slope.high, item.p, item.p_adjusted, item.comparisons, item.shape, "; ".join(map(str, item.reversals)), item.rho,
            " ".join(f"{value:.4g}" for value in item.slopes.values()), item.method, item.note]  # fmt: skip


def settings_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What produced the figures, each value once, with how many cells have it."""
    names = ("suite", "suite_fingerprint", "seeds", "high_frequency", "settings", "world_size", "device", "versions", "git")
    rows = []
    for name in names:
        counted: dict[str, int] = {}
        for cell in evaluation.cells:
            if cell.meta.get(name) is not None:
                text = json.dumps(cell.meta[name], ensure_ascii=False, sort_keys=True)
                counted[text] = counted.get(text, 0) + 1
        for text, count in sorted(counted.items(), key=lambda item: -item[1])[:5]:
            rows.append((name if len(counted) == 1 else f"{name} ({count} of {len(evaluation.cells)} cells)", text))
        if len(counted) > 5:
            rows.append((name, f"and {len(counted) - 5} more"))
    return rows


def script_json(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element, open a comment, or break the line."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: Any) -> Any:
    """NaN and infinity as null; floats to ten digits, which tell the ends of every interval apart (spread.ROUNDING)."""
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
