"""n-grams of many texts at once, as numbers: nothing here crosses the border between two texts.

`np.unique(axis=0)` sorts rows as bytes and is slow, so an n-gram becomes one int64: the number of its first n - 1 tokens
and its last token, packed. Shapes: M tokens over all texts, T texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np


@dataclass(frozen=True)
class Corpus:
    """Texts end to end.

    Attributes:
        tokens: int64 [M].
        lengths: tokens of each text, int64 [T].
        runs: number of the run of each token, int64 [M]; a run ends with its text and where a token was left out.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    runs: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], left_out: Sequence[int] = ()) -> "Corpus":
        """`texts` without the ids in `left_out`; no n-gram spans the place of such an id."""
        lengths = np.fromiter((len(text) for text in texts), dtype=np.int64, count=len(texts))
        return cls.of_stream(np.fromiter(chain.from_iterable(texts), dtype=np.int64, count=int(lengths.sum())), lengths, left_out)

    @classmethod
    def of_stream(cls, tokens: np.ndarray, lengths: np.ndarray, left_out: Sequence[int] = ()) -> "Corpus":
        """The same, of texts that lie end to end: ids int64 [M], and how many are each text's [T]."""
        runs = np.repeat(np.arange(len(lengths)), lengths)
        dropped = np.isin(tokens, np.asarray(left_out, dtype=np.int64)) if len(left_out) else np.zeros(0, dtype=bool)
        if dropped.any():
            lengths = lengths - np.bincount(runs[dropped], minlength=len(lengths))
            runs = (runs + np.cumsum(dropped))[~dropped]
            tokens = tokens[~dropped]
        return cls(tokens, lengths, runs)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each text starts, int64 [T]."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def text_of(self) -> np.ndarray:
        """The text of each token, int64 [M]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def gram_starts(self, n: int) -> np.ndarray:
        """Positions where an n-gram starts that ends in the same run, in order."""
        last = max(0, len(self.tokens) - n + 1)
        return np.flatnonzero(self.runs[:last] == self.runs[n - 1 :])

    def select(self, texts: np.ndarray) -> "Corpus":
        """The corpus of some of the texts, in the order given."""
        where = np.repeat(self.starts[texts], self.lengths[texts]) + _counting(self.lengths[texts])
        new_text = np.repeat(np.arange(len(texts)), self.lengths[texts])
        # A text keeps its own runs, moved up so that no two texts share one.
        runs = self.runs[where] + new_text * (int(self.runs.max(initial=0)) + 1)
        return Corpus(self.tokens[where], self.lengths[texts], runs)

    def __add__(self, other: "Corpus") -> "Corpus":
        """The texts of both, one behind the other."""
        runs = np.concatenate([self.runs, other.runs + int(self.runs.max(initial=-1)) + 1])
        return Corpus(np.concatenate([self.tokens, other.tokens]), np.concatenate([self.lengths, other.lengths]), runs)

    def stream_positions(self, order: np.ndarray) -> np.ndarray:
        """Place of each token in the stream that the texts form when read in `order` (a permutation [T]); int64 [M]."""
        start = np.empty(len(self.lengths), dtype=np.int64)
        start[order] = np.cumsum(self.lengths[order]) - self.lengths[order]
        return np.repeat(start - self.starts, self.lengths) + np.arange(len(self.tokens))


def _counting(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... anew for each length."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def dense(keys: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers 0..types-1 for the distinct keys, in their order, and how many there are."""
    distinct, numbers = np.unique(keys, return_inverse=True)
    return numbers, len(distinct)


def gram_numbers(corpus: Corpus, max_n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For n = 1..max_n: (positions where an n-gram starts, number of that n-gram); equal n-grams have equal numbers."""
    tokens, types = dense(corpus.tokens)
    positions = np.arange(len(tokens))
    numbers = tokens
    result = [(positions, numbers)]
    at = np.zeros(len(tokens), dtype=np.int64)
    for n in range(2, max_n + 1):
        at[positions] = numbers
        positions = corpus.gram_starts(n)
        # Below 2^63 for any corpus that fits in memory: at most M numbers times at most M types.
        numbers, _ = dense(at[positions] * types + tokens[positions + n - 1])
        result.append((positions, numbers))
    return result


def distinct_per_owner(owner: np.ndarray, numbers: np.ndarray, owners: int) -> tuple[np.ndarray, np.ndarray]:
    """(distinct numbers, numbers) of each owner 0..owners-1, int64 [owners] each; `owner` [n] says whose a number is."""
    total = np.bincount(owner, minlength=owners)
    if not len(numbers):
        return np.zeros(owners, dtype=np.int64), total
    types = int(numbers.max()) + 1
    keys = np.sort(owner * types + numbers)
    first = np.concatenate([[True], keys[1:] != keys[:-1]])
    return np.bincount(keys[first] // types, minlength=owners), total


def raw_keys(tokens: np.ndarray, positions: np.ndarray, n: int, base: int) -> np.ndarray:
    """n-grams as numbers that mean the same in any corpus: digits to the base `base` (above every id). For n = 1, 2."""
    keys = tokens[positions]
    for offset in range(1, n):
        keys = keys * base + tokens[positions + offset]
    return keys
