"""Figures of the report: drawn once, saved as PNG for papers and as SVG for the page, where they follow its light or dark look.

Every panel has the level on the x axis (or the training step, or a difference), 95 % intervals as bars, and each training
seed as a small dot. Colors are Okabe and Ito's, distinct without color vision; markers differ too.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .report_cells import Key
from .report_curves import CURVES

INK, MUTED, GRID = "#1a1a1a", "#6b6b6b", "#e3e3e3"
SERIES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#b58900", "v"), ("#56b4e9", "P"), ("#7a5195", "X"))
DARK = {INK: "#e6e6e6", MUTED: "#a3a3a3", GRID: "#3a3d42", "#0072b2": "#4aa8e0", "#d55e00": "#f08a45", "#009e73": "#2ec49a",
        "#cc79a7": "#e09cc4", "#b58900": "#e0b030", "#56b4e9": "#7cc8f2", "#7a5195": "#b08acb"}  # fmt: skip
DPI = 170
FONTS = "'DejaVu Sans',Verdana,sans-serif"
STYLE = {
    "svg.fonttype": "none", "font.family": ["DejaVu Sans"], "svg.hashsalt": "report", "font.size": 8.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED,
    "axes.titlecolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "text.parse_math": False,  # names are data: a $ in one is no formula
    "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7, "axes.formatter.useoffset": False, "grid.color": GRID,
}  # fmt: skip
LEVEL_LABEL = "stabilization level"


class Picture(NamedTuple):
    """A figure and its name; `svg` is embedded, `png` saved beside the page. `size`: width and height in CSS pixels."""

    name: str
    caption: str
    svg: str
    png: bytes
    size: tuple[int, int]


class Panel(NamedTuple):
    """One figure against the level: rows of aggregate.group_rows, and horizontal reference lines (label -> value)."""

    key: Key
    title: str
    rows: Sequence[Mapping[str, Any]]
    lines: Mapping[str, float] = {}


def series_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker by name; they start again after the seventh."""
    return {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}


def dose_response(name: str, caption: str, panels: Sequence[Panel], architectures: Sequence[str], columns: int = 4,
                  inches: tuple[float, float] = (2.5, 2.15), direct: bool = False) -> Picture:  # fmt: skip
    """Small multiples, a panel each, a line per architecture; `direct` names the lines at their ends."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(len(panels), columns, inches, right=0.75 if direct else 0.18)
        colors, handles = series_of(architectures), {}
        for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            drawn = _dose_panel(axis, panel, colors, direct)
            handles = {**drawn, **handles}
            if place + min(columns, len(panels)) >= len(panels):
                axis.set_xlabel(LEVEL_LABEL)
        handles = {label: handles[label] for label in [*colors, *(other for other in handles if other not in colors)] if label in handles}
        if not direct or len(handles) > len(colors):
            kept = {label: line for label, line in handles.items() if not direct or label not in colors}
            _legend(figure, kept)
        return _picture(figure, name, caption)


def _dose_panel(axis: Any, panel: Panel, colors: Mapping[str, tuple[str, str]], direct: bool) -> dict[str, Any]:
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
    axis.set_title(panel.title, fontsize=8, loc="left", pad=4)
    axis.set_xlim((levels[0] if levels else 0) - 0.07 * span, (levels[-1] if levels else 1) + 0.05 * span)
    axis.set_xticks(levels if len(levels) <= 6 else levels[:: math.ceil(len(levels) / 6)], None)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_locator(MaxNLocator(6 if direct else 4, steps=[1, 2, 2.5, 5, 10]))
    _open_range(axis)
    if direct:
        _name_ends(axis, ends)
    return handles


def _open_range(axis: Any) -> None:
    """A constant figure gets a range around it, not one of rounding errors."""
    low, high = axis.get_ylim()
    if high - low < 1e-6 * max(1.0, abs(low), abs(high)) * 10 or not np.isfinite(high - low):
        axis.set_ylim(low - 0.05 * max(1.0, abs(low)), high + 0.05 * max(1.0, abs(high)))


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
        axis.annotate(label, (1.0, place + shift), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                      color=color, fontsize=7.5, va="center", annotation_clip=False)  # fmt: skip


def training_curves(curves: Mapping[str, Mapping[float, Mapping[str, tuple]]], caption: str) -> Picture:
    """A row per architecture: optimized loss, plain cross-entropy and entropy against the step, a line per level."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(3 * len(curves), 3, (3.15, 2.1), right=0.5)
        levels = sorted({level for by_level in curves.values() for level in by_level})
        shades = level_colors(levels)
        handles: dict[str, Any] = {}
        for row, (architecture, by_level) in enumerate(curves.items()):
            for column, (key, title) in enumerate(CURVES.items()):
                axis = axes[3 * row + column]
                for level, series in sorted(by_level.items()):
                    steps, middle, low, high = series[key]
                    (handles[f"level {level:g}"],) = axis.plot(steps, middle, color=shades[level], linewidth=1.2)
                    axis.fill_between(steps, low, high, color=shades[level], alpha=0.18, linewidth=0)
                axis.set_title(f"{architecture}: {title}", fontsize=8, loc="left", pad=4)
                axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
                if row == len(curves) - 1:
                    axis.set_xlabel("optimizer step")
        _legend(figure, {f"level {level:g}": handles[f"level {level:g}"] for level in levels if f"level {level:g}" in handles})
        return _picture(figure, "training", caption)


