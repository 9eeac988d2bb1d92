"""Tiny models on real English prose, from scratch, under ZeRO-3: the variance ratio step by step.

Usage: deepspeed --num_gpus 2 ratio_worker.py OUT.json ARCH:LEVEL [...]. Rank 0 writes {"ARCH:LEVEL": [metrics, ...]}. ARCH
"trained" goes on from the weights of a level-0 llama, saved and loaded by from_pretrained, with the warm-up of such a model.
"""

import gc
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ds_stability
from ds_stability.data import DataSpec, load_blocks
from ds_stability.data.readers import read_documents
from ds_stability.data.tokenizer import train_bpe

STEPS, VOCAB, BLOCK, MICRO = 232, 512, 64, 8  # 1,024 tokens a step on two ranks
FEWER = {"zero": 120, "trained": 142}  # steps of a run at level 0, and of one that goes on from its weights


def build_model(arch, folder):
    torch.manual_seed(0)
    if arch == "trained":
        return LlamaForCausalLM.from_pretrained(folder, use_cache=False).train()  # it comes in eval mode
    if arch == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=BLOCK, n_embd=64, n_layer=2, n_head=2, use_cache=False,
                                          resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=2, use_cache=False,
                                        max_position_embeddings=BLOCK))  # fmt: skip


def save_weights(engine, folder):
    """What from_pretrained needs, from the partitions of both ranks."""
    weights = {n: deepspeed.utils.safe_get_full_fp32_param(p).cpu() for n, p in engine.module.named_parameters()}
    if dist.get_rank() == 0:
        engine.module.save_pretrained(folder, state_dict=weights)
    dist.barrier()


def train(arch, level, blocks, folder):
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 200_000},
        "stability": {"level": level, "statistics": {"gradient_noise_scale": False, "update_ratio_interval": 0}},
    }
    model = build_model(arch, folder)
    engine = ds_stability.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).tolist()
    rows, position = [], dist.get_rank()
    for _ in range(FEWER.get("zero" if level == 0.0 else arch, STEPS)):
        chosen = []
        for _ in range(MICRO):
            chosen.append(blocks[order[position % len(order)]])
            position += dist.get_world_size()
        batch = {key: torch.stack([block[key] for block in chosen]) for key in chosen[0]}
        engine.backward(engine(**batch).loss)
        engine.step()
        rows.append(engine.stability.metrics)
    if level == 0.0:
        save_weights(engine, folder)
    engine.destroy()
    return rows


def main():
    gc.freeze()  # DeepSpeed collects garbage for every engine: the imports need not be walked each time
    deepspeed.init_distributed()
    spec = DataSpec(dataset_name="builtin:prose")
    blocks, _, _ = load_blocks(spec, train_bpe(read_documents(spec), VOCAB), BLOCK)
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    folder = str(Path(arguments[0]).with_name("level-zero"))
    results = {case: train(case.split(":")[0], float(case.split(":")[1]), blocks, folder) for case in arguments[1:]}
    if dist.get_rank() == 0:
        Path(arguments[0]).write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
