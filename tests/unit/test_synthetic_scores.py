"""Scores on the synthetic language against enumeration of a tiny one, and models whose scores are known."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ds_stability.data.spec import DataSpec
from ds_stability.data.synthetic import BOS_ID, EOS_ID, SyntheticLanguage
from ds_stability.errors import UserError
from ds_stability.eval import synthetic_scores
from ds_stability.eval.generation import Generated
from ds_stability.eval.synthetic_measures import conditional_kl
from ds_stability.eval.synthetic_scores import (
    SyntheticSettings,
    SyntheticTask,
    common_prefixes,
    training_sentences,
    true_distributions,
)

TINY = dict(nouns=1, verbs=1, adjectives=1, adverbs=1, prepositions=1, classes=1, max_depth=0, max_adjectives=0, max_conjuncts=0)
SMALL = SyntheticSettings(sentences=40, samples=30, training_sentences=50, modes=10, min_count=3, max_prefixes=20, batch_size=16, max_new_tokens=40)


@pytest.fixture(scope="module")
def tiny():
    return SyntheticLanguage(seed=1, **TINY)


@pytest.fixture(scope="module")
def enumerated(tiny):
    """Every sentence of the tiny language with its probability."""
    found, stack = [], [([], 1.0)]
    while stack:
        ids, probability = stack.pop()
        if ids[-1:] == [EOS_ID]:
            found.append((ids, probability))
            continue
        following = tiny.next_token_distribution(ids)
        stack += [([*ids, token], probability * following[token]) for token in np.flatnonzero(following).tolist()]
    assert sum(probability for _, probability in found) == pytest.approx(1)
    return found


@pytest.fixture(scope="module")
def language():
    return SyntheticLanguage(seed=0)


def network(vocab_size, positions=64):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab_size, n_positions=positions, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3,
                        bos_token_id=0, eos_token_id=1)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def make_loaded(model, language, **changes):
    values = dict(model=model, tokenizer=language.tokenizer(), pad_id=2, eos_ids=(EOS_ID,), context_length=64,
                  vocab_size=language.vocab_size, device=torch.device("cpu"))  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def make_task(model, language, number=300, settings=SMALL, **changes):
    return SyntheticTask(make_loaded(model, language, **changes), language, language.sample(n_sentences=number, seed=0), settings)


def run(task, folder):
    records = json.loads(json.dumps([record for unit in task.units() for record in task.run(unit, folder)], allow_nan=False))
    return records, {measured.metric.removeprefix("synthetic_"): measured for measured in task.measure(records, folder)}


def log_probabilities(model, ids):
    """log p of the next token at each prefix, [T, V], one unpadded sentence at a time."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([[BOS_ID, *ids[:-1]]])).logits[0].double(), dim=-1).numpy()


class Knowing:
    """A model made of the language itself; `change` turns a true distribution into what it says."""

    def __init__(self, language, change=lambda true: true):
        self.language, self.change = language, change

    def __call__(self, input_ids, attention_mask, use_cache):
        logits = torch.zeros(*input_ids.shape, self.language.vocab_size, dtype=torch.float64)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for position in range(sum(mask)):
                prefix = ids[: position + 1]
                if self.language.is_grammatical(prefix, complete=False) and not self.language.is_grammatical(prefix):
                    true = self.change(self.language.next_token_distribution(prefix))
                    logits[row, position] = torch.as_tensor(np.log(np.maximum(true, 1e-300)))
        return SimpleNamespace(logits=logits)


class Drawing:
    """In place of the Generator: sentences of the language."""

    language: SyntheticLanguage

    def __init__(self, model, eos_ids, pad_id):
        assert tuple(eos_ids) == (EOS_ID,)

    def generate_keyed(self, prompts, decoding, keys, max_new_tokens):
        assert decoding.name == "sample" and prompts == [[BOS_ID]] * len(keys)
        return [Generated(self.language.sample(n_sentences=1, seed=int(key.split("/")[-1]))[0][:-1], "eos", None, None, 1) for key in keys]


@pytest.fixture
def drawing(monkeypatch, language):
    monkeypatch.setattr(synthetic_scores, "Generator", Drawing)
    monkeypatch.setattr(Drawing, "language", language, raising=False)


