"""Concentration: how much of the output is frequent tokens, and how far its n-grams are from the empirical distribution.

High-frequency share as ds_stability.text_metrics defines it. Divergences are Kullback-Leibler in nats with add-alpha on
both sides over all V^n n-grams of the vocabulary (special ids left out): forward is KL(data || outputs), which maximum
likelihood minimizes, reverse is KL(outputs || data).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..records import Measured
from . import TOP_K
from .layout import SELF_NOTE, Layout
from .ngrams import raw_keys
from .pools import PoolCounts, Pools, pooled

ALPHA = 0.01  # pseudo-counts per token of the vocabulary, whatever n: ALPHA / V^(n - 1) per n-gram
COVERAGE_N = 2


def measure_shares(layout: Layout) -> list[Measured]:
    """high_frequency_share and top_K_share: tokens in a set over all tokens, special ones in neither; units are prompts."""
    context, special = layout.context, np.asarray(layout.context.special_ids, dtype=np.int64)
    rows: list[Measured | None] = []
    sets: list[tuple[str, np.ndarray, dict[str, object]]] = []  # one for each None among the rows
    if context.high_frequency_ids is None:
        missing = "no high-frequency set: the model's folder has none; give --reference_file"
        rows.append(layout.null("high_frequency_share", missing))
    else:
        ids = np.setdiff1d(np.asarray(context.high_frequency_ids, dtype=np.int64), special)
        rows.append(None)
        sets.append(("high_frequency_share", ids, {"set_size": len(ids)}))
    for k in TOP_K:
        name = f"top_{k}_share"
        if context.training_unigrams is None:
            rows.append(layout.null(name, "no unigram counts of the training text"))
            continue
        counts = np.asarray(context.training_unigrams).copy()
        counts[special[(special >= 0) & (special < len(counts))]] = 0
        types = int((counts > 0).sum())
        if types < k:
            rows.append(layout.null(name, f"the training text has only {types} types"))
            continue
        # Ties by id, as in data.frequency.
        ids = np.lexsort((np.arange(len(counts)), -counts))[:k]
        rows.append(None)
        sets.append((name, ids, {"k": k, "training_share": float(counts[ids].sum() / counts.sum())}))
    shares = _shares(layout, sets)
    return [next(shares) if row is None else row for row in rows]


def _shares(layout: Layout, sets: list[tuple[str, np.ndarray, dict[str, object]]]) -> Iterator[Measured]:
    """One row a set (name, ids, settings); the texts are gone through once."""
    inside = np.zeros((len(sets), len(layout.lengths)), dtype=np.int32)
    for texts in layout.parts() if sets else ():
        corpus = layout.corpus_of(texts)
        for row, (_, ids, _) in zip(inside, sets, strict=True):
            row[texts] = np.bincount(corpus.text_of, np.isin(corpus.tokens, ids), len(texts))
    for row, (name, _, settings) in zip(inside, sets, strict=True):
        yield layout.per_prompt(name, row, layout.lengths, "no tokens", settings=settings)


@dataclass(frozen=True)
class Empirical:
    """An empirical distribution of n-grams with add-alpha.

    Attributes:
        keys, counts: n-grams that occur, rising, and how often, [R] each.
        cells: n-grams there could be, V^n.
        alpha: pseudo-count of each.
    """

    keys: np.ndarray
    counts: np.ndarray
    cells: float
    alpha: float

    def counts_of(self, keys: np.ndarray) -> np.ndarray:
        """How often each of `keys` occurs, 0 if it does not."""
        if not len(self.keys):
            return np.zeros(len(keys))
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0).astype(np.float64)


def divergences(reference: Empirical, keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || outputs) and KL(outputs || reference), nats, [F] each.

    Exact over all cells: those that occur in neither are summed in closed form.

    Args:
        keys: distinct n-grams of the outputs [K].
        counts: F histograms over them [F, K].
    """
    alpha, cells = reference.alpha, reference.cells
    total_p = reference.counts.sum() + alpha * cells
    total_q = counts.sum(axis=1) + alpha * cells
    floor_p, floor_q = np.log(alpha / total_p), np.log(alpha / total_q)
    seen_p, unseen_p = (reference.counts + alpha) / total_p, (cells - len(reference.keys)) * alpha / total_p
    p = (reference.counts_of(keys) + alpha) / total_p
    log_table = np.log(np.arange(int(counts.max(initial=0)) + 1) + alpha)
    log_q = log_table[counts] - np.log(total_q)[:, None]
    forward = seen_p @ np.log(seen_p) + unseen_p * floor_p - log_q @ p - (1.0 - p.sum()) * floor_q
    q = (counts + alpha) / total_q[:, None]
    rest_q = alpha / total_q
    rest_log_p = np.log(seen_p).sum() + (cells - len(reference.keys)) * floor_p - np.log(p).sum()
    reverse = (q * log_q).sum(axis=1) - q @ np.log(p) + rest_q * ((cells - len(keys)) * floor_q - rest_log_p)
    # Equal distributions leave rounding error below 0.
    return np.maximum(forward, 0.0), np.maximum(reverse, 0.0)


