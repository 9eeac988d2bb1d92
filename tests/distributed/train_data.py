"""Models and batches of the short trainings; no deepspeed here, so that the plain-torch reference can use it too."""

from types import SimpleNamespace

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

DEFAULTS = {
    "engine": "ours",  # or "plain": deepspeed.initialize, without the stability block
    "arch": "llama",
    "ds": {},  # merged over `base_config`
    "stability": {},
    "steps": 4,
    "gas": 2,
    "micro": 2,
    "seq": 16,
    "vocab": 97,  # not divisible by 2: partitions are padded
    "optimizer": "adamw",
    "lr": 1e-2,
    "clip": 1.0,
    "checkpointing": None,  # "reentrant" or "plain"
    "freeze": None,  # substring of parameter names to freeze
    "evaluate": False,  # an evaluation pass between the steps
    # {"step": s, "rank": r, "value": "nan"}: rank r's embedding output becomes NaN in step s; with "micro" in that micro-batch
    # only, with "at" "logits" those are multiplied, with "at" "loss" the loss.
    "poison": None,
    "shrink": None,  # {"step": s, "by": k}: the mean weight predicted for that step is k times too small
    "hear_seconds": 1.0,  # collective.HEAR_SECONDS
    "masked": None,  # {"step": s, "micro": m, "rank": r}: every label of that micro-batch is -100
    "history": False,  # keep the stability state after every step
    "high_frequency": None,
    "save_at": None,
    "load": None,
    "num_items": False,  # pass num_items_in_batch, and scale the loss by world size, as Trainer does
    "other_block": None,  # a different stability block for rank 1
    "zipf_seed": 1000,
    "syncs": False,  # count host synchronizations of each step, see host_syncs.py
    "held_out": 0,  # sequences for the governor; "held_out_odd": True gives rank 1 other ones
    "held_out_odd": False,
    "via_args": None,  # give the config as this attribute of args, as deepspeed.add_config_arguments does
    "comments": False,  # ... with a comment and a trailing comma, which DeepSpeed reads
    "mode": "train",  # or "eval": the mode that from_pretrained returns a model in
    "stray": False,  # evaluate with gradients before each micro-batch, in eval mode
    "direct": False,  # loss.backward() instead of engine.backward(loss)
    "died": False,  # another engine of the same model died in the middle of a backward
    "sparse": False,  # sparse gradients of the embedding
}


def with_expert_layers(model):
    """Each MLP of a LLaMA becomes DeepSpeed's mixture of four of it, two on each of two ranks."""
    from deepspeed.moe.layer import MoE

    for layer in model.model.layers:
        layer.mlp = MoE(hidden_size=32, expert=layer.mlp, num_experts=4, ep_size=2)
    return model


class OwnLossModel(torch.nn.Module):
    """No transformers model: it computes its loss by itself."""

    def __init__(self, vocab):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(vocab, 16), torch.nn.Linear(16, vocab)

    def forward(self, input_ids, labels):
        logits = self.head(self.embed(input_ids))[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss)


def build_model(run):
    run = {**DEFAULTS, **run}
    model = make_model(run).train(run["mode"] == "train")
    if run["sparse"]:
        model.get_input_embeddings().sparse = True
    return model


def make_model(run):
    torch.manual_seed(0)
    if run["arch"] == "own_loss":
        return OwnLossModel(run["vocab"])
    if run["arch"] == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=run["vocab"], n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                          resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(vocab_size=run["vocab"], hidden_size=32, intermediate_size=56,
                                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                                         max_position_embeddings=64))  # fmt: skip
    return with_expert_layers(model) if run["arch"] == "moe" else model


def global_batches(run, step, rows):
    """Token ids [rows, seq] of a global batch; Zipf-like so that surprisal is skewed as in text."""
    generator = torch.Generator().manual_seed(run["zipf_seed"] + step)
    weights = 1.0 / torch.arange(1, run["vocab"] + 1).float()
    return torch.multinomial(weights, rows * run["seq"], replacement=True, generator=generator).view(rows, run["seq"])


def micro_batches(run, step, rank, world):
    rows = run["micro"] * run["gas"] * world
    tokens = global_batches(run, step, rows)
    for index in range(run["gas"]):
        start = (index * world + rank) * run["micro"]
        ids = tokens[start : start + run["micro"]]
        labels = ids.clone()
        for row in range(run["micro"]):
            labels[row, : 3 + (start + row) % 5] = -100  # uneven numbers of supervised tokens
        masked = run["masked"]
        if masked and masked["step"] == step and masked["micro"] in (index, "all") and masked["rank"] in (rank, "all"):
            labels[:] = -100
        yield ids, labels


def held_out(run, rank):
    """A governor's sequences, of unequal lengths."""
    tokens = global_batches(run, 5000 + (rank if run["held_out_odd"] else 0), run["held_out"])
    for row, ids in enumerate(tokens):
        ids = ids[: run["seq"] - row % 3]
        yield {"input_ids": ids, "labels": ids.clone()}


def num_items(run, step, world):
    total = 0
    for rank in range(world):
        total += sum(int((labels[:, 1:] != -100).sum()) for _, labels in micro_batches(run, step, rank, world))
    return total
