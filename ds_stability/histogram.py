"""Fixed-bin histogram of surprisal, and the variance ratio that a gain would give on it.

A bin keeps (count, sum s, sum s^2). The ratio at any gain is then computed without another pass over tokens: a bin
stands for two equal masses at its mean +- its standard deviation, which matches its first two moments (and, for
symmetric bins, the third). Where sigma spans several bins this is within 1e-3 of the exact ratio for every gain up to 8
(tests/unit/test_histogram.py); on narrower surprisal it can be off by .01, and bin centers alone by 10-25 %.

Everything here is numpy, fp64 and pure: the same on every rank.
"""

import numpy as np

NUM_BINS = 64
MAX_EDGE = 24.0
#: Inner bin edges in nats, shape [NUM_BINS - 1]; finer near 0, where a trained model has most of its tokens.
EDGES = MAX_EDGE * (np.arange(1, NUM_BINS) / (NUM_BINS - 1)) ** 1.5
#: Points of the first scan for the gain, points of a later scan of the interval that was found, and how many of these there are.
GRID, FINER, REFINEMENTS = 129, 33, 5
Z_MAX = 3.0  # the law clips the standardized surprisal to [-Z_MAX, Z_MAX]


def histogram(surprisal: np.ndarray) -> np.ndarray:
    """Histogram of `surprisal` [N], nats, as fp64 [NUM_BINS, 3] of (count, sum, sum of squares)."""
    surprisal = np.asarray(surprisal, dtype=np.float64)
    bins = np.searchsorted(EDGES, surprisal, side="right")
    columns = (np.ones_like(surprisal), surprisal, surprisal**2)
    return np.stack([np.bincount(bins, weights=column, minlength=NUM_BINS) for column in columns], axis=1)


def quadrature(bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [P] (nats) and masses [P] that stand for the histogram `bins` [NUM_BINS, 3]; empty bins are left out."""
    count, total, squares = bins[bins[:, 0] > 0].T
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return np.concatenate([mean - deviation, mean + deviation]), np.concatenate([count, count]) / 2


def token_weight(surprisal: np.ndarray, gain: float, mu: float, sigma: float) -> np.ndarray:
    """w = exp(-gain * clip((s - mu) / sigma, -3, 3)), the law of design section 3."""
    return np.exp(-gain * np.clip((surprisal - mu) / sigma, -Z_MAX, Z_MAX))


def variance_ratio(points: np.ndarray, masses: np.ndarray, gain: float, mu: float, sigma: float) -> float:
    """Var_w(s) / Var(s) under the weights of `gain`, from quadrature `points` and `masses`, both [P]."""
    plain = _variance(points, masses)
    if plain <= 0.0:
        return 1.0
    return _variance(points, masses * token_weight(points, gain, mu, sigma)) / plain


def _variance_ratios(points: np.ndarray, masses: np.ndarray, gains: np.ndarray, mu: float, sigma: float) -> np.ndarray:
    """`variance_ratio` for several gains [G] at once; the points spread."""
    centered = points - np.average(points, weights=masses)
    weights = masses * np.exp(-gains[:, None] * np.clip((points - mu) / sigma, -Z_MAX, Z_MAX))  # [G, P]
    sums = weights @ np.stack([np.ones_like(centered), centered, centered**2], axis=1)  # [G, 3]
    means, squares = sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0]
    return (squares - means**2) / np.average(centered**2, weights=masses)


def mean_weight(points: np.ndarray, masses: np.ndarray, gain: float, mu: float, sigma: float) -> float:
    """E[w] under `gain`: what the loss divides its weights by, predicted before the step."""
    return float(np.average(token_weight(points, gain, mu, sigma), weights=masses))


def solve_gain(
    points: np.ndarray, masses: np.ndarray, target: float, gain_max: float, mu: float, sigma: float
) -> tuple[float, bool]:
    """Gain whose variance ratio is `target`, and whether the target is out of reach (saturated).

    The ratio is not monotone in the gain: with left-skewed surprisal it rises first and crosses the target twice. The
    scan starts at `gain_max` and takes the first crossing from there, which is on the falling branch.

    Returns (gain in [0, gain_max], saturated).
    """
    if target >= 1.0:
        return 0.0, False
    if _variance(points, masses) <= 0.0:
        return gain_max, True
    low, high = 0.0, gain_max
    for number in range(1 + REFINEMENTS):  # 8 / 128 / 32^5 is far below what the ratio can resolve
        grid = np.linspace(low, high, FINER if number else GRID)
        reached = _variance_ratios(points, masses, grid, mu, sigma) <= target
        falling = np.flatnonzero(reached[1:] & ~reached[:-1])
        if falling.size == 0:
            # In the first scan: out of reach. Later: rounding, the crossing is at this resolution.
            return (float(high), False) if number else (gain_max, True)
        low, high = grid[falling[-1]], grid[falling[-1] + 1]
    return float(high), False


def _variance(points: np.ndarray, masses: np.ndarray) -> float:
    mean = np.average(points, weights=masses)
    return float(np.average((points - mean) ** 2, weights=masses))
