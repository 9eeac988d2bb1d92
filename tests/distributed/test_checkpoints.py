"""Checkpoints under the real launcher: damaged ones, a full disk, a read-only file system, a kill while one is written.

The runs are those of the fault driver (tests/faults), compared with its undisturbed one.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ds_stability.checkpoint_files import hash_fault
from ds_stability.run_dir import RunDir

BLOCK = 4096
LOST = 0.5  # seconds that a killed process may take to be gone


@pytest.fixture(scope="module")
def place(fault_driver):
    """The fault driver with its undisturbed training, which left checkpoint-12 to checkpoint-24."""
    fault_driver.undisturbed("training")
    return fault_driver


@pytest.fixture
def start(place, tmp_path):
    """`start(output, **flags)` begins a training with some flags changed; what is left of it ends with the test."""
    import driver

    attempts = []

    def begin(output, **changed):
        log = tmp_path / f"{len(attempts)}.log"
        attempts.append(driver.Attempt(place.runs["training"], Path(output), log, place.environment, **changed))
        return attempts[-1]

    yield begin
    for attempt in attempts:
        attempt.clear()


def error_lines(text):
    """The reasons: not what a neighbour says about the rank that left with one."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    return [line for line in lines if "has ended; so does this one" not in line and "lost contact with" not in line]


def whole(output):
    return [step for step, path in RunDir(output).checkpoints() if hash_fault(path) is None]


def copy_before_done(place, output):
    """The undisturbed run as it was before its end."""
    shutil.copytree(place.undisturbed_folder("training"), output)
    (output / "DONE").unlink()
    shutil.rmtree(output / "final")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shard(checkpoint, rank):
    return next(checkpoint.rglob(f"*rank_{rank}_*optim_states.pt"))


def test_damaged_checkpoints_are_named_and_the_one_before_them_is_used(place, start, tmp_path):
    """The newest with a flipped bit in rank 1's shard, the one before cut short, the third without a file."""
    output = tmp_path / "run"
    copy_before_done(place, output)
    flip(shard(output / "checkpoint-24", 1))
    os.truncate(shard(output / "checkpoint-20", 0), 1000)
    (output / "checkpoint-16" / "rng_state_1.pth").unlink()
    for left in (".saving-28/checkpoint-28", ".removing-checkpoint-8"):
        (output / left).mkdir(parents=True)
    run = place.runs["training"]
    kept = b"".join(line + b"\n" for line in output.joinpath("metrics.jsonl").read_bytes().split(b"\n")[:12])
    attempt = start(output, resume_from_checkpoint="true")
    text = attempt.wait_until_ended()
    assert run.done(output), text[-3000:]
    named = [line for line in text.splitlines() if "is damaged" in line]
    assert len(named) == 1 and "Traceback" not in text
    for part in ("checkpoint-24 is damaged", "has changed", "checkpoint-20 is damaged", "has 1,000 bytes instead of",
                 "checkpoint-16 is damaged", "rng_state_1.pth is missing", "going on from checkpoint-12"):  # fmt: skip
        assert part in named[0]
    assert run.keeps(output, kept) and run.results(output) == place.undisturbed("training")
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == [] and whole(output) == [12, 16, 20, 24]


