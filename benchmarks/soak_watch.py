"""What benchmarks/soak.py sees of a live run from outside: its ranks' processes (psutil) and its files."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import training

from ds_stability.run_dir import RunDir

FILE_NAMES = {"metrics_bytes": "metrics.jsonl", "tensorboard_bytes": "tensorboard/", "log_bytes": "log", "checkpoint_bytes": "checkpoints"}


class Watcher:
    """For `training.run_script`: looks at the launcher's ranks and the run's files until the launcher ends.

    Args:
        log: the launcher's output.
        interval: seconds between looks.
        found: called with each sample {seconds, step, ranks: {rank: {own, pss, rss, fds, threads, children, cpu}}, files};
            bytes, counts, and seconds of processor time.
    """

    def __init__(self, run: RunDir, log: Path, interval: float, found: Callable[[dict[str, Any]], None]):
        self.run, self.log, self.interval, self.found = run, log, interval, found
        self.shown = 0

    def __call__(self, process: subprocess.Popen) -> None:
        started, finished_at = time.monotonic(), None
        while process.poll() is None:
            time.sleep(self.interval)
            step = last_step(self.run.metrics)
            ranks = {} if self.run.done.exists() else look(process.pid)  # a rank that tears down is no longer measured
            files = file_sizes(self.run) | {"log_bytes": size_of(self.log)}
            self.found({"seconds": round(time.monotonic() - started, 2), "step": step, "ranks": ranks, "files": files})
            self._show(step, ranks)
            if self.run.done.exists():
                finished_at = finished_at or time.monotonic()
                if time.monotonic() - finished_at > training.TEARDOWN_SECONDS:
                    return

    def _show(self, step: int, ranks: dict[str, dict[str, int]]) -> None:
        if step >= self.shown + 100:
            self.shown = step
            memory = ", ".join(f"{one['own'] / 2**20:.1f}" for _, one in sorted(ranks.items()))
            print(f"step {step}  memory of the ranks {memory} MiB", flush=True)


def look(launcher: int) -> dict[str, dict[str, int]]:
    """Each rank's memory (bytes), open descriptors, threads and child processes, by rank as text."""
    found = {}
    try:
        family = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return {}
    ranks: dict[int, str] = {}
    for process in sorted(family, key=lambda p: p.create_time()):
        try:
            rank = process.environ().get("RANK")
            if rank is None or process.ppid() in ranks:  # the launcher itself, or a rank's own child
                continue
            ranks[process.pid] = rank
            memory, seconds = process.memory_full_info(), process.cpu_times()
            found[rank] = {"own": own_memory(process.pid), "pss": memory.pss, "rss": memory.rss, "fds": process.num_fds(),
                           "threads": process.num_threads(), "children": len(process.children()),
                           "cpu": round(seconds.user + seconds.system, 2)}  # fmt: skip
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended while it was looked at
            continue
    return found


def own_memory(pid: int) -> int:
    """Bytes of anonymous and shared memory. RSS and PSS hold pages of libraries too, which come and go with the page cache and
    with other programs that map the same files.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines())
        return sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem")) * 1024
    except (OSError, KeyError):
        raise psutil.NoSuchProcess(pid) from None


def last_step(metrics: Path) -> int:
    """Step of the last whole line, 0 before there is one."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, size_of(metrics) - 8192))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    return int(json.loads(lines[-2])["step"]) if len(lines) > 2 else 0


def file_sizes(run: RunDir) -> dict[str, int]:
    """Bytes and counts of the run's files. `unfinished`: what a write or a removal that was cut off would leave behind."""
    checkpoints = [path for path in run.path.glob("checkpoint-*") if path.is_dir()]
    unfinished = [path for path in run.path.rglob("*") if path.name.startswith((".saving", ".removing")) or path.suffix == ".tmp"]
    samples = list(run.samples.glob("*"))
    return {
        "metrics_bytes": size_of(run.metrics),
        "tensorboard_bytes": sum(size_of(path) for path in run.tensorboard.glob("*")),
        "sample_bytes": sum(size_of(path) for path in samples),
        "sample_count": len(samples),
        "checkpoint_bytes": sum(size_of(path) for folder in checkpoints for path in folder.rglob("*") if path.is_file()),
        "checkpoint_count": len(checkpoints),
        "unfinished": len(unfinished),
    }


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # not yet, or no longer
        return 0


def tensorboard_points(run: RunDir) -> int:
    """Points of the tag `loss` in the run's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    accumulator.Reload()
    return len(accumulator.Scalars("loss"))
