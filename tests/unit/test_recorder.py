import errno
import gc
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability import locks
from ds_stability import recorder as recorder_module
from ds_stability.errors import UserError
from ds_stability.recorder import TAGS, Recorder, read_metrics, tag_table_markdown, tensorboard_interval
from ds_stability.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run").create()


def write_steps(run, steps, **kwargs):
    with Recorder(run, tensorboard=False, **kwargs) as recorder:
        for step in steps:
            recorder.record(step, {"loss": float(step)})


def test_one_line_per_step(run):
    write_steps(run, [1, 2, 3])
    assert run.metrics.read_text() == "".join(f'{{"step": {n}, "loss": {n}.0}}\n' for n in (1, 2, 3))
    assert read_metrics(run.metrics) == [{"step": n, "loss": float(n)} for n in (1, 2, 3)]


def test_what_comes_after_the_step_lands_in_its_line(run):
    with Recorder(run, tensorboard=False) as recorder:
        recorder.record(1, {"loss": 2.0, "grad_norm": 1.0})
        recorder.record(1, {"eval/cross_entropy": 3.0, "loss": 2.5})
        recorder.record(2, {"loss": 1.0})
    rows = read_metrics(run.metrics)
    assert rows[0] == {"step": 1, "loss": 2.5, "grad_norm": 1.0, "eval/cross_entropy": 3.0}
    assert len(run.metrics.read_text().splitlines()) == 2


def test_a_value_after_a_flush_is_merged_by_the_reader(run):
    with Recorder(run, tensorboard=False) as recorder:
        recorder.record(1, {"loss": 2.0})
        recorder.flush()
        assert read_metrics(run.metrics) == [{"step": 1, "loss": 2.0}]
        recorder.record(1, {"eval/loss": 3.0})
    assert read_metrics(run.metrics) == [{"step": 1, "loss": 2.0, "eval/loss": 3.0}]


def test_each_line_is_one_append(run, monkeypatch):
    writes = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (writes.append(data), real(fd, data))[1])
    write_steps(run, range(1, 6))
    assert len(writes) == 5 and all(w.endswith(b"\n") and w.count(b"\n") == 1 for w in writes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("inf")])
def test_non_finite_is_null(run, bad):
    with Recorder(run, tensorboard=True) as recorder:
        recorder.record(1, {"loss": bad, "stability/gain": None})
    assert json.loads(run.metrics.read_text()) == {"step": 1, "loss": None, "stability/gain": None}


def test_numpy_numbers_and_bools_and_ints_keep_their_kind(run):
    with Recorder(run, tensorboard=False) as recorder:
        recorder.record(1, {"skipped": True, "stability/tokens": np.int64(7), "loss": np.float32(0.5)})
    assert run.metrics.read_text() == '{"step": 1, "skipped": true, "stability/tokens": 7, "loss": 0.5}\n'


@pytest.mark.parametrize("key", ["lss", "stability/levl", "step", "evaluation/x", "eval"])
def test_unknown_keys_are_errors(run, key):
    with Recorder(run, tensorboard=False) as recorder, pytest.raises(KeyError):
        recorder.record(1, {"loss": 1.0, key: 1.0})
    assert run.metrics.read_text() == ""  # nothing of a refused call is kept


@pytest.mark.parametrize("value", ["0.5", [1.0], {"a": 1}, 1j])
def test_only_numbers(run, value):
    with Recorder(run, tensorboard=False) as recorder, pytest.raises(TypeError):
        recorder.record(1, {"loss": value})


def test_steps_do_not_go_back_and_a_closed_recorder_refuses(run):
    with Recorder(run, tensorboard=False) as recorder:
        recorder.record(2, {"loss": 1.0})
        with pytest.raises(ValueError):
            recorder.record(1, {"loss": 1.0})
    with pytest.raises(ValueError):
        recorder.record(3, {"loss": 1.0})
    recorder.close()  # twice is harmless


