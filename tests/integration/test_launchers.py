"""launchers/train.py and eval/run.py under launchers other than `deepspeed` alone: torchrun, accelerate, mpirun, Slurm.

Slurm is a real one (tests/slurm.py). What its job scripts do is tested with a stand-in for Python in a second each; that
real ranks train, stop, resume and evaluate there, in the slow tests.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import slurm as throw_away
import tiny
from ports import free_port
from tiny import SUITE, evaluation

from ds_stability.errors import UserError
from ds_stability.launchers import sweep_slurm
from ds_stability.recorder import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN, EVALUATE = REPOSITORY / "launchers" / "train.py", REPOSITORY / "eval" / "run.py"
JOBS = REPOSITORY / "launchers" / "slurm"
BIN = Path(sys.executable).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")  # the script of that name lies where torch was installed
HOSTILE = "o' \"x\" $(touch pwned) `touch pwned` ;#&*"  # a folder's name
#: In Python's place: writes down its arguments and does what behavior.json says for this start of the job.
STAND_IN = """#!{python}
import json, os, signal, sys, time
folder, start = os.environ["STAND_IN"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
rank = os.environ["SLURM_PROCID"]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
with open(f"{{folder}}/{{start}}-{{rank}}.tmp", "w") as file:
    json.dump(sys.argv[1:], file)
os.rename(f"{{folder}}/{{start}}-{{rank}}.tmp", f"{{folder}}/{{start}}-{{rank}}.json")
code = json.load(open(f"{{folder}}/behavior.json"))[start]
if code is None:
    time.sleep(100)
time.sleep(0.3 * int(rank))
sys.exit(code)
"""
RANKS = "import json, os; from ds_stability.launch_environment import complete_environment as c; c(); " + (
    "print(json.dumps([os.environ[n] for n in 'RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT'.split()]))"
)


@pytest.fixture(scope="module")
def slurm():
    reason = throw_away.what_is_missing()
    if reason is not None:
        pytest.skip(f"a throw-away Slurm {reason}")
    with throw_away.throw_away_slurm() as running:
        running.environment.update(environment(), PATH=f"{BIN}{os.pathsep}{running.environment['PATH']}")
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "suite.yaml").write_text(json.dumps(SUITE))
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text())
    (folder / "ds.json").write_text(json.dumps({**config, "stability": {"level": 0.5}}))
    return folder


def environment():
    """For ranks on CPUs that find this checkout."""
    paths = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run(*words, timeout=240, env=None, cwd=None):
    """The process's output; it and its ranks are gone afterwards."""
    process = subprocess.Popen([str(word) for word in words], env={**os.environ, **environment(), **(env or {})}, cwd=cwd, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{words} took more than {timeout} s: {process.communicate()[0][-4000:]}")


def training(place, output, steps=3):
    return tiny.training(place, output, "--save_strategy", "no", steps=steps)


def losses(output, steps=3, world=2, log=""):
    """Losses of a run that is done, each step once, by `world` ranks."""
    assert (output / "DONE").exists(), log[-5000:]
    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert json.loads((output / "manifest.json").read_text())["world_size"] == world
    return [row["cross_entropy"] for row in rows]


def evaluated_by(output, log=""):
    assert (output / "cells" / "cell" / "DONE").exists(), log[-5000:]
    return json.loads((output / "cells" / "cell" / "cell.json").read_text())["world_size"]


@pytest.mark.slow
def test_torchrun_with_rendezvous(place):
    port = free_port()
    out = run(*TORCHRUN, "--nnodes", 1, "--nproc_per_node", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}",
              TRAIN, *training(place, place / "torchrun"))  # fmt: skip
    losses(place / "torchrun", log=out)
    out = run(*TORCHRUN, "--nnodes", 1, "--nproc_per_node", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}",
              EVALUATE, *evaluation(place, place / "torchrun", place / "torchrun-evals"))  # fmt: skip
    assert evaluated_by(place / "torchrun-evals", out) == 2


@pytest.mark.slow
def test_accelerate(place):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", REPOSITORY / "launchers" / "accelerate.yaml", "--num_processes", 2,
              "--main_process_port", free_port()]  # fmt: skip
    losses(place / "accelerate", log=run(*launch, TRAIN, *training(place, place / "accelerate")))
    out = run(*launch, EVALUATE, *evaluation(place, place / "accelerate", place / "accelerate-evals"))
    assert evaluated_by(place / "accelerate-evals", out) == 2


@pytest.mark.slow
def test_openmpi_without_mpi4py(place):
    if shutil.which("mpirun") is None or shutil.which("ompi_info") is None:
        pytest.skip("needs mpirun and ompi_info (Debian: openmpi-bin)")
    (place / "mpi_hosts").write_text("localhost slots=2\n")
    arguments = "--oversubscribe --mca btl_tcp_if_include lo" + " --allow-run-as-root" * (os.geteuid() == 0)
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", place / "mpi_hosts", "--force_multi", "--no_ssh_check",
              "--master_addr", "127.0.0.1", "--launcher", "openmpi", "--launcher_args", arguments]  # fmt: skip
    losses(place / "openmpi", log=run(*launch, TRAIN, *training(place, place / "openmpi")))
    out = run(*launch, EVALUATE, *evaluation(place, place / "openmpi", place / "openmpi-evals"))
    assert evaluated_by(place / "openmpi-evals", out) == 2