def mass_covered(reference: Empirical, pool: PoolCounts) -> np.ndarray:
    """Share of the reference's n-gram occurrences whose n-gram occurs among the outputs, [1 + folds]."""
    return (pool.counts > 0) @ reference.counts_of(pool.keys) / reference.counts.sum()


def reference_grams(layout: Layout, n: int, base: int, training: bool = True) -> tuple[Empirical | None, str]:
    """What outputs are compared with, and its name: n-grams of the training text if asked for and known, else of the references."""
    vocabulary = layout.context.vocab_size - len(set(layout.context.special_ids) & set(range(layout.context.vocab_size)))
    cells, alpha = float(vocabulary) ** n, ALPHA / vocabulary ** (n - 1)
    if training and n == 2 and layout.context.training_bigrams is not None:
        (pairs, counts), source = layout.context.training_bigrams, "training text"
        keys = pairs[:, 0] * base + pairs[:, 1]  # base is at least the vocabulary's size: the order stays
    elif training and n == 1 and layout.context.training_unigrams is not None:
        counts = np.asarray(layout.context.training_unigrams, dtype=np.float64).copy()
        counts[[i for i in layout.context.special_ids if 0 <= i < len(counts)]] = 0
        keys, source = np.flatnonzero(counts), "training text"
        counts = counts[keys]
    else:
        corpus, source = layout.references, "references"
        keys, counts = np.unique(raw_keys(corpus.tokens, corpus.gram_starts(n), n, base), return_counts=True)
    return (Empirical(keys, counts.astype(np.float64), cells, alpha) if len(keys) else None), source


def measure_divergence(layout: Layout, pools: Pools) -> list[Measured]:
    """kl_unigram, kl_bigram, their reverses, and mode_coverage, of pools of equal token count."""
    rows = []
    for n, name in ((1, "kl_unigram"), (2, "kl_bigram")):
        reference, source = reference_grams(layout, n, pools.base)
        if reference is None:
            missing = f"no {n}-grams to compare with: give references"
            rows += [layout.null(name + tail, missing, unit="nats") for tail in ("", "_reverse")]
            continue
        settings = {"n": n, "reference": source, "alpha": ALPHA, "pseudo_counts": reference.alpha * reference.cells}
        for direction, tail in enumerate(("", "_reverse")):
            row = pooled(layout, pools, name + tail, n,
                         lambda pool, reference=reference, direction=direction:
                         divergences(reference, pool.keys, pool.counts)[direction],
                         "nats", settings | {"direction": ("KL(data || outputs)", "KL(outputs || data)")[direction]},
                         f"no {n}-gram")  # fmt: skip
            rows.append(_about_self(layout, row) if source == "references" else row)
    return [*rows, _coverage(layout, pools)]


def _coverage(layout: Layout, pools: Pools) -> Measured:
    reference, _ = reference_grams(layout, COVERAGE_N, pools.base, training=False)
    if reference is None:
        return layout.null("mode_coverage", f"no {COVERAGE_N}-grams to compare with: give references")
    settings = {"n": COVERAGE_N, "reference_grams": int(reference.counts.sum())}
    return _about_self(layout, pooled(layout, pools, "mode_coverage", COVERAGE_N,
                                      lambda pool: mass_covered(reference, pool), "share", settings, "no n-gram"))  # fmt: skip


def _about_self(layout: Layout, row: Measured) -> Measured:
    if layout.is_reference and row.value is not None:
        row.note = "; ".join(filter(None, [row.note, SELF_NOTE]))
    return row