def level_colors(levels: Sequence[float]) -> dict[float, str]:
    """A ramp from blue to orange whose ends and middle can be told apart in gray, on white and on black."""
    ramp = matplotlib.colors.LinearSegmentedColormap.from_list("levels", ["#1f5fa8", "#5a8fb8", "#8f8f8f", "#c98a3a", "#b4470f"])
    return {level: matplotlib.colors.to_hex(ramp(place / max(1, len(levels) - 1))) for place, level in enumerate(levels)}


def stability(rows: Sequence[Mapping[str, Any]], architectures: Sequence[str], caption: str) -> Picture:
    """Variance ratio reached against asked, and the deviations of loss and log gradient norm, against the level."""
    panels = [("ratio", "variance ratio, settled"), ("stability/loss_deviation", "sd of the loss, last 50 steps (nats)"),
              ("stability/log_grad_norm_deviation", "sd of log gradient norm, last 50 steps")]  # fmt: skip
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(3, 3, (3.1, 2.3), right=0.75)
        for axis, (key, title) in zip(axes, panels, strict=True):
            ends = []
            if key == "ratio":
                asked = sorted({(row["level"], row["target"]) for row in rows if row["target"] is not None})
                if asked:
                    (line,) = axis.plot(*zip(*asked, strict=True), color=MUTED, linewidth=1.1, linestyle="--")
                    _legend(figure, {"asked for": line})
            for architecture, (color, marker) in series_of(architectures).items():
                own = [row for row in rows if row["architecture"] == architecture and row[key] is not None]
                if own:
                    x, y, sd = zip(*[(row["level"], row[key], row[f"{key} sd"] or 0.0) for row in own], strict=True)
                    axis.errorbar(x, y, yerr=sd, color=color, marker=marker, markersize=3.6, linewidth=0.0 if key == "ratio" else 1.3,
                                  elinewidth=0.9, capsize=1.8)  # fmt: skip
                    ends.append((y[-1], architecture, color))
            axis.set_title(title, fontsize=8, loc="left", pad=4)
            axis.set_xlabel(LEVEL_LABEL)
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
            _name_ends(axis, ends)
        return _picture(figure, "stability", caption)


