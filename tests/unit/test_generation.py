"""Generation from tiny random models: against plain generate, batch by batch, with models that break or end at once."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from ds_stability.data.tokenizer import word_tokenizer
from ds_stability.errors import UserError
from ds_stability.eval.decoding import DEFAULT_DECODINGS, Decoding, uniform_numbers
from ds_stability.eval.generation import Generator
from ds_stability.eval.generation_task import GenerationTask
from ds_stability.eval.kv_cache import RightSizedLayer, right_sized_cache
from ds_stability.eval.records import Prompt, Sample, ScoringContext

VOCABULARY, EOS, PAD = 40, 1, 2
SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [5, 6, 7]]
GREEDY, SAMPLE, BEAM = (DEFAULT_DECODINGS[name] for name in ("greedy", "sample", "beam_4"))


def make_llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **LLAMA))


def make_gpt2():
    return GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def make_gpt_neo():  # a layer of local attention
    return GPTNeoForCausalLM(GPTNeoConfig(**SHAPE, hidden_size=32, num_layers=2, num_heads=4, window_size=4,
                                          attention_types=[[["global", "local"], 1]], max_position_embeddings=64))  # fmt: skip


def make_gpt_neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                            num_attention_heads=4, max_position_embeddings=64))  # fmt: skip


def make_mistral():  # sliding windows: a cache that is not ours
    return MistralForCausalLM(MistralConfig(**SHAPE, **LLAMA, sliding_window=4))


def make_mamba():  # no attention at all
    return MambaForCausalLM(MambaConfig(**SHAPE, hidden_size=32, state_size=4, num_hidden_layers=2))


MAKERS = {"llama": make_llama, "gpt2": make_gpt2, "gpt_neo": make_gpt_neo, "gpt_neox": make_gpt_neox, "mistral": make_mistral,
          "mamba": make_mamba}  # fmt: skip


def sharpened(model):
    """Random weights are nearly uniform: scale the head until texts differ and some of them end."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return {name: sharpened(make()) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def llama(models):
    return models["llama"]


def generator(model, eos_ids=(EOS,)):
    return Generator(model, eos_ids, PAD)


def numbers(rows: int, count: int, start: int = 0) -> np.ndarray:
    return np.stack([uniform_numbers(f"0/test/{start + row}/0", count) for row in range(rows)])


def teacher_forced(model, prompt, output) -> torch.Tensor:
    """fp64 log-probabilities [output, V] of one unpadded text, without a cache: the oracle of all sums."""
    ids = torch.tensor([[*prompt, *output]])
    with torch.no_grad():
        return model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def check_sums(model, prompt, text):
    output = [*text.token_ids, EOS] if text.finish == "eos" else text.token_ids
    logprobs = teacher_forced(model, prompt, output)
    assert text.scored_tokens == len(output)
    assert text.logprob_sum == pytest.approx(logprobs[range(len(output)), output].sum().item(), rel=1e-4)
    assert text.entropy_sum == pytest.approx(-(logprobs.exp() * logprobs).sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_greedy_is_plain_generate_with_left_padding(models, name):
    """Also token for token what each prompt gives alone, which plain generate with a wrong padding would not."""
    model, new = models[name], 12
    texts = generator(model).generate(PROMPTS, GREEDY, None, new)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=EOS, pad_token_id=PAD)
    plain = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    for prompt, text, row in zip(PROMPTS, texts, plain, strict=True):
        expected = row[: row.index(EOS)] if EOS in row else row
        assert text.token_ids == expected and text.finish == ("eos" if EOS in row else "length")
        assert generator(model).generate([prompt], GREEDY, None, new)[0].token_ids == expected
        check_sums(model, prompt, text)
    assert texts[0] == texts[4]
    assert len({tuple(text.token_ids) for text in texts}) > 2


