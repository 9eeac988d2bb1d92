"""Dots with intervals, a line each (an arm and level, or a model), a panel for each measure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .report_cells import Key
from .report_drawing import MUTED, Layout, Picture, grid, legend, narrow, picture, series_of, set_title, shortened

LINE = 0.19  # inches
WIDE_INCHES = 11.75  # the page's own width
DASHES = (":", "-.", "--")


class Point(NamedTuple):
    value: float
    low: float | None
    high: float | None


class Panel(NamedTuple):
    """points: one for each line of the figure, None where it has no value. lines: what to compare with (label -> value)."""

    title: str
    points: Sequence[Point | None]
    lines: Mapping[str, float] = {}


def forest(name: str, caption: str, panels: Sequence[Panel], names: Sequence[str], kinds: Sequence[str], axis_label: str = "",
           columns: int = 4) -> Picture:  # fmt: skip
    """The figure. `names` and `kinds`: of each line; lines of one kind share a color and a marker."""
    colors = series_of(list(dict.fromkeys(kinds)))
    height = LINE * len(names) + 0.9
    left = min(2.6, 0.4 + 0.07 * max(len(shortened(label, 36)) for label in names))

    def draw(layout: Layout) -> Any:
        labels = list(dict.fromkeys(label for panel in panels for label in panel.lines if label))
        figure, axes = grid(len(panels), layout, labels)
        handles: dict[str, Any] = {}
        for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            for label, value in panel.lines.items():
                style = DASHES[labels.index(label) % len(DASHES)] if label else "-"
                handles[label] = axis.axvline(value, color=MUTED, linewidth=0.9, linestyle=style)
            _draw_points(axis, panel.points, [colors[kind] for kind in kinds])
            set_title(axis, panel.title)
            first = place % min(layout.columns, len(panels)) == 0
            shown = [shortened(label, 24 if layout.narrow else 36) for label in names]
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.set_yticks(range(len(names)), shown if first else [""] * len(names))
            axis.grid(axis="y", visible=False)
            axis.grid(axis="x", linewidth=0.6)
            axis.tick_params(axis="y", length=0)
            axis.locator_params(axis="x", nbins=4 if layout.narrow else 5)
            axis.set_xlabel(axis_label)
        legend(figure, {label: handles[label] for label in labels})
        return figure

    columns = min(columns, len(panels))
    width = min(2.6, (WIDE_INCHES - left - 0.18 - (columns - 1) * 0.35) / columns)
    return picture(name, caption, draw, Layout(columns, (width, height), left=left, gap=0.35),
                   narrow(1, height + 0.14, left=min(left, 1.85)))  # fmt: skip


def _draw_points(axis: Any, points: Sequence[Point | None], colors: Sequence[tuple[str, str]]) -> None:
    for place, (point, (color, marker)) in enumerate(zip(points, colors, strict=True)):
        if point is None:
            continue
        if point.low is not None and point.high is not None:
            axis.plot([point.low, point.high], [place, place], color=color, linewidth=1.3)
        axis.plot([point.value], [place], color=color, marker=marker, markersize=4)


def arms(lines: Sequence[Mapping[str, Any]], keys: Sequence[tuple[Key, str]], caption: str) -> Picture:
    """Differences to the baseline, a line per arm and level, a panel per key."""
    architectures = [line["group"].architecture for line in lines]
    names = [f"{line['group'].arm}, {line['group'].level:g}" for line in lines]
    if len(set(architectures)) > 1:
        names = [f"{architecture}: {name}" for architecture, name in zip(architectures, names, strict=True)]
    panels = []
    for key, title in keys:
        rows = [line["rows"].get(key) for line in lines]
        points = [Point(row["difference"], row["difference_low"], row["difference_high"]) if row and row["difference"] is not None else None
                  for row in rows]  # fmt: skip
        panels.append(Panel(title, points, {"": 0.0}))
    return forest("arms", caption, panels, names, architectures, "difference to the baseline", len(keys))
