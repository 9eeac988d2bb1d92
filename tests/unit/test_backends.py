"""Backends: continuous batching against the static generator in the mean, and what is asked of vLLM."""

import math
import os
import sys
import types
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_stability.errors import UserError
from ds_stability.eval.backends import ContinuousBackend, make_backend, vllm_settings
from ds_stability.eval.decoding import DEFAULT_DECODINGS, key_seed, sample_key
from ds_stability.eval.generation import Generator

EOS = 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
TEXTS, NEW = 240, 20


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=4, eos_token_id=EOS, bos_token_id=0, pad_token_id=2))  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return SimpleNamespace(model=model.eval(), eos_ids=(EOS,), pad_id=2, device=torch.device("cpu"), folder=Path("models/m"))


def keys_of(decoding, count):
    return [sample_key(0, decoding.name, i, 0) for i in range(count)]


def figures(texts) -> dict[str, np.ndarray]:
    """Per text, or per group of 8 texts: what the means are compared on."""
    groups = [texts[i : i + 8] for i in range(0, len(texts), 8)]

    def distinct_2(group):
        grams = Counter(pair for text in group for pair in zip(text.token_ids, text.token_ids[1:], strict=False))
        return len(grams) / grams.total()

    return {
        "tokens": np.array([len(text.token_ids) for text in texts]),
        "eos_rate": np.array([text.finish == "eos" for text in texts]),
        "entropy": np.array([text.entropy_sum / text.scored_tokens for text in texts]),
        "surprisal": np.array([-text.logprob_sum / text.scored_tokens for text in texts]),
        "distinct_2": np.array([distinct_2(group) for group in groups]),
    }


@pytest.mark.parametrize("name", ["sample", "top_p_95", "top_k_40"])
def test_continuous_batching_has_the_same_means(loaded, name):
    """Within 4 standard errors of the difference, in every figure: 2 * 240 texts of up to 20 tokens."""
    decoding, prompts = DEFAULT_DECODINGS[name], [PROMPTS[i % 4] for i in range(TEXTS)]
    static, continuous = make_backend("static", loaded), make_backend("continuous", loaded)
    ours = figures(static.generate_keyed(prompts, decoding, keys_of(decoding, TEXTS), NEW))
    theirs = figures(continuous.generate_keyed(prompts, decoding, keys_of(decoding, TEXTS), NEW))
    for figure, values in ours.items():
        error = math.sqrt(sum(v.var(ddof=1) / len(v) for v in (values, theirs[figure])))
        assert 0 < error < 0.1 * max(1.0, values.mean()), figure  # the bound means something
        assert abs(values.mean() - theirs[figure].mean()) < 4 * error, figure


def test_means_would_show_another_temperature(loaded):
    """The comparison above can fail: one temperature against another."""
    sample, cooler = DEFAULT_DECODINGS["sample"], DEFAULT_DECODINGS["top_k_40"]
    prompts, generator = [PROMPTS[i % 4] for i in range(TEXTS)], make_backend("static", loaded)
    ours = figures(generator.generate_keyed(prompts, sample, keys_of(sample, TEXTS), NEW))
    theirs = figures(generator.generate_keyed(prompts, cooler, keys_of(sample, TEXTS), NEW))
    error = math.sqrt(sum(v["surprisal"].var(ddof=1) / TEXTS for v in (ours, theirs)))
    assert abs(ours["surprisal"].mean() - theirs["surprisal"].mean()) > 8 * error


