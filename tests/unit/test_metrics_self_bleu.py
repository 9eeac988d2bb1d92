"""Self-BLEU against sacrebleu's sentence scores with the same smoothing, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.eval.metrics import self_bleu as module
from ds_stability.eval.metrics.layout import Layout
from ds_stability.eval.metrics.ngrams import Corpus
from ds_stability.eval.metrics.self_bleu import count_grams, measure_self_bleu, self_bleu
from ds_stability.eval.records import Sample, ScoringContext, jackknife_units

TEXTS = st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=14), min_size=2, max_size=7)


def oracle(texts):
    bleu = pytest.importorskip("sacrebleu").metrics.BLEU(smooth_method="exp", tokenize="none", effective_order=False)
    words = [" ".join(f"t{token}" for token in text) for text in texts]
    return [bleu.sentence_score(word, words[:i] + words[i + 1 :]).score / 100 for i, word in enumerate(words)]


def scores(texts, kept=None):
    corpus = Corpus.of(texts)
    return self_bleu(corpus, count_grams(corpus), np.ones(len(texts), dtype=bool) if kept is None else kept)


@given(TEXTS)
@settings(deadline=None, max_examples=150)
def test_every_score_is_sacrebleus(texts):
    assert scores(texts) == pytest.approx(oracle(texts), abs=1e-9)


@given(TEXTS, st.data())
@settings(deadline=None, max_examples=50)
def test_leaving_texts_out_is_scoring_the_others(texts, data):
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)).filter(lambda k: sum(k) > 1)))
    assert scores(texts, kept) == pytest.approx(scores([t for t, k in zip(texts, kept, strict=True) if k]))


def test_by_hand():
    same = [[1, 2, 3, 4, 5]] * 3
    assert scores(same) == pytest.approx([1.0] * 3)
    assert scores([[1, 2, 3, 4], [5, 6, 7, 8]]).tolist() == [0.0, 0.0]  # not one token in common
    # (1 1 2 3) against (1 2 3 4): unigrams 3/4, bigrams 2/3, trigrams 1/2, no 4-gram of 1: 1/(2*1); lengths equal.
    assert scores([[1, 1, 2, 3], [1, 2, 3, 4]])[0] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_all_references_count():
    # Half of the text is in each of two others: an implementation that takes the first only would score lower.
    texts = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9], [9, 9, 9, 9, 5, 6, 7, 8]]
    assert scores(texts)[0] > scores(texts[:2])[0]


def layout_of(texts, prompts=None):
    samples = [Sample(i, "s", 0, 0, text, "", "length") for i, text in enumerate(texts)]
    return Layout.of(samples, ScoringContext(100))


def test_measured_value_and_jackknife():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 6, rng.integers(5, 12)).tolist() for _ in range(6)]
    (row,) = measure_self_bleu(layout_of(texts))
    assert row.value == pytest.approx(np.mean(oracle(texts)))
    without = [np.mean(oracle(texts[:i] + texts[i + 1 :])) for i in range(6)]
    assert row.totals == pytest.approx(jackknife_units(np.mean(oracle(texts)), without, np.ones(6))[0])


def test_short_texts_are_left_out_and_counted():
    (row,) = measure_self_bleu(layout_of([[1, 2, 3, 4], [], [1, 2, 3], [1, 2, 3, 4]]))
    assert row.value == pytest.approx(1.0) and row.settings["texts"] == 2 and row.settings["texts_too_short"] == 2
    assert "no interval" in row.note  # with one text left there is nothing to compare
    (row,) = measure_self_bleu(layout_of([[1, 2, 3, 4], [1, 2]]))
    assert row.value is None and "fewer than two texts" in row.note


def test_subsample_is_stated_and_depends_on_keys_only(monkeypatch):
    monkeypatch.setattr("ds_stability.eval.metrics.layout.SUBSAMPLE_TEXTS", 10)
    rng = np.random.default_rng(0)
    one, two = (layout_of([rng.integers(0, 9, 8).tolist() for _ in range(30)]) for _ in range(2))
    assert one.subsample.tolist() == two.subsample.tolist() and len(one.subsample) == 10
    assert measure_self_bleu(one)[0].settings["texts"] == 10
    assert module.SUBSAMPLE_TEXTS == 500
