"""`ds-stability sweep` under the real launcher, killed in the middle; and the lock of a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import named_buffers

from ds_stability.locks import TRAIN_LOCK, is_locked, try_lock

REPOSITORY = Path(__file__).resolve().parents[2]
SWEEP = """
name: tiny
num_gpus: 1
flags:
  config_name: ds_configs/models/gpt2_tiny.json
  dataset_name: builtin:synthetic
  synthetic_tokens: 5000
  deepspeed: ds_configs/zero3_cpu.json
  block_size: 64
  per_device_train_batch_size: 2
  max_steps: 20
  learning_rate: 1.0e-3
  save_strategy: steps
  save_steps: 4
  save_total_limit: 1
  stability.loss_path: linear
  stability.controller.warmup_steps: 2
grid:
  stability.level: [0, 0.5]
"""


class Runner:
    """Sweep processes of one folder."""

    def __init__(self, folder: Path):
        (folder / "tiny.yaml").write_text(SWEEP, encoding="utf-8")
        self.folder, self.output = folder, folder / "runs" / "tiny"
        self.environment = {
            **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        self.launchers: set[int] = set()

    def start(self, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "ds_stability.cli", "sweep", str(self.folder / "tiny.yaml"), *words]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True)  # fmt: skip

    def finish(self, process: subprocess.Popen, code: int = 0) -> str:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == code, output + self.logs()
        return output

    def logs(self) -> str:
        return "".join(path.read_text(errors="replace")[-2000:] for path in sorted((self.output / "logs").glob("*")))

    def cells(self) -> list[str]:
        return [cell["id"] for cell in json.loads((self.output / "sweep.json").read_text())["cells"]]

    def starts(self) -> list[tuple[str, int | None]]:
        rows = [json.loads(line) for line in (self.output / "attempts.jsonl").read_text().splitlines()]
        return [(row["cell"], row["resumed_from"]) for row in rows if row["event"] == "start"]

    def wait_for(self, condition, process: subprocess.Popen | None = None) -> None:
        deadline = time.monotonic() + 300  # against a hang only: a loaded machine takes minutes
        while not condition():
            assert process is None or process.poll() is None, process.communicate()[0] + self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)  # a tiny training may be over a second after its first checkpoint

    def launcher_of(self, process: subprocess.Popen) -> int:
        """The launcher that a sweep started: the child that leads a session of its own."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == process.pid and fields[3] == entry.name:
                self.launchers.add(int(entry.name))
                return int(entry.name)
        raise AssertionError("the sweep has no launcher")


