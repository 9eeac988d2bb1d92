"""The connections by which a rank of an evaluation notices that another one is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_stability.errors import PeerLostError
from ds_stability.eval import peers
from ds_stability.eval.peers import PeerLinks

REPOSITORY = Path(__file__).resolve().parents[2]
RANK = """
import sys, time
from pathlib import Path
from ds_stability.eval.peers import PeerLinks
from test_peers import FileStore
links = PeerLinks(int(sys.argv[1]), 3, FileStore(Path(sys.argv[2])))
print("here", flush=True)
if sys.stdin.readline() == "leave\\n":
    links.close()
    print("gone", flush=True)
time.sleep(60)
"""


class FileStore:
    def __init__(self, folder):
        self.folder = folder

    def set(self, key, value):
        (self.folder / "new").write_text(value)
        (self.folder / "new").rename(self.folder / key)

    def get(self, key):
        while not (self.folder / key).exists():
            time.sleep(0.01)
        return (self.folder / key).read_bytes()


@pytest.fixture
def start(tmp_path):
    """`start(rank)`: another rank of three, as a process."""
    started = []
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])

    def run(rank):
        environment = {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": "0"}
        process = subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def lost():
    return []


def first_of_three(start, tmp_path, lost):
    """(links of rank 0, which is this process, the two other ranks)."""
    others = [start(1), start(2)]
    links = PeerLinks(0, 3, FileStore(tmp_path), lost.append)
    assert [other.stdout.readline() for other in others] == ["here\n"] * 2
    return links, others


def until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_killed_rank_is_named_and_one_that_leaves_is_not_missed(start, tmp_path, lost):
    _, (second, third) = first_of_three(start, tmp_path, lost)
    second.stdin.write("leave\n")
    second.stdin.flush()
    assert second.stdout.readline() == "gone\n"
    second.kill()
    time.sleep(0.2)
    assert lost == []
    third.kill()
    until(lambda: lost)
    assert isinstance(lost[0], PeerLostError) and f"lost rank 2 on {socket.gethostname()}" in str(lost[0])


def test_a_rank_without_the_first_says_so_and_leaves(start, tmp_path, lost):
    links, others = first_of_three(start, tmp_path, lost)
    for peer in links._peers:
        peer.shutdown(socket.SHUT_RDWR)  # what the kernel does for a process that is killed
    for rank, other in enumerate(others, 1):
        assert other.wait(10) == 69
        [line] = other.stderr.read().splitlines()
        assert line.startswith(f"error: rank {rank}: lost rank 0 on {socket.gethostname()} (")


def test_a_stopped_rank_is_not_lost(start, tmp_path, lost):
    links, (second, _) = first_of_three(start, tmp_path, lost)
    second.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    assert lost == []
    links.close()


def test_a_stranger_takes_nobodys_place(start, tmp_path, lost):
    others = [start(1)]

    class WithStranger(FileStore):
        def set(self, key, value):
            port = json.loads(value)["port"]
            for said in (b"", b"GET / HTTP/1.0\r\n\r\n\n", b'{"rank": 2, "host": "x", "token": "wrong"}\n', b'{"token": 3}\n', b"\xff" * 2000):
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(said)
            super().set(key, value)
            others.append(start(2))

    links = PeerLinks(0, 3, WithStranger(tmp_path), lost.append)
    assert [other.stdout.readline() for other in others] == ["here\n"] * 2
    assert len(links._peers) == 2
    links.close()
    time.sleep(0.2)
    assert lost == [] and [other.poll() for other in others] == [None, None]


def test_ranks_that_do_not_come_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CONNECT_SECONDS", 0.2)
    with pytest.raises(PeerLostError, match="only 1 of 3 ranks have come"):
        PeerLinks(0, 3, FileStore(tmp_path))
