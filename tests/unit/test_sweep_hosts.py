"""Hosts of a sweep's hostfile, and its progress line."""

import io
import os
from pathlib import Path

import pytest

from ds_stability.errors import UserError
from ds_stability.launchers import sweep_progress
from ds_stability.launchers.sweep_hosts import Hosts, count_slots
from ds_stability.launchers.sweep_progress import Progress, clock, last_step


def test_hosts_of_a_hostfile(tmp_path, monkeypatch):
    file = tmp_path / "hosts"
    file.write_text("# two\nnode1 slots=4\n\nnode2 slots=8  # more\n")
    assert count_slots(str(file)) == 12
    monkeypatch.setattr(os, "getcwd", lambda: "/plain")
    monkeypatch.setenv("PYTHONPATH", "/plain:/too")
    command = Hosts(12, str(file)).command(Path("train.py"), ["--seed", "0"], 29500)
    assert command[1:] == ["-m", "deepspeed.launcher.runner", "--hostfile", str(file), "--master_port", "29500", "train.py", "--seed", "0"]
    assert Hosts(2).command(Path("train.py"), [], 1)[3:5] == ["--num_gpus", "2"]
    for text, message in (("", "names no host"), ("node1\n", "line 1"), ("node1 slots=x\n", "allowed is HOST slots=N"),
                          ("-oProxyCommand=x slots=1\n", "allowed is HOST slots=N"), ("a slots=\u00b2\n", "line 1"),
                          ("a slots=1\na slots=1\n", "line 2: a is there twice")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            count_slots(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        count_slots(str(tmp_path / "none"))


def test_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_progress, "QUIET_SECONDS", 15)
    stream = io.StringIO()
    progress = Progress({"a": 100, "b": 100, "c": 200}, stream)
    progress.begin("a")
    assert progress.left(progress.started) is None and "starting" in progress.line(0, progress.started)
    progress.finish("a", 50.0)
    progress.begin("b")
    progress.first = (10, progress.started)
    assert progress.left(progress.started + 20) == pytest.approx(150 - 20)  # half a second a step
    line = progress.line(30, progress.started + 20)
    assert line == "[1/3 done] b  step 30/100  1.0 steps/s  2:10 left in all"
    for step in range(5):
        progress.show(step)
    assert stream.getvalue().count("\n") == 1  # a line every 15 s without a terminal
    assert clock(3725) == "1:02:05" and clock(65) == "1:05"
    metrics = tmp_path / "metrics.jsonl"
    assert last_step(metrics) == 0
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert last_step(metrics) == 2