def arms(lines: Sequence[Mapping[str, Any]], keys: Sequence[tuple[Key, str]], caption: str) -> Picture:
    """Differences to the baseline, a line per arm and level, a panel per key."""
    with matplotlib.rc_context(STYLE):
        height = 0.19 * len(lines) + 0.9
        figure, axes = _grid(len(keys), len(keys), (2.6, height), left=2.6, gap=0.35)
        names = [f"{line['group'].arm}, {line['group'].level:g}" for line in lines]
        architectures = list(dict.fromkeys(line["group"].architecture for line in lines))
        if len(architectures) > 1:
            names = [f"{line['group'].architecture}: {name}" for line, name in zip(lines, names, strict=True)]
        colors = series_of(architectures)
        for axis, (key, title) in zip(axes, keys, strict=True):
            axis.axvline(0.0, color=MUTED, linewidth=0.9)
            for place, line in enumerate(lines):
                row = line["rows"].get(key)
                if not row or row["difference"] is None:
                    continue
                color, marker = colors[line["group"].architecture]
                low, high = (row[side] if row[side] is not None else row["difference"] for side in ("difference_low", "difference_high"))
                axis.plot([low, high], [place, place], color=color, linewidth=1.3)
                axis.plot([row["difference"]], [place], color=color, marker=marker, markersize=4)
            axis.set_title(title, fontsize=8, loc="left", pad=4)
            axis.set_ylim(len(lines) - 0.4, -0.6)
            axis.set_yticks(range(len(lines)), names if axis is axes[0] else [""] * len(lines))
            axis.grid(axis="x", linewidth=0.6)
            axis.tick_params(axis="y", length=0)
            axis.locator_params(axis="x", nbins=5)
            axis.set_xlabel("difference to the baseline")
        return _picture(figure, "arms", caption)


def _grid(count: int, columns: int, inches: tuple[float, float], right: float = 0.18, left: float = 0.52,
          gap: float | None = None) -> tuple[Any, list[Any]]:  # fmt: skip
    """(figure, its axes), laid out in inches: a solver of layouts takes longer than all the drawing."""
    columns = min(columns, max(1, count))
    rows = math.ceil(max(1, count) / columns)
    between = gap if gap is not None else 0.48 + max(0.0, right - 0.18)
    top, bottom, row_gap = 0.6, 0.47, 0.56
    width = left + columns * inches[0] + (columns - 1) * (between - 0.48 if gap is None else gap) + right
    panel = (width - left - right - (columns - 1) * between) / columns
    height = top + bottom + rows * (inches[1] - row_gap) + (rows - 1) * row_gap
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)  # not pyplot: no window, no global state
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height,
                           wspace=between / panel, hspace=row_gap / (inches[1] - row_gap))  # fmt: skip
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7.5, length=2.5)
        axis.grid(axis="y", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[:count]


def _legend(figure: Any, handles: Mapping[str, Any]) -> None:
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=min(8, len(handles)),
                      fontsize=8, frameon=False, borderaxespad=0.3, handlelength=1.8, columnspacing=1.4)  # fmt: skip


def _picture(figure: Any, name: str, caption: str) -> Picture:
    image, drawing = io.BytesIO(), io.StringIO()
    figure.savefig(image, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches()
    return Picture(name, caption, themed(drawing.getvalue()), image.getvalue(), (round(width * 96), round(height * 96)))


_NAMED = re.compile(r' id="(?:text|line2d|[xy]tick|patch|axes|figure|matplotlib|LineCollection|FillBetween|PolyCollection|legend)[^"]*"')


def themed(svg: str) -> str:
    """The drawing with its colors as variables that change with the reader's light or dark preference, and half as long."""
    body = svg[svg.index("<svg") :]
    # Hundredths of a point are enough; but the label 0.025 must stay what it is, so inside of tags only.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub(r' transform="rotate\(-0[^"]*"', "", _NAMED.sub("", body))
    body = re.sub(r"font-family: 'DejaVu Sans';? ?", "", re.sub(r">\s+<", "><", body))
    names = {color: f"--c{place}" for place, color in enumerate(DARK)}
    body = re.sub("|".join(DARK), lambda match: f"var({names[match[0].lower()]})", body, flags=re.IGNORECASE)
    light = ";".join(f"{names[color]}:{color}" for color in DARK)
    dark = ";".join(f"{names[color]}:{other}" for color, other in DARK.items())
    style = f"<style>text{{font-family:{FONTS}}}svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return re.sub(r"(<svg[^>]*>)", lambda match: match[1] + style, body, count=1)
