"""Page's test of a trend over ordered levels, within training seeds, exact with ties and without."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

EXACT_LEVELS = 10  # above, the null distribution is taken as normal
DIGITS = 12  # values that agree to these are tied: equal figures differ by an ulp when sums are added in another order


def page_test(values: np.ndarray) -> tuple[float, str]:
    """Two-sided p of Page's L (Page 1963) for values that rise or fall with the level, and how it was computed.

    L is the sum over levels of the level's place times the sum of its ranks within the seeds. Under no effect of the
    level every order of a seed's values is equally likely, and seeds are independent: the null distribution is the
    convolution over seeds of the distribution over all orders. What a seed has in common at all levels does not enter.

    Args:
        values: [seeds, levels], finite, levels in their order; at least one seed and two levels.

    Returns:
        (p, method).
    """
    ranks = _ranks(values)
    places = np.arange(1, ranks.shape[1] + 1)
    # Twice the ranks, so that mean ranks of ties are whole; the distribution lies symmetrically around its middle.
    observed, twice_middle = int((ranks @ places).sum()), int(ranks.sum() * (len(places) + 1))
    if ranks.shape[1] > EXACT_LEVELS:
        spread = math.sqrt(sum(_variance(places) * _variance(row) * (len(places) - 1) for row in ranks))
        p = 2 * stats.norm.sf(abs(observed - twice_middle / 2) / spread) if spread > 0 else 1.0
        return min(1.0, float(p)), f"Page's L within seeds, normal approximation (over {EXACT_LEVELS} levels)"
    null = np.ones(1)
    for row in ranks:
        null = np.convolve(null, _null_distribution(tuple(sorted(row.tolist()))))
    far = np.abs(2 * np.arange(len(null)) - twice_middle) >= abs(2 * observed - twice_middle)
    return min(1.0, float(null[far].sum())), "Page's L within seeds, exact"


def _ranks(values: np.ndarray) -> np.ndarray:
    """Twice the ranks within each line of [seeds, levels], ties by mean rank, as integers."""
    scale = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-300)
    return np.rint(2 * stats.rankdata(np.round(values / scale, DIGITS), axis=1)).astype(np.int64)


def _variance(numbers: np.ndarray) -> float:
    return float(np.var(numbers, ddof=1))


@lru_cache(maxsize=64)
def _null_distribution(ranks: Sequence[int]) -> np.ndarray:
    """P(sum of place x rank = index) over all orders of `ranks`, by adding one place after the other to sets of ranks."""
    levels = len(ranks)
    size = sum(place * rank for place, rank in enumerate(ranks, 1)) + 1  # sorted: the largest sum there is
    counts = np.zeros((1 << levels, size))
    counts[0, 0] = 1.0
    for taken in range(1 << levels):
        place = taken.bit_count() + 1
        for i, rank in enumerate(ranks):
            if not taken >> i & 1:
                step = place * rank
                counts[taken | 1 << i, step:] += counts[taken, : size - step]
    return counts[-1] / math.factorial(levels)