def test_a_model_that_is_the_language_is_perfect(language, drawing, tmp_path):
    _, figures = run(make_task(Knowing(language), language), tmp_path)
    for name in ("forward_kl", "entropy_gap", "impossible_mass", "errors_per_token", "reverse_kl_possible", "own_impossible_mass"):
        assert figures[name].value == pytest.approx(0, abs=1e-9), name
    assert figures["reverse_kl"].value == pytest.approx(0, abs=2e-4)  # epsilon
    assert figures["grammatical"].value == figures["agreement_accuracy"].value == figures["agreement_mass"].value == 1
    assert figures["mode_mass"].value == pytest.approx(figures["mode_mass"].settings["true_mass"])
    assert figures["mode_mass"].value == pytest.approx(sum(math.exp(logprob) for _, logprob in language.modes(10)))
    truth = language.sample(n_sentences=40, seed=-1)
    tokens = sum(map(len, truth))
    assert figures["cross_entropy"].value == pytest.approx(-sum(language.sequence_logprob(ids) for ids in truth) / tokens)
    assert figures["entropy"].counts.sum() == tokens and len(figures["entropy"].units) == 40
    assert 0 < figures["forward_kl_corpus"].value < 3 and figures["forward_kl_prefixes"].value > 0


def test_agreement_of_a_model_that_prefers_the_wrong_number(language, drawing, tmp_path):
    def swapped(true):
        result = true.copy()
        for index, other in language.counterpart.items():
            result[other] = true[index]
        return result

    _, figures = run(make_task(Knowing(language, swapped), language), tmp_path)
    reached = [name for name in figures if name.startswith("agreement_accuracy") and figures[name].value is not None]
    assert figures["agreement_accuracy_distance_1"].value == 0 and len(reached) >= 4
    ids = language.sample(n_sentences=40, seed=-1)
    sites = [site for sentence in ids for site in language.agreement_sites(sentence)]
    assert figures["agreement_accuracy"].counts.sum() == len(sites)
    for name, low, high in (("1", 1, 1), ("4_to_6", 4, 6), ("7_up", 7, 999)):
        assert figures[f"agreement_accuracy_distance_{name}"].counts.sum() == sum(low <= site.distance <= high for site in sites)
    assert figures["agreement_accuracy_attractors_1_up"].counts.sum() == sum(site.attractors > 0 for site in sites)


def test_forward_divergences_by_enumeration(tiny, enumerated):
    """Chain rule: the expected sum of next-token divergences is the divergence between the distributions of sentences."""
    model = network(tiny.vocab_size)
    task = make_task(model, tiny)
    records = task._truth([ids for ids, _ in enumerated])
    divergence = sum(p * (math.log(p) - log_probabilities(model, ids)[np.arange(len(ids)), ids].sum()) for ids, p in enumerated)
    assert sum(p * record["forward_kl"] for (_, p), record in zip(enumerated, records, strict=True)) == pytest.approx(divergence, rel=1e-5)
    assert sum(p * record["true_entropy"] for (_, p), record in zip(enumerated, records, strict=True)) == pytest.approx(tiny.sentence_entropy)
    ids, record = enumerated[3][0], records[3]
    p = np.exp(log_probabilities(model, ids))
    assert record["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    impossible = sum(p[t][token] for t in range(len(ids)) for token in range(tiny.vocab_size)
                     if not tiny.is_grammatical([*ids[:t], token], complete=False))  # fmt: skip
    # A BOS in front is accepted everywhere, but it is no token of a sentence.
    assert record["impossible_mass"] == pytest.approx(impossible + p[0][BOS_ID], rel=1e-5)


def test_divergence_from_the_training_sentences_by_counting(tiny, tmp_path):
    model = network(tiny.vocab_size)
    task = make_task(model, tiny, 120, SyntheticSettings(sentences=4, samples=4, training_sentences=120, modes=5, batch_size=16))
    _, figures = run(task, tmp_path)
    counts = Counter(map(tuple, task.training))
    assert max(counts.values()) > 3
    tokens = sum(map(len, task.training))
    divergence = sum(n * (math.log(n / 120) - log_probabilities(model, ids)[np.arange(len(ids)), ids].sum()) for ids, n in counts.items())
    assert figures["forward_kl_corpus"].value == pytest.approx(divergence / tokens, rel=1e-5)
    mass = sum(math.exp(log_probabilities(model, ids)[np.arange(len(ids)), ids].sum()) for ids, _ in tiny.modes(5))
    assert figures["mode_mass"].value == pytest.approx(mass, rel=1e-4)


