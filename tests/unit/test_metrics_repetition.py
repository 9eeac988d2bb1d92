"""seq-rep-n and tail loops over many texts at once: the same as ds_stability.text_metrics text by text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability import text_metrics
from ds_stability.eval.metrics.gram_counts import count_grams
from ds_stability.eval.metrics.layout import Layout
from ds_stability.eval.metrics.ngrams import Corpus, distinct_per_owner, gram_numbers
from ds_stability.eval.metrics.repetition import measure_repetition, seq_rep, tail_loops
from ds_stability.eval.records import Sample, ScoringContext

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=1, max_size=8)


def layout_of(texts):
    samples = [Sample(i, "sample", 0, 0, text, "", "length") for i, text in enumerate(texts)]
    return Layout.of(samples, ScoringContext(10))


@given(TEXTS, st.integers(1, 4))
def test_seq_rep_is_that_of_text_metrics(texts, n):
    corpus = Corpus.of(texts)
    positions, numbers = gram_numbers(corpus, 4)[n - 1]
    values, defined = seq_rep(*distinct_per_owner(corpus.text_of[positions], numbers, len(texts)))
    expected = [text_metrics.seq_rep_n(text, n) for text in texts]
    assert [float(v) if d else None for v, d in zip(values, defined, strict=True)] == expected


@given(st.lists(st.lists(st.integers(0, 1), max_size=30), max_size=8))
def test_tail_loops_are_those_of_text_metrics(texts):
    assert tail_loops(Corpus.of(texts)).tolist() == [text_metrics.tail_loop(text) for text in texts]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.lists(st.integers(0, 3), max_size=8))
def test_a_phrase_said_three_times_is_a_loop(phrase, before):
    assert tail_loops(Corpus.of([[9], before + phrase * 3, [9]])).tolist() == [False, True, False]


@given(TEXTS)
def test_measured_means(texts):
    layout = layout_of(texts)
    rows = {row.metric: row for row in measure_repetition(layout, count_grams(layout))}
    for n in range(1, 5):
        expected = text_metrics.mean_seq_rep_n(texts, n).value
        assert rows[f"seq_rep_{n}"].value == (None if expected is None else pytest.approx(expected, abs=1e-12))
    assert rows["tail_loop_rate"].value == pytest.approx(text_metrics.tail_loop_rate(texts).value)


def test_by_hand():
    # abab: bigrams ab ba ab: 1 - 2/3; a single text of one token has no bigram and is left out.
    layout = layout_of([[1, 2, 1, 2], [5]])
    row = measure_repetition(layout, count_grams(layout))[1]
    assert row.value == pytest.approx(1 / 3) and row.counts.tolist() == [1, 0]
    assert row.settings["texts_too_short"] == 1


def test_samples_of_a_prompt_are_one_unit():
    samples = [Sample(3, "s", j, 0, text, "", "length") for j, text in enumerate([[1, 1], [1, 2]])]
    layout = Layout.of(samples, ScoringContext(10))
    row = measure_repetition(layout, count_grams(layout))[0]
    assert row.units == [3] and row.totals.tolist() == [0.5] and row.counts.tolist() == [2]
    assert np.isfinite(row.totals).all()


@given(TEXTS, st.integers(1, 12), st.integers(1, 3))
def test_counts_part_by_part_are_those_of_everything_at_once(texts, part_tokens, group_texts):
    samples = [Sample(i // 2, "sample", i % 2, 0, text, "", "length") for i, text in enumerate(texts)]
    whole, parts = (count_grams(Layout.of(samples, ScoringContext(10, group_texts=group_texts), size)) for size in (10**6, part_tokens))
    for name in ("text_distinct", "text_total", "group_distinct", "group_total", "first_texts"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
