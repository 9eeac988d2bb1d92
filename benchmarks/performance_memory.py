"""How much memory a training step takes, beyond what is held when its engine is built: exactly on CUDA, in two ways on CPUs.

On a CPU nothing counts what torch holds. Two measures stand for it. *Allocated*: the profiler's record of every allocation and
release of torch's CPU allocator in a step, summed up; exact and the same in every run, and what CUDA's counter counts.
*Resident*: the kernel's high-water mark of the process, reset after the engine is built; it holds everything, libraries'
buffers too, but also what the C library keeps for later unless it is told to give freed memory back.
"""

import ctypes
import gc
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from performance_engines import Trainer

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of <malloc.h>
_SMALLEST_MAPPED = 65_536  # bytes; a freed tensor of this size or more leaves the process at once


def return_freed_memory() -> None:
    """Let glibc give every larger freed block back to the kernel, so that resident memory is memory in use."""
    libc = ctypes.CDLL(None)
    try:
        libc.mallopt(_MMAP_THRESHOLD, _SMALLEST_MAPPED)
        libc.mallopt(_TRIM_THRESHOLD, 0)
    except AttributeError:  # another C library
        return


def measure(trainer: Trainer, steps: Callable[[int], None], count: int) -> dict[str, int]:
    """Bytes on this rank: peak of `count` steps, its activation part, what was held before, the stated copy.

    peak: whole memory, of the accelerator or resident. activation: peak of torch's allocator less what is held after the
    engine and its optimizer are built, moments included, which torch makes in the first step. resident_activation: the same by
    resident memory (0 on CUDA). copy: bytes of the averaging's means, which are part of both.
    """
    gc.collect()
    if trainer.engine.device.type == "cuda":
        return _on_cuda(trainer, steps, count)
    before, held, moments = live_bytes(), status_bytes("VmRSS"), trainer.moment_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark (man 5 proc)
    steps(count)
    peak = status_bytes("VmHWM")
    gc.collect()
    late = trainer.moment_bytes() - moments
    since_built = live_bytes() - before - late
    return {"peak": peak, "held": held + late, "activation": since_built + peak_of_one_step(lambda: steps(1)),
            "resident_activation": peak - held - late, "copy": trainer.copy_bytes()}  # fmt: skip


def _on_cuda(trainer: Trainer, steps: Callable[[int], None], count: int) -> dict[str, int]:
    torch.cuda.synchronize()
    held, moments = torch.cuda.memory_allocated(), trainer.moment_bytes()
    torch.cuda.reset_peak_memory_stats()
    steps(count + 1)
    torch.cuda.synchronize()
    peak, held = torch.cuda.max_memory_allocated(), held + trainer.moment_bytes() - moments
    return {
        "peak": peak,
        "held": held,
        "activation": peak - held,
        "resident_activation": 0,
        "copy": trainer.copy_bytes(),
    }


def status_bytes(key: str) -> int:
    """A line of /proc/self/status: VmRSS, resident now, or VmHWM, its high-water mark."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def live_bytes() -> int:
    """Bytes of all storages that tensors in this process's Python objects hold, each storage once."""
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type != "meta":  # isinstance() would run proxies' code
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def peak_of_one_step(step: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator had given out at once within `step`, beyond what it had before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return highest((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")


def highest(changes: Iterable[tuple[float, int]]) -> int:
    """Largest running sum of (time, change in bytes), in the order of time; never below 0."""
    total = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        total += change
        peak = max(peak, total)
    return peak
