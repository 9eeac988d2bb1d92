"""How far a mean over training seeds and units lies from what more seeds and units would give: arrays in, bounds out.

The seeds of a sweep share their units (prompts, documents), so that seeds and units are crossed: y_su = mean + seed_s +
unit_u + rest_su. The variance of the mean over S seeds and U units is estimated from the two-way table without replication
(Searle, Casella and McCulloch 1992, *Variance Components*, chapter 4), and the interval is Banerjee's for a sum of variances
with unlike degrees of freedom (Banerjee 1960, Sankhya 22, 357): h^2 = sum of t_f^2 V_f. It holds its 95 % whatever share of the
variance lies between seeds; Satterthwaite's single degree of freedom does not with two or three seeds (docs/evaluation.md).

Every function takes any number of figures at once in the leading axes, which is how benchmarks/interval_coverage.py simulates it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import special

ALPHA = 0.05
MAX_UNITS = 500  # more are summed in runs of neighbors first: the same variance, a bounded cost
ROUNDING = 1e-9  # of the figures, which come from numbers of 24 bits and fewer: a smaller spread is none
LARGEST = 1e90  # of a figure with an interval: squares of larger ones are no numbers
TOO_LARGE = "too large to square: no interval"
CLOPPER_PEARSON = "Clopper-Pearson interval, as of independent answers"


class Spread(NamedTuple):
    """Parts of the variance of a mean over `seeds` x `units`, each [...]; 0 where there is one seed, or one unit.

    Attributes:
        by_seed: from the seeds' values, seeds - 1 degrees of freedom; holds what is left over between units too.
        by_unit: from the units' means over seeds, units - 1 degrees of freedom; holds what is left over between seeds too.
        rest: what is neither the seed's nor the unit's; 0 with one seed.
    """

    by_seed: np.ndarray
    by_unit: np.ndarray
    rest: np.ndarray
    seeds: int
    units: int


def in_runs(array: np.ndarray) -> np.ndarray:
    """[..., U] as sums of at most MAX_UNITS runs of neighbors of (nearly) equal number."""
    units = array.shape[-1]
    return array if units <= MAX_UNITS else np.add.reduceat(array, np.arange(MAX_UNITS) * units // MAX_UNITS, axis=-1)


def pseudo_values(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What each unit says of the ratio of sums r = T / C, [..., U], with mean r: the delete-one jackknife's pseudo-values.

    Plain linearization takes U / C for (U - 1) / (C - count) and falls short where few units hold most of the count. A count
    of 0 over all units is not allowed; a unit that holds all of it says r, as the others do.
    """
    whole, units = counts.sum(axis=-1, keepdims=True), totals.shape[-1]
    ratio, left = totals.sum(axis=-1, keepdims=True) / whole, whole - counts
    apart = (units - 1) * np.divide(totals - ratio * counts, left, out=np.zeros(totals.shape), where=left > 0)
    return ratio + apart - apart.mean(axis=-1, keepdims=True)


