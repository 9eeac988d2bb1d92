"""DeepSpeed's buffers in shared memory: what a process maps keeps its name until all have opened it; what nobody maps goes."""

import mmap
import os
import subprocess
import sys
import time

import pytest

from ds_stability import shared_memory
from ds_stability.shared_memory import OPENING_SECONDS, forget_buffers, remove_abandoned

HOLD = """
import mmap, sys
files = [open(path, "r+b") for path in sys.argv[1:]]
maps = [mmap.mmap(file.fileno(), 0) for file in files]
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return tmp_path


@pytest.fixture
def buffer(folder):
    """buffer(rank, port, age in seconds, user): a file as DeepSpeed makes it."""

    def make(rank, port=29500, age=0.0, user=None):
        path = folder / f"deepspeed_allreduce_buffer_{os.getuid() if user is None else user}_127.0.0.1_{port}_{rank}"
        path.write_bytes(bytes(mmap.PAGESIZE))
        os.utime(path, (time.time() - age,) * 2)
        return path

    return make


@pytest.fixture
def held():
    """held(*paths): another process maps these files until the test ends."""
    processes = []

    def hold(*paths):
        processes.append(subprocess.Popen([sys.executable, "-c", HOLD, *map(str, paths)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "mapped\n"
        return processes[-1]

    yield hold
    for process in processes:
        process.communicate()


OLD = 2 * OPENING_SECONDS


def test_abandoned_buffers_go_and_mapped_ones_stay(buffer, held, folder):
    mapped, abandoned, fresh = buffer(0, age=OLD), buffer(1, age=OLD), buffer(0, port=29501)
    others, foreign = buffer(0, age=OLD, user=os.getuid() + 1), folder / "deepspeed_else"
    foreign.touch()
    process = held(mapped)
    remove_abandoned()
    assert [path.exists() for path in (mapped, abandoned, fresh, others, foreign)] == [True, False, True, True, True]
    process.kill()
    process.wait()
    remove_abandoned()
    assert [path.exists() for path in (mapped, fresh, others, foreign)] == [False, True, True, True]


def test_of_one_port_new_ones_go_as_well(buffer, held):
    """Who started the ranks knows that they have ended; a rank that has not keeps its buffer all the same."""
    ended, lives, neighbour, longer = buffer(0), buffer(1), buffer(0, port=2950), buffer(0, port=129500)
    held(lives)
    remove_abandoned(29500)
    assert [path.exists() for path in (ended, lives, neighbour, longer)] == [False, True, True, True]


def test_what_all_ranks_have_opened_needs_no_name(buffer, held):
    mine, peer, other_run, abandoned = buffer(0), buffer(1), buffer(0, port=29501), buffer(0, port=29502, age=OLD)
    held(other_run)
    with open(mine, "r+b") as first, open(peer, "r+b") as second, mmap.mmap(first.fileno(), 0) as a, mmap.mmap(second.fileno(), 0) as b:
        forget_buffers()
        assert [path.exists() for path in (mine, peer, other_run, abandoned)] == [False, False, True, False]
        a[0], b[0] = 1, 2  # the memory stays
        later = buffer(0)  # the next run on this port makes its own while this one lives
        forget_buffers()
        assert later.exists() and (a[0], b[0]) == (1, 2)


def test_one_rank_of_a_host_cleans_up(buffer, monkeypatch):
    abandoned = buffer(0, age=OLD)
    monkeypatch.setenv("LOCAL_RANK", "1")
    forget_buffers()
    assert abandoned.exists()


def test_processes_that_end_or_cannot_be_read_meanwhile(buffer, monkeypatch):
    """Nobody's buffer is kept, and nothing is raised: not for a process that is gone, nor a file that another one removed."""
    path = buffer(0, age=OLD)
    read = shared_memory._mapped

    def vanishing(process):
        path.unlink(missing_ok=True)
        return read("no such process") | read(process)

    monkeypatch.setattr(shared_memory, "_mapped", vanishing)
    remove_abandoned()
    assert not path.exists()
