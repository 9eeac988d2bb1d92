"""Standard errors and 95 % intervals of `Measured` figures, their paired differences, and figures over several seeds.

All by the bootstrap over units. Intervals are *expanded* percentile intervals (Hesterberg 2015, The American Statistician
69(4)): the percentile interval at the level whose normal width equals a t interval's. The plain one is too narrow for few
units; BCa does no better there and breaks down where many units are equal, as rates of rare events are. The coverage of
all three is simulated in tests/unit/test_intervals.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from .records import Measured

CONFIDENCE = 0.95
MAX_UNITS = 500  # more are summed in runs of neighbors first: the same variance, a bounded cost
FEW_UNITS = 6  # resampling fewer can not reach 95 %: the extremes of the data are the widest interval there is
COUNTED = {"groups", "pools", "texts", "texts_too_short", "texts_without_words", "texts_without_repeat"}  # not chosen: outcomes
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
    interval = _interval([(totals, counts)], measured.value, resamples, seed)
    result = {**_where(measured), "value": measured.value, "n": int(round(float(measured.counts.sum()))),
              "units": int(used.sum()), **interval, "unit": measured.unit, "settings": measured.settings,
              "note": _notes(measured.note, interval["note"])}  # fmt: skip
    return _clip_share(result)


def paired_difference(a: Measured, b: Measured, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """a - b over the units that both have, each resample drawing the same units from both; keys as in `row`.

    `n` and `units` are the number of common units.
    """
    pair, common = _pair(a, b)
    value = _ratio(*pair[0]) - _ratio(*pair[1]) if common else None
    interval = _interval(pair, value, resamples, seed)
    chosen_a, chosen_b = ({key: m.settings[key] for key in m.settings.keys() - COUNTED} for m in (a, b))
    differ = None if chosen_a == chosen_b else "measured under different settings"
    missing = None if common else "no unit in common"
    return {**_where(a), "value": value, "n": common, "units": common, **interval, "unit": a.unit,
            "settings": a.settings, "note": _notes(a.note, b.note, missing, differ, interval["note"])}  # fmt: skip


def hierarchical(seeds: Sequence[Measured], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The mean over training seeds, bootstrapped over seeds and, within a seed, over units; keys as in `row`.

    Seeds without a value are left out. `n` is the number of seeds used; a single one gives no interval.
    """
    used = [one for one in seeds if one.value is not None]
    if not seeds:
        raise ValueError("no seed given")
    parts = [[(one.totals[one.counts > 0], one.counts[one.counts > 0])] for one in used]
    return _clip_share(_over_seeds(seeds, used, parts, [one.value for one in used], resamples, seed))


def hierarchical_difference(
    pairs: Sequence[tuple[Measured, Measured]], resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """The mean over seeds of a - b, one pair a seed, paired by unit within it; keys as in `row`."""
    if not pairs:
        raise ValueError("no pair of seeds given")
    paired = [(a, *_pair(a, b)) for a, b in pairs]
    used = [(a, pair) for a, pair, common in paired if common]
    values = [_ratio(*pair[0]) - _ratio(*pair[1]) for _, pair in used]
    return _over_seeds([a for a, _ in pairs], [a for a, _ in used], [pair for _, pair in used], values, resamples, seed)


def t_interval(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean of one value per seed with Student's 95 % interval: value, n, stderr, ci_low, ci_high, note. None are left out."""
    known = np.array([value for value in values if value is not None and math.isfinite(value)], dtype=np.float64)
    if len(known) < 2:
        value = float(known[0]) if len(known) else None
        note = "one seed: no interval" if len(known) else "no value"
        return {"value": value, "n": len(known), "stderr": None, "ci_low": None, "ci_high": None, "note": note}
    mean = float(known.mean())
    error = 0.0 if _constant(known) else float(known.std(ddof=1) / math.sqrt(len(known)))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1)) * error
    return {"value": mean, "n": len(known), "stderr": error, "ci_low": mean - half, "ci_high": mean + half, "note": None}


def confidence_level(units: int) -> float:
    """Level at which the percentile interval of `units` units is as wide as a t interval, for normal data."""
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, units - 1) * math.sqrt(units / (units - 1))
    return float(1 - 2 * stats.norm.sf(quantile))


Pairs = list[tuple[np.ndarray, np.ndarray]]  # one (totals, counts), or two of them whose difference is asked


