"""Figures of the results: small multiples, one quantity a panel, drawn from the rows of a results file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#666666"  # Okabe and Ito: distinct without color vision
COLUMNS, PANEL_INCHES = 4, (2.75, 2.3)


class Panel(NamedTuple):
    """One quantity: key of the rows, label of the axis, key of its error, a reference line (value, its name)."""

    key: str
    label: str
    error: str | None = None
    reference: tuple[float, str] | None = None
    from_zero: bool = False


DOSE_PANELS = (
    Panel("ratio", "variance ratio, settled", "ratio_error"),
    Panel("cross_entropy", "held-out cross-entropy (nats)"),
    Panel("entropy", "predictive entropy (nats)", from_zero=True),
    Panel("top1_mass", "top-1 mass"),
    Panel("sample/distinct_2", "distinct-2 of samples"),
    Panel("sample/seq_rep_4", "seq-rep-4 of samples", from_zero=True),
    Panel("sample/high_frequency_share", "high-frequency share of samples", reference=(0.5, "share in the training text")),
    Panel("loss_deviation", "sd of the loss, last 50 steps (nats)", from_zero=True),
)


def dose_response(rows: Sequence[Mapping[str, Any]], path: Path, title: str, panels: Sequence[Panel] = DOSE_PANELS,
                  baseline: Mapping[str, Any] | None = None) -> None:
    """Write a PNG: each panel's quantity against the level.

    Args:
        rows: one dict per level, with "level" and the panels' keys; None leaves a gap.
        baseline: figures of an untouched model, drawn as a horizontal line.
    """
    figure, axes = _grid(len(panels))
    known: dict[str, Any] = {}  # name -> line, for one legend
    for axis, panel in zip(axes, panels, strict=False):
        known |= _dose_panel(axis, panel, rows, baseline)
    # Axis labels at the lowest panel of each column only: all share the axis.
    for index in range(len(panels)):
        if index + COLUMNS >= len(panels):
            axes[index].set_xlabel("level", fontsize=9)
    if known:
        figure.legend(list(known.values()), list(known), loc="outside upper right", ncols=len(known), fontsize=8, frameon=False)
    _finish(figure, path, title)


def _dose_panel(axis, panel: Panel, rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """Draw one panel; the reference lines in it, by name."""
    points = [(row["level"], row[panel.key], row.get(panel.error) if panel.error else None)
              for row in rows if row.get(panel.key) is not None]  # fmt: skip
    levels, values = [p[0] for p in points], [p[1] for p in points]
    lines = {}
    if panel.key == "ratio":
        (lines["asked: 1 - level"],) = axis.plot([0, 1], [1, 0], color=GRAY, linewidth=1, linestyle="--")
    errors = [p[2] or 0.0 for p in points] if panel.error else None
    axis.errorbar(levels, values, yerr=errors, color=BLUE, marker="o", markersize=4.5, capsize=2,
                  linewidth=1.2 if lines else 1.6, linestyle="none" if lines else "-")  # fmt: skip
    if panel.reference:
        value, name = panel.reference
        lines[name] = axis.axhline(value, color=GRAY, linewidth=1.2, linestyle=":")
    if baseline is not None and baseline.get(panel.key) is not None:
        lines["untouched model"] = axis.axhline(baseline[panel.key], color=ORANGE, linewidth=1.2, linestyle="-.")
    axis.set_title(panel.label, fontsize=9, loc="left")
    axis.set_xlim(-0.04, 1.04)
    if panel.from_zero:
        axis.set_ylim(bottom=0, top=axis.get_ylim()[1])
    return lines


def _grid(count: int, columns: int = COLUMNS, size: tuple[float, float] = PANEL_INCHES):
    """(figure, flat list of axes) without frames at the top and right; spare axes are removed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(columns * size[0], lines * size[1] + 0.4), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no window, no global state
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[:count]


def _finish(figure, path: Path, title: str) -> None:
    import io

    from ds_stability.run_dir import write_atomic

    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=160, metadata={"Software": None})
    write_atomic(path, image.getvalue())
