"""Features, Vendi score, k-NN recall and coverage: against loops and known cases."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.eval.metrics.layout import Layout
from ds_stability.eval.metrics.neighbours import (
    Features,
    knn_coverage,
    knn_recall,
    measure_neighbours,
    radii,
    squared_distances,
    vendi_score,
)
from ds_stability.eval.metrics.ngrams import Corpus
from ds_stability.eval.records import Sample, ScoringContext

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=6)
MASK = 2**64 - 1


def slow_mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_grams(text):
    """(hash of each 1-, 2- and 3-gram) in plain integers."""
    token = [slow_mix((t + 0x9E3779B97F4A7C15) & MASK) for t in text]
    for i in range(len(text)):
        value = token[i]
        yield value
        for j in (i + 1, i + 2):
            if j < len(text):
                value = slow_mix((value * 31 + token[j]) & MASK)
                yield value


def slow_features(documents, texts):
    frequency = Counter(h for text in documents for h in set(slow_grams(text)))
    rows = np.zeros((len(texts), 1024))
    for i, text in enumerate(texts):
        for h in slow_grams(text):
            rows[i, h % 1024] += (-1) ** ((h >> 10) & 1) * (math.log((1 + len(documents)) / (1 + frequency[h])) + 1)
        rows[i] /= np.linalg.norm(rows[i]) or 1.0
    return rows


@given(TEXTS, TEXTS)
@settings(deadline=None, max_examples=40)
def test_features_by_loops(documents, texts):
    np.testing.assert_allclose(Features(Corpus.of(documents))(Corpus.of(texts)), slow_features(documents, texts), atol=1e-12)


def test_vendi_counts_equal_modes_and_both_forms_agree():
    modes = np.eye(7)[np.repeat(np.arange(5), 3)]  # five modes, three copies each
    assert vendi_score(modes) == pytest.approx(5.0)
    assert vendi_score(np.ones((9, 1))) == pytest.approx(1.0)
    rows = np.random.default_rng(0).normal(size=(6, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(rows @ rows.T / 6)  # the other form than the one taken for d < n
    expected = math.exp(-sum(v * math.log(v) for v in eigenvalues if v > 1e-15))
    assert vendi_score(rows) == pytest.approx(expected)


def slow_knn(samples, references, k_recall, k_coverage):
    def distance(a, b):
        return float(np.linalg.norm(a - b))

    def radius(points, i, k):
        return sorted(distance(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    recall = [any(distance(r, s) <= radius(samples, j, k_recall) for j, s in enumerate(samples)) for r in references]
    coverage = [any(distance(r, s) <= radius(references, i, k_coverage) for s in samples) for i, r in enumerate(references)]
    return np.mean(recall), np.mean(coverage)


@pytest.mark.parametrize("seed", range(8))
def test_recall_and_coverage_by_loops(seed):
    rng = np.random.default_rng(seed)
    samples, references = (rng.normal(size=(n, 3)) + shift for n, shift in ((9, 0.7), (11, 0.0)))
    samples, references = (p / np.linalg.norm(p, axis=1, keepdims=True) for p in (samples, references))
    across = squared_distances(references, samples)
    recall = knn_recall(across, radii(squared_distances(samples, samples), 3))
    coverage = knn_coverage(across, radii(squared_distances(references, references), 5))
    assert (recall, coverage) == pytest.approx(slow_knn(samples, references, 3, 5))


def layout_of(texts, references, decoding="sample"):
    samples = [Sample(i, decoding, 0, 0, text, "", "length") for i, text in enumerate(texts)]
    context = ScoringContext(100, reference_ids=tuple(map(tuple, references)), reference_texts=("x",) * len(references))
    return Layout.of(samples, context)


def measured(*args):
    return {row.metric: row for row in measure_neighbours(layout_of(*args))}


def random_texts(seed, n=30, types=40):
    return np.random.default_rng(seed).integers(0, types, (n, 12)).tolist()


def test_collapse_lowers_all_three():
    references = random_texts(0)
    spread, collapsed = measured(random_texts(1), references), measured([[1] * 12] * 30, references)
    assert collapsed["vendi_score"].value == pytest.approx(1.0)
    assert spread["vendi_score"].value > 15
    for name in ("knn_recall", "knn_coverage"):
        assert collapsed[name].value < spread[name].value
    assert collapsed["knn_recall"].value == 0.0


def test_equal_texts_are_at_distance_zero():
    references = random_texts(0)
    rows = measured(references, references, "reference")
    assert rows["knn_recall"].value == pytest.approx(1.0) and rows["knn_coverage"].value == pytest.approx(1.0)
    assert "themselves" in rows["knn_recall"].note
    assert measured(random_texts(1), references, "reference")["knn_recall"].note is None  # other human texts


@pytest.mark.parametrize(
    "texts, references, missing",
    [
        ([[1, 2]] * 3, random_texts(0), {"knn_recall"}),
        (random_texts(1), [[1, 2]] * 5, {"knn_coverage"}),
        (random_texts(1), [], {"knn_recall", "knn_coverage"}),
        ([[], []], random_texts(0), {"vendi_score", "knn_recall", "knn_coverage"}),
    ],
)
def test_too_few_are_nulls(texts, references, missing):
    rows = measured(texts, references)
    assert {name for name, row in rows.items() if row.value is None} == missing
    assert all(rows[name].note for name in missing)
