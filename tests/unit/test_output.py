"""A rank whose launcher is gone is asked to stop; it does not die of what it prints."""

import os
import signal
import subprocess
import sys

import pytest

RANK = """
import logging, os, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
from ds_stability.output import stop_when_unread
stop_when_unread()
print("caf\\u00e9", flush=True)
sys.stdin.read()
for number in range(3):
    print("a step", number)
    print("a step", number, file=sys.stderr)
    logging.error("a step")
with open(sys.argv[1], "w") as file:
    file.write(f"{len(asked)}")
"""


BY = {"deepspeed": {"RANK": "0"}, "mpirun": {"OMPI_COMM_WORLD_RANK": "0"}, "srun": {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}}


@pytest.mark.parametrize("launcher, asked", [*((name, "2") for name in BY), (None, None)])
def test_prints_to_a_closed_pipe_are_a_wish_to_stop(tmp_path, launcher, asked):
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | BY.get(launcher, {})
    process = subprocess.Popen([sys.executable, "-u", "-c", RANK, str(tmp_path / "end")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**environment, "PYTHONIOENCODING": "utf-8"})  # fmt: skip
    assert process.stdout.readline().decode() == "café\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    code = process.wait(20)
    if asked is None:  # a command of the user's: it ends, as any does whose output nobody reads
        assert code != 0 and not (tmp_path / "end").exists()
    else:
        assert code == 0 and (tmp_path / "end").read_text() == asked  # once for stdout, once for stderr


def test_it_ends_a_rank_that_does_not_handle_the_signal(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", RANK.replace("signal.signal(", "(lambda *_: 0)("), str(tmp_path / "end")],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "RANK": "0"})  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    assert process.wait(20) == -signal.SIGTERM
