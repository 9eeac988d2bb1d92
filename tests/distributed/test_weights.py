"""Under ZeRO-3, where weights are cut up while they load, the same folders are refused as without: by all ranks, in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
CASES = {  # what is done to the weights, and what the error names
    "whole": (lambda weights: weights, None),
    "no_head": (lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"}, "1 missing (lm_head.weight)"),
    "prefixed": (lambda weights: {f"_orig_mod.{k}": v for k, v in weights.items()}, "'_orig_mod.'"),
    "unknown": (lambda weights: weights | {"v_head.weight": torch.ones(3)}, "1 not the model's (v_head.weight)"),
    "reshaped": (lambda weights: weights | {"model.norm.weight": torch.ones(5)}, "(model.norm.weight: [5] for [33])"),
    # The last number lies in the last rank's part alone, beside what fills that part up and is never written.
    "nan": (lambda weights: weights | {"model.norm.weight": torch.tensor([1.0] * 32 + [float("nan")])}, "model.norm.weight"),
    "two_heads": (lambda weights: weights, "config.json ties lm_head.weight and model.embed_tokens.weight"),
    "one_head_twice": (lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def errors(run_ranks, tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("weights")
    config = LlamaConfig(vocab_size=33, hidden_size=33, intermediate_size=24, num_hidden_layers=1, num_attention_heads=3, head_dim=4,
                         max_position_embeddings=32)  # fmt: skip
    for name, (change, _) in CASES.items():
        LlamaForCausalLM(config).save_pretrained(root / name)
        file = root / name / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    for name in ("two_heads", "one_head_twice"):
        description = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(description | {"tie_word_embeddings": True}))
    (root / "out").mkdir()
    process = run_ranks(HERE / "weights_worker.py", root / "out", *(root / name for name in CASES), timeout=120)
    assert (root / "out" / "DONE").exists(), process.stdout[-2000:] + process.stderr[-4000:]
    return [json.loads((root / "out" / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_refuse_with_one_line(errors, name):
    first, second = (rank[name] for rank in errors)
    expected = CASES[name][1]
    assert first == second
    assert first is None if expected is None else expected in first and "\n" not in first
