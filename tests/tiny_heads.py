"""Tiny causal LMs with heads of every kind, and the loss installed in them with and without a fused head."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_stability.controller import Setting
from ds_stability.fused_head import FusedHead
from ds_stability.linear_spec import LogitTransform
from ds_stability.loss import StabilityLoss

SETTING = Setting(gain=1.3, mu=3.0, sigma=0.9, mean_weight=1.7)

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 48, "vocab_size": 131, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 64}  # fmt: skip
SMALL_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 131, "n_positions": 64, "resid_pdrop": 0.0,
              "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
MODELS = {
    "llama": (TINY | {"tie_word_embeddings": False}, LogitTransform()),
    "gpt2": (SMALL_GPT2, LogitTransform()),
    "gpt_neox": (TINY, LogitTransform()),
    "gemma2": (TINY | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}, LogitTransform(1.0, 3.0)),
    "gemma3_text": (TINY | {"final_logit_softcapping": None}, LogitTransform()),
    "qwen2": (TINY, LogitTransform()),
    "qwen3": (TINY | {"tie_word_embeddings": True}, LogitTransform()),
    "cohere": (TINY | {"logit_scale": 0.0625}, LogitTransform(0.0625)),
    "granite": (TINY | {"logits_scaling": 6.0}, LogitTransform(1 / 6)),
    "olmo2": (TINY, LogitTransform()),
    "phi3": (TINY, LogitTransform()),
    "opt": (TINY | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, LogitTransform()),
    "phi": (TINY | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}, LogitTransform()),  # a head with bias
    "recurrent_gemma": (TINY | {"lru_width": 32, "logits_soft_cap": 2.0, "attention_window_size": 8, "num_hidden_layers": 2,
                                "block_types": ["recurrent", "attention"]},
                        LogitTransform(1.0, 2.0)),
}  # fmt: skip


def make_model(kind, seed=0):
    options = {name: value for name, value in MODELS[kind][0].items() if not (kind == "gpt2" and name in TINY and name != "vocab_size")}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(20.0)  # logits of some size, so that a wrong scale or cap shows
        if head.bias is not None:
            head.bias.normal_()
    return model.train()


def install(model, fused: bool, chunk_size=5, setting=SETTING):
    loss = StabilityLoss(model, model.loss_function, True, "cpu", chunk_size)
    loss.setting, model.loss_function = setting, loss
    loss.high_frequency_V = (torch.arange(131) % 4 == 0).float()
    loss.head = FusedHead(model, loss) if fused else None
    return loss


def make_ids(batch=2, length=9, seed=1):
    ids = torch.randint(3, 131, (batch, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :2] = -100
    return ids, labels


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
