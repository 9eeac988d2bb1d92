import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability.text_metrics import (
    Mean,
    distinct_n,
    high_frequency_share,
    mean_seq_rep_n,
    output_entropy,
    seq_rep_n,
    shannon_entropy,
    tail_loop,
    tail_loop_rate,
)

TOKENS = st.integers(0, 4)
TEXT = st.lists(TOKENS, max_size=25)
TEXTS = st.lists(TEXT, max_size=6)
N = st.integers(1, 4)


def grams(text, n):
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


@given(TEXTS, N)
def test_distinct_n_by_brute_force(texts, n):
    every = [gram for text in texts for gram in grams(text, n)]
    assert distinct_n(texts, n) == Mean(float(len(set(every))), len(every))


@given(TEXT, N)
def test_seq_rep_n_by_brute_force(text, n):
    every = grams(text, n)
    assert seq_rep_n(text, n) == (1 - len(set(every)) / len(every) if every else None)


@given(TEXTS, N)
def test_mean_seq_rep_n_leaves_short_texts_out(texts, n):
    values = [1 - len(set(grams(text, n))) / len(grams(text, n)) for text in texts if len(text) >= n]
    mean = mean_seq_rep_n(texts, n)
    assert mean.count == len(values)
    assert mean.total == pytest.approx(sum(values), abs=1e-12)


def ends_in_loop(text):
    text = list(text)
    for start in range(len(text)):
        tail = text[start:]
        for length in range(2, len(tail) + 1):
            repeats = len(tail) // length
            if repeats >= 3 and tail == tail[:length] * repeats:
                return True
    return False


@given(st.lists(st.integers(0, 1), max_size=14))
def test_tail_loop_by_brute_force(text):
    assert tail_loop(text) == ends_in_loop(text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ([], False),
        ([1, 2, 1, 2], False),
        ([9, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 1, 2, 1, 2, 9], False),
        ([7, 7, 7], False),  # a phrase has two tokens or more ...
        ([7] * 6, True),  # ... and this is (7 7) three times
    ],
)
def test_tail_loop_examples(text, expected):
    assert tail_loop(text) is expected


def test_tail_loop_rate():
    assert tail_loop_rate([[1, 2] * 3, [1, 2, 3], []]) == Mean(1.0, 3)
    assert tail_loop_rate([]).value is None


@given(TEXTS, st.sets(TOKENS), st.sets(TOKENS))
def test_high_frequency_share_by_brute_force(texts, ids, special):
    kept = [token for text in texts for token in text if token not in special]
    assert high_frequency_share(texts, ids, special) == Mean(float(sum(t in ids for t in kept)), len(kept))


@given(TEXTS, N)
def test_metrics_lie_in_range_and_do_not_depend_on_the_order_of_texts(texts, n):
    for metric in (lambda t: distinct_n(t, n), lambda t: mean_seq_rep_n(t, n), lambda t: high_frequency_share(t, {1})):
        mean = metric(texts)
        assert mean.value is None or 0.0 <= mean.value <= 1.0
        again = metric(texts[::-1])
        assert again.count == mean.count and again.total == pytest.approx(mean.total)


def test_ngrams_never_cross_texts():
    assert distinct_n([[1, 2], [3, 4]], 2) == Mean(2.0, 2)
    assert distinct_n([[1], [2]], 2) == Mean(0.0, 0)


def test_numpy_texts_and_large_ids():
    text = np.array([2**40, 2**40, 5], dtype=np.int64)
    assert distinct_n([text], 1) == Mean(2.0, 3)


@given(st.lists(st.integers(0, 50), max_size=20))
def test_shannon_entropy_by_brute_force(counts):
    total = sum(counts)
    entropy = shannon_entropy(counts)
    if total == 0:
        assert entropy is None
        return
    expected = -sum(c / total * math.log2(c / total) for c in counts if c)
    assert entropy == pytest.approx(expected, abs=1e-12)
    types = sum(c > 0 for c in counts)
    corrected = shannon_entropy(counts, miller_madow=True)
    assert corrected == pytest.approx(expected + (types - 1) / (2 * total * math.log(2)), abs=1e-12)


def test_entropy_extremes():
    assert shannon_entropy([5]) == 0.0 and math.copysign(1, shannon_entropy([5])) == 1.0
    assert shannon_entropy([1] * 8) == 3.0
    assert output_entropy([[1, 2], [1, 2]], 2) == 0.0
    assert output_entropy([[1], [2]], 2) is None
    with pytest.raises(ValueError):
        shannon_entropy([-1])


@given(TEXTS, N)
def test_output_entropy_by_brute_force(texts, n):
    counts = Counter(gram for text in texts for gram in grams(text, n))
    assert output_entropy(texts, n) == (None if not counts else pytest.approx(shannon_entropy(list(counts.values()))))


def test_mean_of_nothing_is_none_and_means_add():
    assert Mean(0.0, 0).value is None
    assert (Mean(1.0, 2) + Mean(2.0, 2)).value == 0.75


def test_n_below_one_is_refused():
    with pytest.raises(ValueError):
        distinct_n([[1]], 0)