@pytest.fixture
def runner(tmp_path, torch_extensions):
    runner = Runner(tmp_path)
    yield runner
    for launcher in runner.launchers:
        try:
            os.killpg(launcher, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_a_sweep_that_is_killed_goes_on_and_trains_nothing_twice(runner):
    # Everything is killed at once, as by a power cut, while the first cell trains.
    sweep = runner.start()
    runner.wait_for(lambda: list(runner.output.glob("*/checkpoint-*/trainer_state.json")), sweep)
    launcher = runner.launcher_of(sweep)
    assert named_buffers(Path("/proc", str(launcher), "cmdline").read_text().split("\0")) == []  # so a SIGKILL leaves none
    sweep.kill()
    os.killpg(launcher, signal.SIGKILL)
    sweep.communicate()
    first, second = runner.cells()
    assert runner.starts() == [(first, None)] and not list(runner.output.glob("*/DONE"))

    # The next one resumes it. Then only the sweep is killed: the training of the second cell goes on without it.
    sweep = runner.start()
    runner.wait_for(lambda: (runner.output / second / "metrics.jsonl").exists(), sweep)
    launcher = runner.launcher_of(sweep)
    sweep.kill()
    sweep.communicate()
    assert is_locked(runner.output / "locks" / f"{second}.lock") and is_locked(runner.output / second / TRAIN_LOCK)

    # A third one waits for that training, and starts no other.
    output = runner.finish(runner.start())
    starts = runner.starts()
    assert [cell for cell, _ in starts] == [first, first, second] and starts[1][1] is not None
    assert "another process trains" in output or not is_locked(runner.output / second / TRAIN_LOCK)
    for cell in (first, second):
        assert (runner.output / cell / "DONE").exists()
        steps = [json.loads(line)["step"] for line in (runner.output / cell / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 21))

    # One high-frequency set and one tokenizer for all; and where all is done, nothing happens.
    sets = {(runner.output / cell / "high_frequency.json").read_text() for cell in (first, second)}
    assert sets == {(runner.output / "high_frequency.json").read_text()}
    runner.wait_for(lambda: not is_locked(runner.output / "locks" / f"{second}.lock"))  # its launcher may take a while to end
    assert "2 of 2 cells were done before" in runner.finish(runner.start()) and runner.starts() == starts


def await_end_of_group(leader: int) -> None:
    """Killed ranks give back their memory, and are reaped by init, a moment after their sweep has ended."""
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(leader, 0)
            time.sleep(0.05)


def test_sigterm_ends_the_children_and_says_so(runner):
    sweep = runner.start()
    runner.wait_for(lambda: list(runner.output.glob("logs/*")), sweep)
    time.sleep(1)
    launcher = runner.launcher_of(sweep)
    sweep.send_signal(signal.SIGTERM)
    output = runner.finish(sweep, 128 + signal.SIGTERM)
    assert "interrupted; the same command goes on" in output and "Traceback" not in output
    await_end_of_group(launcher)
    rows = [json.loads(line) for line in (runner.output / "attempts.jsonl").read_text().splitlines()]
    assert rows[-1]["outcome"] == "interrupted"
    assert not is_locked(runner.output / "locks" / f"{runner.cells()[0]}.lock")


def test_a_second_training_in_a_folder_in_use_is_refused(run_distributed, tmp_path):
    run = tmp_path / "run"
    words = ["--config_name", REPOSITORY / "ds_configs" / "models" / "gpt2_tiny.json", "--dataset_name", "builtin:synthetic",
             "--synthetic_tokens", "5000", "--deepspeed", REPOSITORY / "ds_configs" / "zero3_cpu.json", "--block_size", "64",
             "--max_steps", "1", "--output_dir", run]  # fmt: skip
    # The other process locks the folder after this one has looked at it.
    script = tmp_path / "train_late.py"
    script.write_text(LATE.format(path=str(REPOSITORY / "launchers" / "train.py"), run=str(run)), encoding="utf-8")
    process = run_distributed(script, *words, ranks=1, timeout=120)
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, process.stderr[-3000:]
    assert len(errors) == 1 and f"--output_dir {run}: another process is training in this folder" in errors[0]
    assert not (run / "manifest.json").exists()


LATE = """
import runpy, subprocess, sys
from ds_stability.launchers import arguments

parse = arguments.parse_command
def parse_and_be_late(argv):
    command = parse(argv)
    holder = "import sys, time; from pathlib import Path; from ds_stability.locks import *; "
    holder += "assert try_lock(Path(sys.argv[1]) / TRAIN_LOCK) is not None; print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", holder, {run!r}], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "held"
    import atexit; atexit.register(process.kill)
    return command
arguments.parse_command = parse_and_be_late
sys.argv[0] = {path!r}
runpy.run_path({path!r}, run_name="__main__")
"""


def test_a_lock_ends_with_its_holder_and_its_children(tmp_path):
    path = tmp_path / "locks" / "a.lock"
    held = try_lock(path)
    assert held is not None and try_lock(path) is None and is_locked(path)
    child = subprocess.Popen(["sleep", "600"], pass_fds=(held,))
    os.close(held)
    assert is_locked(path)
    child.kill()
    child.wait()
    assert not is_locked(path)
    assert not is_locked(tmp_path / "none.lock") and not (tmp_path / "none.lock").exists()
