"""Minimal pairs: what the templates promise, and the accuracy of models whose preferences are known."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ds_stability.data.tokenizer import train_bpe, word_tokenizer
from ds_stability.errors import UserError
from ds_stability.eval.minimal_pairs import MinimalPairsTask, all_pairs, preference, sentence_logprobs, sentence_prefix
from ds_stability.eval.minimal_pairs_templates import MASS, NAMES, PEOPLE, PHENOMENA, THINGS, VERBS, make_pairs

MIN_PAIRS = 60


def words(sentence):
    return re.findall(r"\w+|[.?]", sentence)


@pytest.fixture(scope="module")
def pairs():
    return {name: make_pairs(name) for name in PHENOMENA}


@pytest.fixture(scope="module")
def vocabulary(pairs):
    return sorted({word for found in pairs.values() for pair in found for sentence in pair for word in sentence.split()})


def test_there_are_enough_phenomena_and_pairs(pairs):
    assert len(pairs) >= 12
    assert all(len(found) >= MIN_PAIRS and len(set(found)) == len(found) for found in pairs.values())


def test_a_pair_differs_in_its_phenomenon_only(pairs):
    for name, found in pairs.items():
        for good, bad in found:
            assert good != bad, name
            assert len(good.split()) == len(bad.split()), (name, good, bad)
            for sentence in (good, bad):
                assert sentence[0].isupper() and sentence[-1] in ".?" and "  " not in sentence and "_" not in sentence, sentence
            one, other = (sorted(sentence.lower().replace(".", "").replace("?", "").split()) for sentence in (good, bad))
            changed = len([word for word in set(one + other) if one.count(word) != other.count(word)])
            assert changed <= 2, (name, good, bad)  # one word for another, or the same words in another order


def test_no_sentence_is_good_in_one_place_and_bad_in_another(pairs):
    good = {pair[0] for found in pairs.values() for pair in found}
    bad = {pair[1] for found in pairs.values() for pair in found}
    assert not good & bad


@pytest.mark.parametrize("name", ["agreement_simple", "agreement_attractor", "agreement_relative", "agreement_verb_coordination",
                                  "reflexive_gender", "reflexive_number", "reflexive_locality", "determiner_noun", "article"])  # fmt: skip
def test_neither_form_is_always_right(pairs, name):
    """A model that likes one form best, whatever the context, must not get far beyond chance."""
    forms = {"agreement_attractor": ("are", "were"), "reflexive_gender": ("herself.",), "reflexive_number": ("themselves.",),
             "reflexive_locality": ("themselves.",), "article": ("an",)}  # fmt: skip
    if name in forms:
        share = sum(bool(set(forms[name]) & set(good.split())) for good, _ in pairs[name][:100]) / 100
    else:  # the form that ends in -s
        share = sum([g for g, b in zip(good.split(), bad.split()) if g != b][0].rstrip(".").endswith("s") for good, bad in pairs[name][:100]) / 100
    assert 0.25 < share < 0.75, share


def test_agreement_is_with_the_subject(pairs):
    plurals = {"men", "women", "children", *(noun + "s" for noun in PEOPLE)}
    for good, bad in pairs["agreement_simple"]:
        noun, verb = good.split()[1:3]
        assert (noun in plurals) != verb.endswith("s"), good
    for good, _ in pairs["agreement_attractor"]:
        parts = good.split()
        verb = next(word for word in parts if word in ("is", "are", "was", "were"))
        assert (parts[1] in THINGS) == (verb in ("is", "was")), good
        attractor = parts[parts.index(verb) - 1]
        assert (attractor in THINGS) != (parts[1] in THINGS), good
    for good, _ in pairs["reflexive_gender"]:
        assert good.endswith("himself.") == (good.split()[0] in NAMES[:8] or good.split()[1] in ("man", "boy", "king", "father", "brother",
                                                                                               "uncle", "prince", "son"))  # fmt: skip


def test_determiners_quantifiers_and_articles_fit(pairs):
    for good, _ in pairs["determiner_noun"]:
        *_, determiner, noun = good.rstrip(".").split()
        assert (determiner in ("this", "that")) == (noun in THINGS), good
    for good, bad in pairs["quantifier"]:
        mass = bool(set(words(good)) & set(MASS))
        right = {"much", "little", "less"} if mass else {"many"}
        assert set(words(good)) & right and not set(words(bad)) & right - {"less"}, good
    for good, _ in pairs["article"]:
        parts = good.split()
        place = next(i for i, word in enumerate(parts) if word in ("a", "an"))
        assert (parts[place + 1][0] in "aeiou") == (parts[place] == "an"), good


def test_verb_forms_are_distinct():
    for base, third, past, participle, progressive, _ in VERBS:
        assert len({base, third, past, participle, progressive}) == 5, base


def test_generation_is_the_same_every_time(pairs):
    assert make_pairs("article") == pairs["article"]
    # Pinned: another Python or a changed template would break the comparison with earlier results.
    assert pairs["agreement_simple"][0] == ("The king laughs all day.", "The king laugh all day.")
    assert all_pairs(3) == [pair for pair in all_pairs(5) if pair.index < 3]


def test_too_many_pairs_are_refused():
    most = min(len(make_pairs(name)) for name in PHENOMENA)
    assert len(all_pairs(most)) == most * len(PHENOMENA)
    with pytest.raises(UserError, match=f"per_phenomenon {most + 1}: allowed is a number from 1 to {most}"):
        all_pairs(most + 1)
    with pytest.raises(UserError):
        all_pairs(0)


class Unigram:
    """A model with one distribution for every position: log-probabilities [V]."""

    def __init__(self, logits):
        self.logits = torch.as_tensor(logits, dtype=torch.float32)

    def __call__(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, len(self.logits)))


def make_loaded(model, tokenizer, context_length=None):
    return SimpleNamespace(model=model, tokenizer=tokenizer, pad_id=0, device=torch.device("cpu"), context_length=context_length)


def run(task, folder):
    records = [record for unit in task.units() for record in task.run(unit, folder)]
    return records, {measured.metric: measured for measured in task.measure(records, folder)}


def test_a_model_without_preferences_is_at_chance(vocabulary, tmp_path):
    tool = word_tokenizer(vocabulary)
    records, figures = run(MinimalPairsTask(make_loaded(Unigram([0.0] * len(tool)), tool), 5, 6), tmp_path)
    assert len(records) == 5 * len(PHENOMENA)
    assert {measured.value for measured in figures.values()} == {0.5}
    assert figures["minimal_pairs"].settings["chance"] == 0.5 and len(figures["minimal_pairs_article"].units) == 5


def test_accuracy_by_hand(vocabulary, tmp_path):
    """A unigram model that likes "an" is right where "an" is, and ties where both sentences have the same words."""
    tool = word_tokenizer(vocabulary)
    logits = torch.zeros(len(tool))
    logits[tool.convert_tokens_to_ids("an")] = 1.0
    _, figures = run(MinimalPairsTask(make_loaded(Unigram(logits), tool), 40, 16), tmp_path)
    good = [good for good, _ in make_pairs("article")[:40]]
    assert figures["minimal_pairs_article"].value == pytest.approx(sum("an" in text.split() for text in good) / 40)
    assert figures["minimal_pairs_past_form"].value == 0.5
    every = [figures[f"minimal_pairs_{name}"].value for name in PHENOMENA]
    assert figures["minimal_pairs"].value == pytest.approx(sum(every) / len(every))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_log_probabilities_by_brute_force(batch_size, tmp_path):
    torch.manual_seed(0)
    tool = train_bpe([" ".join(pair) for pair in make_pairs("npi_any")], 320)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tool), n_positions=96, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)).eval()
    task = MinimalPairsTask(make_loaded(model, tool, 96), 1, batch_size)
    records, figures = run(task, tmp_path)
    wins, per_token, equal = [], [], []
    for record in records:
        scores, lengths = [], []
        for which in ("good", "bad"):
            ids = tool(record[which])["input_ids"]
            assert ids[0] == tool.bos_token_id
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
            scores.append(sum(log_p[t, token].item() for t, token in enumerate(ids[1:])))
            lengths.append(len(ids) - 1)
            assert record[f"{which}_logprob"] == pytest.approx(scores[-1], rel=1e-5)
            assert record[f"{which}_tokens"] == lengths[-1]
        wins.append(float(scores[0] > scores[1]))
        per_token.append(float(scores[0] / lengths[0] > scores[1] / lengths[1]))
        equal += [wins[-1]] if lengths[0] == lengths[1] else []
    assert figures["minimal_pairs"].value == pytest.approx(sum(wins) / len(wins))
    assert figures["minimal_pairs_per_token"].value == pytest.approx(sum(per_token) / len(wins))
    assert 0 < len(equal) < len(wins)
    assert figures["minimal_pairs_equal_tokens"].value == pytest.approx(sum(equal) / len(equal))


def test_preferences():
    assert [preference(-1.0, -2.0), preference(-2.0, -1.0), preference(-1.0, -1.0 + 1e-9)] == [1.0, 0.0, 0.5]


def test_a_prefix_of_two_tokens_is_not_scored():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=1.0)).eval()
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([[0, 1, 2]])).logits[0].double(), dim=-1)
    assert sentence_logprobs(make_loaded(model, None), [[0, 1, 2, 3]], prefix=2) == pytest.approx([(log_p[1, 2] + log_p[2, 3]).item()], rel=1e-5)


def test_the_prefix_is_what_the_model_has_seen_before_text():
    tool = train_bpe(["a line\nand another"], 300)
    assert sentence_prefix(tool) == ("bos", [tool.bos_token_id])
    from tokenizers import processors

    backend = type(tool.backend_tokenizer).from_str(tool.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    chat = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    name, ids = sentence_prefix(chat)
    assert name == "line break" and chat.decode(ids) == "\n"


def test_nan_is_left_out_and_counted(vocabulary, tmp_path):
    tool = word_tokenizer(vocabulary)
    task = MinimalPairsTask(make_loaded(Unigram([math.nan] * len(tool)), tool), 2, 8)
    _, figures = run(task, tmp_path)
    assert figures["minimal_pairs"].value is None
    assert f"{2 * len(PHENOMENA)} of {2 * len(PHENOMENA)} pairs left out" in figures["minimal_pairs"].note


def test_sentences_must_fit_into_the_context(vocabulary):
    tool = word_tokenizer(vocabulary)
    with pytest.raises(UserError, match="context only 8"):
        MinimalPairsTask(make_loaded(Unigram([0.0] * len(tool)), tool, context_length=8), 2, 8)
