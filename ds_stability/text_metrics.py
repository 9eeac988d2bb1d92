"""Repetition, diversity and concentration of texts given as sequences of token ids (or of any integers).

Pure functions on numpy. Over several texts the answer is a `Mean`, a sum with its count, so that texts of different
length or from different ranks are weighed correctly: divide once, at the end. A mean over nothing is None, never 0.

Sources: distinct-n, Li et al. 2016 (arXiv 1510.03055); seq-rep-n, Welleck et al. 2020 (arXiv 1908.04319), section 6;
tail loops, Holtzman et al. 2020 (arXiv 1904.09751), section 4; Miller-Madow correction, Miller 1955.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

TAIL_LOOP_MIN_PHRASE = 2  # tokens
TAIL_LOOP_MIN_REPEATS = 3


@dataclass(frozen=True)
class Mean:
    """A sum and the number of things summed."""

    total: float
    count: int

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)


def ngrams(sequence: Sequence[int], n: int) -> np.ndarray:
    """The n-grams of one text in order, [max(0, T - n + 1), n]."""
    if n < 1:
        raise ValueError(f"n is {n}, must be at least 1")
    tokens = np.asarray(sequence, dtype=np.int64).reshape(-1)
    if len(tokens) < n:
        return np.empty((0, n), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(tokens, n)


def ngram_counts(sequences: Sequence[Sequence[int]], n: int) -> np.ndarray:
    """How often each distinct n-gram occurs over all texts, never across a border between two; [distinct]."""
    grams = np.concatenate([np.empty((0, n), dtype=np.int64), *(ngrams(sequence, n) for sequence in sequences)])
    return np.unique(grams, axis=0, return_counts=True)[1] if len(grams) else np.empty(0, dtype=np.int64)


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> Mean:
    """Distinct n-grams over all n-grams. Falls as texts are added: compare at equal token counts, never add two."""
    counts = ngram_counts(sequences, n)
    return Mean(float(len(counts)), int(counts.sum()))


def seq_rep_n(sequence: Sequence[int], n: int) -> float | None:
    """1 - distinct n-grams / n-grams of one text, in 0..1; None for a text shorter than n."""
    grams = ngrams(sequence, n)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams) if len(grams) else None


def mean_seq_rep_n(sequences: Sequence[Sequence[int]], n: int) -> Mean:
    """seq-rep-n averaged over the texts in which it is defined."""
    values = [value for value in (seq_rep_n(sequence, n) for sequence in sequences) if value is not None]
    return Mean(math.fsum(values), len(values))


def tail_loop(sequence: Sequence[int]) -> bool:
    """Whether the text ends in a phrase of at least 2 tokens that occurs at least 3 times in a row."""
    tokens = np.asarray(sequence, dtype=np.int64).reshape(-1)
    for length in range(TAIL_LOOP_MIN_PHRASE, len(tokens) // TAIL_LOOP_MIN_REPEATS + 1):
        tail = tokens[-length * TAIL_LOOP_MIN_REPEATS :].reshape(TAIL_LOOP_MIN_REPEATS, length)
        if (tail == tail[0]).all():
            return True
    return False


def tail_loop_rate(sequences: Sequence[Sequence[int]]) -> Mean:
    """Share of texts that end in a loop."""
    return Mean(float(sum(tail_loop(sequence) for sequence in sequences)), len(sequences))


def high_frequency_share(
    sequences: Sequence[Sequence[int]], ids: Collection[int], special_ids: Collection[int] = ()
) -> Mean:
    """Share of tokens that belong to the high-frequency set `ids`; special tokens count neither above nor below."""
    chosen = np.asarray(sorted(set(ids) - set(special_ids)), dtype=np.int64)
    special = np.asarray(sorted(set(special_ids)), dtype=np.int64)
    inside = counted = 0
    for sequence in sequences:
        tokens = np.asarray(sequence, dtype=np.int64).reshape(-1)
        tokens = tokens[~np.isin(tokens, special)]
        inside += int(np.isin(tokens, chosen).sum())
        counted += len(tokens)
    return Mean(float(inside), counted)


def shannon_entropy(counts: Sequence[int] | np.ndarray, *, miller_madow: bool = False) -> float | None:
    """Entropy in bits of a histogram, p log p taken as 0 at p = 0; None for an empty one.

    The plug-in estimate is biased low in small samples: `miller_madow` adds (types - 1) / (2 N ln 2).
    """
    counts = np.asarray(counts, dtype=np.float64).reshape(-1)
    if (counts < 0).any():
        raise ValueError("a count is negative")
    counts = counts[counts > 0]
    total = counts.sum()
    if total == 0:
        return None
    shares = counts / total
    correction = (len(counts) - 1) / (2.0 * total * math.log(2.0)) if miller_madow else 0.0
    # max: a single type gives -0.0
    return max(0.0, float(-(shares * np.log2(shares)).sum())) + float(correction)


def output_entropy(sequences: Sequence[Sequence[int]], n: int, *, miller_madow: bool = False) -> float | None:
    """Entropy in bits of the n-gram histogram of the texts, pooled; not the model's predictive entropy."""
    return shannon_entropy(ngram_counts(sequences, n), miller_madow=miller_madow)
