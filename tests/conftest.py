"""Shared fixtures."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from ports import free_port
from precisions import Results, without_missing

from ds_stability.shared_memory import remove_abandoned

REPOSITORY = Path(__file__).resolve().parent.parent

# No example has a time limit (200 ms by default): beside ranks and compilers a machine of two cores may stand still for that long.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

if not torch.cuda.is_available():
    # Triton decides when it is imported whether its kernels are interpreted, and any test module may bring that about.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def environment_is_kept():
    """What a test calls in this process may set RANK and its kin; the next test's processes must not inherit that."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


COMPILE = """
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
CPUAdamBuilder().load(verbose=False), ShareMemCommBuilder().load(verbose=False)
"""
# DeepSpeed decorates functions with torch.compile as it is imported, and nothing is ever compiled: without Inductor a rank
# starts a second earlier.
NO_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
# Of the files that start processes the longest: begun first, so that no worker is left alone with one of them.
LONGEST = ("test_checkpoints", "test_sweep", "test_resume", "test_probe", "test_faults", "test_trainer", "test_preemption", "test_examples",
           "test_gone_wrong", "test_eval_run", "test_governor", "test_variance_ratio", "test_config_stops_early")  # fmt: skip


def pytest_collection_modifyitems(items):
    """Unit tests first: meanwhile DeepSpeed's operators compile. Then the longest files, then the others."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ("unit" not in item.path.parts, place.get(item.path.stem, len(place))))


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory):
    """A folder of this session, the same for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compilation(request, session_folder):
    """DeepSpeed compiles its operators at their first use, for a minute: begun in the background where a test needs them.

    One folder per session, as ranks of several runs would wait for each other's lock. Of several workers one compiles, and
    torch's lock makes the others wait for it. (folder, process or None).
    """
    folder = os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(session_folder / "torch_extensions"))
    process = None
    if any("torch_extensions" in item.fixturenames for item in request.session.items):
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        process = subprocess.Popen([sys.executable, "-c", COMPILE], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield folder, process
    if process is not None:
        process.wait()  # killed, it would leave a lock behind for which all later ones wait


@pytest.fixture(scope="session")
def torch_extensions(compilation):
    """The folder of DeepSpeed's compiled operators."""
    folder, process = compilation
    if process is not None:
        process.wait()
    return folder


def rank_environment(extensions: str, more: dict[str, str] | None) -> dict[str, str]:
    """On CPU, with the compiled operators of this session."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": extensions, "PYTHONPATH": path,
            **NO_COMPILER, **(more or {})}  # fmt: skip


@pytest.fixture(scope="session")
def start_distributed(torch_extensions):
    """`start_distributed(script, *args, ranks=2, env=None, output=PIPE)` starts a script under the `deepspeed` launcher.

    Returns the Popen,
    the leader of a process group of its own: `os.killpg(process.pid, SIGKILL)` ends the launcher and its ranks.
    """
    ports: list[int] = []

    def start(script, *args: str, ranks: int = 2, env: dict[str, str] | None = None, output: int = subprocess.PIPE):
        environment = rank_environment(torch_extensions, env)
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
        ports.append(free_port())
        command += ["--master_port", str(ports[-1]), str(script), *map(str, args)]
        return subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment, start_new_session=True)

    yield start
    for port in ports:
        remove_abandoned(port)


@pytest.fixture(scope="session")
def run_distributed(start_distributed):
    """`run_distributed(script, *args, ranks=2, timeout=300, env=None)` runs a script under the `deepspeed` launcher.

    Returns the CompletedProcess with stdout and stderr as text. Judge by a file that the script writes last, not by the
    exit code: DeepSpeed on CPU now and then aborts after all work is done.
    """

    def run(script, *args: str, ranks: int = 2, timeout: int = 300, env: dict[str, str] | None = None):
        process = start_distributed(script, *args, ranks=ranks, env=env)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            pytest.fail(f"{script} {args} took more than {timeout} s\n{stdout[-3000:]}\n{stderr[-3000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def run_ranks(torch_extensions, tmp_path_factory):
    """As `run_distributed`, but the ranks are started with the variables that `deepspeed` sets, and no launcher.

    For workers that test the engine: the launcher's two processes import DeepSpeed for seconds each. When a rank fails, the
    others end with it. Judge by a file that the script writes last.
    """

    def run(script, *args: str, ranks: int = 2, timeout: int = 300, env: dict[str, str] | None = None):
        port, folder = free_port(), tmp_path_factory.mktemp("ranks")
        common = rank_environment(torch_extensions, env) | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "CROSS_RANK": "0",
            "CROSS_SIZE": "1"}  # fmt: skip
        command = [sys.executable, "-u", str(script), *map(str, args)]
        with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
            processes = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=out, stderr=err)
                         for rank in range(ranks)]  # fmt: skip
            code = wait_for_ranks(processes, timeout)
        remove_abandoned(port)
        done = subprocess.CompletedProcess(command, code, (folder / "out").read_text(), (folder / "err").read_text())
        if code is None:
            pytest.fail(f"{script} {args} took more than {timeout} s\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    return run


def wait_for_ranks(processes: list[subprocess.Popen], timeout: float) -> int | None:
    """The first exit code that is not 0, or 0; None if time ran out. All have ended then."""
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                return failed[0] if failed else 0
            time.sleep(0.05)
        return None
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def trainings(run_ranks, tmp_path_factory):
    """`trainings(runs, ranks=2)` runs a list of short trainings (see distributed/train_worker.py) in one launch.

    Returns {name: result}; a run that ended in an error of ours has {"errors": {rank: text}}. Runs in a precision that this CPU
    does not compute are left out: who asks for such a result is skipped.
    """
    import json

    import torch

    def run(runs: list[dict], ranks: int = 2, timeout: int = 300) -> dict[str, dict]:
        folder = tmp_path_factory.mktemp("trainings")
        runs, left_out = without_missing(runs)
        results = Results(left_out, folder=folder)
        if not runs:
            return results
        (folder / "spec.json").write_text(json.dumps({"runs": runs}))
        worker = REPOSITORY / "tests" / "distributed" / "train_worker.py"
        process = run_ranks(worker, str(folder / "spec.json"), str(folder), ranks=ranks, timeout=timeout)
        assert (folder / "DONE").exists(), process.stdout[-2000:] + process.stderr[-6000:]
        for item in runs:
            name = item["name"]
            errors = {int(path.suffix[1:]): path.read_text() for path in folder.glob(f"{name}.error.*")}
            results[name] = {"errors": errors} if errors else torch.load(folder / f"{name}.pt", weights_only=False)
        return results

    return run


@pytest.fixture(scope="session")
def fault_driver(torch_extensions, session_folder):
    """The fault driver (faults/driver.py) in a folder of this session: its undisturbed training is run once for all tests."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "faults"))
    import driver

    made = driver.Driver(session_folder / "faults")
    made.environment |= NO_COMPILER
    with open(session_folder / "faults" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker trains, the other one reads
        made.undisturbed("training")
    return made
