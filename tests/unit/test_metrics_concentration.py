"""Shares of frequent tokens, divergences over the whole vocabulary, mode coverage: against loops."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability import text_metrics
from ds_stability.eval.metrics.concentration import (
    ALPHA,
    Empirical,
    divergences,
    mass_covered,
    measure_divergence,
    measure_shares,
    reference_grams,
)
from ds_stability.eval.metrics.layout import Layout
from ds_stability.eval.metrics.pools import PoolCounts, make_pools
from ds_stability.eval.records import Sample, ScoringContext

TEXTS = st.lists(st.lists(st.integers(0, 7), max_size=10), min_size=1, max_size=6)


def layout_of(texts, **context):
    samples = [Sample(i, "sample", 0, 0, text, "", "length") for i, text in enumerate(texts)]
    return Layout.of(samples, ScoringContext(8, **context))


@given(TEXTS, st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7), max_size=3))
def test_high_frequency_share_is_that_of_text_metrics(texts, ids, special):
    layout = layout_of(texts, high_frequency_ids=tuple(ids), special_ids=tuple(special))
    row = measure_shares(layout)[0]
    expected = text_metrics.high_frequency_share(texts, ids, special)
    assert row.value == (None if expected.value is None else pytest.approx(expected.value))
    assert row.counts.sum() == expected.count


def test_top_k_takes_the_most_frequent_types_and_ties_by_id():
    counts = np.zeros(3000, dtype=np.int64)
    counts[:20] = [100, 9, 8, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    samples = [Sample(0, "sample", 0, 0, [0, 1, 10, 11, 12, 2999], "", "length")]
    rows = {row.metric: row for row in measure_shares(Layout.of(samples, ScoringContext(3000, special_ids=(0,), training_unigrams=counts)))}
    # Without the special id 0 the ten most frequent are 1..9 and, of the ties, 10.
    assert rows["top_10_share"].value == pytest.approx(2 / 5)
    assert rows["top_50_share"].value is None and "only 19 types" in rows["top_50_share"].note


def test_no_set_and_no_counts_are_nulls():
    rows = measure_shares(layout_of([[1, 2]]))
    assert all(row.value is None and row.note for row in rows) and len(rows) == 6


def histogram(counts, cells, alpha):
    weights = np.array([counts.get(cell, 0) + alpha for cell in cells])
    return weights / weights.sum()


@given(st.dictionaries(st.integers(0, 8), st.integers(1, 9), min_size=1),
       st.lists(st.lists(st.integers(0, 5), min_size=9, max_size=9), min_size=1, max_size=3), st.sampled_from([0.01, 0.5, 2.0]))
def test_divergences_over_every_cell(reference, rows, alpha):
    keys = np.array(sorted(reference))
    empirical = Empirical(keys, np.array([reference[k] for k in sorted(reference)], dtype=float), 9.0, alpha)
    counts = np.array(rows)
    seen = np.flatnonzero(counts.any(axis=0))  # what occurs nowhere is no key, as in a pool
    forward, reverse = divergences(empirical, seen, counts[:, seen])
    p = histogram(reference, range(9), alpha)
    for i, row in enumerate(rows):
        q = histogram(dict(enumerate(row)), range(9), alpha)
        assert forward[i] == pytest.approx((p * np.log(p / q)).sum(), abs=1e-9)
        assert reverse[i] == pytest.approx((q * np.log(q / p)).sum(), abs=1e-9)


def test_divergence_by_hand():
    # Two cells, alpha 1: data 3:0 -> 4/5, 1/5; outputs 0:3 -> 1/5, 4/5. KL = 3/5 log 4 both ways.
    empirical = Empirical(np.array([0]), np.array([3.0]), 2.0, 1.0)
    forward, reverse = divergences(empirical, np.array([1]), np.array([[3]]))
    assert forward[0] == reverse[0] == pytest.approx(0.6 * math.log(4))


def test_measured_divergences_against_all_pairs_of_the_vocabulary():
    references = [[1, 2, 3, 0, 1, 2], [4, 4, 2, 2, 1, 1]]  # id 0 is special: it breaks the text
    texts = [[1, 2, 2, 3], [5, 0, 5, 1], [2, 2, 4, 4]]
    layout = layout_of(texts, special_ids=(0,), reference_ids=tuple(map(tuple, references)), reference_texts=("a", "b"))
    rows = {row.metric: row for row in measure_divergence(layout, make_pools(layout))}
    size = layout.pool_tokens
    stream = [(i, j, t) for i, text in enumerate(texts) for j, t in enumerate(text) if t]
    pools = [stream[s : s + size] for s in range(0, len(stream) - size + 1, size)]

    def grams(tokens, n):
        windows = (tokens[i : i + n] for i in range(len(tokens) - n + 1))
        return [tuple(t for *_, t in w) for w in windows if w[-1][0] == w[0][0] and w[-1][1] - w[0][1] == n - 1]

    flat = [(i, j, t) for i, text in enumerate(references) for j, t in enumerate(text) if t]
    for n, name in ((1, "kl_unigram"), (2, "kl_bigram")):
        cells, alpha = list(product(range(1, 8), repeat=n)), ALPHA / 7 ** (n - 1)
        p = histogram(Counter(grams(flat, n)), cells, alpha)
        qs = [histogram(Counter(grams(pool, n)), cells, alpha) for pool in pools]
        assert rows[name].value == pytest.approx(np.mean([(p * np.log(p / q)).sum() for q in qs]))
        assert rows[name + "_reverse"].value == pytest.approx(np.mean([(q * np.log(q / p)).sum() for q in qs]))
        assert rows[name].settings["alpha"] == ALPHA
    mass = Counter(grams(flat, 2))
    covered = [sum(c for gram, c in mass.items() if gram in set(grams(pool, 2))) / sum(mass.values()) for pool in pools]
    assert rows["mode_coverage"].value == pytest.approx(np.mean(covered))


def test_training_counts_come_before_references_for_unigrams():
    layout = layout_of([[1]], training_unigrams=np.array([9, 3, 0, 1, 0, 0, 0, 0]), special_ids=(0,), reference_ids=((2, 2),))
    reference, source = reference_grams(layout, 1, 8)
    assert source == "training text" and reference.keys.tolist() == [1, 3] and reference.cells == 7
    assert reference_grams(layout, 2, 8)[1] == "references"


def test_coverage_by_hand():
    reference = Empirical(np.array([3, 5, 9]), np.array([6.0, 3.0, 1.0]), 100.0, 0.1)
    pool = PoolCounts(np.array([1, 3, 9]), np.array([[2, 1, 1], [2, 0, 1], [0, 0, 0]]))
    assert mass_covered(reference, pool).tolist() == pytest.approx([0.7, 0.1, 0.0])


def test_without_references_nulls_say_so():
    layout = layout_of([[1, 2, 3]])
    rows = measure_divergence(layout, make_pools(layout))
    assert len(rows) == 5 and all(row.value is None and "give references" in row.note for row in rows)
