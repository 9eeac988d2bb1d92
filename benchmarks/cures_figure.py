"""The figure of benchmarks/cures.py: quality against diversity, an arm a number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import figures
from figures import BLUE, GRAY, GREEN, ORANGE

QUALITY = "bits per byte"
DIVERSITY = {"entropy": "predictive entropy, held-out (nats)", "generation entropy": "generation entropy, T = 1 (nats)",
             "distinct-2": "distinct-2 of samples, T = 1", "self-BLEU-4": "self-BLEU-4 of samples, T = 1 (lower is more diverse)"}  # fmt: skip
FAMILIES = (("feedback", "clipping", "averaging", "z_loss", "regularization"), ("governor_initial", "governor_data"), ("untouched", "plain"))
COLORS = (ORANGE, GREEN, "#000000")


def pareto(result: Mapping[str, Any], path: Path, title: str) -> None:
    """Write a PNG: each measure of diversity against bits per byte beyond those of plain training. Numbered: an arm at its learning
    rate, mean over seeds with 95 % intervals (sideways: of the paired difference). Small dots: cells of the search. Dotted: human text."""
    figure, axes = figures._grid(len(DIVERSITY), columns=2, size=(4.6, 3.7))
    plain = next(row for row in result["rows"] if row["arm"] == "plain")["figures"][QUALITY]["value"]
    for axis, (name, label) in zip(axes, DIVERSITY.items(), strict=True):
        _dots(axis, result["search"], name, plain)
        for number, row in enumerate(result["rows"], start=1):
            _arm(axis, row, name, str(number))
        if result["human"].get(name) is not None:
            axis.axhline(result["human"][name], color=GRAY, linewidth=1.2, linestyle=":")
        axis.set_title(label, fontsize=9, loc="left")
        axis.set_xlim(*_range(result["rows"]))
    for axis in axes[-2:]:
        axis.set_xlabel("held-out bits per byte beyond plain training (left is better)", fontsize=9)
    names = [f"{number} {row['arm'].replace('_', ' ')}" for number, row in enumerate(result["rows"], start=1)]
    lines = ["     ".join(names[start : start + 6]) for start in range(0, len(names), 6)]
    figure.supxlabel("\n".join(lines), fontsize=8, x=0.02, ha="left")
    figures._finish(figure, path, title)


def color(arm: str) -> str:
    return next((shade for family, shade in zip(FAMILIES, COLORS, strict=True) if arm in family), BLUE)


def _dots(axis, cells: list[Mapping[str, Any]], name: str, plain: float) -> None:
    known = [cell for cell in cells if cell[QUALITY] is not None and cell[name] is not None]
    axis.scatter([cell[QUALITY] - plain for cell in known], [cell[name] for cell in known], s=8, linewidths=0, alpha=0.45,
                 c=[color(cell["arm"]) for cell in known])  # fmt: skip


def _arm(axis, row: Mapping[str, Any], name: str, number: str) -> None:
    x, y, shade = _beyond_plain(row), row["figures"].get(name), color(row["arm"])
    if x is None or y is None or y["value"] is None:
        return
    axis.errorbar(x["value"], y["value"], xerr=_lengths(x), yerr=_lengths(y), color=shade, linewidth=0.9, capsize=0, alpha=0.7)
    axis.plot(x["value"], y["value"], "o", markersize=11, markerfacecolor="white", markeredgecolor=shade, markeredgewidth=1.1)
    axis.annotate(number, (x["value"], y["value"]), ha="center", va="center", fontsize=7, color=shade)


def _beyond_plain(row: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Bits per byte beyond plain training's, paired by seed and unit; None where there is none."""
    if row["arm"] == "plain":
        return {"value": 0.0, "ci_low": None, "ci_high": None}
    found = row["figures"][QUALITY]
    if found["difference"] is None:
        return None
    return {"value": found["difference"], "ci_low": found["difference_low"], "ci_high": found["difference_high"]}


def _lengths(figure: Mapping[str, Any]) -> list[list[float]] | None:
    """Lengths of an error bar; None without an interval."""
    low, high, value = (figure[key] for key in ("ci_low", "ci_high", "value"))
    return None if low is None else [[max(0.0, value - low)], [max(0.0, high - value)]]


def _range(rows: list[Mapping[str, Any]]) -> tuple[float, float]:
    """What is shown of the horizontal axis: the numbered points, their bars and a margin; far dots of the search fall out."""
    shown = [item for item in map(_beyond_plain, rows) if item is not None]
    lows = [item["value"] if item["ci_low"] is None else item["ci_low"] for item in shown]
    highs = [item["value"] if item["ci_high"] is None else item["ci_high"] for item in shown]
    margin = 0.06 * (max(highs) - min(lows)) or 0.05
    return min(lows) - margin, max(highs) + margin
