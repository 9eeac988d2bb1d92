"""distinct-n at equal token counts, output entropy, Zipf exponent, compression."""

import gzip
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability import text_metrics
from ds_stability.eval.metrics import pools as pools_module
from ds_stability.eval.metrics.diversity import (
    compressed_size,
    entropy_rows,
    measure_compression,
    measure_distinct,
    measure_entropy,
    zipf_exponent,
)
from ds_stability.eval.metrics.gram_counts import count_grams
from ds_stability.eval.metrics.layout import Layout
from ds_stability.eval.metrics.pools import SparsePool, make_pools
from ds_stability.eval.records import Sample, ScoringContext

KEYED = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1), st.lists(st.integers(0, 5), max_size=9)),
                 min_size=1, max_size=14, unique_by=lambda item: item[:2])  # fmt: skip


def layout_of(keyed, group_texts=2, reference_tokens=4):
    samples = [Sample(p, "sample", j, 0, text, " ".join(map(str, text)), "length") for p, j, text in keyed]
    reference = tuple(range(reference_tokens))
    context = ScoringContext(10, reference_ids=(reference,), reference_texts=("0123456789ab",), group_texts=group_texts)
    return Layout.of(samples, context)


def block_stream(layout):
    """The texts as (block, text), block by block, within one by (sample, prompt)."""
    keys = [(layout.prompts.tolist().index(s.prompt) // layout.group_texts, s.sample, s.prompt, s) for s in layout.samples]
    return [(block, s) for block, _, _, s in sorted(keys, key=lambda key: key[:3])]


@given(KEYED, st.integers(1, 4))
def test_distinct_by_cutting_lists(keyed, n):
    layout = layout_of(keyed)
    size = layout.group_tokens
    stream = [(block, i, token) for i, (block, s) in enumerate(block_stream(layout)) for token in s.token_ids]
    totals, counts = Counter(), Counter()
    for start in range(0, len(stream) - size + 1, size):
        group = stream[start : start + size]
        windows = [group[i : i + n] for i in range(size - n + 1)]
        grams = [tuple(t for _, _, t in window) for window in windows if len({text for _, text, _ in window}) == 1]
        totals[group[0][0]] += len(set(grams))
        counts[group[0][0]] += len(grams)
    row = measure_distinct(layout, count_grams(layout))[n - 1]
    assert row.settings["group_tokens"] == size
    if not sum(counts.values()):
        assert row.value is None and row.note
        return
    assert row.totals.tolist() == [totals[b] for b in range(layout.blocks)]
    assert row.counts.tolist() == [counts[b] for b in range(layout.blocks)]


def test_distinct_is_compared_at_equal_token_counts():
    # One group of text_metrics' definition; a second model with half the tokens per text is cut into groups of equal size.
    long = [[i % 7 for i in range(k, k + 8)] for k in range(8)]
    short = [text[:4] for text in long]
    rows = []
    for texts in (long, short):
        layout = layout_of([(i, 0, text) for i, text in enumerate(texts)], reference_tokens=8)
        rows.append(measure_distinct(layout, count_grams(layout))[0])
    assert rows[0].settings["group_tokens"] == rows[1].settings["group_tokens"] == 16
    assert (rows[0].settings["groups"], rows[1].settings["groups"]) == (4, 2)
    assert rows[0].totals[0] / rows[0].counts[0] == text_metrics.distinct_n(long[:2], 1).value


@given(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=4))
def test_entropy_is_that_of_text_metrics(rows):
    expected = [text_metrics.shannon_entropy(row, miller_madow=True) for row in rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = entropy_rows(np.array(rows))
    assert [None if np.isnan(v) else pytest.approx(float(v)) for v in values] == expected


@given(KEYED)
@settings(deadline=None)
def test_output_entropy_of_pools(keyed):
    layout = layout_of(keyed, reference_tokens=3)
    size, pools = layout.pool_tokens, make_pools(layout)
    rows = measure_entropy(layout, pools)
    stream = [(i, token) for i, sample in enumerate(layout.samples) for token in sample.token_ids]
    if len(stream) < size:
        assert pools.note
        return
    for n, row in ((1, rows[0]), (2, rows[1])):
        values = []
        for start in range(0, len(stream) - size + 1, size):
            pool = stream[start : start + size]
            windows = [pool[i : i + n] for i in range(size - n + 1)]
            grams = Counter(tuple(t for _, t in w) for w in windows if len({text for text, _ in w}) == 1)
            values.append(text_metrics.shannon_entropy(list(grams.values()), miller_madow=True))
        if None in values:
            assert row.value is None and row.note
        else:
            assert row.value == pytest.approx(np.mean(values))


def test_counts_without_a_fold_are_counts_of_the_other_prompts():
    layout = layout_of([(p, j, [p, j, p]) for p in range(5) for j in range(2)], reference_tokens=12)
    ((pool,),) = [list(sparse.pieces()) for sparse in make_pools(layout).grams[1]]
    assert layout.folds == 5 and pool.counts.shape == (6, 5)
    for fold in range(5):
        tokens = [t for s in layout.samples if s.prompt != fold for t in s.token_ids]
        assert pool.counts[1 + fold].tolist() == [tokens.count(key) for key in pool.keys.tolist()]


def test_too_few_tokens_for_a_pool():
    texts = [(p, 0, [1, 2]) for p in range(4)]
    assert "not at equal size" in make_pools(layout_of(texts, reference_tokens=6)).note  # 8 of 12
    pools = make_pools(layout_of(texts, reference_tokens=40))  # 8 of 80
    rows = measure_entropy(layout_of(texts, reference_tokens=40), pools)
    assert [row.value for row in rows] == [None] * 3 and all("fewer than half" in row.note for row in rows)


def log_likelihood(exponent, frequency):
    rank = np.arange(1, len(frequency) + 1)
    return -exponent * (frequency * np.log(rank)).sum() - frequency.sum() * np.log((rank**-exponent).sum())


def test_zipf_exponent_maximizes_the_likelihood():
    rng = np.random.default_rng(0)
    p = np.arange(1, 301) ** -1.2
    counts = rng.multinomial(200_000, p / p.sum())
    exponent = zipf_exponent(counts)
    frequency = np.sort(counts[counts > 0])[::-1]
    grid = np.linspace(exponent - 0.3, exponent + 0.3, 601)
    best = grid[int(np.argmax([log_likelihood(s, frequency) for s in grid]))]
    assert exponent == pytest.approx(best, abs=1e-3) and exponent == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize("counts, expected", [([5] * 50, 0.0), ([5] * 49, None), ([10**6] + [1] * 60, None)])
def test_zipf_extremes(counts, expected):
    value = zipf_exponent(np.array(counts))
    if len(counts) < 50:
        assert math.isnan(value)
    elif expected is None:  # concentrated as can be: finite, and steep
        assert 2 < value < 30
    else:
        assert value == pytest.approx(expected, abs=1e-6)


def test_compressed_once():
    data = b"the cat sat on the mat. " * 5000
    assert compressed_size(data) == len(gzip.compress(data, 9, mtime=0))
    assert compressed_size(data) > 1.5 * len(gzip.compress(gzip.compress(data)))  # compressing twice is another figure


def test_compression_ratio_of_groups_of_equal_size():
    texts = ["one two three four", "", "five six seven eight nine", "ten", "é" * 9] * 3
    samples = [Sample(i, "sample", 0, 0, [1], text, "length") for i, text in enumerate(texts)]
    context = ScoringContext(10, reference_ids=((1,),), reference_texts=("0123456789",), group_texts=2)
    (row,) = measure_compression(Layout.of(samples, context))
    stream = b"".join(text.encode() + b"\n" for text in texts if text)
    groups = [stream[i : i + 20] for i in range(0, len(stream) - 19, 20)]
    assert row.settings["group_bytes"] == 20 and row.settings["groups"] == len(groups)
    assert row.value == pytest.approx(20 * len(groups) / sum(len(gzip.compress(g, 9)) for g in groups))


def test_repeating_oneself_compresses_and_lone_surrogates_do_not_stop_it():
    context = ScoringContext(10, reference_ids=((1,),), reference_texts=("x" * 200,), group_texts=4)
    rng = np.random.default_rng(0)
    fresh = ["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(8)]
    values = []
    for texts in (fresh, [fresh[0]] * 8, ["\ud800" * 200] * 8):
        samples = [Sample(i, "sample", 0, 0, [1], text, "length") for i, text in enumerate(texts)]
        values.append(measure_compression(Layout.of(samples, context))[0].value)
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_rows_of_a_pool_are_the_whole_and_all_but_one_fold(piece, monkeypatch):
    monkeypatch.setattr(pools_module, "PIECE", piece)
    by_fold = np.random.default_rng(0).integers(0, 3, (5, 6))
    cells = np.flatnonzero(by_fold)
    pieces = list(SparsePool(np.arange(6), 5, cells, by_fold.reshape(-1)[cells]).pieces())
    rows = np.concatenate([one.counts for one in pieces])
    assert np.array_equal(rows, np.concatenate([by_fold.sum(0, keepdims=True), by_fold.sum(0) - by_fold]))
    assert all(np.array_equal(one.keys, np.arange(6)) for one in pieces) and (len(pieces) == 1) == (piece == 10**6)
