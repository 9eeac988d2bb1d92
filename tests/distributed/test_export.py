"""What is exported, loaded by transformers in another process, gives the engine's logits (invariant 10)."""

import json
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("export_worker.py")
LORA = ["llama_lora_fp32", "llama_lora_bf16", "gpt2_lora_fp32", "llama_dora_saved_head"]
CASES = ["llama_fp32", "llama_bf16", "llama_stage2_bf16", "llama_offload", "gpt2_fp32", "gpt2_bf16", *LORA]


@pytest.fixture(scope="module")
def exported(run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    done = run_ranks(WORKER, str(out), *CASES, ranks=2, timeout=600)
    assert (out / "DONE").exists(), done.stderr[-4000:]
    return out


def results(exported, case):
    return [torch.load(exported / f"{case}.rank{rank}.pt") for rank in (0, 1)]


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


@torch.no_grad()
def logits_of(model, ids):
    return model.eval()(input_ids=ids).logits.float()


@pytest.mark.parametrize("case", CASES)
def test_loaded_model_gives_the_engines_logits(exported, case):
    from transformers import AutoModelForCausalLM

    first, second = results(exported, case)
    assert torch.equal(first["logits"], second["logits"])
    model = AutoModelForCausalLM.from_pretrained(exported / case / "final")
    expected_dtype = torch.bfloat16 if "bf16" in case else torch.float32
    assert {p.dtype for p in model.parameters()} == {expected_dtype}
    assert model.config.dtype == expected_dtype
    error = relative_error(logits_of(model, first["ids"]), first["logits"])
    assert error <= (2e-2 if "bf16" in case else 1e-5)


@pytest.mark.parametrize("case", LORA)
def test_adapter_on_the_untouched_base_gives_the_engines_logits(exported, case):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    first, _ = results(exported, case)
    dtype = torch.bfloat16 if "bf16" in case else torch.float32
    base = AutoModelForCausalLM.from_pretrained(exported / "base" / case, dtype=dtype)
    model = PeftModel.from_pretrained(base, exported / case / "final" / "adapter", autocast_adapter_dtype=False)
    error = relative_error(logits_of(model, first["ids"]), first["logits"])
    assert error <= (2e-2 if "bf16" in case else 1e-5)


@pytest.mark.parametrize("case", LORA)
def test_the_adapter_matters(exported, case):
    # If merging did nothing, the tests above would need the adapter to be nothing too.
    from transformers import AutoModelForCausalLM

    first, _ = results(exported, case)
    base = AutoModelForCausalLM.from_pretrained(exported / "base" / case)
    assert relative_error(logits_of(base, first["ids"]), first["logits"]) > 0.05


@pytest.mark.parametrize("case", CASES)
def test_the_engine_trains_on_as_if_nothing_had_happened(exported, case):
    for rank in results(exported, case):
        assert rank["undisturbed"]
        assert rank["same_config"]


@pytest.mark.parametrize("case", CASES)
def test_a_failed_write_is_raised_on_every_rank_and_keeps_the_earlier_export(exported, case):
    for rank in results(exported, case):
        message, before, after = rank["failure"]
        assert "no_such_file.json" in message
        assert before == after == ["final"]


def test_weights_are_sharded_and_listed(exported):
    final = exported / "llama_fp32" / "final"
    index = json.loads((final / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1 and all((final / shard).exists() for shard in shards)


def test_tied_weights_are_saved_once(exported):
    index = json.loads((exported / "gpt2_fp32" / "final" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"] and "transformer.wte.weight" in index["weight_map"]


def test_an_adapter_on_one_of_two_tied_matrices_unties_them(exported):
    config = json.loads((exported / "gpt2_lora_fp32" / "final" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert results(exported, "gpt2_lora_fp32")[0]["same_config"]  # the live config still ties


def test_card_and_high_frequency_file(exported):
    final = exported / "llama_fp32" / "final"
    assert json.loads((final / "high_frequency.json").read_text()) == {"token_ids": [5]}
    card = (final / "README.md").read_text()
    assert "| stability.level | 0.5 |" in card
    assert "<script>" not in card and "\n# <" not in card