@pytest.mark.parametrize("name", MAKERS)
def test_samples_are_their_numbers_and_not_their_batch(models, name):
    """Each text of a padded batch is the one its numbers give alone, drawn here one forward pass at a time."""
    model, new = models[name], 8
    uniforms = numbers(len(PROMPTS), new)
    texts = generator(model).generate(PROMPTS, SAMPLE, uniforms, new)
    for prompt, row, text in zip(PROMPTS, uniforms, texts, strict=True):
        output = []
        for number in row:
            probabilities = teacher_forced(model, prompt, [*output, 0])[-1].exp()
            output.append(int((probabilities.cumsum(0) <= number).sum()))
            if output[-1] == EOS:
                break
        assert text.token_ids == [token for token in output if token != EOS]
        check_sums(model, prompt, text)


def test_cache_is_ours_where_all_layers_attend_to_everything(models):
    ours = {name: right_sized_cache(model, 9) is not None for name, model in models.items()}
    assert ours == {"llama": True, "gpt2": True, "gpt_neo": True, "gpt_neox": True, "mistral": False, "mamba": False}


def test_cache_is_allocated_once_at_its_capacity():
    layer, keys = RightSizedLayer(7), torch.randn(2, 3, 7, 4)
    layer.update(keys[:, :, :4], keys[:, :, :4])
    place = layer.key_buffer.data_ptr()
    for position in range(4, 7):
        shown, _ = layer.update(keys[:, :, position : position + 1], keys[:, :, position : position + 1])
    assert torch.equal(shown, keys) and layer.get_seq_length() == 7
    assert layer.key_buffer.data_ptr() == place == shown.data_ptr() and layer.key_buffer.shape[2] == 7


def brute_force_beams(model, prompt, beams: int, new: int):
    """Beam search by hand over all continuations: the 2 * beams best candidates a step, those that end or reach the cap
    are kept by log-probability over length."""
    running, finished = [((), 0.0)], []
    for _ in range(new):
        candidates = []
        for output, score in running:
            logprobs = teacher_forced(model, prompt, [*output, 0])[-1].tolist()
            candidates += [((*output, token), score + logprob) for token, logprob in enumerate(logprobs)]
        candidates.sort(key=lambda item: -item[1])
        candidates = candidates[: 2 * beams]
        ended = [c for c in candidates[:beams] if c[0][-1] == EOS or len(c[0]) == new]
        finished += [(score / len(output), output) for output, score in ended]
        finished = sorted(finished, reverse=True)[:beams]
        running = [c for c in candidates if c[0][-1] != EOS][:beams]
        if len(finished) == beams and running[0][1] / (len(running[0][0])) < finished[-1][0]:
            break
    return list(finished[0][1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_beam_search_against_brute_force(models, name):
    model = models[name]
    for new in (1, 5):
        texts = generator(model).generate(PROMPTS, BEAM, None, new)
        for prompt, text in zip(PROMPTS, texts, strict=True):
            output = [*text.token_ids, EOS] if text.finish == "eos" else text.token_ids
            assert output == brute_force_beams(model, prompt, 4, new)
            check_sums(model, prompt, text)


def test_wide_beam_finds_the_likeliest_text(llama):
    """With as many beams as there are continuations the search is exhaustive (per length: the cap is the only end)."""
    wide = Decoding("wide", "beam", num_beams=VOCABULARY)
    text = generator(llama, ()).generate([[5, 6, 7]], wide, None, 2)[0]
    with torch.no_grad():
        logits = llama(torch.tensor([[5, 6, 7, token] for token in range(VOCABULARY)])).logits.double()
    scores = logits[0, 2].log_softmax(-1).unsqueeze(1) + logits[:, 3].log_softmax(-1)
    assert text.token_ids == [int(i) for i in np.unravel_index(scores.argmax(), scores.shape)]


def test_model_without_end_token_runs_to_the_cap(llama):
    for decoding in (GREEDY, SAMPLE, BEAM):
        texts = generator(llama, ()).generate(PROMPTS, decoding, numbers(5, 6), 6)
        assert all(text.finish == "length" and len(text.token_ids) == text.scored_tokens == 6 for text in texts)


def biased(model, changes: dict[int, float]):
    """The model with logits of single tokens moved."""
    bias = torch.zeros(VOCABULARY)
    for token, value in changes.items():
        bias[token] = value

    def add(module, inputs, output):
        output.logits = output.logits + bias
        return output

    return model.register_forward_hook(add)


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLE, BEAM], ids=lambda d: d.name)
def test_model_whose_only_output_is_eos(llama, decoding):
    handle = biased(llama, {token: -math.inf for token in range(VOCABULARY) if token != EOS})
    try:
        texts = generator(llama).generate(PROMPTS, decoding, numbers(5, 6), 6)
    finally:
        handle.remove()
    for text in texts:
        assert (text.token_ids, text.finish, text.scored_tokens) == ([], "eos", 1)
        assert text.entropy_sum == 0 and text.logprob_sum == 0


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLE, BEAM], ids=lambda d: d.name)
def test_padded_vocabulary_changes_nothing(llama, decoding):
    never = [token for token in range(30, VOCABULARY)]
    handle = biased(llama, dict.fromkeys(never, -1e5))
    expected = generator(llama).generate(PROMPTS, decoding, numbers(5, 6), 6)
    handle.remove()
    handle = biased(llama, dict.fromkeys(never, -math.inf))
    texts = generator(llama).generate(PROMPTS, decoding, numbers(5, 6), 6)
    handle.remove()
    assert texts == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLE, BEAM], ids=lambda d: d.name)
