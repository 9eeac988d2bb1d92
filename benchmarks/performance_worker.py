"""One process of benchmarks/performance.py, started by the `deepspeed` launcher.

    deepspeed --num_gpus 2 benchmarks/performance_worker.py SPEC.json

SPEC.json: mode, cases (as `performance_cases.Case.spec` makes them) and output. Mode "time": the engines of all arms of a case
live in this process and take turns; then a few steps of each are counted and profiled. Mode "memory": the one arm of the one
case, alone in its process. Rank 0 writes `output`: a list with a result per case.
"""

import gc
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import performance_memory
import torch
import torch.distributed as dist
from performance_engines import Trainer, announce_zero3

from ds_stability.console import quiet_libraries
from ds_stability.run_dir import write_json_atomic

OPTIONAL = ("trl", "liger", "triton")  # need a package or a GPU: what they cannot do is recorded, not an error
KEPT_OPERATORS = 40


def main(path: str) -> None:
    quiet_libraries()
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    if spec["mode"] == "memory":
        performance_memory.return_freed_memory()
    deepspeed.init_distributed()
    progress = Progress(spec)
    measure = {"time": time_case, "memory": memory_case}[spec["mode"]]
    results = [measure(case, progress) for case in spec["cases"]]
    if dist.get_rank() == 0:
        write_json_atomic(spec["output"], results)
    dist.barrier()


class Progress:
    """Lines `progress DONE/ALL` on rank 0's output, at most one a second: the benchmark reads them."""

    def __init__(self, spec: dict[str, Any]):
        self.done, self.shown_at = 0, 0.0
        self.all = sum(steps_of(case, spec["mode"]) for case in spec["cases"])

    def add(self, steps: int) -> None:
        self.done += steps
        if dist.get_rank() == 0 and time.monotonic() - self.shown_at > 1:
            self.shown_at = time.monotonic()
            print(f"progress {self.done}/{self.all}", flush=True)


def steps_of(case: dict[str, Any], mode: str) -> int:
    each = case["memory_steps"] + 1 if mode == "memory" else case["warmup_steps"] + case["rounds"] * case["steps"]
    return each * len(case["arms"])


# ---- time -----------------------------------------------------------------------------------------------------------


def time_case(case: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Seconds of a step in each round and arm, messages of a step, operators of a step; and why an arm did not run."""
    trainers, refused = build(case)
    hf_config = announce_zero3(case)
    for name in list(trainers):
        if not attempt(
            name, case, refused, lambda name=name: [trainers[name].step() for _ in range(case["warmup_steps"])]
        ):
            del trainers[name]
        progress.add(case["warmup_steps"])
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    names = list(trainers)
    for number in range(case["rounds"]):
        # In a new order each round, the same on all ranks: what a turn leaves behind in caches and heap meets all alike.
        for name in random.Random(number).sample(names, len(names)):
            seconds[name].append(turn(trainers[name], case["steps"]))
            progress.add(case["steps"])
    result = {"seconds": seconds, "not_run": refused, "world_size": dist.get_world_size(), "messages": {}, "profile": {},
              "loss_path": {name: trainer.loss_path for name, trainer in trainers.items()}}  # fmt: skip
    for name in names if case["profile_steps"] else ():
        result["messages"][name] = count_messages(trainers[name])
        result["profile"][name] = profile(trainers[name], case["profile_steps"])
    while trainers:
        trainers.popitem()[1].engine.destroy()
    del hf_config
    gc.collect()
    return result


def build(case: dict[str, Any]) -> tuple[dict[str, Trainer], dict[str, str]]:
    """(trainers by arm, why the others are none)."""
    trainers: dict[str, Trainer] = {}
    refused: dict[str, str] = {}
    for name, arm in case["arms"].items():
        attempt(name, case, refused, lambda name=name, arm=arm: trainers.update({name: Trainer(case, arm)}))
    return trainers, refused


def attempt(name: str, case: dict[str, Any], refused: dict[str, str], work: Callable[[], Any]) -> bool:
    """Whether `work` was done. Where an optional loss fails, alike on all ranks, the reason is kept."""
    if case["arms"][name]["loss"] not in OPTIONAL:
        work()
        return True
    try:
        work()
    except (ImportError, RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
        refused[name] = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return False
    return True


def turn(trainer: Trainer, steps: int) -> float:
    """Seconds of a step: the mean over a turn, so that what is done only now and then counts with its share."""
    synchronize(trainer)
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    synchronize(trainer)
    return (time.perf_counter() - start) / steps


def synchronize(trainer: Trainer) -> None:
    if trainer.engine.device.type == "cuda":
        torch.cuda.synchronize()


def count_messages(trainer: Trainer) -> dict[str, dict[str, int]]:
    """Collectives of one step by DeepSpeed's comms logger: {operation: {bytes of its tensor argument: calls}}."""
    logger = deepspeed.comm.comm.comms_logger
    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False, debug=False)
    logger.reset_data()
    trainer.step()
    raw = logger.get_raw_data()
    deepspeed.comm.configure(enabled=False)
    return {name: {str(size): values[0] for size, values in sizes.items()} for name, sizes in raw.items()}


def profile(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Self time (ms a step) of the operators of rank 0, on the accelerator where there is one, and the wall time."""
    from torch.profiler import ProfilerActivity

    on_gpu = trainer.engine.device.type == "cuda"
    if dist.get_rank() != 0:
        turn(trainer, steps)
        return {}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = turn(trainer, steps)
    times = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000 / steps
             for event in profiler.key_averages()}  # fmt: skip
    largest = sorted(times, key=times.__getitem__, reverse=True)[:KEPT_OPERATORS]
    return {"wall_ms": 1000 * seconds, "operators": {name: times[name] for name in largest}}


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory_case(case: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Bytes of the largest rank (performance_memory.py), of the one arm of the case."""
    trainers, refused = build(case)
    if refused:
        return {"memory": None, "not_run": refused}
    (name, trainer) = next(iter(trainers.items()))
    hf_config = announce_zero3(case)
    measured: dict[str, int] = {}

    def steps(count: int) -> None:
        for _ in range(count):
            trainer.step()
            progress.add(1)

    done = attempt(
        name, case, refused, lambda: measured.update(performance_memory.measure(trainer, steps, case["memory_steps"]))
    )
    del hf_config
    if not done:
        return {"memory": None, "not_run": refused}
    values = torch.tensor(list(measured.values()), dtype=torch.float64, device=trainer.engine.device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return {"memory": dict(zip(measured, values.tolist(), strict=True)), "not_run": {}}


if __name__ == "__main__":
    main(next(word for word in sys.argv[1:] if not word.startswith("--local_rank")))
