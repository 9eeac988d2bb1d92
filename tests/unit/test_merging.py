"""LoRA with the default targets: on every architecture the merged model, and the saved adapter, give the live logits."""

import pytest
import torch
import transformers as T

from ds_stability.errors import UserError
from ds_stability.export import _save_model, check_exportable
from ds_stability.launchers.setup_model import _add_adapter
from ds_stability.merging import merge_adapter

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
CONFIGS = {
    "llama": T.LlamaConfig(**SIZES),
    "mixtral": T.MixtralConfig(**SIZES, **LOCAL),
    "qwen3_moe": T.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8),
    "deepseek_v3": T.DeepseekV3Config(**SIZES | {"num_key_value_heads": 4}, **ROUTED, n_group=2, topk_group=1, q_lora_rank=8, kv_lora_rank=8,
                                      qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8),
    "olmoe": T.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "glm4_moe": T.Glm4MoeConfig(**SIZES, **ROUTED, n_group=1, topk_group=1, head_dim=8),
    "ernie4_5_moe": T.Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=8, moe_num_shared_experts=1),
    "minimax_m2": T.MiniMaxM2Config(**SIZES, **LOCAL, head_dim=8),
    "phimoe": T.PhimoeConfig(**SIZES, **LOCAL),
    "llama4": T.Llama4TextConfig(**SIZES, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=24, head_dim=8),
    "gpt_oss": T.GptOssConfig(**SIZES, **LOCAL, head_dim=8),
    "jamba": T.JambaConfig(**SIZES, num_experts=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_dt_rank=4),
    "mamba2": T.Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1),
}  # fmt: skip
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


class Flags:
    lora_r, lora_alpha, lora_dropout, lora_target_modules = 4, 8, 0.0, None
    gradient_checkpointing = activation_checkpointing = False


def adapted(name: str, targets: list[str] | None = None, noise: float = 0.2):
    """(base model, peft model with an adapter that is not zero)"""
    torch.manual_seed(0)
    base = T.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    flags = Flags()
    flags.lora_target_modules = targets
    model = _add_adapter(base, flags, flags).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=noise)
    return base, model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_and_reloaded_gives_the_live_logits(name, tmp_path):
    _, model = adapted(name)
    check_exportable(model)
    live, before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    with model.disable_adapter():
        assert (logits(model) - live).abs().max() > 1e-2 * live.abs().max()  # the adapter matters
    merged = merge_adapter(model, model.state_dict())
    _save_model(merged, merged.state_dict(), tmp_path, torch.float32, "5GB")
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits(loaded) - live).abs().max() <= 2e-5 * live.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # the live model is only read


def test_each_matrix_is_rounded_once_and_keeps_its_dtype():
    _, model = adapted("mixtral")
    model.to(torch.bfloat16)
    exact = merge_adapter(model.to(torch.float32), model.state_dict()).state_dict()
    model.to(torch.bfloat16)
    for key, value in merge_adapter(model, model.state_dict()).state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, exact[key].to(torch.bfloat16)), key


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [("jamba", "dt_proj", "reads its matrix"), ("phimoe", "router", "router"), ("llama4", "router", "router")],
)
def test_layers_that_an_adapter_cannot_act_on_are_refused_by_name(name, target, reason):
    _, model = adapted(name, [target, "o_proj"])
    with pytest.raises(UserError, match=rf"--lora_target_modules.*{target}.*{reason}"):
        check_exportable(model)


def test_what_cannot_be_merged_is_refused_before_training(monkeypatch):
    from peft.tuners.lora import Linear

    def fails(self, *args, **kwargs):
        raise AttributeError("no attribute 'weight'")

    _, model = adapted("llama")
    monkeypatch.setattr(Linear, "merge", fails)
    with pytest.raises(UserError, match="cannot be merged into this model.*no attribute 'weight'"):
        check_exportable(model)


def test_a_model_whose_weights_cannot_be_turned_back_is_refused(monkeypatch):
    import transformers.core_model_loading as loading

    def fails(model, state):
        raise RuntimeError("no such conversion")

    model = T.AutoModelForCausalLM.from_config(CONFIGS["mixtral"])
    check_exportable(model)
    monkeypatch.setattr(loading, "revert_weight_conversion", fails)
    with pytest.raises(UserError, match="MixtralForCausalLM: its weights cannot be saved.*no such conversion"):
        check_exportable(model)