def test_text_that_becomes_non_finite_ends_and_leaves_the_others_alone(llama, decoding, value):
    """Logits of the second text break from its third position on; the others are the same to the bit."""
    uniforms = numbers(5, 8)
    whole = generator(llama, ()).generate(PROMPTS, decoding, uniforms, 8)
    rows = decoding.num_beams
    calls = itertools.count()

    def break_row(module, inputs, output):
        if next(calls) >= 2 or output.logits.shape[1] > 1:  # the scoring pass of a beam search sees all positions
            output.logits[1 * rows_here(output) : (1 + 1) * rows_here(output), -6:] = value
        return output

    def rows_here(output):
        return rows if output.logits.shape[0] == rows * len(PROMPTS) else 1

    handle = llama.register_forward_hook(break_row)
    try:
        texts = generator(llama, ()).generate(PROMPTS, decoding, uniforms, 8)
    finally:
        handle.remove()
    broken = texts.pop(1)
    assert (broken.token_ids, broken.finish, broken.entropy_sum, broken.logprob_sum, broken.scored_tokens) == (
        [], "non_finite", None, None, 0)  # fmt: skip
    assert texts == whole[:1] + whole[2:]


def test_model_of_nothing_but_nan_stops_at_once(llama):
    calls = []

    def break_all(module, inputs, output):
        calls.append(1)
        output.logits = torch.full_like(output.logits, math.nan)
        return output

    handle = llama.register_forward_hook(break_all)
    texts = generator(llama).generate(PROMPTS, SAMPLE, numbers(5, 50), 50)
    handle.remove()
    assert len(calls) == 1 and {text.finish for text in texts} == {"non_finite"}


def test_batch_stops_when_all_texts_have_ended(llama):
    lengths = [text.scored_tokens for text in generator(llama).generate(PROMPTS, SAMPLE, numbers(5, 200), 200)]
    calls = []
    handle = llama.register_forward_hook(lambda *_: calls.append(1))
    generator(llama).generate(PROMPTS, SAMPLE, numbers(5, 200), 200)
    handle.remove()
    assert len(calls) == max(lengths) < 200


def test_model_is_left_as_it_was(llama):
    llama.generation_config = GenerationConfig(repetition_penalty=5.0, eos_token_id=17, max_new_tokens=2)
    before = llama.generation_config.to_dict()
    state = torch.get_rng_state()
    for decoding in (GREEDY, SAMPLE, BEAM):
        one = generator(llama).generate(PROMPTS, decoding, numbers(5, 6), 6)
        llama.generation_config, kept = GenerationConfig(), llama.generation_config
        assert kept.to_dict() == before
        assert generator(llama).generate(PROMPTS, decoding, numbers(5, 6), 6) == one  # penalties were not applied
        llama.generation_config = kept
    assert torch.equal(torch.get_rng_state(), state)


def prompts_of(*rows: list[int]) -> list[Prompt]:
    return [Prompt(index, "", tuple(row)) for index, row in enumerate(rows)]


