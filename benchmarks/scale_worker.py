"""One process of benchmarks/scale.py, started by the `deepspeed` launcher: counts what engines of several sizes hold, send and store.

    deepspeed --num_gpus 2 benchmarks/scale_worker.py SPEC.json

SPEC.json: cases (as in scale.CASES), folder for checkpoints (removed case by case), output, own_network (nobody else uses the
loopback device). Rank 0 writes `output`: per case the shapes of the parameters, the bytes of all live tensors that the
engine brought, between two steps and inside the optimizer's step, the messages of a step, the bytes that crossed the
loopback device, what autograd keeps of a forward, and the bytes of a checkpoint's and an export's files.
"""

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_stability
from ds_stability.console import quiet_libraries
from ds_stability.export import export_model
from ds_stability.run_dir import write_json_atomic

SETTLING_STEPS, COUNTED_STEPS = 3, 2  # ZeRO-3 records its trace in the first step


def main(path: str) -> None:
    quiet_libraries()
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    deepspeed.init_distributed()
    results = []
    for case in spec["cases"]:
        results.append(measure(case, Path(spec["folder"]), spec["own_network"]))
        if dist.get_rank() == 0:
            print(f"{case['name']} on {dist.get_world_size()} ranks: done", flush=True)
    if dist.get_rank() == 0:
        write_json_atomic(spec["output"], results)
    dist.barrier()


def measure(case: dict[str, Any], folder: Path, own_network: bool) -> dict[str, Any]:
    before = live_storages()
    engine = build(case)
    ids = torch.randint(0, case["model"]["vocab_size"], (case["batch_size"], case["block_size"]),
                        generator=torch.Generator().manual_seed(dist.get_rank()))  # fmt: skip
    batch = {"input_ids": ids, "labels": ids}
    inside = watch_optimizer_step(engine, before)
    for _ in range(SETTLING_STEPS):
        train_step(engine, batch)
    memory = {"held": sum_of(live_storages(), before), "inside_step": max(inside), "parts": parts(engine)}
    messages = count_messages(engine, batch)
    loopback = count_loopback(engine, batch) if own_network else None
    saved = saved_by_autograd(engine, batch)
    stored = store(engine, folder, case["name"])
    numels = [p.ds_numel for p in engine.module.parameters()]
    persistent = [p.ds_numel for p in engine.module.parameters() if p.ds_persist]
    groups = [sum(p.partition_numel() for p in group) for group in engine.optimizer.fp16_groups]
    engine.destroy()
    del engine, batch, inside
    gc.collect()
    return {"name": case["name"], "world_size": dist.get_world_size(), "numels": numels, "persistent": persistent, "sub_groups": groups,
            "memory": memory, "messages": messages, "loopback_per_rank": loopback, "saved_activations": saved,
            "stored": stored}  # fmt: skip