def srun(slurm, *words):
    rows = slurm.run("srun", *words, sys.executable, "-c", RANKS).splitlines()
    return sorted(json.loads(row) for row in rows)


def test_tasks_of_srun_know_their_ranks(slurm):
    rows = srun(slurm, "-N2", "-n3")
    assert [row[:2] for row in rows] == [["0", "3"], ["1", "3"], ["2", "3"]]
    assert [row[2:4] for row in rows] == [["0", "2"], ["1", "2"], ["0", "1"]]
    assert {row[4] for row in rows} == {"127.0.0.1"}, "node1 has no address but the one that Slurm knows"
    assert len({row[5] for row in rows}) == 1
    assert srun(slurm, "-n1")[0][:4] == ["0", "1", "0", "1"]


def test_a_lone_python_in_a_batch_script_is_one_process(slurm, tmp_path):
    job = tmp_path / "lone.sh"
    job.write_text(f'#!/bin/bash\n"{sys.executable}" -c "{RANKS}"\nsrun "{sys.executable}" -c "{RANKS}"\n')
    slurm.submit("--wait", "-N2", "-n2", "--output", tmp_path / "log", job)
    lone, *tasks = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert lone[:4] == ["0", "1", "0", "1"] and sorted(row[0] for row in tasks) == ["0", "1"] and tasks[0][1] == "2"


class Job:
    """A job script of ours, submitted from a folder with a hostile name, with the stand-in for Python."""

    def __init__(self, slurm, folder, script, behavior, *words):
        self.slurm, self.folder, self.notes = slurm, folder / HOSTILE, folder / "notes"
        self.folder.mkdir()
        self.notes.mkdir()
        (self.notes / "behavior.json").write_text(json.dumps(behavior))
        python = self.folder / "python"
        python.write_text(STAND_IN.format(python=sys.executable))
        python.chmod(0o755)
        shutil.copy(JOBS / script, self.folder)
        settings = {**slurm.environment, "PYTHON": str(python), "STAND_IN": str(self.notes)}
        self.id = slurm.submit("--nodes=2", "--ntasks-per-node=1", "--output", folder / "log", self.folder / script, *words,
                               env=settings, cwd=self.folder)  # fmt: skip

    def arguments(self, start):
        """What rank 0 and rank 1 were given at a start of the job."""
        files = [self.notes / f"{start}-{rank}.json" for rank in (0, 1)]
        deadline = time.monotonic() + 30
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline, (self.notes.parent / "log").read_text()
            time.sleep(0.1)
        both = [json.loads(file.read_text()) for file in files]
        assert both[0] == both[1] and not list(self.notes.parent.rglob("pwned"))
        return both[0]

    def end(self, *states):
        state = self.slurm.wait_for(self.id, *states, seconds=40)
        details = self.slurm.details(self.id)
        return state, int(details["Restarts"]), details["ExitCode"]


def test_a_training_job_is_queued_again_when_it_was_stopped(slurm, tmp_path):
    words = ["--output_dir", f"runs/{HOSTILE}", "--learning_rate", "1e-3", "", "a\nb"]
    job = Job(slurm, tmp_path, "train.sbatch", [None, 0], *words)
    given = ["-u", "-m", "ds_stability.launchers.train", "--resume_from_checkpoint", "auto", *words]
    assert job.arguments(0) == given
    slurm.run("scancel", "--signal=USR1", job.id)  # what Slurm does itself before the time limit: to the ranks, not the script
    assert job.end("PENDING")[1] == 1
    slurm.start_now(job.id)
    assert job.arguments(1) == given
    assert job.end("COMPLETED") == ("COMPLETED", 1, "0:0")
    assert "stopped with its checkpoint saved" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("code", [2, 69])
def test_a_training_job_that_failed_is_not_queued_again(slurm, tmp_path, code):
    job = Job(slurm, tmp_path, "train.sbatch", [code])
    job.arguments(0)
    assert job.end("FAILED", "PENDING", "COMPLETED") == ("FAILED", 0, f"{code}:0")


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate.sbatch"])
def test_a_job_that_was_canceled_stays_so(slurm, tmp_path, script):
    job = Job(slurm, tmp_path, script, [None, None])
    job.arguments(0)
    slurm.run("scancel", job.id)
    assert job.end("CANCELLED", "PENDING")[:2] == ("CANCELLED", 0)


def test_an_evaluation_job_is_queued_again_when_its_time_is_up(slurm, tmp_path):
    words = ["--model", f"runs/{HOSTILE}", "b", "--output_dir", "evals/x y"]
    job = Job(slurm, tmp_path, "evaluate.sbatch", [None, 3], *words)
    assert job.arguments(0) == ["-u", "-m", "ds_stability.eval.run", *words]
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)
    assert job.end("PENDING")[1] == 1
    slurm.start_now(job.id)
    job.arguments(1)
    assert job.end("FAILED", "PENDING", "COMPLETED") == ("FAILED", 1, "3:0")


