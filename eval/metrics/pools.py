"""n-gram counts of pools of equal token count, over everything and without each fold: what pooled statistics work on."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..records import Measured
from .layout import Layout
from .ngrams import raw_keys

PIECE = 2**20  # counts at once, 8 MiB


@dataclass(frozen=True)
class PoolCounts:
    """n-grams of one pool.

    Attributes:
        keys: the distinct ones, rising, int64 [K] (see ngrams.raw_keys).
        counts: how often each occurs, int64 [rows, K]; of all 1 + folds rows, row 0 is the whole pool, row 1 + f without fold f.
    """

    keys: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class SparsePool:
    """n-grams of one pool, as how often each occurs in each fold, zeros left out.

    Attributes:
        keys: the distinct ones, rising, int64 [K]. folds: how many. cells: fold * K + place in `keys`, rising. counts: of each.
    """

    keys: np.ndarray
    folds: int
    cells: np.ndarray
    counts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """n-grams in each fold, [folds]."""
        return np.bincount(self.cells // max(1, len(self.keys)), self.counts, self.folds)

    def pieces(self) -> Iterator[PoolCounts]:
        """The rows of PoolCounts, in order, about PIECE counts at a time."""
        types = len(self.keys)
        whole = np.bincount(self.cells % max(1, types), self.counts, types).astype(np.int64)
        step = max(1, PIECE // max(1, types))
        for first in range(0, 1 + self.folds, step):
            rows = []
            for row in range(first, min(first + step, 1 + self.folds)):
                inside = slice(*np.searchsorted(self.cells, [(row - 1) * types, row * types])) if row else slice(0)
                left = whole.copy()
                left[self.cells[inside] - (row - 1) * types] -= self.counts[inside]
                rows.append(left)
            yield PoolCounts(self.keys, np.stack(rows))


@dataclass(frozen=True)
class Pools:
    """Pools of the unigrams and of the bigrams, what fixes them, and what to know about them.

    Attributes:
        grams: {1: pools, 2: pools}; empty where there are too few tokens.
        base: keys of bigrams are first * base + second.
    """

    grams: dict[int, Sequence[SparsePool]]
    base: int
    settings: dict[str, Any]
    note: str | None


def make_pools(layout: Layout) -> Pools:
    """Cut the stream by (sample, prompt) into pools of `layout.pool_tokens`; what is left over at the end is not used.

    Fewer tokens than one pool, but at least half of it, make one smaller pool and a note; fewer still make none.
    """
    size, ends = layout.pool_tokens, np.cumsum(layout.lengths)
    total = int(ends[-1]) if len(ends) else 0
    number, note = total // size, None
    if not number and 2 * total >= size:
        note = f"{total} tokens, fewer than the {size} of a pool: not at equal size"
        number, size = 1, total
    elif not number:
        note = f"{total} tokens, fewer than half of the {size} of a pool"
    base = max(layout.context.vocab_size, layout.largest_id + 1, int(layout.references.tokens.max(initial=0)) + 1)
    grams = {n: SpilledPools((_count(layout, ends, n, base, pool * size, (pool + 1) * size) for pool in range(number)), layout.everything.folder)
             for n in (1, 2)}  # fmt: skip
    return Pools(grams, base, {"tokens": size, "pools": number, "size_from": layout.size_from}, note)


class SpilledPools(Sequence[SparsePool]):
    """Pools that are kept on the disk: several statistics are taken of each, and a pool grows with the prompts."""

    def __init__(self, pools: Iterable[SparsePool], folder: Path | None):
        self.file, self.places = tempfile.TemporaryFile(dir=folder), []  # noqa: SIM115, lives as long as the pools
        for pool in pools:
            self.places.append((self.file.tell(), pool.folds))
            for array in (pool.keys, pool.cells, pool.counts):
                np.save(self.file, array)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> SparsePool:
        start, folds = self.places[number]
        self.file.seek(start)
        keys, cells, counts = (np.load(self.file) for _ in range(3))
        return SparsePool(keys, folds, cells, counts)


def _count(layout: Layout, ends: np.ndarray, n: int, base: int, first: int, end: int) -> SparsePool:
    """n-grams of tokens `first` to `end` of the stream; `ends` [T]: where each text ends in it."""
    texts = np.arange(np.searchsorted(ends, first, side="right"), np.searchsorted(ends, end, side="left") + 1)
    corpus, folds = layout.corpus_of(texts), layout.folds
    offset = int(ends[texts[0]]) - int(layout.lengths[texts[0]])  # of the part in the stream
    starts = corpus.gram_starts(n)
    starts = starts[np.searchsorted(starts, first - offset) : np.searchsorted(starts, end - offset - n + 1)]
    keys = raw_keys(corpus.tokens, starts, n, base)
    distinct, numbers = np.unique(keys, return_inverse=True)
    fold = layout.folds_of(texts)[corpus.text_of[starts]]
    cells, counts = np.unique(fold * len(distinct) + numbers, return_counts=True)
    return SparsePool(distinct, folds, cells, counts)


def pooled(layout: Layout, pools: Pools, metric: str, n: int, statistic: Callable[[PoolCounts], np.ndarray], unit: str,
           settings: dict[str, Any], undefined: str) -> Measured:
    """The mean over pools of `statistic` [1 + folds] of their n-gram counts, with jackknife units.

    Args:
        undefined: the note where the statistic of a pool is not finite.
    """
    settings = pools.settings | settings
    if not pools.grams[n]:
        return layout.null(metric, pools.note or "no tokens", unit=unit, settings=settings)
    # A statistic that is undefined is NaN on purpose, and becomes a stated null below.
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.mean([np.concatenate([statistic(piece) for piece in pool.pieces()]) for pool in pools.grams[n]], axis=0)
    if not np.isfinite(values[0]):
        return layout.null(metric, undefined, unit=unit, settings=settings)
    sizes = sum(pool.sizes for pool in pools.grams[n])
    return layout.in_folds(metric, float(values[0]), values[1:], sizes, unit, settings, pools.note)
