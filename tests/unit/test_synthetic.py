"""The synthetic language against brute force: enumeration of a tiny language, and large samples of the full one."""

import math
from collections import Counter

import numpy as np
import pytest

from ds_stability.data.synthetic import BOS_ID, EOS_ID, PAD_ID, UNKNOWN_ID, SyntheticLanguage

ONE_WORD = dict(nouns=1, verbs=1, adjectives=1, adverbs=1, prepositions=1)
TINY = {  # small enough to list every sentence
    "adjectives": dict(ONE_WORD, classes=2, max_depth=0, max_adjectives=1, max_conjuncts=0),
    "conjunction": dict(ONE_WORD, classes=1, max_depth=0, max_adjectives=0, max_conjuncts=1),
    "clauses": dict(ONE_WORD, classes=1, max_depth=1, max_adjectives=0, max_conjuncts=0),
}


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    return SyntheticLanguage(seed=1, **TINY[request.param])


@pytest.fixture(scope="module")
def enumerated(tiny):
    """Every sentence with its probability, by following every token of positive probability."""
    sentences, stack = [], [([], 0.0)]
    while stack:
        ids, logprob = stack.pop()
        if ids and ids[-1] == EOS_ID:
            sentences.append((ids, logprob))
            continue
        probabilities = tiny.next_token_distribution(ids)
        for index in np.flatnonzero(probabilities).tolist():
            stack.append((ids + [index], logprob + math.log(probabilities[index])))
    return sentences


@pytest.fixture(scope="module")
def language():
    return SyntheticLanguage(seed=0)


@pytest.fixture(scope="module")
def sample(language):
    return language.sample(n_sentences=20_000, seed=5)


def test_probabilities_of_all_sentences_sum_to_one(tiny, enumerated):
    assert math.fsum(math.exp(logprob) for _, logprob in enumerated) == pytest.approx(1, abs=1e-10)
    assert len({tuple(ids) for ids, _ in enumerated}) == len(enumerated) > 1000
    assert all(tiny.is_grammatical(ids) for ids, _ in enumerated[::50])


def test_entropy_length_and_ngrams_by_enumeration(tiny, enumerated):
    mass = [math.exp(logprob) for _, logprob in enumerated]
    assert sum(-p * math.log(p) for p in mass) == pytest.approx(tiny.sentence_entropy, rel=1e-9)
    assert sum(p * len(ids) for p, (ids, _) in zip(mass, enumerated)) == pytest.approx(tiny.mean_length, rel=1e-9)
    unigram, bigram = np.zeros(tiny.vocab_size), np.zeros((tiny.vocab_size,) * 2)
    for p, (ids, _) in zip(mass, enumerated):
        for before, index in zip([BOS_ID, *ids], ids):
            unigram[index] += p / tiny.mean_length
            bigram[before, index] += p / tiny.mean_length
    np.testing.assert_allclose(tiny.unigram(), unigram, atol=1e-10)
    np.testing.assert_allclose(tiny.bigram(), bigram, atol=1e-10)


def test_modes_by_enumeration(tiny, enumerated):
    expected = sorted((logprob for _, logprob in enumerated), reverse=True)[:200]
    modes = tiny.modes(200)
    np.testing.assert_allclose([logprob for _, logprob in modes], expected, atol=1e-9)
    assert len({tuple(ids) for ids, _ in modes}) == 200
    assert all(tiny.sequence_logprob(ids) == pytest.approx(logprob, abs=1e-9) for ids, logprob in modes)


def test_distributions_sum_to_one(language, sample):
    assert language.unigram().sum() == pytest.approx(1, abs=1e-12)
    assert language.bigram().sum() == pytest.approx(1, abs=1e-12)
    assert language.stationary().sum() == pytest.approx(1, abs=1e-12)
    for ids in sample[:50]:
        for length in range(len(ids)):
            probabilities = language.next_token_distribution([BOS_ID, *ids[:length]])
            assert probabilities.sum() == pytest.approx(1, abs=1e-12)
            assert not probabilities[[BOS_ID, PAD_ID, UNKNOWN_ID]].any()


def test_bigram_marginals_are_the_unigram(language):
    bigram, unigram = language.bigram(), language.unigram()
    np.testing.assert_allclose(bigram.sum(0), unigram, atol=1e-14)
    rows = bigram.sum(1)
    assert rows[BOS_ID] == pytest.approx(1 / language.mean_length)
    expected = unigram.copy()
    expected[EOS_ID], expected[BOS_ID] = 0, unigram[EOS_ID]
    np.testing.assert_allclose(rows, expected, atol=1e-14)


def test_sequence_logprob_is_the_product(language, sample):
    for ids in sample[:50]:
        product = sum(math.log(language.next_token_distribution(ids[:length])[ids[length]]) for length in range(len(ids)))
        assert language.sequence_logprob(ids) == pytest.approx(product, abs=1e-10)
        assert language.sequence_logprob([BOS_ID, *ids]) == language.sequence_logprob(ids)
        assert language.token_logprobs(ids).shape == (len(ids),)


