"""The tabular model behind "The claim on the synthetic language": closed forms, the law, and the page."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))  # plain scripts: their folder is where they import from

import theory  # noqa: E402

from ds_stability.data.synthetic import SyntheticLanguage  # noqa: E402

DISTRIBUTION = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=6).map(lambda values: np.array(values) / sum(values))


@pytest.fixture(scope="module")
def language():
    return SyntheticLanguage(seed=0)


@pytest.fixture(scope="module")
def contexts(language):
    return theory.language_contexts(language)[0]


def entropy(p):
    return -float((p[p > 0] * np.log(p[p > 0])).sum())


def test_contexts_hold_the_language(language, contexts):
    assert contexts.share.sum() == pytest.approx(1) and contexts.per_context(contexts.q) == pytest.approx(1)
    assert contexts.mean(-contexts.q * np.log(contexts.q)) == pytest.approx(language.entropy_rate())


def test_contexts_of_a_sample_by_counting():
    sentences = [[5, 6, 1], [5, 6, 1], [5, 7, 1], [8, 1]]
    contexts = theory.sample_contexts(sentences)
    # (): 5 5 5 8; (5): 6 6 7; (5 6), (5 7), (8): certain. 11 tokens.
    expected = 4 * entropy(np.array([0.75, 0.25])) + 3 * entropy(np.array([2 / 3, 1 / 3]))
    assert contexts.mean(-contexts.q * np.log(contexts.q)) == pytest.approx(expected / 11)


@settings(max_examples=20, deadline=None)
@given(DISTRIBUTION, st.floats(0.05, 0.8))
def test_the_stationary_point_is_what_the_page_says(q, a):
    contexts = theory._flatten([q], [1.0])
    p = np.exp(theory.stationary_point(contexts, lambda log_p: a * log_p, damping=0.5)[0])
    assert p == pytest.approx(q ** (1 / (1 - a)) / (q ** (1 / (1 - a))).sum(), abs=1e-7)
    # It is the minimum of both objectives: no neighbor is better.
    generator = np.random.default_rng(0)
    for size in (1e-3, 0.1):
        other = p * np.exp(size * generator.normal(size=len(p)))
        other /= other.sum()
        assert (q * (1 - other**a)).sum() >= (q * (1 - p**a)).sum() - 1e-12
        assert (other * np.log(other / q)).sum() + a * entropy(other) >= (p * np.log(p / q)).sum() + a * entropy(p) - 1e-12


@settings(max_examples=20, deadline=None)
@given(DISTRIBUTION)
def test_entropy_falls_in_first_order_and_forward_kl_rises_in_second(q):
    variance = float(q @ np.log(q) ** 2 - (q @ np.log(q)) ** 2)
    a = 1e-3
    p = q ** (1 / (1 - a)) / (q ** (1 / (1 - a))).sum()
    assert entropy(q) - entropy(p) == pytest.approx(a * variance, rel=0.05, abs=1e-8)
    assert float((q * np.log(q / p)).sum()) == pytest.approx(a**2 * variance / 2, rel=0.05, abs=1e-10)


def test_at_and_above_one_everything_goes_to_the_likeliest_token():
    contexts = theory._flatten([np.array([0.5, 0.3, 0.2])], [1.0])
    for a in (1.0, 1.5):
        p = np.exp(theory.stationary_point(contexts, lambda log_p, a=a: a * log_p, damping=0.5)[0])
        assert p == pytest.approx([1, 0, 0], abs=1e-6)


def test_the_law_holds_its_ratio_at_the_stationary_point(contexts):
    log_p, row = theory.at_level(contexts, 0.5)
    log_w, law = theory.law_weights(contexts, log_p, 0.5)
    surprisal, weight = -log_p, contexts.mass * np.exp(log_w)
    mean = weight @ surprisal / weight.sum()
    ratio = weight @ (surprisal - mean) ** 2 / weight.sum() / law["sigma"] ** 2
    assert ratio == pytest.approx(0.5, abs=0.005) and row["residual"] < 1e-9
    weighted = contexts.q * np.exp(log_w)
    assert np.exp(log_p) == pytest.approx(weighted / contexts.per_context(weighted)[contexts.context], abs=1e-8)
    assert row["forward_kl"] > 0 and row["entropy"] < row["data_entropy"]


def test_level_zero_is_maximum_likelihood(contexts, language):
    log_p, row = theory.at_level(contexts, 0.0)
    assert row["forward_kl"] == pytest.approx(0, abs=1e-12) and row["gain"] == 0
    own = theory.own_stream(language, *theory.language_contexts(language), log_p)
    assert own["own_entropy"] == pytest.approx(language.entropy_rate()) and own["mean_length"] == pytest.approx(language.mean_length)
    assert own["mode_mass"] == pytest.approx(sum(math.exp(logprob) for _, logprob in language.modes(100)))
    assert own["high_frequency_share"] >= 0.5


def test_the_page_is_made_from_the_results_and_its_sentences_hold():
    result, page = json.loads(theory.RESULTS.read_text(encoding="utf-8")), theory.PAGE.read_text(encoding="utf-8")
    assert theory.filled(page, result) == page, "run python benchmarks/theory.py --render"
    assert all(f"<!-- generated: theory_{name} -->" in page for name in theory.TABLES)
    rows = result["levels"]
    for before, after in zip(rows, rows[1:], strict=False):
        assert after["entropy"] < before["entropy"] and after["forward_kl"] > before["forward_kl"] and after["top1_mass"] > before["top1_mass"]
        assert before["high_frequency_share"] < after["high_frequency_share"] < 1
    mass = [row["mode_mass"] for row in rows]
    assert mass[0] < max(mass) and mass[-1] < mass[0] / 10
    assert all(row["exponent"] < 1 for row in rows)
    assert all((row["forward_kl"] < 1e-12) == (row["level"] == 0) for row in result["samples"])
    assert all(row["entropy"] < row["true_entropy"] / 2 for row in result["samples"])
    assert all(row["objective"] < row["objective_at_data"] for row in result["exponents"])
