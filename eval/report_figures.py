"""Figures of the report: what is drawn in them, panel by panel.

Every panel has the level on the x axis (or the training step), 95 % intervals as bars, and each training seed as a small dot.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from .report_cells import Key
from .report_curves import CURVES
from .report_drawing import (
    MUTED,
    Layout,
    Picture,
    grid,
    legend,
    narrow,
    open_range,
    picture,
    series_of,
    set_title,
    shortened,
)

LEVEL_LABEL = "stabilization level"


class Panel(NamedTuple):
    """One figure against the level: rows of aggregate.group_rows, and horizontal reference lines (label -> value)."""

    key: Key
    title: str
    rows: Sequence[Mapping[str, Any]]
    lines: Mapping[str, float] = {}


def dose_response(name: str, caption: str, panels: Sequence[Panel], architectures: Sequence[str], columns: int = 4,
                  inches: tuple[float, float] = (2.5, 2.15), direct: bool = False) -> Picture:  # fmt: skip
    """Small multiples, a panel each, a line per architecture; `direct` names the lines at their ends where there is room."""
    colors = series_of(architectures)
    lines = list(dict.fromkeys(label for panel in panels for label in panel.lines))

    def draw(layout: Layout) -> Any:
        at_ends = direct and not layout.narrow
        labels = [*([] if at_ends else colors), *lines]
        figure, axes = grid(len(panels), layout, labels)
        handles: dict[str, Any] = {}
        for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            handles |= _dose_panel(axis, panel, colors, at_ends, 4 if layout.narrow else 6)
            if place + min(layout.columns, len(panels)) >= len(panels):
                axis.set_xlabel(LEVEL_LABEL)
        legend(figure, {label: handles[label] for label in labels if label in handles})
        return figure

    return picture(name, caption, draw, Layout(columns, inches, right=0.75 if direct else 0.18), narrow())


def _dose_panel(axis: Any, panel: Panel, colors: Mapping[str, tuple[str, str]], direct: bool, ticks: int) -> dict[str, Any]:
    handles, ends = {}, []
    levels = sorted({row["level"] for row in panel.rows})
    span = (levels[-1] - levels[0]) or 1.0 if levels else 1.0
    for place, (architecture, (color, marker)) in enumerate(colors.items()):
        rows = sorted((row for row in panel.rows if row["architecture"] == architecture and row["value"] is not None),
                      key=lambda row: row["level"])  # fmt: skip
        if not rows:
            continue
        shift = (place - (len(colors) - 1) / 2) * 0.014 * span  # apart, so that no interval hides another
        x, y = np.array([row["level"] for row in rows]) + shift, np.array([row["value"] for row in rows])
        seeds = [(row["level"] + shift - 0.025 * span, value) for row in rows for value in row["values"].values() if value is not None]
        axis.plot(*zip(*seeds, strict=True), linestyle="none", marker="o", markersize=2.2, color=color, alpha=0.55, markeredgewidth=0)
        low, high = (np.array([row[side] if row[side] is not None else row["value"] for row in rows]) for side in ("ci_low", "ci_high"))
        axis.vlines(x, low, high, color=color, linewidth=1.0)
        (handles[architecture],) = axis.plot(x, y, color=color, marker=marker, markersize=3.6, linewidth=1.3)
        ends.append((y[-1], architecture, color))
    for label, value in panel.lines.items():
        style = ":" if "human" in label or "chance" in label else "-."
        handles[label] = axis.axhline(value, color=MUTED, linewidth=1.0, linestyle=style)
    set_title(axis, panel.title)
    axis.set_xlim((levels[0] if levels else 0) - 0.07 * span, (levels[-1] if levels else 1) + 0.05 * span)
    axis.set_xticks(levels[:: math.ceil(len(levels) / ticks)], None)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_locator(MaxNLocator(6 if direct else 4, steps=[1, 2, 2.5, 5, 10]))
    open_range(axis)
    if direct:
        _name_ends(axis, ends)
    return handles


def _name_ends(axis: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names to the right of the last points, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    gap, previous = 0.085 * (high - low), -math.inf
    ends = sorted(ends)
    places = []
    for y, _, _ in ends:
        previous = max(y, previous + gap)
        places.append(previous)
    if not ends:
        return
    # Stacking pushes names up: back, so that they stand around their points, and inside the panel.
    shift = sum(y for y, _, _ in ends) / len(ends) - sum(places) / len(places)
    shift = min(max(shift, low + gap / 3 - places[0]), high - gap / 3 - places[-1])
    for place, (_, label, color) in zip(places, ends, strict=True):
        axis.annotate(shortened(label, 20), (1.0, place + shift), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                      color=color, fontsize=7.5, va="center", annotation_clip=False)  # fmt: skip


def training_curves(curves: Mapping[str, Mapping[float, Mapping[str, tuple]]], caption: str) -> Picture:
    """A row per architecture: optimized loss, plain cross-entropy and entropy against the step, a line per level."""
    levels = sorted({level for by_level in curves.values() for level in by_level})
    shades = level_colors(levels)

    def draw(layout: Layout) -> Any:
        figure, axes = grid(3 * len(curves), layout, [f"level {level:g}" for level in levels])
        handles: dict[str, Any] = {}
        for row, (architecture, by_level) in enumerate(curves.items()):
            for column, (key, title) in enumerate(CURVES.items()):
                axis = axes[3 * row + column]
                for level, series in sorted(by_level.items()):
                    steps, middle, low, high = series[key]
                    (handles[f"level {level:g}"],) = axis.plot(steps, middle, color=shades[level], linewidth=1.2)
                    axis.fill_between(steps, low, high, color=shades[level], alpha=0.18, linewidth=0)
                set_title(axis, f"{architecture}: {title}")
                axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
                if row == len(curves) - 1:
                    axis.set_xlabel("optimizer step")
        legend(figure, {f"level {level:g}": handles[f"level {level:g}"] for level in levels if f"level {level:g}" in handles})
        return figure

    return picture("training", caption, draw, Layout(3, (3.15, 2.1), right=0.5), narrow(1))


def level_colors(levels: Sequence[float]) -> dict[float, str]:
    """A ramp from blue to orange whose ends and middle can be told apart in gray, on white and on black."""
    ramp = matplotlib.colors.LinearSegmentedColormap.from_list("levels", ["#1f5fa8", "#5a8fb8", "#8f8f8f", "#c98a3a", "#b4470f"])
    return {level: matplotlib.colors.to_hex(ramp(place / max(1, len(levels) - 1))) for place, level in enumerate(levels)}


def stability(rows: Sequence[Mapping[str, Any]], architectures: Sequence[str], caption: str) -> Picture:
    """Variance ratio reached against asked, and the deviations of loss and log gradient norm, against the level."""
    panels = [("ratio", "variance ratio, settled"), ("stability/loss_deviation", "sd of the loss, last 50 steps (nats)"),
              ("stability/log_grad_norm_deviation", "sd of log gradient norm, last 50 steps")]  # fmt: skip

    def draw(layout: Layout) -> Any:
        figure, axes = grid(3, layout, ["asked for"])
        for axis, (key, title) in zip(axes, panels, strict=True):
            ends = []
            if key == "ratio":
                asked = sorted({(row["level"], row["target"]) for row in rows if row["target"] is not None})
                if asked:
                    (line,) = axis.plot(*zip(*asked, strict=True), color=MUTED, linewidth=1.1, linestyle="--")
                    legend(figure, {"asked for": line})
            for architecture, (color, marker) in series_of(architectures).items():
                own = [row for row in rows if row["architecture"] == architecture and row[key] is not None]
                if own:
                    x, y, sd = zip(*[(row["level"], row[key], row[f"{key} sd"] or 0.0) for row in own], strict=True)
                    axis.errorbar(x, y, yerr=sd, color=color, marker=marker, markersize=3.6, linewidth=0.0 if key == "ratio" else 1.3,
                                  elinewidth=0.9, capsize=1.8)  # fmt: skip
                    ends.append((y[-1], architecture, color))
            set_title(axis, title)
            axis.set_xlabel(LEVEL_LABEL)
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
            _name_ends(axis, ends)
        return figure

    return picture("stability", caption, draw, Layout(3, (3.1, 2.3), right=0.75), narrow(1, 2.1)._replace(right=0.75, panel=(2.45, 2.1)))