def test_entropy_rate_against_monte_carlo(language, sample):
    logprobs = np.array([language.sequence_logprob(ids) for ids in sample])
    lengths = np.array([len(ids) for ids in sample])
    assert abs(-logprobs.mean() - language.sentence_entropy) < 5 * logprobs.std() / math.sqrt(len(sample))
    assert abs(lengths.mean() - language.mean_length) < 5 * lengths.std() / math.sqrt(len(sample))
    residual = -logprobs - language.entropy_rate() * lengths  # ratio estimator
    assert abs(residual.mean()) < 5 * residual.std() / math.sqrt(len(sample))
    assert language.entropy_rate() == pytest.approx(language.sentence_entropy / language.mean_length, rel=1e-12)


def test_sampled_frequencies_are_the_exact_ones(language, sample):
    counts = Counter(index for ids in sample for index in ids)
    first = Counter(ids[0] for ids in sample)
    start = language.next_token_distribution([])
    for index in np.flatnonzero(start > 1e-3):
        expected = len(sample) * start[index]
        assert abs(first[int(index)] - expected) < 5 * math.sqrt(expected)
    total = sum(counts.values())
    frequency = np.array([counts[index] / total for index in range(language.vocab_size)])
    # The total variation distance of n tokens from their law is about sum(sqrt(2 p / (pi n))) / 2.
    bound = 1.5 * np.sqrt(2 * language.unigram() / (math.pi * total)).sum() / 2
    assert np.abs(frequency - language.unigram()).sum() / 2 < bound


def test_every_sample_is_grammatical_and_no_corruption_is(language, sample):
    distances, attractors = Counter(), 0
    for ids in sample[:2000]:
        assert language.is_grammatical(ids) and language.is_grammatical(ids[:-1], complete=False)
        assert not language.is_grammatical(ids[:-1])
        for site in language.agreement_sites(ids):
            distances[site.distance] += 1
            attractors += site.attractors > 0
            assert ids[site.position] in site.correct and not set(site.correct) & set(site.wrong)
            corrupted = list(ids)
            corrupted[site.position] = language.counterpart[ids[site.position]]
            assert corrupted[site.position] in site.wrong
            assert not language.is_grammatical(corrupted)
            assert language.sequence_logprob(corrupted) == -math.inf
            before = language.next_token_distribution(ids[: site.position])
            assert before[list(site.correct)].min() > 0 and before[list(site.wrong)].max() == 0
    assert max(distances) >= 10 and attractors > 100 and 0.2 < distances[1] / sum(distances.values()) < 0.8


def test_agreement_head_and_distance_by_hand(language):
    def words(*groups):
        return [language._groups[group][0] for group in groups]

    ids = words(("determiner", "any"), ("noun", "pl", 0), ("that",), ("determiner", "sg"), ("noun", "sg", 1),
                ("transitive", "sg"), ("transitive", "pl"), ("reflexive", "pl"), ("and",), ("intransitive", "pl"), ("end",))
    assert language.is_grammatical(ids)
    sites = [(site.position, site.distance, site.attractors) for site in language.agreement_sites(ids)]
    assert sites == [(5, 1, 0), (6, 5, 1), (7, 6, 1), (9, 8, 1)]


def test_words_are_zipfian_and_distinct(language):
    assert len(set(language.vocabulary)) == language.vocab_size
    nouns = language.unigram()[language._groups["noun", "sg", 0]]
    np.testing.assert_allclose(nouns[0] / nouns, np.arange(1, len(nouns) + 1), rtol=1e-9)


def test_same_arguments_same_language():
    one, other, third = SyntheticLanguage(seed=3), SyntheticLanguage(seed=3), SyntheticLanguage(seed=4)
    assert one.vocabulary == other.vocabulary and one.fingerprint() == other.fingerprint() != third.fingerprint()
    assert one.sample(n_tokens=500, seed=1) == other.sample(n_tokens=500, seed=1) != one.sample(n_tokens=500, seed=2)
    assert one.vocabulary != third.vocabulary


def test_impossible_prefixes(language):
    for ids in ([EOS_ID], [BOS_ID, BOS_ID], [UNKNOWN_ID], [10**6]):
        assert not language.is_grammatical(ids, complete=False)
        assert language.sequence_logprob(ids) == -math.inf
    sentence = language.modes(1)[0][0]
    with pytest.raises(ValueError, match="not the beginning"):
        language.next_token_distribution(sentence)
    with pytest.raises(ValueError, match="at least 1"):
        SyntheticLanguage(nouns=0)


def test_tokenizer_ids_are_the_languages(language, sample):
    tokenizer = language.tokenizer()
    assert len(tokenizer) == language.vocab_size
    for ids in sample[:100]:
        assert tokenizer(language.text(ids))["input_ids"] == [BOS_ID, *ids[:-1]]
        assert tokenizer.decode(ids, skip_special_tokens=True) == language.text(ids)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)
    assert tokenizer("neverseenword")["input_ids"] == [BOS_ID, UNKNOWN_ID]
