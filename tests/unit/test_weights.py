"""Pretrained weights that are not the model's are one line of error; what a model ties or makes itself is none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MixtralConfig,
)

from ds_stability.errors import UserError
from ds_stability.launchers.setup_model import check_pretrained
from ds_stability.weights import check_names, load_causal_lm

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
WHOLE = {
    "llama": LlamaConfig(**SIZES),
    "tied_llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "tied_gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=2),  # its experts are stored one by one
    "deepseek_v3": DeepseekV3Config(**SIZES, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=8,
                                    kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, moe_intermediate_size=8,
                                    first_k_dense_replace=1),
    "jamba": JambaConfig(**SIZES, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_dt_rank=4),
}  # fmt: skip


def save(config, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path):
    return save(WHOLE["llama"], tmp_path / "model")


def change(folder: Path, action) -> None:
    """Write the tensors that `action` returns for the stored ones."""
    save_file(action(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder, check=check_names) -> str:
    with pytest.raises(UserError) as error:
        check(folder, f"--model {folder.name}")
    assert "\n" not in str(error.value) and "--model" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_load_to_the_bit(tmp_path, name):
    folder = save(WHOLE[name], tmp_path / "model")
    check_names(folder, "--model x")
    loaded, expected = load_causal_lm(folder, "--model x"), AutoModelForCausalLM.from_pretrained(folder)
    for (key, ours), theirs in zip(loaded.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("check", [check_names, load_causal_lm])
def test_a_missing_head_is_no_random_one(llama, check):
    change(llama, lambda weights: {key: value for key, value in weights.items() if key != "lm_head.weight"})
    assert "1 missing (lm_head.weight)" in refusal(llama, check)


def test_tables_of_old_checkpoints_are_no_fault(llama):
    change(llama, lambda weights: weights | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)})
    load_causal_lm(llama, "--model x")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_prefix_before_all_names_is_named(llama, prefix):
    change(llama, lambda weights: {prefix + key: value for key, value in weights.items()})
    message = refusal(llama)
    assert repr(prefix) in message and "wrapped" in message and "cut the prefix off" in message


def test_unknown_weights_and_other_shapes(llama, tmp_path):
    change(llama, lambda weights: weights | {"v_head.weight": torch.ones(2), "model.norm.weight": torch.ones(5)})
    message = refusal(llama)
    assert "1 not the model's (v_head.weight)" in message and "1 of another shape (model.norm.weight: [5] for [16])" in message
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "10 not the model's" in refusal(llama) and "and 7 more" in refusal(llama)  # a layer too many, and the value head
    classifier = AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES, num_labels=2, pad_token_id=0))
    classifier.save_pretrained(tmp_path / "classifier")
    assert "lm_head.weight" in refusal(tmp_path / "classifier") and "score.weight" in refusal(tmp_path / "classifier")


def test_layers_that_the_class_declares_ignorable_are_dropped(tmp_path):
    """DeepSeek's layers for multi-token prediction, which transformers' class has none of."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

    assert DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected
    folder = save(WHOLE["deepseek_v3"], tmp_path / "model")
    change(folder, lambda weights: weights | {"model.layers.61.eh_proj.weight": torch.ones(3)})
    check_names(folder, "--model x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(llama, value):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 2] = value
        return weights

    change(llama, spoil)
    check_names(llama, "--model x")
    assert "model.layers.1.mlp.up_proj.weight" in refusal(llama, load_causal_lm)


def test_large_finite_weights_pass(llama):
    change(llama, lambda weights: {key: torch.full_like(value, 6e4).to(torch.float16) for key, value in weights.items()})
    load_causal_lm(llama, "--model x")


@pytest.mark.parametrize("check", [check_names, load_causal_lm])
def test_torn_and_missing_files(llama, check):
    content = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "cannot be loaded" in refusal(llama, check)
    (llama / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(WHOLE["llama"]).save_pretrained(llama, max_shard_size="5KB")
    next(iter(sorted(llama.glob("model-*.safetensors")))).unlink()
    assert "cannot be loaded" in refusal(llama, check)


def test_what_training_loads_is_checked_before_anything_else(llama, tmp_path):
    """An adapter alone, and a reference model that lacks a weight."""
    from types import SimpleNamespace as Bag

    model = Bag(model_name_or_path=str(tmp_path), model_revision="main", attn_implementation=None, trust_remote_code=False)
    command = Bag(model=model, stability=Bag(objective=Bag(name="cross_entropy")))
    (tmp_path / "adapter_config.json").write_text("{}")
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(UserError, match="is a PEFT adapter; merge it"):
        check_pretrained(command, AutoConfig.from_pretrained(tmp_path))
    change(llama, lambda weights: {key: value for key, value in weights.items() if key != "lm_head.weight"})
    command.stability.objective = Bag(name="reverse_kl", reference=str(llama))
    with pytest.raises(UserError, match="stability.objective.reference.*1 missing"):
        check_pretrained(command, None)
