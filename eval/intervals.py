"""A cell's figure as a row of its table: standard error and 95 % interval over the units of one model (spread.py)."""

from typing import Any

import numpy as np

from .records import Measured
from .spread import (
    CLOPPER_PEARSON,
    TOO_LARGE,
    half_width,
    in_runs,
    interval_error,
    pseudo_values,
    share_bounds,
    spread_of,
    standard_error,
    too_large,
)

NOTHING = {"stderr": None, "ci_low": None, "ci_high": None}


def row(measured: Measured) -> dict[str, Any]:
    """A figure with its standard error and 95 % interval, as a row of a results table.

    Returns:
        metric, decoding, split, value, n (what was counted), units (that count), stderr, ci_low, ci_high, unit, settings, note.
        stderr and the interval are None, with the reason in the note, without a value, with a single unit, and where all units
        are equal; but a share always has an interval of two units or more, and none has width 0.
    """
    used = (measured.counts > 0) | (measured.totals != 0)  # the others say nothing
    value = _clipped(measured.value, measured.unit)
    interval, why = _interval(measured.totals[used], measured.counts[used], value, measured.unit == "share")
    if value is None and not measured.note:
        why = "a unit is not finite" if used.any() else "nothing was counted"
    return {"metric": measured.metric, "decoding": measured.decoding, "split": measured.split, "value": value,
            "n": round(float(measured.counts.sum())) if measured.n is None else measured.n, "units": int(used.sum()), **interval,
            "unit": measured.unit, "settings": measured.settings, "note": _notes(measured.note, why)}  # fmt: skip


def _interval(totals: np.ndarray, counts: np.ndarray, value: float | None, share: bool) -> tuple[dict[str, Any], str | None]:
    """stderr, ci_low, ci_high; and why there is no interval, or which."""
    if value is None:
        return NOTHING, None
    if len(totals) < 2:
        return NOTHING, "one unit: no interval"
    with np.errstate(over="ignore", invalid="ignore"):
        y = pseudo_values(in_runs(totals), in_runs(counts))
    if too_large(y):
        return NOTHING, TOO_LARGE
    spread = spread_of(y.mean(keepdims=True), y[None])
    half, number = float(half_width(spread)), len(totals)
    if half == 0.0 and not share:
        return NOTHING, f"all {number} units are equal: no interval"
    low, high = share_bounds(value, half, number) if share else (value - half, value + half)
    error = float(standard_error(spread)) if half > 0 else interval_error(low, high)
    note = None if half > 0 else f"all {number} units are equal: {CLOPPER_PEARSON}"
    return {"stderr": error, "ci_low": float(low), "ci_high": float(high)}, note


def _clipped(value: float | None, unit: str) -> float | None:
    """A share lies in 0..1, whatever rounding and pseudo-values of a jackknife say."""
    return value if value is None or unit != "share" else min(1.0, max(0.0, value))


def _notes(*notes: str | None) -> str | None:
    """The distinct notes that there are, joined."""
    return "; ".join(dict.fromkeys(note for note in notes if note)) or None
