"""failures.py, siblings.py, preemption.py: what is told apart, and who is named."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch.distributed as dist

from ds_stability import cli, siblings
from ds_stability.console import agree
from ds_stability.errors import PeerLostError, SkippedStepsError, StorageError, UserError
from ds_stability.failures import cluster_failures, peer_reason, storage_reason
from ds_stability.preemption import LOST_SIBLING


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_failing_file_system_is_known_by_its_error_number(number):
    error = OSError(number, os.strerror(number), "/data/run/metrics.jsonl")
    assert storage_reason(error) == f"/data/run/metrics.jsonl: {os.strerror(number)}"


@pytest.mark.parametrize("text", ["[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0",
                                  "PytorchStreamWriter failed writing file data/3: file write failed"])  # fmt: skip
def test_a_failing_file_system_is_known_by_torchs_words(text):
    assert storage_reason(RuntimeError(text)) == f"torch.save met a full or failing disk: {text}"


def test_the_cause_of_an_error_counts():
    try:
        try:
            raise OSError(errno.ENOSPC, "x")
        except OSError as inner:
            raise KeyError("outer") from inner
    except KeyError as error:
        assert storage_reason(error) is not None


@pytest.mark.parametrize("error", [ValueError("No space left on device"), OSError(errno.ENOENT, "x"), RuntimeError("size mismatch")])
def test_other_errors_are_no_storage_failures(error):
    assert storage_reason(error) is None and peer_reason(error) is None


@pytest.mark.parametrize("error", [
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1"),
    RuntimeError("Timed out waiting 20000ms for recv operation to complete"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited"),
    dist.DistNetworkError("failed to recv"),
])  # fmt: skip
def test_lost_peers_are_known(error):
    with pytest.raises(PeerLostError) as caught, cluster_failures(["a", "a", "b", "b"], 0, "start again"):
        raise error
    assert "ranks 2-3 on b" in str(caught.value) and "\n" not in str(caught.value) and "start again" in str(caught.value)


def test_a_peer_of_the_same_host_is_named_if_there_is_no_other_host():
    with pytest.raises(PeerLostError, match="lost contact with rank 1 on a "), cluster_failures(["a", "a"], 0, "go"):
        raise RuntimeError("Connection reset by peer")


def test_storage_failures_are_one_line():
    with pytest.raises(StorageError, match="No space left on device.*make room, then go") as caught, cluster_failures(["a"], 0, "go"):
        raise OSError(errno.ENOSPC, "No space\nleft")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [UserError("x"), SkippedStepsError("3 steps in a row"), ZeroDivisionError("y")])
def test_what_is_not_the_clusters_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, cluster_failures(["a", "b"], 0, "go"):
        raise error
    assert caught.value is error


RANK = """
import os, sys, time
from ds_stability.preemption import StopSignals
stop = StopSignals().install()
print("ready", flush=True)
while stop.received is None:
    time.sleep(0.01)
time.sleep(float(sys.argv[1]))
print(stop.received, flush=True)
"""


def start_rank(rank, count, seconds=0.0):
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(count),
                   "MASTER_PORT": f"{os.getpid()}"}
    environment.pop("LOCAL_WORLD_SIZE", None)
    process = subprocess.Popen([sys.executable, "-c", RANK, str(seconds)], env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_does_not_kill(number):
    ranks = [start_rank(rank, 2) for rank in range(2)]
    try:
        ranks[0].send_signal(number)
        out, err = ranks[0].communicate(timeout=20)
        assert (out, err, ranks[0].returncode) == (f"{number.name}\n", "", 0)
    finally:
        ranks[1].kill()
        ranks[1].communicate()


def test_a_rank_whose_sibling_has_ended_leaves_at_once_and_names_it():
    ranks = [start_rank(rank, 3, seconds=30.0) for rank in range(3)]
    try:
        ranks[1].kill()  # and stays a zombie: the parent has not looked
        started = time.monotonic()
        while psutil.Process(ranks[1].pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - started < 20
        ranks[2].send_signal(signal.SIGTERM)
        assert ranks[2].communicate(timeout=20) == ("", "") and ranks[2].returncode == LOST_SIBLING
        ranks[0].send_signal(signal.SIGTERM)
        out, err = ranks[0].communicate(timeout=20)
        assert out == "" and err == "error: rank 0: rank 1, 2 of this host has ended; so does this one\n"
        assert time.monotonic() - started < 20
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_a_forked_child_dies_of_the_signal_and_its_parent_does_not_hear_it():
    code = RANK.split("print", 1)[0] + """
