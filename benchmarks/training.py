"""Start launchers/train.py under the real `deepspeed` launcher, cell after cell, with progress, and resume a broken sweep."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import REPOSITORY, TRAIN_SCRIPT

from ds_stability.errors import UserError
from ds_stability.launchers.sweep_hosts import default_processes, environment, free_port, on_gpu
from ds_stability.run_dir import RunDir, write_json_atomic
from ds_stability.shared_memory import remove_abandoned

POLL_SECONDS = 0.5
TEARDOWN_SECONDS = 60  # DeepSpeed on CPU now and then hangs or aborts after all work is done
QUIET_SECONDS = 15  # between progress lines where there is no terminal


__all__ = ["default_processes", "on_gpu"]  # of this machine, for the scripts here


class FailedRun(RuntimeError):
    """A launched script ended without its result; the message ends with its log."""


@dataclass(frozen=True)
class Cell:
    """One training run of a sweep: its folder's name, and its flags for launchers/train.py."""

    name: str
    flags: Mapping[str, Any]
    steps: int


def train_cells(cells: Sequence[Cell], output: Path, num_gpus: int) -> dict[str, RunDir]:
    """Train every cell that is not complete. A cell is complete if it has DONE and was made by the same flags.

    Raises:
        FailedRun: a run ended without DONE; the message ends with its log.
    """
    end_children_on_sigterm()
    runs = {}
    progress = Progress(len(cells))
    for position, cell in enumerate(cells, start=1):
        run, record = RunDir(output / cell.name), output / f"{cell.name}.json"
        runs[cell.name] = run
        made_by = json.loads(json.dumps({"flags": dict(cell.flags), "num_gpus": num_gpus}))
        if run.done.exists() and _read(record).get("made_by") == made_by:
            print(f"{cell.name}: done before")
            continue
        _remove_run(run)
        write_json_atomic(record, {"made_by": made_by})
        progress.begin(cell, position)
        launch_training({**cell.flags, "output_dir": str(run.path)}, num_gpus, output / f"{cell.name}.log", progress.show)
        progress.end()
        write_json_atomic(record, {"made_by": made_by, "seconds": round(progress.cell_seconds[-1], 1)})
    return runs


def training_seconds(cells: Sequence[Cell], output: Path) -> float:
    """Wall time that the cells took to train, start-up included, whenever that was."""
    return sum(_read(output / f"{cell.name}.json").get("seconds", 0.0) for cell in cells)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _remove_run(run: RunDir) -> None:
    """Remove an incomplete or outdated run; a folder that is no run of ours is left to train.py, which refuses it."""
    if run.manifest.exists():
        print(f"{run.path}: incomplete, or made by other settings; training it again")
        shutil.rmtree(run.path)


def launch_training(flags: Mapping[str, Any], num_gpus: int, log: Path, on_progress=None) -> None:
    """Run launchers/train.py with `flags` on `num_gpus` processes of this machine; output goes to the file `log`.

    Judged by its DONE file: DeepSpeed on CPU now and then aborts after all work is done.

    Raises:
        FailedRun: no DONE; the message ends with the end of the log.
    """
    run = RunDir(flags["output_dir"])
    code = run_script(TRAIN_SCRIPT, flag_words(flags), num_gpus, log, lambda process: _watch(process, run, on_progress))
    if not run.done.exists():
        raise FailedRun(f"{run.path}: training ended without DONE (exit code {code}); {log_tail(log)}")


def log_tail(log: Path, lines: int = 25) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    return f"{log} ends:\n" + "\n".join(text.splitlines()[-lines:])


def _watch(process: subprocess.Popen, run: RunDir, on_progress) -> None:
    finished_at = None
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if on_progress is not None:
            on_progress(_count_lines(run.metrics))
        if run.done.exists():
            finished_at = finished_at or time.monotonic()
            if time.monotonic() - finished_at > TEARDOWN_SECONDS:
                return


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0  # not yet


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """{"block_size": 128, "train_file": [a, b]} as command-line words; a flag of None is left out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        words.append(f"--{name}")
        words += [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
    return words


def run_script(script: Path, words: Sequence[str], num_gpus: int, log: Path,
               watch: Callable[[subprocess.Popen], None] = subprocess.Popen.wait) -> int:  # fmt: skip
    """Run a script under the `deepspeed` launcher, on CPUs where there is no GPU, with its output in the file `log`.

    `watch(process)` returns when there is nothing left to wait for; whatever still runs then is ended. The exit code.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as stream:
        process = start_script(script, words, num_gpus, port, stdout=stream, stderr=subprocess.STDOUT)
        try:
            watch(process)
        finally:
            end_process(process)
            remove_abandoned(port)
    return process.returncode


def start_script(script: Path, words: Sequence[str], num_gpus: int, port: int, **options: Any) -> subprocess.Popen:
    """In a session of its own, so that it can be ended with its ranks, and nothing else."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_gpus)]
    command += ["--master_port", str(port), str(script), *words]
    return subprocess.Popen(command, env=environment(), cwd=REPOSITORY, start_new_session=True, **options)


def end_process(process: subprocess.Popen) -> None:
    """End a process that `start_script` started, with its ranks, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_main(main: Callable[[], int]) -> int:
    """Exit code of `main`, with a failed run and a user's error told without a traceback, and Ctrl-C in one line."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except FailedRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command keeps what is complete", file=sys.stderr)
        return 128 + signal.SIGINT


def end_children_on_sigterm() -> None:
    """Let SIGTERM unwind the script as Ctrl-C does, so that `run_script` ends what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Progress:
    """One line: which cell, its step, the rate, the time left in this cell and in all."""

    def __init__(self, cells: int, stream=None):
        self.cells, self.stream = cells, stream or sys.stdout
        self.cell_seconds: list[float] = []
        self.shown_at = 0.0

    def begin(self, cell: Cell, position: int) -> None:
        self.cell, self.position, self.started = cell, position, time.monotonic()
        self.first: tuple[int, float] | None = None  # (steps, time) when the first step was seen

    def show(self, done: int) -> None:
        now = time.monotonic()
        if done and self.first is None:
            self.first = (done, now)
        if not self.stream.isatty() and now - self.shown_at < QUIET_SECONDS:
            return
        self.shown_at = now
        self._print(self.line(done, now), end="" if self.stream.isatty() else "\n")

    def line(self, done: int, now: float) -> str:
        head = f"{self.cell.name} ({self.position} of {self.cells})"
        if self.first is None or done <= self.first[0]:
            return f"{head}  starting, {now - self.started:.0f} s"
        rate = (done - self.first[0]) / (now - self.first[1])
        left = (self.cell.steps - done) / rate
        whole = self.cell_seconds[-1] if self.cell_seconds else now - self.started + left
        rest = left + (self.cells - self.position) * whole
        return f"{head}  step {done}/{self.cell.steps}  {rate:.1f} steps/s  {clock(left)} left here, {clock(rest)} in all"

    def end(self) -> None:
        self.cell_seconds.append(time.monotonic() - self.started)
        self._print(f"{self.cell.name} ({self.position} of {self.cells})  done in {clock(self.cell_seconds[-1])}", end="\n")

    def _print(self, text: str, end: str) -> None:
        # On a terminal each line covers the one before it.
        start = "\r\033[K" if self.stream.isatty() else ""
        print(start + text, end=end, file=self.stream, flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
