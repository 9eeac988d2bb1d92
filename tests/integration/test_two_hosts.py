"""Training and evaluation across two hosts, started as a user does it: `deepspeed --hostfile`, by pdsh over ssh.

The hosts are namespaces of this machine (tests/hosts.py). What two hosts compute is what one host computes with as many
ranks; a host that is lost, or cannot be reached any more, ends the run on both sides, and the run goes on afterwards.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import hosts
import pytest
import tiny
from tiny import SUITE, evaluation

from ds_stability.recorder import read_metrics
from ds_stability.run_dir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN, EVALUATE = REPOSITORY / "launchers" / "train.py", REPOSITORY / "eval" / "run.py"
SLOW_EVALUATION = REPOSITORY / "tests" / "distributed" / "eval_worker.py"  # eval/run.py with time to be disturbed
STEPS = 6
DDP_TIMEOUT = 30  # seconds; also what ranks have to find each other on a busy machine
END = 60  # seconds that survivors have after a loss, beyond the timeout of the network
KILLED = 256 - signal.SIGKILL  # what DeepSpeed's launcher makes of a rank that SIGKILL ended; pdsh returns the greatest code
STOPPED = 75
SLOTS = [1, 2]


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory, torch_extensions):
    with hosts.two_hosts(tmp_path_factory.mktemp("hosts"), torch_extensions) as both:
        yield both


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_hosts")
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text())
    config["stability"] = {"level": 0.5, "stabilizers": {"feedback": {}, "averaging": {"level": 0.3}}, "controller": {"warmup_steps": 2},
                           "probe": {"interval": 2, "num_prompts": 4, "max_new_tokens": 6}}  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(config))
    (folder / "suite.yaml").write_text(json.dumps(SUITE))
    return folder


def training(place, output, *more, steps=STEPS):
    return tiny.training(place, output, "--save_steps", "2", *more, steps=steps)


@pytest.fixture(scope="module")
def one_host(place, run_distributed):
    """`one_host(ranks)`: folder of the undisturbed run of `ranks` processes on this machine, without namespaces."""
    folders = {}

    def run(ranks: int) -> Path:
        if ranks not in folders:
            folders[ranks] = place / f"one-{ranks}"
            done = run_distributed(TRAIN, *training(place, folders[ranks]), ranks=ranks)
            assert (folders[ranks] / "DONE").exists(), done.stdout[-3000:] + done.stderr[-5000:]
        return folders[ranks]

    return run


def wait_until(condition, run, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert run.process.poll() is None and time.monotonic() < deadline, run.text()
        time.sleep(0.02)


def measured(folder):
    return [{key: value for key, value in row.items() if not key.endswith(("_seconds", "_per_second"))}
            for row in read_metrics(folder / "metrics.jsonl")]  # fmt: skip


def assert_same_metrics(folder, expected):
    ours, theirs = measured(folder), measured(expected)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert "probe/sample/entropy" in ours[-1] and "eval/cross_entropy" in ours[-1]
    for row, other in zip(ours, theirs, strict=True):
        assert _numbers(row) == pytest.approx(_numbers(other), rel=1e-6), row["step"]
        assert row.keys() == other.keys()  # with the same nulls


def _numbers(row):
    return {key: value for key, value in row.items() if value is not None}


def errors(run, ranks):
    """The lines in which these ranks say what was wrong."""
    return [line for rank in ranks for line in run.rank_text(rank).splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize("slots", SLOTS)
def test_a_run_that_loses_a_rank_of_one_host_ends_on_both_and_goes_on(place, one_host, two_hosts, slots):
    output, ranks = place / f"two-{slots}", 2 * slots
    run = two_hosts.start(TRAIN, *training(place, output), slots=slots)
    wait_until((output / "checkpoint-2").exists, run)
    os.kill(two_hosts.hosts[1].rank(ranks - 1), signal.SIGKILL)
    assert run.wait(END) == KILLED, run.text()
    assert not (output / "DONE").exists()
    assert "host-b: ssh exited with exit code" in run.launcher_text()  # pdsh names the host whose command failed
    assert any("lost contact" in line and "host-b" in line for line in errors(run, range(slots))), run.text()

    resumed = two_hosts.run(TRAIN, *training(place, output, "--resume_from_checkpoint", "true"), slots=slots)
    assert (output / "DONE").exists(), resumed.text()
    assert json.loads((output / "manifest.json").read_text())["hosts"] == ["host-a and 1 more"]
    assert_same_metrics(output, one_host(ranks))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_hosts_after_the_same_step(place, one_host, two_hosts):
    output = place / "stopped"
    run = two_hosts.start(TRAIN, *training(place, output), slots=2)
    wait_until((output / "checkpoint-2").exists, run)
    os.kill(two_hosts.hosts[1].rank(3), signal.SIGUSR1)
    assert run.wait(END) == STOPPED, run.text()
    assert RunDir(output).complete_checkpoints()[-1][0] in range(2, STEPS) and not (output / "DONE").exists()
    resumed = two_hosts.run(TRAIN, *training(place, output, "--resume_from_checkpoint", "auto"), slots=2)
    assert (output / "DONE").exists(), resumed.text()
    assert_same_metrics(output, one_host(4))


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_a_checkpoint(place, two_hosts):
    """DeepSpeed ends pdsh, and with it the pipes that the ranks print to, then sends SIGTERM to the ranks by `pkill`."""
    output = place / "terminated"
    run = two_hosts.start(TRAIN, *training(place, output, "--save_steps", 1000, "--logging_steps", 1, steps=200), rank_logs=False)
    wait_until(lambda: (output / "metrics.jsonl").exists() and (output / "metrics.jsonl").stat().st_size, run)
    os.kill(run.launcher(), signal.SIGTERM)
    assert run.wait(END) == 1  # whatever the ranks return: the launcher says 1
    [(step, _)] = RunDir(output).complete_checkpoints()
    assert 1 <= step < 200, run.text()


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
def test_a_cut_network_ends_the_run_on_both_sides_and_it_goes_on(place, one_host, two_hosts, slots):
    """`ip link set eth0 down`: nothing is closed, nothing arrives any more."""
    output = place / f"cut-{slots}"
    run = two_hosts.start(TRAIN, *training(place, output, "--ddp_timeout", DDP_TIMEOUT), slots=slots)
    wait_until((output / "checkpoint-2").exists, run)
    with two_hosts.cut():
        assert run.wait(DDP_TIMEOUT + END) != 0
    for name, ranks in (("host-b", range(slots)), ("host-a", range(slots, 2 * slots))):
        assert any("lost contact" in line and name in line for line in errors(run, ranks)), run.text()
    before = RunDir(output).complete_checkpoints()[-1][0]
    resumed = two_hosts.run(TRAIN, *training(place, output, "--resume_from_checkpoint", "true"), slots=slots)
    assert (output / "DONE").exists(), f"resumed from {before}: {resumed.text()}"
    assert_same_metrics(output, one_host(2 * slots))


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
def test_an_evaluation_across_hosts_has_the_scores_of_one_host(place, one_host, two_hosts, run_distributed, slots):
    ranks, cells = 2 * slots, [place / f"scores-{slots}-{hosts}" for hosts in ("one", "two")]
    done = run_distributed(EVALUATE, *evaluation(place, one_host(2), cells[0]), ranks=ranks)
    run = two_hosts.run(EVALUATE, *evaluation(place, one_host(2), cells[1]), slots=slots)
    cells = [folder / "cells" / "cell" for folder in cells]
    assert (cells[0] / "DONE").exists(), done.stderr[-5000:]
    assert (cells[1] / "DONE").exists(), run.text()
    for name in ("scores.json", "samples.jsonl", "records/text_held_out.jsonl"):
        assert (cells[0] / name).read_bytes() == (cells[1] / name).read_bytes(), name
    assert json.loads((cells[1] / "cell.json").read_text())["world_size"] == ranks


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rank 0", "rank 1", "network"])
def test_an_evaluation_that_loses_a_host_ends_on_both_and_goes_on(place, one_host, two_hosts, fault):
    """Its ranks wait for each other without a limit of time; peers.py tells them."""
    output = place / fault.replace(" ", "-")
    run = two_hosts.start(SLOW_EVALUATION, *evaluation(place, one_host(2), output))
    cell = output / "cells" / "cell"
    wait_until(lambda: list(cell.glob("journal/*.jsonl")), run)
    if fault == "network":
        with two_hosts.cut():
            assert run.wait(END) != 0
    else:
        rank = int(fault[-1])
        os.kill(two_hosts.hosts[rank].rank(rank), signal.SIGKILL)
        assert run.wait(END) == KILLED, run.text()
    assert not (cell / "DONE").exists()
    for rank in (0, 1):
        if fault != f"rank {rank}":
            [line] = errors(run, [rank])
            assert f"lost rank {1 - rank} on {hosts.NAMES[1 - rank]}" in line and "Traceback" not in run.rank_text(rank)
    resumed = two_hosts.run(EVALUATE, *evaluation(place, one_host(2), output))
    assert (cell / "DONE").exists(), resumed.text()


@pytest.mark.slow
def test_a_folder_that_one_host_does_not_see_is_refused_in_one_line(place, two_hosts):
    """Every host has an OUTPUT_DIR of its own: the most usual mistake of a first run on several machines."""
    own = place / "own"
    own.mkdir()
    mount = two_hosts.hosts[1].enter("mount", "-t", "tmpfs", "tmpfs", str(own))
    subprocess.run(mount, check=True)
    run = two_hosts.run(TRAIN, *training(place, own / "run"))
    lines = errors(run, range(2))
    assert run.process.returncode == 2 and len(lines) == 1, run.text()
    assert "does not see what rank 0 wrote" in lines[0] and "Traceback" not in run.text()
    assert not RunDir(own / "run").checkpoints()


@pytest.mark.slow
@pytest.mark.parametrize("codes, expected", [((75, 75), 75), ((2, 2), 2), ((69, 75), 75), ((0, 69), 69)])
def test_the_launcher_returns_the_greatest_exit_code_of_the_hosts(place, two_hosts, codes, expected):
    script = place / "leave.py"
    script.write_text(f"import os, sys\nsys.exit({codes}[int(os.environ['RANK'])])\n")
    assert two_hosts.run(script, timeout=60).process.returncode == expected


def test_hosts_are_two(two_hosts):
    """The fixture is what it claims to be: two names, two networks, /dev/shm and processes of their own."""
    said = two_hosts.shell("hostname; ls /dev/shm; ip -brief -4 address show | tr -s ' '; ps -e | grep -c sshd")
    for name, address in zip(hosts.NAMES, hosts.ADDRESSES, strict=True):
        lines = [line.split(": ", 1)[1] for line in said.splitlines() if line.startswith(f"{name}: ")]
        assert [lines[0], lines[1].split("@")[0], lines[2].split()[2]] == [name, "lo UNKNOWN 127.0.0.1/8 ", f"{address}/24"] and len(lines) == 4
    assert two_hosts.survivors() == {}