def weighted(totals: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """By seed and unit, [..., S, U], the weighted sum over cells of what each unit says.

    Args:
        totals, counts: [..., S, cells, U].
        weights: [S, cells] or [cells].
    """
    return (weights[..., None] * pseudo_values(totals, counts)).sum(axis=-2)


def spread_of(values: np.ndarray, y: np.ndarray | None = None, scale: np.ndarray | float = 0.0) -> Spread:
    """The parts of the variance of the mean of `values`.

    Args:
        values: of each seed, [..., S].
        y: of each seed and unit, [..., S, U]; None where only the seeds are known.
        scale: [...], the size of the figures that `values` are differences of: spreads of ROUNDING times it are 0.
    """
    seeds, units = values.shape[-1], 1 if y is None else y.shape[-1]
    zero = np.zeros(values.shape[:-1])
    by_seed = values.var(axis=-1, ddof=1) / seeds if seeds > 1 else zero
    by_unit = rest = zero
    if y is not None and units > 1:
        means = y.mean(axis=-2)
        by_unit = means.var(axis=-1, ddof=1) / units
        if seeds > 1:
            left = y - means[..., None, :]
            left -= left.mean(axis=-1, keepdims=True)
            rest = (left * left).sum(axis=(-1, -2)) / ((seeds - 1) * (units - 1) * seeds * units)
    floor = (ROUNDING * np.maximum(scale, np.abs(values).max(axis=-1))) ** 2
    by_seed, by_unit, rest = (np.where(part > floor, part, 0.0) for part in (by_seed, by_unit, rest))
    return Spread(by_seed, by_unit, rest, seeds, units)


def standard_error(spread: Spread) -> np.ndarray:
    """[...]: the unbiased sum of the parts, but never below one of them alone."""
    parts = np.maximum(np.maximum(spread.by_seed, spread.by_unit), spread.rest)
    return np.sqrt(np.maximum(spread.by_seed + spread.by_unit - spread.rest, parts))


def half_width(spread: Spread, alpha: float = ALPHA) -> np.ndarray:
    """Half the width of the 1 - alpha interval, [...]; 0 where nothing varies."""
    seeds, units = spread.seeds - 1, spread.units - 1
    over_seeds, over_units, over_both = (t_quantile(freedom, alpha) ** 2 for freedom in (seeds, units, seeds * units))
    both = over_seeds * spread.by_seed + over_units * np.maximum(0.0, spread.by_unit - spread.rest)
    return np.sqrt(np.maximum(np.maximum(both, over_units * spread.by_unit), over_both * spread.rest))


def recovered(value: np.ndarray, parts: Iterable[tuple[float, np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a weighted sum from those of its parts, (weight, value, low, high) each, taken as independent: (low, high).

    MOVER, the method of variance estimates recovery (Newcombe 1998, Statistics in Medicine 17, 873; Zou and Donner 2008,
    Statistics in Medicine 27, 1693): the distances from each part to its own bounds, added in quadrature.
    """
    below, above = 0.0, 0.0
    for weight, center, low, high in parts:
        sides = (weight * (low - center), weight * (high - center)) if weight > 0 else (weight * (high - center), weight * (low - center))
        below, above = below + sides[0] ** 2, above + sides[1] ** 2
    return value - np.sqrt(below), value + np.sqrt(above)


def interval_error(low: float, high: float) -> float:
    """The standard error of a normal estimate with this interval: what is stated where nothing varies."""
    return float((high - low) / (-2 * special.ndtri(ALPHA / 2)))


def too_large(*arrays: np.ndarray | float) -> bool:
    return not all(np.abs(array).max() < LARGEST for array in arrays)


def t_quantile(freedom: int, alpha: float = ALPHA) -> float:
    """Two-sided quantile of Student's t; 0 without a degree of freedom, where there is no part that it could widen."""
    return float(-special.stdtrit(freedom, alpha / 2)) if freedom > 0 else 0.0


def share_bounds(share: np.ndarray, half: np.ndarray, number: int, alpha: float = ALPHA) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a share from its half-width, inside 0..1 and never of width 0: (low, high), each [...].

    Korn and Graubard 1998, Survey Methodology 24, 193: Clopper and Pearson's interval (1934) of a sample of as many
    independent yes-or-no answers as would be as uncertain. Where nothing varies: of `number` answers.
    """
    share = np.clip(share, 0.0, 1.0)
    spread = share * (1.0 - share)
    known = (half > 0) & (spread > 0)
    size = np.where(known, spread * (-special.ndtri(alpha / 2) / np.where(known, half, 1.0)) ** 2, number)
    hits = share * size
    with np.errstate(all="ignore"):  # a 0 of a parameter where the bound is 0 or 1 anyway
        low = np.where(hits > 0, special.betaincinv(np.maximum(hits, 1e-300), size - hits + 1, alpha / 2), 0.0)
        high = np.where(hits < size, special.betaincinv(hits + 1, np.maximum(size - hits, 1e-300), 1 - alpha / 2), 1.0)
    # Pseudo-values of a jackknife can vary where their mean is 0 or 1.
    low, high = (np.where((half > 0) & ~known, bound, exact) for bound, exact in
                 ((np.minimum(low, share - half), low), (np.maximum(high, share + half), high)))  # fmt: skip
    return np.clip(np.minimum(low, share), 0.0, 1.0), np.clip(np.maximum(high, share), 0.0, 1.0)