@pytest.fixture(scope="module")
def task_of(llama):
    words = word_tokenizer([f"w{i}" for i in range(VOCABULARY - 4)])
    prompts = [Prompt(index, "", tuple(PROMPTS[index % 4][: 1 + index % 5])) for index in range(7)]
    context = ScoringContext(vocab_size=VOCABULARY, special_ids=(0, 1, 2, 3))

    def make(seeds=(0,), samples=2, decodings=(GREEDY, SAMPLE, BEAM), metrics=None):
        return GenerationTask(generator(llama), words, prompts, decodings, seeds, samples, 6, 4, context, metrics)

    return make


def test_units_give_the_same_bytes_in_any_order(task_of, tmp_path):
    first, second = task_of(), task_of()
    forward = {unit: first.run(unit, tmp_path) for unit in first.units()}
    backward = {unit: second.run(unit, tmp_path) for unit in reversed(second.units())}
    assert forward == backward  # floats are compared exactly
    assert first.units()[:3] == ["greedy/00000", "greedy/00001", "sample/00000"]
    one = task_of()
    for unit in ("sample/00002", "sample/00002", "beam_4/00001"):  # alone, and again after a kill
        assert one.run(unit, tmp_path) == forward[unit]


def test_batches_are_sorted_by_length_and_hold_every_key_once(task_of, tmp_path):
    task = task_of(seeds=(3, 8))
    samples = [Sample.from_dict(record) for unit in task.units() for record in task.run(unit, tmp_path)]
    keys = [sample.key for sample in samples]
    expected = {(p, name, 0) for p in range(7) for name in ("greedy", "beam_4")} | {
        (p, "sample", s) for p in range(7) for s in range(4)}  # fmt: skip
    assert len(keys) == len(set(keys)) and set(keys) == expected
    lengths = [len(row.prompt.token_ids) for unit in task.units() if unit.startswith("sample") for row in task.rows(unit)]
    assert lengths == sorted(lengths) and {len(task.rows(unit)) for unit in task.units()} <= {4, 3}
    assert {(s.sample, s.seed) for s in samples if s.decoding == "sample"} == {(0, 3), (1, 3), (2, 8), (3, 8)}
    assert {s.seed for s in samples if s.decoding == "greedy"} == {3}


def test_texts_of_a_seed_do_not_depend_on_the_seeds_beside_it(task_of, tmp_path):
    def texts(task, seed):
        samples = [Sample.from_dict(record) for unit in task.units() for record in task.run(unit, tmp_path)]
        return sorted((s.prompt, s.sample, s.token_ids, s.finish) for s in samples if s.seed == seed)

    alone = texts(task_of(seeds=(8,), decodings=(SAMPLE,)), 8)
    beside = [(p, s - 2, ids, f) for p, s, ids, f in texts(task_of(seeds=(3, 8), decodings=(SAMPLE,)), 8)]
    assert alone == beside
    assert alone != texts(task_of(seeds=(3,), decodings=(SAMPLE,)), 3)


def test_sums_of_the_records_are_the_figures(task_of, tmp_path):
    task = task_of(metrics=("generation_entropy", "eos_rate"))
    records = [record for unit in task.units() for record in task.run(unit, tmp_path)]
    figures = {(m.decoding, m.metric): m for m in task.measure(records, tmp_path)}
    chosen = [r for r in records if r["decoding"] == "sample"]
    entropy = sum(r["entropy_sum"] for r in chosen) / sum(r["scored_tokens"] for r in chosen)
    assert figures["sample", "generation_entropy"].value == pytest.approx(entropy, rel=1e-12)
    assert list(figures["sample", "generation_entropy"].units) == list(range(7))
    ended = np.mean([r["finish"] == "eos" for r in chosen])
    assert figures["sample", "eos_rate"].value == pytest.approx(ended)
    assert list(figures) == [(d, m) for d in ("greedy", "sample", "beam_4") for m in ("eos_rate", "generation_entropy")]


def test_two_of_one_name_are_refused(task_of):
    with pytest.raises(UserError, match="decodings: 'sample' is given twice"):
        task_of(decodings=(SAMPLE, SAMPLE))
    with pytest.raises(UserError, match="seeds: 1 is given twice"):
        task_of(seeds=(1, 1))