import signal
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    os.write(tell, b"!")
    time.sleep(60)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
status = os.waitpid(child, 0)[1]
time.sleep(0.2)
print(os.WTERMSIG(status), stop.received)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{int(signal.SIGTERM)} None\n", done.stderr


def test_the_count_of_one_that_accelerate_sets_is_not_believed(monkeypatch):
    """Under deepspeed on CPUs: rank 0 would then never see another rank end."""
    from ds_stability import siblings

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(siblings, "_living", lambda: {0})
    assert siblings.ended_ranks() == [1]


def test_a_thread_that_meets_a_full_disk_prints_no_traceback(capsys, monkeypatch):
    """As TensorBoard's writer, whose error the main thread raises again."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)

    def fail(error):
        def run():
            raise error

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    full = OSError(errno.ENOSPC, "full", b"events")
    with pytest.raises(StorageError, match="events: No space left"), cluster_failures(["a"], 0, "start again"):
        fail(full)
        raise full
    fail(full)  # one that is late
    assert capsys.readouterr().err == ""
    fail(KeyError("a bug"))
    assert "KeyError" in capsys.readouterr().err


def test_a_full_disk_on_one_rank_is_no_mistake_of_the_user():
    def write():
        raise OSError(errno.ENOSPC, "No space left on device", "/data/run/manifest.json")

    with pytest.raises(StorageError, match="/data/run/manifest.json"):
        agree(write)


def test_a_file_that_is_missing_is_a_mistake_of_the_user():
    def read():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/prompts.txt")

    with pytest.raises(UserError, match="prompts.txt"):
        agree(read)


def test_ranks_that_were_never_seen_are_not_missed(monkeypatch):
    monkeypatch.setattr(siblings, "_seen", {0, 2})  # rank 1 runs in a container of its own
    monkeypatch.setattr(siblings, "_living", lambda: {0})
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert siblings.ended_ranks() == [2]


@pytest.mark.parametrize(("error", "code", "words"), [
    (OSError(errno.ENOSPC, "full", "run/final/README.md"), 74, "error: writing failed (run/final/README.md: No space left on device); make room"),
    (type("SafetensorError", (Exception,), {})("I/O error: No space left on device (os error 28)"), 74, "error: writing failed (I/O error"),
    (PermissionError(errno.EACCES, "Permission denied", "run/train.lock"), 2, "error: run/train.lock: Permission denied"),
])  # fmt: skip
def test_a_subcommand_that_cannot_write_ends_in_one_line(monkeypatch, capsys, error, code, words):
    def fail(args):
        raise error

    monkeypatch.setattr(cli, "_run_export", fail)
    assert cli.main(["export", "run"]) == code
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1


REFUSED = """
import atexit, sys
import torch.distributed as dist
from ds_stability.console import run_script
from ds_stability.errors import UserError

def main(argv):
    dist.init_process_group("gloo", init_method=f"file://{argv[0]}", rank=0, world_size=1)
    raise UserError("--what it was")

class Last:
    def __del__(self):
        print("the interpreter's own end")  # in which gloo's threads may abort the process, exit code and all

last = Last()
atexit.register(print, "loggers")
sys.exit(run_script(main))
"""


def test_who_is_refused_in_a_process_group_leaves_with_its_code(tmp_path):
    done = subprocess.run([sys.executable, "-c", REFUSED, str(tmp_path / "store")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "loggers\n", "error: --what it was\n")