@pytest.mark.slow
def test_deepspeed_starts_its_ranks_with_srun(slurm, place):
    (place / "slurm_hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", place / "slurm_hosts", "--no_ssh_check",
              "--master_addr", "node1", "--launcher", "slurm", "--launcher_args=--nodes=2"]  # fmt: skip
    losses(place / "srun", log=run(*launch, TRAIN, *training(place, place / "srun"), env=slurm.environment))
    out = run(*launch, EVALUATE, *evaluation(place, place / "srun", place / "srun-evals"), env=slurm.environment)
    assert evaluated_by(place / "srun-evals", out) == 2


@pytest.mark.slow
def test_a_stopped_training_job_goes_on_and_is_evaluated_by_another_job(slurm, place):
    folder, steps = place / HOSTILE, 100
    folder.mkdir()
    tasks = ["--nodes=2", "--ntasks-per-node=1", "--output", place / "job.log"]
    words = [str(word) for word in training(place, "run", steps)]
    job = slurm.submit(*tasks, JOBS / "train.sbatch", *words, cwd=folder)
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline and slurm.state(job) in ("PENDING", "RUNNING"), (place / "job.log").read_text()[-5000:]
        time.sleep(0.1)
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait_for(job, "PENDING", seconds=60)
    saved = [path.name for path in (folder / "run").glob("checkpoint-*")]
    assert len(saved) == 1 and not (folder / "run" / "DONE").exists()
    slurm.start_now(job)
    slurm.wait_for(job, "COMPLETED", "FAILED")
    losses(folder / "run", steps, log=(place / "job.log").read_text())
    words = [str(word) for word in evaluation(place, "run", "evals")]
    slurm.submit("--wait", *tasks, JOBS / "evaluate.sbatch", *words, cwd=folder, timeout=200, check=False)
    assert evaluated_by(folder / "evals", (place / "job.log").read_text()) == 2
    assert not list(place.rglob("pwned"))


@pytest.fixture
def array(slurm, tmp_path, monkeypatch):
    """`array(folder)`: what submits the jobs of a sweep."""
    pytest.importorskip("submitit")
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sweep_slurm, "QUEUE_SECONDS", 0.2)
    monkeypatch.setattr(sweep_slurm, "LOST_SECONDS", 1.0)
    return lambda path: sweep_slurm.Array(SimpleNamespace(folder=SimpleNamespace(path=path), plan=SimpleNamespace(name="x")), {})


def ended(array, job):
    deadline = time.monotonic() + 30
    while not array._ended(job):
        assert time.monotonic() < deadline, job.stderr()
        time.sleep(0.1)
    return array._problem(job)


def test_jobs_of_a_sweep_with_a_hostile_name_and_one_that_was_killed(slurm, tmp_path, array):
    here = array(tmp_path / HOSTILE)
    job, killed = here.executor.submit(os.getcwd), here.executor.submit(time.sleep, 100)
    slurm.wait_for(killed.job_id, "RUNNING")
    assert ended(here, job) == os.getcwd() and not list(tmp_path.rglob("pwned"))
    slurm.run("scancel", "--signal=KILL", "--full", killed.job_id)  # as for too much memory; this Slurm keeps no accounts
    assert "it was killed" in ended(here, killed)


@pytest.mark.parametrize("name", ["a%jb", "a\\b", "a\nb"])
def test_a_folder_that_sbatch_would_take_for_another_is_refused(tmp_path, array, name):
    with pytest.raises(UserError, match="give another --output_dir"):
        array(tmp_path / name)


SWEEP = """
name: tiny
num_gpus: 2
flags: {dataset_name: "builtin:synthetic", synthetic_tokens: 20000, block_size: 32, per_device_train_batch_size: 2,
        max_steps: 3, learning_rate: 1.0e-3, save_strategy: "no", config_overrides: "n_embd=32,n_layer=1,n_head=2"}
grid: {stability.level: [0, 0.5]}
"""


@pytest.mark.slow
def test_a_sweep_as_a_job_array(slurm, place, tmp_path):
    folder = tmp_path / HOSTILE
    folder.mkdir()
    settings = {"deepspeed": str(place / "ds.json"), "config_name": str(REPOSITORY / "ds_configs" / "models" / "gpt2_tiny.json")}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    (folder / "tiny.yaml").write_text(SWEEP)
    out = run(sys.executable, "-m", "ds_stability.cli", "sweep", "tiny.yaml", "--slurm", "cpus_per_task=2", "timeout_min=10",
              *sets, cwd=folder, env=slurm.environment)  # fmt: skip
    sweep = folder / "runs" / "tiny"
    assert (sweep / "sweep.json").exists() and not list(tmp_path.rglob("pwned")), out[-5000:]
    cells = json.loads((sweep / "sweep.json").read_text())["cells"]
    assert len(cells) == 2
    for cell in cells:
        losses(sweep / cell["id"], log=out)

