"""Standard errors and 95 % intervals of `Measured` figures.

The bootstrap over units; over seeds and units together, and for
paired differences, it is in aggregate.py. Intervals are *expanded* percentile intervals (Hesterberg 2015, The American Statistician
69(4)): the percentile interval at the level whose normal width equals a t interval's. The plain one is too narrow for few
units; BCa does no better there and breaks down where many units are equal, as rates of rare events are. The coverage of
all three is simulated in tests/unit/test_intervals.py.
"""

import math
from typing import Any

import numpy as np
from scipy import stats

from .records import Measured

CONFIDENCE = 0.95
MAX_UNITS = 500  # more are summed in runs of neighbors first: the same variance, a bounded cost
FEW_UNITS = 6  # resampling fewer can not reach 95 %: the extremes of the data are the widest interval there is
BATCH = 2_000_000  # units drawn at once: bounds memory


def row(measured: Measured, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """A figure with its standard error and 95 % interval, as a row of a results table.

    Returns:
        metric, decoding, split, value, n (what was counted), units (that were resampled), stderr, ci_low, ci_high, unit,
        settings, note. stderr and the interval are None without a value or with a single unit; where all units are equal
        the interval has width 0.
    """
    used = measured.counts > 0
    totals, counts = measured.totals[used], measured.counts[used]
    interval = _interval(totals, counts, measured.value, resamples, seed)
    result = {"metric": measured.metric, "decoding": measured.decoding, "split": measured.split, "value": measured.value, "n": round(float(measured.counts.sum())) if measured.n is None else measured.n,
              "units": int(used.sum()), **interval, "unit": measured.unit, "settings": measured.settings,
              "note": _notes(measured.note, interval["note"])}  # fmt: skip
    return _clip_share(result)


def confidence_level(units: int) -> float:
    """Level at which the percentile interval of `units` units is as wide as a t interval, for normal data."""
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, units - 1) * math.sqrt(units / (units - 1))
    return float(1 - 2 * stats.norm.sf(quantile))


def _interval(totals: np.ndarray, counts: np.ndarray, value: float | None, resamples: int, seed: int) -> dict[str, Any]:
    """stderr, ci_low, ci_high and a note, for the ratio of sums."""
    units = len(totals)
    nothing = {"stderr": None, "ci_low": None, "ci_high": None, "note": None}
    if value is None:
        return nothing
    if units < 2:
        return nothing | {"note": "one unit: no interval"}
    if _constant(totals / counts):
        return {"stderr": 0.0, "ci_low": value, "ci_high": value, "note": "all units are equal"}
    totals, counts = _in_runs(totals), _in_runs(counts)
    units = len(totals)
    result = stats.bootstrap(
        (totals, counts), _ratio, n_resamples=resamples, batch=max(1, BATCH // units), vectorized=True, paired=True,
        confidence_level=confidence_level(units), method="percentile", random_state=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = (float(bound) for bound in result.confidence_interval)
    # The spread of resamples underestimates that of samples by (units - 1) / units in the variance.
    error = float(result.standard_error) * math.sqrt(units / (units - 1))
    note = f"{units} units: the interval is narrower than 95 %" if units < FEW_UNITS else None
    return {"stderr": error, "ci_low": low, "ci_high": high, "note": note}


def _clip_share(result: dict[str, Any]) -> dict[str, Any]:
    """A share lies in 0..1: ends of intervals over pseudo-values of the jackknife need not, nor a value after rounding."""
    if result["unit"] == "share":
        for key in ("value", "ci_low", "ci_high"):
            result[key] = None if result[key] is None else min(1.0, max(0.0, result[key]))
    return result


def _ratio(totals: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    return totals.sum(axis=axis) / counts.sum(axis=axis)


def _constant(values: np.ndarray) -> bool:
    """Whether all are equal, rounding aside."""
    return bool(np.ptp(values) <= 1e-12 * max(1e-300, np.abs(values).max()))


def _in_runs(array: np.ndarray) -> np.ndarray:
    """At most MAX_UNITS sums over runs of neighboring units of (nearly) equal number."""
    units = len(array)
    return array if units <= MAX_UNITS else np.add.reduceat(array, np.arange(MAX_UNITS) * units // MAX_UNITS)


def _notes(*notes: str | None) -> str | None:
    """The distinct notes that there are, joined."""
    return "; ".join(dict.fromkeys(note for note in notes if note)) or None
