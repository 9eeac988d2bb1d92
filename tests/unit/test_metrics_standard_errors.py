"""Standard errors of pooled statistics: units of the jackknife by formula, and against the spread over many samples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability.eval.intervals import row
from ds_stability.eval.metrics import DISTINCT, NEIGHBOURS, POOLED, SELF_BLEU
from ds_stability.eval.metrics.layout import Layout
from ds_stability.eval.metrics.score_samples import score_samples
from ds_stability.eval.records import Measured, Sample, ScoringContext, jackknife_units
from ds_stability.eval.results import memorization_gap
from ds_stability.eval.spread import pseudo_values
from ds_stability.eval.structure import structure_scores

TYPES, TOPICS, TOKENS = 1000, 30, 48
SIZES = st.lists(st.integers(1, 40), min_size=2, max_size=12)


def standard_error(totals, counts):
    """What a table shows for these units, but where all are equal."""
    used = counts > 0
    values = pseudo_values(totals[used], counts[used])
    return values.std(ddof=1) / math.sqrt(len(values))


@given(SIZES, st.integers(0, 99))
def test_units_of_a_ratio_are_its_sums(sizes, seed):
    """A figure that is a mean gets back what it is the mean of, whatever the sizes."""
    counts = np.array(sizes, dtype=float)
    totals = np.random.default_rng(seed).normal(size=len(counts)) * counts
    value = totals.sum() / counts.sum()
    without = [(totals.sum() - t) / (counts.sum() - c) for t, c in zip(totals, counts, strict=True)]
    found, found_counts = jackknife_units(value, without, sizes)
    assert found == pytest.approx(totals, abs=1e-9) and found_counts.tolist() == counts.tolist()


@given(SIZES, st.integers(0, 99))
def test_units_are_pseudo_values_of_busing_and_others(sizes, seed):
    rng = np.random.default_rng(seed)
    value, without, n = rng.normal(), rng.normal(size=len(sizes)), sum(sizes)
    totals, counts = jackknife_units(value, without, sizes)
    pseudo = [n / m * value - (n / m - 1) * left for m, left in zip(sizes, without, strict=True)]
    estimate = len(sizes) * value - sum((1 - m / n) * left for m, left in zip(sizes, without, strict=True))  # theirs
    assert totals.sum() / counts.sum() == pytest.approx(value)
    assert totals / counts - value == pytest.approx(np.array(pseudo) - estimate, abs=1e-8 * (1 + max(map(abs, pseudo))))


def test_a_statistic_that_is_the_number_of_texts_hardly_spreads():
    """Groups of 1 and 2 of 50 texts: equal weights would give a standard error of 2.3."""
    sizes = np.array([1, 2] * 16 + [2])
    totals, counts = jackknife_units(sizes.sum(), sizes.sum() - sizes, sizes)
    assert standard_error(totals, counts) < 0.1


@pytest.mark.parametrize("prompts, folds", [(1, 1), (7, 7), (20, 20), (21, 20), (23, 20), (32, 16), (127, 18), (128, 16), (600, 20), (1250, 16)])
@pytest.mark.parametrize("samples", [1, 3, 8])
def test_folds_are_as_equal_as_can_be_and_the_subsample_takes_equally_of_each(prompts, folds, samples):
    texts = [Sample(p, "sample", s, 0, [1, 2], "", "length") for p in range(prompts) for s in range(samples)]
    layout = Layout.of(texts, ScoringContext(10))
    assert layout.folds == folds
    everything = np.bincount(layout.folds_of(np.arange(len(texts))), minlength=folds)
    assert np.ptp(everything) <= samples * (prompts % folds > 0)
    chosen = np.bincount(layout.folds_of(layout.subsample), minlength=folds)
    assert len(set(layout.subsample.tolist())) == chosen.sum() == min(500, len(texts))
    assert np.ptp(chosen) <= (1 if len(texts) > 500 and prompts % folds == 0 else np.ptp(everything) + 1)


# ---- against the truth -------------------------------------------------------------------------------------------------


def source():
    """ids [texts, TOKENS] of `prompts` times `samples`: a Zipf law, a topic and its strength by prompt, fixed followers, and
    phrases that one text in five starts with."""
    rng = np.random.default_rng(7)
    share = 1.0 / np.arange(1, TYPES + 1)
    share /= share.sum()
    topics, follower, phrases = rng.integers(50, TYPES, (TOPICS, 40)), rng.integers(0, TYPES, TYPES), rng.integers(0, TYPES, (5, TOKENS // 3))

    def draw(rng, prompts, samples):
        number = prompts * samples
        topic, strength = (np.repeat(values, samples)[:, None] for values in (rng.integers(0, TOPICS, prompts), rng.beta(2, 3, prompts)))
        ids = rng.choice(TYPES, (number, TOKENS), p=share)
        ids = np.where(rng.random(ids.shape) < strength, topics[topic, rng.integers(0, 40, ids.shape)], ids)
        for t in range(1, TOKENS):
            ids[:, t] = np.where(rng.random(number) < 0.3, follower[ids[:, t - 1]], ids[:, t])
        copies = rng.random(number) < 0.2
        ids[copies, : TOKENS // 3] = phrases[rng.integers(0, 5, int(copies.sum()))]
        return ids

    return draw


def written(ids):
    return "".join(f" w{i}{'.' if i % 11 == 3 else ',' if i % 13 == 1 else ''}" for i in ids)


@pytest.fixture(scope="module")
def ratios():
    """Of each metric: root mean square of its standard error, over the standard deviation of its value, in 80 samples of 30
    prompts (15 folds of two) with 2 texts each, cut at random."""
    draw, prompts, samples, values, errors = source(), 30, 2, {}, {}
    references = draw(np.random.default_rng(0), prompts, 1)
    context = ScoringContext(TYPES, (), reference_ids=tuple(map(tuple, references.tolist())), reference_texts=tuple(map(written, references)))
    for k in range(80):
        rng = np.random.default_rng(1000 + k)
        ids = [text[:length].tolist() for text, length in zip(draw(rng, prompts, samples), rng.integers(12, TOKENS + 1, prompts * samples), strict=True)]
        texts = [Sample(i // samples, "sample", i % samples, 0, text, written(text), "length") for i, text in enumerate(ids)]
        rows = score_samples(texts, context, (*DISTINCT, *POOLED, *SELF_BLEU, *NEIGHBOURS))
        for found in [*rows, *structure_scores([text.text for text in texts], context.reference_texts, 4, "sample")]:
            values.setdefault(found.metric, []).append(found.value)
            errors.setdefault(found.metric, []).append(standard_error(found.totals, found.counts))
    return {name: np.sqrt(np.mean(np.square(errors[name]))) / np.std(values[name], ddof=1) for name in values}


def test_standard_errors_are_the_spread_over_samples(ratios):
    """Vendi's was 3 to 8 times too large, that of output_entropy_2 2.6 times: folds of unequal size with equal weights."""
    exact = {"vendi_score", "self_bleu_4", "zipf_exponent", "output_entropy_1", "output_entropy_2", *DISTINCT, "sentence_length",
             "sentence_length_wasserstein", "sentence_length_total_variation", "kl_bigram", "kl_bigram_reverse", "kl_unigram_reverse"}  # fmt: skip
    assert {name: ratio for name, ratio in ratios.items() if name in exact and not 0.8 < ratio < 1.3} == {}