TORN = [b'{"step": 4, "lo', b'{"step": 4}', b"\x00\x00\x00", b'{"step": 4, "lo\n', b"\xff\xfe"]


@pytest.mark.parametrize("tail", TORN)
def test_a_torn_last_line_is_dropped(run, tail):
    write_steps(run, [1, 2, 3])
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole + tail)
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3]
    write_steps(run, [4], resume_step=3)
    assert run.metrics.read_bytes() == whole + b'{"step": 4, "loss": 4.0}\n'


def test_lines_after_the_checkpoint_are_cut(run):
    write_steps(run, range(1, 10))
    write_steps(run, [5, 6], resume_step=4)
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4, 5, 6]


def test_resume_from_a_step_before_any_line_or_without_a_file(run):
    write_steps(run, [1], resume_step=0)
    write_steps(run, [1, 2], resume_step=0)
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]


def test_every_cut_of_the_file_resumes_cleanly(run):
    write_steps(run, range(1, 5))
    whole = run.metrics.read_bytes()
    for length in range(len(whole) + 1):
        run.metrics.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        write_steps(run, [], resume_step=2)
        assert [row["step"] for row in read_metrics(run.metrics)] == list(range(1, min(complete, 2) + 1))


def test_a_new_run_never_deletes_lines(run):
    write_steps(run, [1])
    with pytest.raises(UserError, match="another run"):
        Recorder(run, tensorboard=False)
    assert len(read_metrics(run.metrics)) == 1


def test_a_broken_line_in_the_middle_is_named(run):
    write_steps(run, [1, 2, 3])
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    before = run.metrics.read_bytes()
    for attempt in (lambda: read_metrics(run.metrics), lambda: Recorder(run, False, resume_step=3)):
        with pytest.raises(UserError, match="line 2"):
            attempt()
    assert run.metrics.read_bytes() == before


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_write_that_fails_raises(run, monkeypatch):
    recorder = Recorder(run, tensorboard=False)
    recorder.record(1, {"loss": 1.0})
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) - 1)
    with pytest.raises(OSError, match="disk full"):
        recorder.record(2, {"loss": 1.0})


def test_a_failing_close_still_raises(run, monkeypatch):
    recorder = Recorder(run, tensorboard=False)
    recorder.record(1, {"loss": 1.0})
    recorder._write_line()

    def fail(*_):
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        recorder.close()


def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run.tensorboard), purge_orphaned_data=True)
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_has_the_same_keys_and_no_nulls(run):
    with Recorder(run, tensorboard=True) as recorder:
        recorder.record(1, {"loss": 1.0, "stability/gain": None})
        recorder.record(2, {"loss": math.nan, "stability/gain": 0.5})
    assert events(run) == {"loss": [(1, 1.0)], "stability/gain": [(2, 0.5)]}


def test_tensorboard_purges_what_the_resumed_run_repeats(run):
    with Recorder(run, tensorboard=True) as recorder:
        for step in range(1, 7):
            recorder.record(step, {"loss": float(step)})
    with Recorder(run, tensorboard=True, resume_step=4) as recorder:
        for step in (5, 6):
            recorder.record(step, {"loss": 10.0 * step})
    assert events(run)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0)]


def test_tensorboard_gets_fewer_steps_of_a_long_run_and_all_of_what_is_rare(run):
    with Recorder(run, tensorboard=True) as recorder:
        for step in range(1, 1205):
            recorder.record(step, {"loss": float(step)} | ({"eval/cross_entropy": 1.0} if step == 1103 else {}))
            if step == 1107:
                recorder.record(step, {"skipped": True})
    written = events(run)
    assert [step for step, _ in written["loss"]] == [*range(1, 1001), *range(1010, 1101, 10), 1107, *range(1110, 1201, 10)]
    assert written["eval/cross_entropy"] == [(1103, 1.0)] and written["skipped"] == [(1107, 1.0)]
    assert len(read_metrics(run.metrics)) == 1204  # every step is here


