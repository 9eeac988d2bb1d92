"""Trains small models for two steps, exports them in mid-training, and trains on.

Usage: deepspeed --num_gpus N export_worker.py OUT CASE ...
Rank 0 writes OUT/CASE.pt (engine logits and more), OUT/CASE/final/, and OUT/DONE last.
"""

import gc
import sys
from pathlib import Path

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

from ds_stability.export import export_model
from ds_stability.gathered import whole

ARGUMENTS = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
OUT, NAMES = Path(ARGUMENTS[0]), ARGUMENTS[1:]
VOCAB, LENGTH = 97, 24
CASES = {
    "llama_fp32": {},
    "llama_bf16": {"bf16": True},
    "llama_stage2_bf16": {"bf16": True, "stage": 2},
    "llama_offload": {"offload": True},
    "gpt2_fp32": {"arch": "gpt2"},
    "gpt2_bf16": {"arch": "gpt2", "bf16": True},
    "llama_lora_fp32": {"lora": ["q_proj", "down_proj"]},
    "llama_lora_bf16": {"lora": ["q_proj", "down_proj"], "bf16": True},
    "gpt2_lora_fp32": {"arch": "gpt2", "lora": ["c_attn", "wte"]},
    "llama_dora_saved_head": {"lora": ["v_proj"], "dora": True, "modules_to_save": ["lm_head"]},
}


def ds_config(case):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": case.get("stage", 3), "reduce_bucket_size": 10_000},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.get("bf16", False)},
    }
    if case.get("stage", 3) == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
    if case.get("offload"):
        config["zero_optimization"] |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    return config


def build_model(case):
    torch.manual_seed(0)
    if case.get("arch") == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2,
                                           initializer_range=0.1))  # fmt: skip
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
                                             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                             max_position_embeddings=64, initializer_range=0.1))  # fmt: skip
    if case.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=case["lora"], lora_dropout=0.1,
                                                 use_dora=case.get("dora", False), init_lora_weights=False,
                                                 modules_to_save=case.get("modules_to_save")))  # fmt: skip
    return model


def train(engine, steps, seed):
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(100 * seed + rank)
    losses = []
    for _ in range(steps):
        ids = torch.randint(2, VOCAB, (2, LENGTH), generator=generator)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights(engine):
    with whole(engine, engine.module.parameters()):
        return [p.detach().clone() for p in engine.module.parameters()]


def run_case(name, exporting):
    case = CASES[name]
    # As under Trainer: transformers then believes that new models are partitioned when they are built.
    keep = HfDeepSpeedConfig(ds_config(case)) if case.get("lora") and case.get("stage", 3) == 3 else None
    model = build_model(case)
    config = model.config.to_dict()
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=trainable, config=ds_config(case))[0]
    torch.manual_seed(torch.distributed.get_rank())
    losses = train(engine, 2, seed=1)
    result = {}
    if exporting:
        engine.eval()
        ids = torch.randint(2, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            logits = engine(input_ids=ids).logits
        engine.train()
        source = OUT / "high_frequency.json"
        if torch.distributed.get_rank() == 0:
            source.write_text('{"token_ids": [5]}')
        metadata = {"stability": {"level": 0.5}, "note": "a|b\n# <script>alert(1)</script>"}
        export_model(engine, None, OUT / name / "final", metadata, source, max_shard_size="20KB")
        result = {"ids": ids, "logits": logits.float(), "failure": failure(engine, name)}
        result["same_config"] = config == model.config.to_dict()
    losses += train(engine, 2, seed=2)
    del keep
    return result | {"losses": losses, "weights": weights(engine)}


def failure(engine, name):
    """What each rank hears when rank 0 cannot write, and what is left of an earlier export."""
    before = sorted(p.name for p in (OUT / name).iterdir())
    torch.distributed.barrier()  # rank 0 writes only after both have looked
    try:
        export_model(engine, None, OUT / name / "final", {}, OUT / "no_such_file.json")
        message = None
    except RuntimeError as error:
        message = str(error)
    torch.distributed.barrier()
    return message, before, sorted(p.name for p in (OUT / name).iterdir())


def main():
    gc.freeze()  # DeepSpeed collects garbage for every engine: the imports need not be walked each time
    deepspeed.init_distributed()
    rank = torch.distributed.get_rank()
    for name in NAMES:
        if rank == 0 and CASES[name].get("lora"):
            build_model({**CASES[name], "lora": None}).save_pretrained(OUT / "base" / name)
        plain = run_case(name, exporting=False)
        exported = run_case(name, exporting=True)
        exported["undisturbed"] = plain["losses"] == exported["losses"] and all(
            torch.equal(a, b) for a, b in zip(plain["weights"], exported["weights"], strict=True)
        )
        torch.save(exported, OUT / f"{name}.rank{rank}.pt")
    torch.distributed.barrier()
    if rank == 0:
        (OUT / "DONE").write_text("")


if __name__ == "__main__":
    main()