def test_divergence_at_shared_prefixes_by_counting(tiny, tmp_path):
    model, settings = network(tiny.vocab_size), SyntheticSettings(sentences=4, samples=4, training_sentences=4, min_count=7, max_prefixes=999,
                                                                  batch_size=16, alpha=0.25)  # fmt: skip
    task = make_task(model, tiny, 200, settings)
    _, figures = run(task, tmp_path)
    following: dict[tuple, Counter] = {}
    for ids in task.training:
        for position, token in enumerate(ids):
            following.setdefault(tuple(ids[:position]), Counter())[token] += 1
    kept = {prefix: counter for prefix, counter in following.items() if counter.total() >= 7}
    assert dict(common_prefixes(task.training, 7, 999)) == kept and () in kept and len(kept) > 5
    assert [counter.total() for _, counter in common_prefixes(task.training, 7, 4)] == sorted(
        (counter.total() for counter in kept.values()), reverse=True)[:4]  # fmt: skip
    forward = reverse = total = 0.0
    for prefix, counter in kept.items():
        n, log_p = counter.total(), log_probabilities(model, [*prefix, EOS_ID])[-1]
        forward += sum(count * (math.log(count / n) - log_p[token]) for token, count in counter.items())
        reverse += n * sum(math.exp(x) * (x - math.log((counter[i] + 0.25) / (n + 0.25 * len(log_p)))) for i, x in enumerate(log_p))
        total += n
    assert figures["forward_kl_prefixes"].value == pytest.approx(forward / total, rel=1e-5)
    assert figures["reverse_kl_prefixes"].value == pytest.approx(reverse / total, rel=1e-5)


def test_samples_of_a_network_by_loops(language, tmp_path):
    """Everything about its own samples, through the real generator; a fresh network is rarely grammatical."""
    model = network(language.vocab_size)
    task = make_task(model, language)
    records, figures = run(task, tmp_path)
    samples = [record for record in records if record["kind"] == "samples"]
    assert len(samples) == 30 and {record["finish"] for record in samples} <= {"eos", "length"}
    reverse = possible = wrong = 0.0
    bigrams = np.zeros((language.vocab_size,) * 2)
    for record in samples:
        ids = record["ids"]
        assert record["grammatical"] == (ids[0] != BOS_ID and language.is_grammatical(ids))
        p = np.exp(log_probabilities(model, ids))
        for position, token in enumerate(ids):
            bigrams[ids[position - 1] if position else BOS_ID] += p[position]
        for position, token in enumerate(ids):
            true = language.next_token_distribution(ids[:position])
            mixed = (1 - 1e-4) * true + 1e-4 / language.vocab_size
            reverse += float((p[position] * np.log(p[position] / mixed)).sum())
            possible += 1
            if true[token] == 0:
                wrong += 1
                break
    assert figures["reverse_kl"].value == pytest.approx(reverse / possible, rel=1e-5)
    assert figures["errors_per_token"].value == pytest.approx(wrong / possible)
    empirical = np.zeros_like(bigrams)
    for ids in task.training:
        for before, token in zip([BOS_ID, *ids[:-1]], ids, strict=True):
            empirical[before, token] += 1
    assert np.array_equal(task.training_bigrams, empirical)
    assert figures["forward_kl_bigram"].value == pytest.approx(conditional_kl(empirical, bigrams, 0.5), rel=1e-5)
    q, p = empirical.sum(axis=0) / empirical.sum(), (bigrams.sum(axis=0) + 0.5) / (bigrams.sum() + 0.5 * language.vocab_size)
    assert figures["forward_kl_unigram"].value == pytest.approx(sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0), rel=1e-5)
    modes = {tuple(ids) for ids, _ in language.modes(10)}
    assert figures["mode_coverage"].value == pytest.approx(len({tuple(record["ids"]) for record in samples} & modes) / 10)


