"""Features, Vendi score and k-NN coverage: against loops over dictionaries, known cases, and texts of known kinds."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.eval.metrics.layout import Layout
from ds_stability.eval.metrics.neighbours import inner, measure_neighbours, tf_idf, vendi_score
from ds_stability.eval.metrics.ngrams import Corpus
from ds_stability.eval.metrics.score_samples import score_samples
from ds_stability.eval.records import Sample, ScoringContext

TEXTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=6)
SPECIAL = 99


def slow_grams(text):
    return [tuple(text[i : i + n]) for n in (1, 2, 3) for i in range(len(text) - n + 1)]


def slow_features(documents, text, member):
    """tf-idf of one text as a dictionary of length 1; it is one of the documents, or is added to them."""
    documents = documents if member else [*documents, text]
    frequency = Counter(gram for document in documents for gram in set(slow_grams(document)))
    weights = {gram: count * (math.log(len(documents) / frequency[gram]) + 1) for gram, count in Counter(slow_grams(text)).items()}
    length = math.sqrt(math.fsum(weight**2 for weight in weights.values()))
    return {gram: weight / length for gram, weight in weights.items()}


def slow_kernel(documents, first, second):
    """Each of `first` and `second` are the documents themselves, or other texts."""
    first, second = ([slow_features(documents, text, texts is documents) for text in texts] for texts in (first, second))
    return np.array([[math.fsum(weight * b.get(gram, 0.0) for gram, weight in a.items()) for b in second] for a in first])


def slow_vendi(kernel):
    return math.exp(-sum(v * math.log(v) for v in np.linalg.eigvalsh(kernel / len(kernel)) if v > 1e-15))


def slow_coverage(documents, texts, k=5):
    """Over references: does one of the texts lie no farther than the k-th nearest other reference?"""
    within, across = slow_kernel(documents, documents, documents), slow_kernel(documents, documents, texts)
    covered = []
    for i, row in enumerate(across):
        kth = sorted((cosine for j, cosine in enumerate(within[i]) if j != i), reverse=True)[k - 1]
        covered.append(any(cosine > 0 and cosine >= kth - 1e-9 for cosine in row))
    return np.mean(covered)


@given(TEXTS, TEXTS)
@settings(deadline=None, max_examples=40)
def test_kernel_by_loops(documents, texts):
    samples, references = tf_idf(Corpus.of(texts), Corpus.of(documents))
    np.testing.assert_allclose(inner(references, samples), slow_kernel(documents, documents, texts), atol=1e-12)
    alone, nothing = tf_idf(Corpus.of(texts), Corpus.of([]))
    np.testing.assert_allclose(inner(alone, alone), slow_kernel(texts, texts, texts), atol=1e-12)
    assert nothing.shape[0] == 0


def layout_of(texts, references=(), decoding="sample", prompts=None):
    """One text a prompt, or as many as there are of each prompt."""
    prompts = range(len(texts)) if prompts is None else prompts
    samples = [Sample(p, decoding, i, 0, text, "", "length") for i, (p, text) in enumerate(zip(prompts, texts, strict=True))]
    context = ScoringContext(100, (SPECIAL,), reference_ids=tuple(map(tuple, references)), reference_texts=("x",) * len(references))
    return Layout.of(samples, context)


def measured(*args, **kwargs):
    return {row.metric: row for row in measure_neighbours(layout_of(*args, **kwargs))}


def random_texts(seed, n=30, types=40):
    return np.random.default_rng(seed).integers(0, types, (n, 12)).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_vendi_and_coverage_by_loops(seed):
    references, texts = random_texts(seed, 11, 9), random_texts(seed + 100, 9, 12)
    rows = measured(texts, references)
    assert rows["vendi_score"].value == pytest.approx(slow_vendi(slow_kernel(references, texts, texts)), rel=1e-9)
    assert rows["knn_coverage"].value == pytest.approx(slow_coverage(references, texts))
    assert measured(texts)["vendi_score"].value == pytest.approx(slow_vendi(slow_kernel(texts, texts, texts)), rel=1e-9)


def test_texts_without_a_common_gram_count_one_each():
    """500 texts: 500, not the 392 that a thousand slots for the n-grams leave of them."""
    texts = np.arange(500 * 30).reshape(500, 30).tolist()
    row = measured(texts, random_texts(0))["vendi_score"]
    assert row.value == pytest.approx(500, rel=1e-9) and row.counts.sum() == 500


def test_vendi_of_equal_texts_is_1_and_of_groups_their_number():
    rng = np.random.default_rng(0)
    equal = measured([[3, 1, 4, 1, 5, 9]] * 60, random_texts(0))["vendi_score"]
    assert equal.value == pytest.approx(1.0, rel=1e-12) and np.ptp(equal.totals / equal.counts) < 1e-12
    for groups in (2, 7, 40):
        kinds = np.arange(groups * 20).reshape(groups, 20)
        texts = kinds[rng.permutation(np.repeat(np.arange(groups), 5))].tolist()
        assert measured(texts)["vendi_score"].value == pytest.approx(groups, rel=1e-9)
    assert vendi_score(np.ones((1, 1))) == 1.0


def test_equal_samples_of_a_prompt_lower_vendi_where_distinct_n_does_not_see_them():
    """Groups of distinct-n hold one sample each of neighboring prompts (docs/evaluation.md)."""
    ids = Source().texts(0, 128).reshape(32, 4, -1)
    rows = []
    for texts in (ids, np.repeat(ids[:, :1], 4, axis=1)):
        samples = [Sample(p, "sample", s, 0, texts[p, s].tolist(), "", "length") for p in range(32) for s in range(4)]
        rows.append({row.metric: row.value for row in score_samples(samples, ScoringContext(Source.types), ("distinct_2", "self_bleu_4", "vendi_score"))})
    assert rows[1]["distinct_2"] == pytest.approx(rows[0]["distinct_2"], abs=0.02)
    assert rows[1]["vendi_score"] < 32 < 100 < rows[0]["vendi_score"]
    assert rows[0]["self_bleu_4"] < 0.5 and rows[1]["self_bleu_4"] == pytest.approx(1.0)


def test_a_gram_does_not_span_a_special_token_or_two_texts():
    """[1, 2] | [3, 4] has no n-gram of [2, 3], whether a text or a special token ends in between."""
    samples, references = tf_idf(Corpus.of([[1, 2, SPECIAL, 3, 4]], [SPECIAL]), Corpus.of([[1, 2], [3, 4]]))
    assert samples.shape[1] == 6 and samples.nnz == 6 and references.nnz == 6  # 1, 2, 3, 4, (1, 2), (3, 4)


# ---- what coverage tells apart -----------------------------------------------------------------------------------------


class Source:
    """Texts as people write them, roughly: a Zipf law, 30 topics of 60 words of their own, and phrases that recur."""

    types, topics, tokens = 2000, 30, 64

    def __init__(self):
        rng = np.random.default_rng(7)
        self.share = 1.0 / np.arange(1, self.types + 1)
        self.share /= self.share.sum()
        self.words = rng.integers(100, self.types, (self.topics, 60))
        self.next = rng.integers(0, self.types, self.types)  # of half of all words the next is fixed

    def texts(self, seed, number, topics=None):
        rng = np.random.default_rng(seed)
        topic = rng.integers(0, topics or self.topics, number)
        ids = rng.choice(self.types, (number, self.tokens), p=self.share)
        own = self.words[topic[:, None], rng.integers(0, 60, ids.shape)]
        ids = np.where(rng.random(ids.shape) < 0.6, own, ids)
        for t in range(1, self.tokens):
            ids[:, t] = np.where(rng.random(number) < 0.3, self.next[ids[:, t - 1]], ids[:, t])
        return ids


def test_coverage_is_high_for_the_references_own_distribution_and_low_for_noise_and_collapse():
    """k-NN recall, which stood beside it, gave noise 0.97 and fresh texts 0.97; coverage on hashed features gave noise 0.75."""
    source = Source()
    references, fresh = source.texts(0, 200), source.texts(1, 200)
    rng = np.random.default_rng(2)
    kinds = {
        "fresh": fresh,
        "noise": rng.integers(0, source.types, fresh.shape),
        "words of another order and place": rng.permutation(fresh.ravel()).reshape(fresh.shape),
        "two topics of thirty": source.texts(3, 200, topics=2),
        "one text": np.repeat(fresh[:1], 200, axis=0),
    }
    share = {kind: measured(texts.tolist(), references.tolist())["knn_coverage"].value for kind, texts in kinds.items()}
    assert share["fresh"] > 0.9, share  # 1 - 2^-5 is what equally many of the same distribution cover
    assert share["noise"] < 0.1 and share["one text"] < 0.1, share
    assert share["two topics of thirty"] < 0.4 and share["words of another order and place"] < 0.5, share


def test_coverage_is_as_high_for_texts_that_have_nothing_but_a_zipf_law():
    """All are equally far from each other: references must not be nearer to themselves because the idf knows their n-grams."""
    share = 1.0 / np.arange(1, 2001)
    references, fresh = (np.random.default_rng(seed).choice(2000, (150, 64), p=share / share.sum()).tolist() for seed in (0, 1))
    assert measured(fresh, references)["knn_coverage"].value > 0.9


def test_texts_that_share_nothing_with_a_reference_do_not_cover_it():
    """Also where the reference has fewer than k neighbors with which it shares anything."""
    references = np.arange(80).reshape(10, 8).tolist()
    assert measured([[90 + i] * 8 for i in range(9)], references)["knn_coverage"].value == 0.0
    assert measured([references[0]] * 9, references)["knn_coverage"].value == pytest.approx(0.1)


def test_equal_texts_are_at_distance_zero():
    references = random_texts(0)
    row = measured(references, references, "reference")["knn_coverage"]
    assert row.value == pytest.approx(1.0) and "themselves" in row.note
    assert measured(random_texts(1), references, "reference")["knn_coverage"].note is None  # other human texts


@pytest.mark.parametrize(
    "texts, references, missing",
    [
        (random_texts(1), [[1, 2]] * 5, {"knn_coverage"}),
        (random_texts(1), [], {"knn_coverage"}),
        ([[], []], random_texts(0), {"vendi_score", "knn_coverage"}),
    ],
)
def test_too_few_are_nulls(texts, references, missing):
    rows = measured(texts, references)
    assert {name for name, row in rows.items() if row.value is None} == missing
    assert all(rows[name].note for name in missing)