def test_tensorboard_points_of_a_tag_grow_by_900_a_decade():
    points = [0]
    for step in range(1, 100_001):
        points.append(points[-1] + (step % tensorboard_interval(step) == 0))
    assert [points[10**n] for n in range(6)] == [1, 10, 100, 1000, 1900, 2800]
    assert [tensorboard_interval(step) for step in (0, 1000, 1001, 10_000, 10_001, 10**6)] == [1, 1, 10, 10, 100, 1000]


def test_tag_table():
    table = tag_table_markdown().splitlines()
    assert len(table) == len(TAGS) + 2
    for line in table:
        assert line.replace(r"\|", "").count("|") == 6
    for key, tag in TAGS.items():
        assert all(tag), f"{key} has an empty field"


def test_keys_of_times_say_so():
    for key, tag in TAGS.items():
        timed = tag.unit == "s" or tag.unit.endswith("/s")
        assert timed == key.endswith(("_seconds", "_per_second")), key


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=1, max_size=20))
def test_finite_floats_survive_exactly(tmp_path_factory, values):
    run = RunDir(tmp_path_factory.mktemp("run")).create()
    with Recorder(run, tensorboard=False) as recorder:
        for step, value in enumerate(values, start=1):
            recorder.record(step, {"loss": value})
    expected = [value if math.isfinite(value) else None for value in values]
    assert [row["loss"] for row in read_metrics(run.metrics)] == expected


def test_tag_table_renders_in_markdown():
    # A "<" that opens a word would be taken for HTML, and the text would vanish.
    assert not re.search(r"<[A-Za-z/!?]", tag_table_markdown())


# ---- one writer ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from ds_stability.recorder import Recorder
from ds_stability.run_dir import RunDir
recorder = Recorder(RunDir(sys.argv[1]), tensorboard=False)
recorder.record(1, {"loss": 1.0})
recorder.flush()
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_is_an_error_and_a_killed_one_is_none(run, monkeypatch):
    monkeypatch.setattr(recorder_module, "LOCK_SECONDS", 0.0)
    process = subprocess.Popen([sys.executable, "-c", HOLD, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match="another process, or another Recorder in this one, writes it"):
        Recorder(run, tensorboard=False, resume_step=1)
    process.kill()
    process.wait()
    with Recorder(run, tensorboard=False, resume_step=1) as recorder:
        with pytest.raises(UserError, match="another Recorder"):
            Recorder(run, tensorboard=False, resume_step=1)
        recorder.record(2, {"loss": 2.0})
    with Recorder(run, tensorboard=False, resume_step=2):  # closed: the next may write
        pass
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]


def test_a_forked_worker_does_not_keep_the_lock_of_a_closed_recorder(run, monkeypatch):
    monkeypatch.setattr(recorder_module, "LOCK_SECONDS", 0.0)
    recorder = Recorder(run, tensorboard=False)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    recorder.close()
    Recorder(run, tensorboard=False).close()
    worker.kill()
    worker.join()


def test_a_recorder_that_nobody_closed_keeps_no_lock(run, monkeypatch):
    """As of a trainer that a notebook has deleted."""
    monkeypatch.setattr(recorder_module, "LOCK_SECONDS", 0.0)
    recorder = Recorder(run, tensorboard=False)
    del recorder
    gc.collect()
    Recorder(run, tensorboard=False).close()


def test_a_file_system_without_locks_is_written_to_all_the_same(run, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    write_steps(run, [1])
    assert len(read_metrics(run.metrics)) == 1


def test_a_broken_file_leaves_no_lock(run, monkeypatch):
    monkeypatch.setattr(recorder_module, "LOCK_SECONDS", 0.0)
    write_steps(run, [1])
    for _ in range(2):
        with pytest.raises(UserError, match="another run"):
            Recorder(run, tensorboard=False)
