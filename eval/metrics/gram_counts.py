"""Counts of n-grams within texts and within groups of equal token count, part by part: memory does not grow with the texts.

n-grams are compared within one text or one group only, so that a part of the stream is as good as all of it.
"""

from dataclasses import dataclass

import numpy as np

from .layout import Layout
from .ngrams import distinct_per_owner, gram_numbers

MAX_N = 4


@dataclass(frozen=True)
class GramCounts:
    """For n = 1..4 in row n - 1.

    Attributes:
        text_distinct, text_total: distinct n-grams, and n-grams, of each text, int32 [4, T].
        group_distinct, group_total: likewise of each group of `layout.group_tokens` tokens, read in block order, int32 [4, G].
        first_texts: the text in which each group starts, [G].
    """

    text_distinct: np.ndarray
    text_total: np.ndarray
    group_distinct: np.ndarray
    group_total: np.ndarray
    first_texts: np.ndarray


def count_grams(layout: Layout) -> GramCounts:
    """Parts hold whole groups, and the whole of each text they touch; a text in two parts is counted twice, the same."""
    size, order = layout.group_tokens, layout.block_order
    ends = np.cumsum(layout.lengths[order])
    groups = int(ends[-1]) // size if len(ends) else 0
    text_counts, group_counts = (np.zeros((2, MAX_N, count), dtype=np.int32) for count in (len(order), groups))
    step = max(1, layout.part_tokens // size)
    for first in range(0, max(1, groups), step):
        last = min(first + step, groups)
        begin = int(np.searchsorted(ends, first * size, side="right")) if first else 0
        # The first text that starts at the border or behind it.
        end = len(order) if last == groups else int(np.searchsorted(ends, last * size, side="left")) + 1
        texts = order[begin:end]
        part = layout.corpus_of(texts)
        # The part is a piece of the stream as it stands.
        start = int(ends[begin - 1]) if begin else 0
        group = (start + np.arange(len(part.tokens))) // size - first
        for n, (positions, numbers) in enumerate(gram_numbers(part, MAX_N), start=1):
            text_counts[:, n - 1, texts] = distinct_per_owner(part.text_of[positions], numbers, len(texts))
            owner = group[positions]
            inside = (owner >= 0) & (owner < last - first) & (owner == group[positions + n - 1])
            group_counts[:, n - 1, first:last] = distinct_per_owner(owner[inside], numbers[inside], last - first)
    first_texts = order[np.searchsorted(ends, np.arange(groups) * size, side="right")]
    return GramCounts(*text_counts, *group_counts, first_texts)