def test_mode_coverage_and_its_expectation(language, drawing, tmp_path):
    _, figures = run(make_task(Knowing(language), language, settings=SyntheticSettings(
        sentences=2, samples=64, training_sentences=2, modes=3, min_count=100, batch_size=16)), tmp_path)  # fmt: skip
    measured = figures["mode_coverage"]
    probabilities = [math.exp(logprob) for _, logprob in language.modes(3)]
    assert measured.settings["expected_of_the_language"] == pytest.approx(sum(1 - (1 - p) ** 64 for p in probabilities) / 3)
    assert len(measured.units) == 4


def test_conditional_divergence_by_loops():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 4, size=(2, 5, 5)).astype(float)
    first[2] = 0
    value = 0.0
    for row, other in zip(first, second, strict=True):
        for a, b in zip(row, other, strict=True):
            if a > 0:
                value += row.sum() / first.sum() * a / row.sum() * math.log((a / row.sum()) / ((b + 0.5) / (other.sum() + 2.5)))
    assert conditional_kl(first, second, 0.5) == pytest.approx(value)
    assert conditional_kl(first, first, 1e-12) == pytest.approx(0, abs=1e-9)


def test_true_distributions_end_with_the_first_impossible_token(language):
    ids = language.sample(n_sentences=1, seed=3)[0]
    table = true_distributions(language, ids, language.vocab_size + 3)
    assert table.shape == (len(ids), language.vocab_size + 3) and table.sum(axis=1) == pytest.approx(1)
    assert len(true_distributions(language, [*ids[:2], BOS_ID, *ids], language.vocab_size)) == 3
    assert len(true_distributions(language, [BOS_ID, *ids], language.vocab_size)) == 1  # a second BOS is no sentence


def test_results_do_not_depend_on_the_batch_size(language, tmp_path):
    model = network(language.vocab_size)
    _, one = run(make_task(model, language), tmp_path / "a")
    _, other = run(make_task(model, language, settings=SyntheticSettings(**{**vars(SMALL), "batch_size": 7})), tmp_path / "b")
    for name, measured in one.items():
        assert other[name].value == pytest.approx(measured.value, rel=1e-4, abs=1e-9), name


def test_a_context_shorter_than_a_sentence(language, tmp_path):
    model = network(language.vocab_size, positions=6)
    records, figures = run(make_task(model, language, context_length=6), tmp_path)
    assert max(len(record["ids"]) for record in records if record["kind"] == "samples") <= 6
    assert max(record["tokens"] for record in records if record["kind"] == "truth") == 6
    assert figures["forward_kl"].value > 0
    # Of a sentence that does not fit, the probability is not known: half of it would be too high.
    short = [record for record in records if record["kind"] == "training" and record["finite"]]
    assert short and max(record["tokens"] for record in short) <= 6
    assert figures["forward_kl_corpus"].note and "do not fit" in figures["forward_kl_corpus"].note
    assert figures["mode_mass"].value is None or all(len(record["ids"]) <= 6 for record in records if record["kind"] == "modes")


def test_nan_gives_nulls(language, tmp_path):
    model = network(language.vocab_size)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    records, figures = run(make_task(model, language), tmp_path)
    assert all(measured.value is None and measured.note for measured in figures.values())
    assert "40 of 40 left out" in figures["forward_kl"].note


def test_a_model_of_another_language_is_refused(language, tiny):
    with pytest.raises(UserError, match="not that of the synthetic language"):
        SyntheticTask(make_loaded(network(language.vocab_size), SyntheticLanguage(seed=5)), language, [])
    with pytest.raises(UserError, match="not that of the synthetic language"):
        SyntheticTask(make_loaded(network(tiny.vocab_size), tiny), language, [])


def test_training_sentences_are_those_of_the_run(language):
    spec = DataSpec(dataset_name="builtin:synthetic", synthetic_tokens=500, seed=4)
    sentences = training_sentences(spec, language)
    assert sentences == language.sample(n_tokens=500, seed=8)
    fewer = training_sentences(spec, language, max_tokens=100)
    assert fewer == sentences[: len(fewer)] and 85 < sum(len(ids) + 1 for ids in fewer) <= 100
