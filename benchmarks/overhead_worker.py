"""One process of benchmarks/overhead.py, started by the `deepspeed` launcher: trains several engines side by side.

    deepspeed --num_gpus 2 benchmarks/overhead_worker.py SPEC.json

SPEC.json: model (a folder of weights, or a config JSON), config_overrides, bf16, batch_size and block_size of a rank, arms
(names of ARMS), rounds, steps, warmup_steps, output. Rank 0 writes `output`: for each arm a list of step times (seconds)
per round, and the peak memory of the largest rank.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_stability
from ds_stability.console import quiet_libraries
from ds_stability.run_dir import write_json_atomic

#: The `stability` block of each arm; None is plain DeepSpeed. The level acts from the first steps on.
ARMS: dict[str, dict | None] = {
    "plain": None,
    "level 0": {"level": 0.0},
    "level 0.5": {"level": 0.5, "controller": {"warmup_steps": 0, "ramp_steps": 1}},
}


def main(path: str) -> None:
    quiet_libraries()
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    deepspeed.init_distributed()
    before = resident_bytes()
    engines = {arm: build(arm, spec) for arm in spec["arms"]}
    batch = random_batch(spec, next(iter(engines.values())))
    for engine in engines.values():
        for _ in range(spec["warmup_steps"]):
            train_step(engine, batch)
    seconds: dict[str, list[list[float]]] = {arm: [] for arm in engines}
    for number in range(spec["rounds"]):
        # Each round starts with another arm, so that a drift of the machine meets all of them alike.
        names = list(engines)
        for arm in names[number % len(names) :] + names[: number % len(names)]:
            seconds[arm].append([train_step(engines[arm], batch) for _ in range(spec["steps"])])
    memory = peak_memory(before, next(iter(engines.values())).device)
    if dist.get_rank() == 0:
        write_json_atomic(spec["output"], {"seconds": seconds, "memory": memory, "world_size": dist.get_world_size()})
    dist.barrier()


def build(arm: str, spec: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if spec["bf16"] else torch.float32
    torch.manual_seed(0)
    if Path(spec["model"]).is_dir():
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(spec["model"], **spec["config_overrides"]), dtype=dtype
        )
    model.config.use_cache = False
    model.train()
    config = json.loads(Path(spec["ds_config"]).read_text(encoding="utf-8"))
    for key in ("optimizer", "stability"):
        config.pop(key, None)
    config |= {"train_micro_batch_size_per_gpu": spec["batch_size"], "bf16": {"enabled": spec["bf16"]}}
    arguments = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), "config": config}
    if ARMS[arm] is None:
        return deepspeed.initialize(**arguments)[0]
    config["stability"] = ARMS[arm]
    return ds_stability.initialize(**arguments)[0]


def random_batch(spec: dict[str, Any], engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Random tokens, other ones on each rank: neither time nor memory depends on what is learned."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    vocab_size = engine.module.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab_size, (spec["batch_size"], spec["block_size"]), generator=generator).to(engine.device)
    return {"input_ids": ids, "labels": ids}


def train_step(engine: deepspeed.DeepSpeedEngine, batch: dict[str, torch.Tensor]) -> float:
    """Wall time of one optimizer step, seconds."""
    start = time.perf_counter()
    loss = engine(**batch, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident_bytes() -> int:
    """High-water mark of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(before: int, device: torch.device) -> dict[str, float]:
    """GiB, the largest rank's: resident memory, its growth since `before` (libraries loaded, no model), the accelerator's."""
    peak = resident_bytes()
    values = [peak, peak - before, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0]
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    names = ("resident_gib", "resident_growth_gib", "accelerator_gib")
    return dict(zip(names, (tensor / 2**30).tolist(), strict=True))


if __name__ == "__main__":
    main(next(word for word in sys.argv[1:] if not word.startswith("--local_rank")))