def test_standard_errors_of_what_counts_whether_anything_occurs_are_too_large_at_most(ratios):
    """The jackknife is never too small in expectation (Efron and Stein 1981); docs/evaluation.md says by how much it is not."""
    wide = {"kl_unigram": 1.6, "mode_coverage": 1.6, "knn_coverage": 2.0, "punctuation_total_variation": 1.8}
    assert {name: ratios[name] for name, most in wide.items() if not 0.8 < ratios[name] < most} == {}


def test_the_table_shows_these_standard_errors():
    rng = np.random.default_rng(0)
    totals, counts = rng.normal(3, 1, 12), rng.integers(1, 9, 12).astype(float)
    assert row(Measured("m", list(range(12)), totals, counts, unit="nats"))["stderr"] == pytest.approx(standard_error(totals, counts))


def test_standard_error_of_the_memorization_gap():
    """Windows of unequal length; fewer of the one text than of the other."""
    values, errors = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        figures = []
        for split, windows, level in (("held_out", 40, 2.0), ("train", 64, 1.5)):
            counts = rng.integers(20, 200, windows).astype(float)
            totals = counts * (level + rng.normal(0, 0.3, windows)) + rng.normal(0, 10, windows)
            figures.append(Measured("bits_per_byte", list(range(windows)), totals, counts, split=split))
        gap = memorization_gap(figures)
        values.append(gap.value)
        errors.append(standard_error(gap.totals, gap.counts))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.1)
