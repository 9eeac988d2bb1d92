"""Self-BLEU-4: BLEU-4 of each text against all others, over token ids. High means that texts resemble each other.

Zhu et al. 2018 (arXiv 1802.01886) on BLEU of Papineni et al. 2002: an n-gram's matches are clipped at the most that any one
other text has of it, the brevity penalty takes the closest length among the others (the smaller of two equally close), and
an order without matches is smoothed as in sacrebleu's "exp" (NIST). Linear in the tokens: for each n-gram only the two texts
that have most of it matter.
"""

from dataclasses import dataclass

import numpy as np

from ..records import Measured
from .layout import SUBSAMPLE_TEXTS, Layout
from .ngrams import Corpus, gram_numbers

ORDER = 4


@dataclass(frozen=True)
class _Grams:
    """Distinct n-grams of each text, sorted by n-gram, then by falling count: parallel arrays."""

    number: np.ndarray
    text: np.ndarray
    count: np.ndarray


def count_grams(corpus: Corpus) -> list[_Grams]:
    """One table for each n = 1..4."""
    tables = []
    for positions, numbers in gram_numbers(corpus, ORDER):
        texts = max(1, len(corpus.lengths))
        keys, count = np.unique(numbers * texts + corpus.text_of[positions], return_counts=True)
        number, text = keys // texts, keys % texts
        order = np.lexsort((-count, number))
        tables.append(_Grams(number[order], text[order], count[order]))
    return tables


def _matches(grams: _Grams, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(clipped matches, n-grams) of each text [T] against all others among `kept` (bool [T])."""
    chosen = kept[grams.text]
    number, text, count = grams.number[chosen], grams.text[chosen], grams.count[chosen]
    total = np.bincount(text, count, len(kept))
    if not len(number):
        return np.zeros(len(kept)), total
    first = np.flatnonzero(np.concatenate([[True], number[1:] != number[:-1]]))
    sizes = np.diff(np.append(first, len(number)))
    second = np.where(sizes > 1, count[np.minimum(first + 1, len(count) - 1)], 0)
    # The most that any other text has: the top count, or for its owner the next.
    limit = np.repeat(count[first], sizes)
    limit[first] = second
    return np.bincount(text, np.minimum(count, limit), len(kept)), total


def _closest_lengths(lengths: np.ndarray) -> np.ndarray:
    """Closest length among the other texts, the smaller of two equally close; [T], T >= 2."""
    distinct, place, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    padded = np.concatenate([[-np.inf], distinct, [np.inf]])
    below, above = padded[place], padded[place + 2]
    nearest = np.where(lengths - below <= above - lengths, below, above)
    return np.where(counts[place] > 1, lengths, nearest)


def self_bleu(corpus: Corpus, tables: list[_Grams], kept: np.ndarray) -> np.ndarray:
    """BLEU-4 (0..1) of each kept text against all other kept ones, [kept]. Each must have a 4-gram; at least two."""
    log_precision = np.zeros(int(kept.sum()))
    smooth, any_match = np.ones(len(log_precision)), np.zeros(len(log_precision), dtype=bool)
    for grams in tables:
        matches, total = (values[kept] for values in _matches(grams, kept))
        smooth = np.where(matches == 0, 2.0 * smooth, smooth)
        log_precision += np.log(np.where(matches == 0, 1.0 / smooth, matches) / total) / ORDER
        any_match |= matches > 0
    length = corpus.lengths[kept].astype(np.float64)
    penalty = np.minimum(0.0, 1.0 - _closest_lengths(length) / length)
    return np.where(any_match, np.exp(log_precision + penalty), 0.0)


def measure_self_bleu(layout: Layout) -> list[Measured]:
    """self_bleu_4 of the subsample (layout.subsample), mean over its texts, with jackknife units."""
    name = "self_bleu_4"
    corpus = layout.corpus_of(layout.subsample)
    usable = np.bincount(corpus.text_of[corpus.gram_starts(ORDER)], minlength=len(corpus.lengths)) > 0
    short = int((~usable).sum())
    settings = {"texts": int(usable.sum()), "subsample": SUBSAMPLE_TEXTS, "texts_too_short": short, "order": ORDER,
                "smoothing": "exp", "on": "token ids"}  # fmt: skip
    if usable.sum() < 2:
        return [layout.null(name, f"fewer than two texts with {ORDER} tokens", settings=settings)]
    tables, fold = count_grams(corpus), layout.folds_of(layout.subsample)

    def mean_bleu(kept: np.ndarray) -> float:
        return float(self_bleu(corpus, tables, kept).mean()) if kept.sum() >= 2 else float("nan")

    note = f"{short} texts of the subsample are too short" if short else None
    return [layout.jackknife(name, mean_bleu(usable), lambda left_out: mean_bleu(usable & (fold != left_out)), fold[usable], "share",
                             settings, note)]  # fmt: skip
