"""One draw from a truncated distribution on a CPU, without sorting the vocabulary.

What top-k and top-p can keep is found by a bound that costs one pass, and only that is sorted, summed and drawn from: a few
hundred tokens of fifty thousand. The same tokens as decoding._truncated and decoding._draw, which go over everything: sums of
what is kept run in the same order. The one sum in another order is the total of top-p; a border that lies within 1e-13 of
top_p could fall on the other side.

Shape suffixes: V vocabulary, C candidates, in the order of the vocabulary.
"""

import numpy as np
import torch

BLOCKS = 1024  # groups of tokens whose largest bound the k-th largest of all
FACTORS = (64, 8)  # bounds of the nucleus that are tried before the one that holds in any case
MARGIN = 1e-9  # relative; bounds are this much lower than they need be, far above any rounding


def draw_truncated(shifted_V: np.ndarray, exp_V: np.ndarray, temperature: float, top_k: int, top_p: float, uniform: float) -> int:
    """The token at `uniform` in [0, 1), after temperature, top-k and top-p, in this order.

    Args:
        shifted_V: logits less their largest, fp64. exp_V: their exponentials.
        top_k: 0 keeps all; ties with the last are kept, as with top_p.
    """
    if 0 < top_k < len(shifted_V):
        tokens_C = np.flatnonzero(shifted_V >= _below_kth_largest(shifted_V, top_k))
        scores_C = shifted_V[tokens_C] / temperature
        kept_C = scores_C >= np.partition(scores_C, len(scores_C) - top_k)[len(scores_C) - top_k]
        tokens_C, weights_C = tokens_C[kept_C], _exp(scores_C[kept_C])
        total = weights_C.sum()
    else:
        weights_V = exp_V if temperature == 1 else _exp(shifted_V / temperature)
        total = weights_V.sum()
        tokens_C = _heavy_enough(weights_V, total, top_p)
        weights_C = weights_V[tokens_C]
    if top_p < 1:
        kept_C = weights_C >= _least_of_nucleus(weights_C, top_p * total)
        tokens_C, weights_C = tokens_C[kept_C], weights_C[kept_C]
    cumulative_C = weights_C.cumsum()
    last = cumulative_C[-1]
    # As decoding._draw: never a token of weight 0, nor beyond the last where the product rounds to the sum.
    place = min(np.searchsorted(cumulative_C, uniform * last, side="right"), np.searchsorted(cumulative_C, last))
    return int(tokens_C[place])


def _heavy_enough(weights_V: np.ndarray, total: float, top_p: float) -> np.ndarray:
    """Tokens among which the nucleus is complete: the heaviest ones, few of them."""
    # Lighter tokens than `least` hold less than 1 - top_p together, so that those above it will do; often far fewer do.
    least = (1 - top_p) * total / len(weights_V) * (1 - MARGIN)
    for factor in FACTORS:
        tokens_C = np.flatnonzero(weights_V >= factor * least)
        if weights_V[tokens_C].sum() > (top_p + (1 - top_p) * MARGIN) * total:
            return tokens_C
    return np.flatnonzero(weights_V >= least)


def _exp(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).exp().numpy()  # numpy's own differs in the last bit


def _below_kth_largest(values_V: np.ndarray, k: int) -> float:
    """A number just below the k-th largest, or below k of the `BLOCKS` groups' largest, which is no larger."""
    width = len(values_V) // BLOCKS
    # Token t is in group t modulo BLOCKS, so that the largest are taken along contiguous memory.
    largest = values_V if k > BLOCKS // 2 or width < 2 else values_V[: width * BLOCKS].reshape(width, BLOCKS).max(axis=0)
    bound = np.partition(largest, len(largest) - k)[len(largest) - k]
    return bound - MARGIN * abs(bound)


def _least_of_nucleus(weights_C: np.ndarray, mass: float) -> float:
    """The weight of the last of the fewest heaviest that reach `mass`."""
    ordered_C = np.sort(weights_C)[::-1]
    before_C = ordered_C.cumsum() - ordered_C
    return ordered_C[max(1, np.count_nonzero(before_C < mass)) - 1]
