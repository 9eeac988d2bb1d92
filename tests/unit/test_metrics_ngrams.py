"""Texts end to end, n-grams as numbers: against lists and tuples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability.eval.metrics.ngrams import Corpus, distinct_per_owner, gram_numbers, raw_keys

TEXTS = st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=6)
N = st.integers(1, 4)


def runs_of(text, left_out):
    """The stretches of a text between ids that are left out."""
    runs = [[]]
    for token in text:
        if token in left_out:
            runs.append([])
        else:
            runs[-1].append(token)
    return runs


def grams_of(text, n, left_out=()):
    return [tuple(run[i : i + n]) for run in runs_of(text, left_out) for i in range(len(run) - n + 1)]


def read_grams(corpus, n):
    return [tuple(corpus.tokens[i : i + n].tolist()) for i in corpus.gram_starts(n)]


@given(TEXTS, N, st.sets(st.integers(0, 4), max_size=2))
def test_grams_never_cross_a_text_or_an_id_left_out(texts, n, left_out):
    corpus = Corpus.of(texts, sorted(left_out))
    assert read_grams(corpus, n) == [gram for text in texts for gram in grams_of(text, n, left_out)]
    assert corpus.lengths.tolist() == [sum(token not in left_out for token in text) for text in texts]


@given(TEXTS, st.sets(st.integers(0, 4), max_size=2), st.data())
def test_selection_is_the_corpus_of_the_selected_texts(texts, left_out, data):
    chosen = data.draw(st.lists(st.integers(0, len(texts) - 1), unique=True)) if texts else []
    part = Corpus.of(texts, sorted(left_out)).select(np.array(chosen, dtype=np.int64))
    expected = Corpus.of([texts[i] for i in chosen], sorted(left_out))
    assert part.tokens.tolist() == expected.tokens.tolist() and part.lengths.tolist() == expected.lengths.tolist()
    for n in (1, 2, 3):
        assert read_grams(part, n) == read_grams(expected, n)


@given(TEXTS)
def test_equal_numbers_mean_equal_grams(texts):
    corpus = Corpus.of(texts)
    for n, (positions, numbers) in enumerate(gram_numbers(corpus, 4), start=1):
        grams = [tuple(corpus.tokens[i : i + n].tolist()) for i in positions]
        assert grams == [gram for text in texts for gram in grams_of(text, n)]
        assert len({*zip(grams, numbers.tolist(), strict=True)}) == len(set(grams)) == len(set(numbers.tolist()))


@given(TEXTS, N)
def test_distinct_per_text(texts, n):
    corpus = Corpus.of(texts)
    positions, numbers = gram_numbers(corpus, 4)[n - 1]
    distinct, total = distinct_per_owner(corpus.text_of[positions], numbers, len(texts))
    assert distinct.tolist() == [len(set(grams_of(text, n))) for text in texts]
    assert total.tolist() == [len(grams_of(text, n)) for text in texts]


def test_large_ids_and_long_grams_do_not_collide():
    ids = [2**40, 2**40 + 1, 2**41, 7]
    corpus = Corpus.of([ids * 3])
    for n, (_, numbers) in enumerate(gram_numbers(corpus, 4), start=1):
        assert len(set(numbers.tolist())) == len(set(grams_of(ids * 3, n)))


def test_stream_positions_follow_the_order_of_texts():
    corpus = Corpus.of([[1, 2], [3], [4, 5, 6]])
    assert corpus.stream_positions(np.array([2, 0, 1])).tolist() == [3, 4, 5, 0, 1, 2]


def test_raw_keys_are_digits():
    corpus = Corpus.of([[3, 4, 5]])
    assert raw_keys(corpus.tokens, corpus.gram_starts(2), 2, 10).tolist() == [34, 45]


@pytest.mark.parametrize("texts", [[], [[]], [[], []]])
def test_nothing(texts):
    corpus = Corpus.of(texts)
    assert [len(numbers) for _, numbers in gram_numbers(corpus, 4)] == [0] * 4