@contextlib.contextmanager
def mounted(*words):
    """A mount for the time of the block; skips where it may not be made."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system")
    target = words[-1]
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


def make_read_only(mount):
    """Refused as long as a file is being written through the mount, which takes moments."""
    for _ in range(200):
        done = subprocess.run(["mount", "-o", "remount,bind,ro", str(mount)], capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(0.01)
    pytest.fail(done.stderr)


def test_a_full_disk_ends_in_one_line_and_loses_nothing(place, start, tmp_path):
    files = [path for path in (place.undisturbed_folder("training") / "checkpoint-24").rglob("*") if path.is_file()]
    size = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files)  # what one checkpoint takes
    (tmp_path / "disk").mkdir()
    with mounted("-t", "tmpfs", "-o", f"size={int(2.6 * size)}", "tmpfs", tmp_path / "disk"):
        output = tmp_path / "disk" / "run"
        attempt = start(output, save_total_limit=None)
        text = attempt.wait_until_ended()
        assert attempt.process.returncode == 74, text[-3000:]
        lines = error_lines(text)
        assert len(lines) == 1 and "writing failed" in lines[0] and "--resume_from_checkpoint auto" in lines[0], lines
        assert "Traceback" not in text and not (output / "DONE").exists()
        assert whole(output) == [step for step, _ in RunDir(output).checkpoints()] == [4, 8]


def test_save_total_limit_deletes_after_the_new_one_is_safe_and_a_read_only_file_system_ends_the_run(start, tmp_path):
    """At every moment one whole checkpoint at least, with a limit of one; then the folder becomes read-only."""
    output = tmp_path / "run"
    attempt, seen, fewest = start(output, save_total_limit=1), set(), 1
    while max(seen, default=0) < 12 and attempt.process.poll() is None:
        names = RunDir(output).checkpoints()
        there = {step for step, _ in RunDir(output).complete_checkpoints()}
        if seen and RunDir(output).checkpoints() == names:  # else one has come and one has gone in the meantime
            fewest = min(fewest, len(there))
        seen |= there
        time.sleep(0.005)
    assert {4, 8, 12} <= seen and fewest == 1, attempt.text()[-3000:]
    # A mount over itself: the files that are open for writing belong to the one below, which could not become read-only.
    with mounted("--bind", output, output):
        make_read_only(output)
        text = attempt.wait_until_ended()
    assert attempt.process.returncode == 74, text[-3000:]
    lines = error_lines(text)
    assert len(lines) == 1 and "Read-only file system" in lines[0] and "Traceback" not in text, text[-3000:]
    newest = [step for step, _ in RunDir(output).checkpoints()][-1]
    assert newest >= 12 and newest in whole(output) and not (output / "DONE").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_earlier_ones_whole(place, start, tmp_path, rank):
    output, run = tmp_path / "run", place.runs["training"]
    attempt = start(output)
    attempt.wait_for(run.moment(output, "checkpoint", 1, random.Random(rank)), rank).kill()
    attempt.wait_until_ended()
    assert attempt.process.returncode not in (0, None)
    before = whole(output)
    assert before and before == [step for step, _ in RunDir(output).checkpoints()]
    attempt = start(output)
    attempt.wait_until_done()
    assert not list(output.glob(".saving-*")) and run.results(output) == place.undisturbed("training")


@pytest.mark.slow
def test_without_any_whole_checkpoint_the_run_is_refused_and_left_alone(place, start, tmp_path):
    output = tmp_path / "run"
    copy_before_done(place, output)
    for step, path in RunDir(output).checkpoints():
        flip(shard(path, step // 4 % 2))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    attempt = start(output, resume_from_checkpoint="true")
    text = attempt.wait_until_ended()
    assert attempt.process.returncode == 2 and len(error_lines(text)) == 1, text[-3000:]
    assert all(f"checkpoint-{step} is damaged" in error_lines(text)[0] for step in (12, 16, 20, 24))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_launcher_and_all_ranks_killed_at_once(place, start, tmp_path):
    """As by a power cut, while a checkpoint is written."""
    import fault_processes

    output, run = tmp_path / "run", place.runs["training"]
    attempt = start(output)
    assert attempt.wait_for(run.moment(output, "checkpoint", 2, random.Random(0)))
    os.killpg(attempt.process.pid, signal.SIGKILL)
    attempt.clear()
    time.sleep(LOST)
    assert not fault_processes.processes_of(attempt.marker)
    assert whole(output) == [step for step, _ in RunDir(output).checkpoints()]
    start(output).wait_until_done()
    assert run.results(output) == place.undisturbed("training")
