"""A plain training loop under stability control, without Trainer.

    deepspeed --num_gpus 2 launchers/plain_loop.py          (on a machine without GPUs: DS_ACCELERATOR=cpu)
"""

import json

import deepspeed
from transformers import AutoConfig, AutoModelForCausalLM

import ds_stability
from ds_stability.data import DataSpec, load_blocks
from ds_stability.data.readers import read_documents
from ds_stability.data.tokenizer import train_bpe

deepspeed.init_distributed()
spec = DataSpec(dataset_name="builtin:prose")
tokenizer = train_bpe(read_documents(spec), vocab_size=1024)
blocks, _, _ = load_blocks(spec, tokenizer, block_size=128)
config = AutoConfig.from_pretrained("ds_configs/models/llama_tiny.json", use_cache=False, vocab_size=len(tokenizer))
model = AutoModelForCausalLM.from_config(config)
with open("ds_configs/loop_zero3.json") as file:
    ds_config = json.load(file)
ds_config["stability"]["controller"] = {"warmup_steps": 20}  # from scratch it is 100, more than this run has steps

engine, optimizer, loader, scheduler = ds_stability.initialize(
    model=model, model_parameters=model.parameters(), training_data=blocks, config=ds_config
)
for batch in loader:
    loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0 and engine.global_steps % 10 == 0:
        metrics = engine.stability.metrics
        print(engine.global_steps, {key: round(metrics[f"stability/{key}"], 3) for key in ("level", "variance_ratio", "entropy")})
if engine.global_rank == 0:
    print(*engine.stability.summary(), sep="\n")  # what was held, and for how long