def build(case: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**case["model"], use_cache=False, bos_token_id=None, eos_token_id=None))
    model = model.to(torch.bfloat16 if case["bf16"] else torch.float32).train()
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    config = {
        "train_micro_batch_size_per_gpu": case["batch_size"], "gradient_clipping": 1.0, "bf16": {"enabled": case["bf16"]},
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": case["reduce_bucket_size"], "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": case["persistence_threshold"],
            "stage3_max_reuse_distance": case["max_reuse_distance"], "sub_group_size": case["sub_group_size"],
        },
        "stability": {
            "level": 0.5, "loss_path": "chunked", "controller": {"warmup_steps": 0, "ramp_steps": 1},
            "statistics": {"update_ratio_interval": 1},
            "stabilizers": {"feedback": {}, "averaging": {"level": 0.5}},
        },
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine = ds_stability.initialize(model=model, optimizer=optimizer, config=config)[0]
    vocab_size = case["model"]["vocab_size"]
    engine.stability.set_high_frequency(list(range(vocab_size // 50)), vocab_size)
    return engine


def train_step(engine: deepspeed.DeepSpeedEngine, batch: dict[str, torch.Tensor]) -> None:
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()


# ---- memory ---------------------------------------------------------------------------------------------------------


def live_storages() -> dict[int, int]:
    """Address -> bytes of every storage that a tensor in this process's Python objects holds."""
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type != "meta":  # isinstance() would run proxies' code
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def sum_of(now: dict[int, int], before: dict[int, int]) -> int:
    return sum(size for address, size in now.items() if address not in before)


def watch_optimizer_step(engine: deepspeed.DeepSpeedEngine, before: dict[int, int]) -> list[int]:
    """Bytes of the live tensors at each call of the base optimizer, after ds_stability's own hook."""
    seen: list[int] = []
    engine.optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(sum_of(live_storages(), before)))
    return seen


def parts(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """Bytes of the tensors that the formula names, this rank's."""
    optimizer = engine.optimizer
    state = [tensor for values in optimizer.optimizer.state.values() for tensor in values.values() if torch.is_tensor(tensor)]
    return {
        "weights": sum(p.ds_tensor.numel() * p.element_size() for p in engine.module.parameters()),
        "persistent": sum(p.ds_numel * p.element_size() for p in engine.module.parameters() if p.ds_persist),
        "gradients": size(optimizer.grad_partitions_flat_buffer),
        "master": sum(size(tensor) for tensor in optimizer.fp32_partitioned_groups_flat),
        "moments": sum(size(tensor) for tensor in state if tensor.numel() > 1),
        "bucket": sum(size(bucket.buffer) for bucket in optimizer.ipg_buckets.values()),
        "averaging": sum(size(mean) for mean in engine.stability.averaging.means.values()),
        "high_frequency": size(engine.stability.loss.high_frequency_V),
    }


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def saved_by_autograd(engine: deepspeed.DeepSpeedEngine, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that the graph of one forward keeps for its backward, weights and inputs left out."""
    kept: dict[int, int] = {}
    inputs = {tensor.untyped_storage().data_ptr() for tensor in batch.values()}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
        if pointer not in weights and pointer not in inputs:
            kept[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    return sum(kept.values())


# ---- the wire -------------------------------------------------------------------------------------------------------


def count_messages(engine: deepspeed.DeepSpeedEngine, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Collectives of a step by DeepSpeed's comms logger: {operation: {bytes of its tensor argument: calls a step}}."""
    logger = deepspeed.comm.comm.comms_logger
    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False, debug=False)
    logger.reset_data()
    for _ in range(COUNTED_STEPS):
        train_step(engine, batch)
    raw = logger.get_raw_data()
    deepspeed.comm.configure(enabled=False)
    return {name: {str(size): values[0] / COUNTED_STEPS for size, values in sizes.items()} for name, sizes in raw.items()}


def count_loopback(engine: deepspeed.DeepSpeedEngine, batch: dict[str, torch.Tensor]) -> float:
    """Bytes a step that a rank sends, by the loopback device's counter, packet headers included."""
    counts = []
    for steps in (0, COUNTED_STEPS):
        dist.barrier()
        first = loopback_bytes()
        dist.barrier()
        for _ in range(steps):
            train_step(engine, batch)
        dist.barrier()
        counts.append(loopback_bytes() - first)
        dist.barrier()
    return (counts[1] - counts[0]) / COUNTED_STEPS / dist.get_world_size()


def loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":", 1)[1].split()[8])


# ---- the disk -------------------------------------------------------------------------------------------------------


def store(engine: deepspeed.DeepSpeedEngine, folder: Path, name: str) -> dict[str, dict[str, int]]:
    """Bytes of the files of a checkpoint and of an export, by name."""
    folder = folder / name
    engine.save_checkpoint(str(folder / "checkpoint"), tag="one")
    export_model(engine, None, folder / "export", {"level": 0.5})
    dist.barrier()
    found = {kind: {path.name: path.stat().st_size for path in sorted((folder / kind).rglob("*")) if path.is_file()}
             for kind in ("checkpoint", "export")}  # fmt: skip
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    return found


if __name__ == "__main__":
    main(next(word for word in sys.argv[1:] if not word.startswith("--local_rank")))
