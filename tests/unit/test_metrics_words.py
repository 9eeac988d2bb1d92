"""Words, MTLD and HD-D: against definitions written out, exact fractions and hand-worked cases."""

from collections import Counter
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability.eval.metrics.layout import Layout
from ds_stability.eval.metrics.ngrams import Corpus
from ds_stability.eval.metrics.words import MIN_WORDS, UNSPACED_NOTE, hdd, measure_words, mtld, number_words
from ds_stability.eval.records import Sample, ScoringContext
from ds_stability.eval.texts import high_frequency_words


def measured(texts, frequent=None):
    samples = [Sample(i, "sample", 0, 0, [1], text, "length") for i, text in enumerate(texts)]
    return {row.metric: row for row in measure_words(Layout.of(samples, ScoringContext(10, high_frequency_words=frequent)))}


def slow_factors(words):
    factors, start = 0, 0
    for end in range(1, len(words) + 1):
        stretch = words[start:end]
        if len(set(stretch)) / len(stretch) < 0.72:
            factors, start = factors + 1, end
    rest = words[start:]
    return factors + ((1 - len(set(rest)) / len(rest)) / 0.28 if rest else 0)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60))
def test_mtld_as_written_in_the_paper(words):
    both = slow_factors(words), slow_factors(words[::-1])
    expected = None if 0 in both else sum(len(words) / f for f in both) / 2
    assert mtld(words) == (None if expected is None else pytest.approx(expected))
    assert (mtld(words) is None) == (len(set(words)) == len(words))


def test_mtld_by_hand():
    assert mtld([1, 1] * 10) == 2.0  # each pair ends a factor
    # a b c a: .75 is above .72, so a quarter of .28 of a factor: 4 / (.25 / .28)
    assert mtld([1, 2, 3, 1]) == pytest.approx(4 / (0.25 / 0.28))


def exact_hdd(words):
    n = len(words)
    missed = [Fraction(comb(n - k, 42), comb(n, 42)) for k in Counter(words).values()]
    return float(sum(1 - m for m in missed) / 42)


@given(st.lists(st.lists(st.integers(0, 30), min_size=42, max_size=90), min_size=1, max_size=3))
def test_hdd_in_exact_fractions(texts):
    assert hdd(Corpus.of(texts)) == pytest.approx([exact_hdd(text) for text in texts], rel=1e-9)


def test_hdd_by_hand():
    values = hdd(Corpus.of([[7] * 50, list(range(42)), [1] * 41, []]))
    assert values[0] == pytest.approx(1 / 42) and values[1] == pytest.approx(1.0) and np.isnan(values[2:]).all()


def test_hdd_is_the_mean_of_draws():
    words = [i % 17 * (i % 3) for i in range(80)]
    rng = np.random.default_rng(0)
    draws = [len(set(rng.permutation(words)[:42].tolist())) / 42 for _ in range(4000)]
    assert hdd(Corpus.of([words]))[0] == pytest.approx(np.mean(draws), abs=5e-3)


def test_high_frequency_words_pool_over_texts_and_skip_texts_without_words():
    rows = measured(["the cat the", '""\n', "a cat"], ("the", "a", "unseen"))
    row = rows["high_frequency_word_share"]
    assert row.value == pytest.approx(3 / 5) and row.counts.tolist() == [3, 0, 2]
    assert row.settings["texts_without_words"] == 1 and "1 of 3 texts have no word" in row.note
    assert rows["no_words_rate"].value == pytest.approx(1 / 3)
    assert rows["words_per_text"].value == pytest.approx(5 / 3)


def test_no_word_at_all_is_null_and_never_zero():
    rows = measured(["\n\n", "..."], ("the",))
    for name in ("high_frequency_word_share", "mtld", "hdd"):
        assert rows[name].value is None and rows[name].note
    assert rows["no_words_rate"].value == 1.0 and rows["no_words_rate"].settings["texts"] == 2


def test_without_a_set_of_words():
    assert "reference_file" in measured(["a b"])["high_frequency_word_share"].note


def test_the_set_of_words_and_the_samples_are_cut_alike():
    """Decomposed training text and composed samples have the same words, of any script."""
    chosen = high_frequency_words(["यह हिन्दी है है e\u0301te\u0301 e\u0301te\u0301"])
    assert set(chosen) == {"है", "été"}
    assert measured(["है हिन्दी ÉTÉ", "है"], chosen)["high_frequency_word_share"].value == pytest.approx(3 / 4)


def test_rows_say_where_words_are_characters_or_runs():
    rows = measured(["中文字，一个字", "ภาษาไทย", "two words"], ("中",))
    assert rows["words_per_text"].value == pytest.approx(9 / 3) and rows["words_per_text"].note == UNSPACED_NOTE
    assert rows["high_frequency_word_share"].note == UNSPACED_NOTE
    assert measured(["中文", "three more words"])["words_per_text"].note is None


def test_averages_take_long_texts_only():
    long, unique = ["a", "b", "c", "a"] * 15, [f"w{i}" for i in range(MIN_WORDS)]
    rows = measured([" ".join(long), "too short", " ".join(unique)])
    assert rows["mtld"].value == pytest.approx(mtld(number_words([long])[0].tokens.tolist()))
    assert rows["mtld"].settings["texts_too_short"] == 1 and rows["mtld"].settings["texts_without_repeat"] == 1
    assert rows["hdd"].value == pytest.approx((exact_hdd(long) + 1.0) / 2)