def test_continuous_greedy_is_static_greedy_and_repeats(loaded):
    static, continuous = make_backend("static", loaded), make_backend("continuous", loaded)
    greedy, sample = DEFAULT_DECODINGS["greedy"], DEFAULT_DECODINGS["sample"]
    ours = static.generate_keyed(PROMPTS, greedy, keys_of(greedy, 4), NEW)
    theirs = continuous.generate_keyed(PROMPTS, greedy, keys_of(greedy, 4), NEW)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.token_ids, one.finish, one.scored_tokens) == (other.token_ids, other.finish, other.scored_tokens)
        assert one.entropy_sum == pytest.approx(other.entropy_sum, rel=1e-5)
        assert one.logprob_sum == pytest.approx(other.logprob_sum, rel=1e-5)
    before, attention = torch.get_rng_state(), loaded.model.config._attn_implementation
    first = continuous.generate_keyed(PROMPTS, sample, keys_of(sample, 4), NEW)
    assert first == continuous.generate_keyed(PROMPTS, sample, keys_of(sample, 4), NEW)
    assert first != continuous.generate_keyed(PROMPTS, sample, keys_of(greedy, 4), NEW)
    assert torch.equal(torch.get_rng_state(), before) and loaded.model.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_nan_in_one_text_does_not_reach_the_others(loaded, name):
    """The embedding of token 8, the second prompt, is NaN. The static generator is the oracle: a row each."""
    decoding, weight = DEFAULT_DECODINGS[name], loaded.model.get_input_embeddings().weight
    kept = weight.detach().clone()
    expected = make_backend("static", loaded).generate_keyed(PROMPTS, decoding, keys_of(decoding, 4), 3)
    assert not any(8 in text.token_ids for text in expected)
    with torch.no_grad():
        weight[8] = math.nan
    try:
        texts = make_backend("continuous", loaded).generate_keyed(PROMPTS, decoding, keys_of(decoding, 4), 3)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert texts[1].finish == "non_finite" and texts[1].token_ids == []
    assert [texts[i] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("name", ["continuous", "vllm"])
def test_beam_search_elsewhere_is_one_line(loaded, name):
    with pytest.raises(UserError) as error:
        make_backend(name, loaded, list(DEFAULT_DECODINGS.values()))
    assert str(error.value).startswith(f"decodings.beam_4: the {name} backend has no beam search")
    assert "\n" not in str(error.value)
    assert isinstance(make_backend("static", loaded, list(DEFAULT_DECODINGS.values())), Generator)
    assert isinstance(make_backend("continuous", loaded, [DEFAULT_DECODINGS["sample"]]), ContinuousBackend)


def test_unknown_backend_is_one_line(loaded):
    with pytest.raises(UserError, match="--backend fast: allowed are static, continuous, vllm"):
        make_backend("fast", loaded)


def test_vllm_that_is_not_installed_is_one_line(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # the import fails, also where it is installed
    with pytest.raises(UserError) as error:
        make_backend("vllm", loaded)
    assert str(error.value) == "--backend vllm: vLLM is not installed; pip install vllm, or use --backend static"


def test_settings_for_vllm():
    """By the documented meaning of its SamplingParams: temperature 0 is greedy, top_k -1 is all."""
    key = sample_key(4, "sample", 1, 2)
    shared = {"seed": key_seed(key), "max_tokens": 9, "ignore_eos": True, "stop_token_ids": [1, 5], "logprobs": 0,
              "detokenize": False}  # fmt: skip
    expected = {
        "greedy": {"temperature": 0.0, "top_p": 1.0, "top_k": -1},
        "sample": {"temperature": 1.0, "top_p": 1.0, "top_k": -1},
        "top_p_95": {"temperature": 1.0, "top_p": 0.95, "top_k": -1},
        "top_k_40": {"temperature": 0.7, "top_p": 1.0, "top_k": 40},
    }
    for name, settings in expected.items():
        assert vllm_settings(DEFAULT_DECODINGS[name], key, (1, 5), 9) == shared | settings


def test_vllm_outputs_become_texts(loaded, monkeypatch):
    """A stand-in with the documented interface, as vLLM cannot be installed here: end tokens, caps and broken sums."""
    seen = {}

    class LLM:
        def __init__(self, **settings):
            seen["engine"], seen["rank"], seen["gpus"] = settings, os.environ.get("RANK"), os.environ["CUDA_VISIBLE_DEVICES"]

        def generate(self, prompts, sampling_params, *, use_tqdm):
            seen["prompts"], seen["parameters"] = prompts, sampling_params
            outputs = [([7, 8, EOS], "stop", -2.5), ([7, 8, 9], "length", -3.5), ([EOS], "stop", -0.5), ([7], "length", math.nan)]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=reason, cumulative_logprob=total)])
                    for ids, reason, total in outputs]  # fmt: skip

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    loaded.device = torch.device("cuda:2")
    try:
        backend = make_backend("vllm", loaded, [DEFAULT_DECODINGS["sample"]], gpus_per_model=2)
    finally:
        loaded.device = torch.device("cpu")
    assert seen["rank"] is None and seen["gpus"] == "6,7"
    assert os.environ["RANK"] == "1" and os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert seen["engine"]["tensor_parallel_size"] == 2 and seen["engine"]["dtype"] == "float32"
    texts = backend.generate_keyed(PROMPTS, DEFAULT_DECODINGS["sample"], keys_of(DEFAULT_DECODINGS["sample"], 4), 3)
    assert [(t.token_ids, t.finish, t.logprob_sum, t.scored_tokens) for t in texts] == [
        ([7, 8], "eos", -2.5, 3), ([7, 8, 9], "length", -3.5, 3), ([], "eos", -0.5, 1), ([], "non_finite", None, 0)]  # fmt: skip
    assert seen["prompts"] == [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    assert len({parameters["seed"] for parameters in seen["parameters"]}) == 4