def _interval(parts: Pairs, value: float | None, resamples: int, seed: int) -> dict[str, Any]:
    """stderr, ci_low, ci_high and a note, for the ratio of sums of one part or the difference of two."""
    units = len(parts[0][0])
    nothing = {"stderr": None, "ci_low": None, "ci_high": None, "note": None}
    if value is None:
        return nothing
    if units < 2:
        return nothing | {"note": "one unit: no interval"}
    if _constant(_per_unit(parts)):
        return {"stderr": 0.0, "ci_low": value, "ci_high": value, "note": "all units are equal"}
    arrays = _in_runs([array for part in parts for array in part])
    units = len(arrays[0])
    result = stats.bootstrap(
        arrays, _statistic, n_resamples=resamples, batch=max(1, BATCH // units), vectorized=True, paired=True,
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


def _statistic(*arrays: np.ndarray, axis: int = -1) -> np.ndarray:
    """Ratio of sums of (totals, counts), minus that of a second pair if there is one."""
    value = arrays[0].sum(axis=axis) / arrays[1].sum(axis=axis)
    return value - arrays[2].sum(axis=axis) / arrays[3].sum(axis=axis) if len(arrays) == 4 else value


def _ratio(totals: np.ndarray, counts: np.ndarray) -> float:
    return float(totals.sum() / counts.sum())


def _per_unit(parts: Pairs) -> np.ndarray:
    """What would have to be equal in all units for the statistic not to vary, [units, parts]."""
    return np.stack([totals / counts for totals, counts in parts], axis=1)


def _constant(values: np.ndarray) -> bool:
    """Whether all rows are equal, rounding aside."""
    spread = np.ptp(values, axis=0)
    return bool(np.all(spread <= 1e-12 * np.maximum(1e-300, np.abs(values).max(axis=0))))


def _in_runs(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """At most MAX_UNITS sums over runs of neighboring units of (nearly) equal number."""
    units = len(arrays[0])
    if units <= MAX_UNITS:
        return arrays
    first = np.arange(MAX_UNITS) * units // MAX_UNITS
    return [np.add.reduceat(array, first) for array in arrays]


def _pair(a: Measured, b: Measured) -> tuple[Pairs, int]:
    """(totals, counts) of both over their common units with something in both, in the order of `a`, and how many."""
    place = {unit: i for i, unit in enumerate(b.units)}
    both = [(i, place[unit]) for i, unit in enumerate(a.units) if unit in place]
    both = [(i, j) for i, j in both if a.counts[i] > 0 and b.counts[j] > 0]
    i, j = np.array(both, dtype=np.int64).reshape(-1, 2).T
    pair = [(a.totals[i], a.counts[i]), (b.totals[j], b.counts[j])]
    finite = all(np.isfinite(array).all() for part in pair for array in part)
    return pair, len(both) if finite and a.value is not None and b.value is not None else 0


def _over_seeds(every: Sequence[Measured], used: Sequence[Measured], parts: list[Pairs], values: list[float],
                resamples: int, seed: int) -> dict[str, Any]:
    """The nested bootstrap: seeds with replacement, then units of each seed drawn, anew for each time it is drawn."""
    result = {**_where(every[0]), "value": float(np.mean(values)) if values else None, "n": len(values),
              "units": sum(len(part[0][0]) for part in parts), "stderr": None, "ci_low": None, "ci_high": None,
              "unit": every[0].unit, "settings": (used or every)[0].settings}  # fmt: skip
    left_out = f"{len(every) - len(used)} seeds have no value" if len(used) < len(every) else None
    if len(values) < 2:
        return result | {"note": _notes(left_out, "one seed: no interval" if values else None)}
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(resamples, len(values)))
    means = np.stack([_resample(part, resamples * len(values), rng).reshape(resamples, -1) for part in parts])
    chosen = means[drawn, np.arange(resamples)[:, None], np.arange(len(values))].mean(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.percentile(chosen, [tail, 100 - tail]))
    if _constant(chosen[:, None]):
        low = high = result["value"]
    return result | {"stderr": 0.0 if low == high else float(chosen.std(ddof=1)), "ci_low": low, "ci_high": high,
                     "note": left_out}  # fmt: skip


def _resample(parts: Pairs, times: int, rng: np.random.Generator) -> np.ndarray:
    """The statistic of `times` resamples of the units, [times]."""
    if _constant(_per_unit(parts)):
        return np.full(times, _statistic(*(array for part in parts for array in part)))
    arrays = _in_runs([array for part in parts for array in part])
    units = len(arrays[0])
    size = max(1, BATCH // units)
    batches = []
    for start in range(0, times, size):
        places = rng.integers(units, size=(min(size, times - start), units))
        batches.append(_statistic(*(array[places] for array in arrays)))
    return np.concatenate(batches)


def _where(measured: Measured) -> dict[str, Any]:
    return {"metric": measured.metric, "decoding": measured.decoding, "split": measured.split}


def _notes(*notes: str | None) -> str | None:
    """The distinct notes that there are, joined."""
    return "; ".join(dict.fromkeys(note for note in notes if note)) or None
