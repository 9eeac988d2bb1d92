"""How the report draws: style and colors, panels laid out in inches, a figure as PNG for papers and as SVG for the page.

The page shows a figure in one of two versions, after the window's width: WIDE, panels side by side, and NARROW, for a phone,
whose text is as large. A figure is a function of its `Layout`, and drawn once for each. On the page it follows the light or
dark look. Colors are Okabe and Ito's, distinct without color vision; markers differ too.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    "axes.titley": 1.0,  # else every drawing measures all labels to place the title: a sixth of its time
    "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7, "axes.formatter.useoffset": False, "grid.color": GRID,
}  # fmt: skip
TITLE_SIZE, TICK_SIZE = 8, 7.5  # points: 10.7 and 10 CSS pixels
NARROW_INCHES = 3.7  # 355 CSS pixels: what a phone of 390 leaves
LEGEND_ROW = 0.15  # inches
LABEL_CHARACTERS = 60  # of a name in a figure: names are data, of any length


class Picture(NamedTuple):
    """A figure and its name; `svg` and `narrow` are embedded, `png` saved beside the page.

    size, narrow_size: width and height in CSS pixels.
    """

    name: str
    caption: str
    svg: str
    png: bytes
    size: tuple[int, int]
    narrow: str
    narrow_size: tuple[int, int]


class Layout(NamedTuple):
    """How panels stand in a figure, in inches: `panel` is a panel's width and height with its title, axis labels and gaps.

    left: room for names before the first column. right: room behind each column.
    """

    columns: int
    panel: tuple[float, float]
    left: float = 0.52
    right: float = 0.18
    gap: float | None = None
    narrow: bool = False


def narrow(columns: int = 2, height: float = 1.85, left: float = 0.5) -> Layout:
    """Panels that fill a phone's width."""
    width = (NARROW_INCHES - left - 0.1 - (columns - 1) * 0.06) / columns
    return Layout(columns, (width, height), left, 0.1, None if columns > 1 else 0.0, True)


def series_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker by name; they start again after the seventh."""
    return {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}


def grid(count: int, layout: Layout, legend: Iterable[str] = ()) -> tuple[Any, list[Any]]:
    """(figure, its axes), with room for a legend of these labels; a solver of layouts takes longer than all the drawing."""
    columns = min(layout.columns, max(1, count))
    rows = math.ceil(max(1, count) / columns)
    between = layout.gap if layout.gap is not None else 0.48 + max(0.0, layout.right - 0.18)
    row_gap = 0.7 if layout.narrow else 0.56
    bottom, panel_height = 0.47, layout.panel[1] - row_gap
    width = layout.left + columns * layout.panel[0] + (columns - 1) * (between - 0.48 if layout.gap is None else layout.gap) + layout.right
    top = max(0.5 if layout.narrow else 0.6, 0.41 + LEGEND_ROW * legend_shape(legend, width)[1])
    panel = (width - layout.left - layout.right - (columns - 1) * between) / columns
    height = top + bottom + rows * panel_height + (rows - 1) * row_gap
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)  # not pyplot: no window, no global state
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(left=layout.left / width, right=1 - layout.right / width, top=1 - top / height, bottom=bottom / height,
                           wspace=between / panel, hspace=row_gap / panel_height)  # fmt: skip
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=TICK_SIZE, length=2.5)
        axis.grid(axis="y", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[:count]


def _one_line(text: str) -> str:
    return re.sub(r"[ \t\r\n]+", " ", text)  # a no-break space stays


def shortened(name: str, characters: int = LABEL_CHARACTERS) -> str:
    """`name` on one line without its middle, if it is longer than that."""
    line = _one_line(name)
    half = (characters - 1) // 2
    return line if len(line) <= characters else f"{line[:half]}\N{HORIZONTAL ELLIPSIS}{line[-half:]}"


def set_title(axis: Any, title: str) -> None:
    """In two lines at most, which may begin above the labels of the y axis."""
    width = axis.get_position().width * axis.figure.get_size_inches()[0]
    lines = textwrap.wrap(_one_line(title), int(16 * (width + 0.3)), max_lines=2, placeholder="\N{HORIZONTAL ELLIPSIS}")
    axis.set_title("\n".join(lines), fontsize=TITLE_SIZE, loc="left", x=-0.3 / width if width < 1.5 else 0.0, pad=4, linespacing=1.05)


def legend_shape(labels: Iterable[str], width: float) -> tuple[int, int]:
    """(columns, rows) of a legend in a figure of `width` inches."""
    lengths = [len(shortened(label)) for label in labels]
    if not lengths:
        return 1, 0
    columns = min(8, len(lengths), max(1, int(width / (0.45 + 0.075 * max(lengths)))))
    return columns, math.ceil(len(lengths) / columns)


def legend(figure: Any, handles: Mapping[str, Any]) -> None:
    if handles:
        columns, _ = legend_shape(handles, figure.get_size_inches()[0])
        figure.legend(list(handles.values()), [shortened(label) for label in handles], loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=columns,
                      fontsize=TITLE_SIZE, frameon=False, borderaxespad=0.3, handlelength=1.8, columnspacing=1.4, labelspacing=0.3)  # fmt: skip


def picture(name: str, caption: str, draw: Callable[[Layout], Any], wide: Layout, slim: Layout) -> Picture:
    """The figure that `draw` makes, in both layouts."""
    with matplotlib.rc_context(STYLE):
        figure, small = draw(wide), draw(slim)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
        return Picture(name, caption, _svg(figure), image.getvalue(), _pixels(figure), _svg(small), _pixels(small))


def _svg(figure: Any) -> str:
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return themed(drawing.getvalue())


def _pixels(figure: Any) -> tuple[int, int]:
    width, height = figure.get_size_inches()
    return round(width * 96), round(height * 96)


def open_range(axis: Any) -> None:
    """A constant figure gets a range around it, not one of rounding errors."""
    low, high = axis.get_ylim()
    if high - low < 1e-6 * max(1.0, abs(low), abs(high)) * 10 or not np.isfinite(high - low):
        axis.set_ylim(low - 0.05 * max(1.0, abs(low)), high + 0.05 * max(1.0, abs(high)))


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
