"""A sweep as Slurm job arrays, by submitit (extra `slurm`): one cell a job, one node a cell.

Arrays are submitted by a process that stays and watches: a cell that needs another one's files is in a later array. A job
that Slurm preempts or that runs out of time goes back to the queue and resumes its cell. The folder must be on a file
system that all nodes share.
"""

import contextlib
import dataclasses
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ds_stability.errors import UserError
from ds_stability.launchers.sweep import Outcome, Sweep
from ds_stability.launchers.sweep_folder import SweepFolder
from ds_stability.launchers.sweep_hosts import Hosts
from ds_stability.launchers.sweep_plan import Cell, Plan
from ds_stability.safe_read import parse_yaml

POLL_SECONDS = 2
CANCEL_SECONDS = 60
QUEUE_SECONDS = 15.0  # between two questions to Slurm, which many sweeps may ask
LOST_SECONDS = 60.0  # for a job that has left the queue to show its result: a network file system may be late
DEFAULT_MINUTES = 24 * 60  # submitit's own default is 5
CLUSTERS = ("slurm", "local")


def parse_parameters(words: Sequence[str]) -> dict[str, Any]:
    """submitit parameters from KEY=VALUE words. UserError for anything else."""
    parameters: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or not key.isidentifier():
            raise UserError(f"--slurm {word}: allowed is KEY=VALUE, such as slurm_partition=gpu, timeout_min=600 or gpus_per_node=8")
        try:
            parameters[key] = parse_yaml(value)
        except ValueError as error:
            raise UserError(f"--slurm {word}: the value is no YAML ({error})") from None
    cluster = parameters.get("cluster", CLUSTERS[0])
    if cluster not in CLUSTERS:
        raise UserError(f"--slurm cluster={cluster}: allowed are {', '.join(CLUSTERS)}")
    for key in ("nodes", "tasks_per_node"):
        if parameters.get(key, 1) != 1:
            raise UserError(f"--slurm {key}={parameters[key]}: allowed is 1; a cell is trained on one node, by the deepspeed launcher")
    return parameters


class Job:
    """What a job does on its node: train one cell. Pickled by submitit, whose signal handlers stay in force."""

    def __init__(self, plan: Plan, folder: Path, hosts: Hosts, shared: dict[str, str]):
        self.plan, self.folder, self.hosts, self.shared = plan, folder, hosts, shared

    def __call__(self) -> str | None:
        """Why it failed, or None."""
        try:
            return self.work(Sweep(self.plan, SweepFolder(self.folder), self.hosts, retries=0, shared=self.shared))
        except UserError as error:
            return str(error)

    def work(self, sweep: Sweep) -> str | None:
        return next((reason for reason, _ in sweep.train().failed.values()), None)

    def checkpoint(self) -> Any:
        """What submitit queues when the job is preempted or out of time: itself, which resumes its cell."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class EvaluationJob(Job):
    """Evaluates all cells that are done."""

    def work(self, sweep: Sweep) -> str | None:
        return None if sweep.evaluate() else "the evaluation failed"


class Array:
    """The process that submits and watches.

    Raises:
        UserError: submitit is not installed, there is no Slurm, it does not know a parameter, or cannot write to the folder.
    """

    def __init__(self, sweep: Sweep, parameters: dict[str, Any]):
        try:
            import submitit
        except ImportError:
            raise UserError("--slurm needs the package submitit; install ds_stability[slurm]") from None
        path = str(sweep.folder.path)
        if re.search(r"[%\\\x00-\x1f\x7f]", path):
            raise UserError(f"--slurm: the sweep's folder {path!r} has a %, a backslash or a line break in its name, which sbatch takes for "
                            "something else; give another --output_dir")  # fmt: skip
        logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns with every question to a Slurm without accounting
        self.sweep = sweep
        parameters = {"timeout_min": DEFAULT_MINUTES, "name": sweep.plan.name, **parameters}
        self.cluster = cluster = parameters.pop("cluster", CLUSTERS[0])
        try:
            self.executor = submitit.AutoExecutor(folder=sweep.folder.path / "slurm" / "%j", cluster=cluster)
            self.executor.update_parameters(**parameters)
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            raise UserError(f"--slurm: {' '.join(str(error).split())}") from None
        self.jobs: dict[str, Any] = {}
        self.missing: dict[str, float] = {}  # job id -> when it was first seen to have left the queue
        self.queue: tuple[float, set[str] | None] = (-QUEUE_SECONDS, None)

    def train(self) -> Outcome:
        """Train until every cell has DONE or has failed for good."""
        with self._cancelling():
            while self.sweep.open_cells():
                self._submit([cell for cell in self.sweep.ready_cells() if cell.id not in self.jobs])
                time.sleep(POLL_SECONDS)
                self._collect()
                self.sweep.progress.update(self._state())
        return self.sweep.outcome

    def evaluate(self) -> bool:
        """Evaluate in a job, as the machine that submits may have no GPU."""
        with self._cancelling():
            self.jobs["evaluation"] = job = self.executor.submit(self._job(EvaluationJob, self.sweep.plan))
            while not self._ended(job):
                self.sweep.progress.update(f"job {job.job_id} evaluates the cells")
                time.sleep(POLL_SECONDS)
        problem = self._problem(job)
        if problem is not None:
            print(f"error: job {job.job_id}: {problem}; see {job.paths.stderr}", file=sys.stderr)
        return problem is None

    def _job(self, kind: type[Job], plan: Plan) -> Job:
        return kind(plan, self.sweep.folder.path, self.sweep.hosts, self.sweep.shared)

    def _submit(self, cells: list[Cell]) -> None:
        if not cells:
            return
        with self.executor.batch():
            for cell in cells:  # in its job a cell stands alone: what it needs is there
                plan = dataclasses.replace(self.sweep.plan, cells=(dataclasses.replace(cell, needs=()),))
                self.jobs[cell.id] = self.executor.submit(self._job(Job, plan))
        ids = [self.jobs[cell.id].job_id for cell in cells]
        self.sweep.progress.say(f"submitted {len(ids)} jobs: {', '.join(ids[:4])}{', ...' * (len(ids) > 4)}")

    def _collect(self) -> None:
        """Take note of the jobs that have ended."""
        for cell in self.sweep.open_cells():
            job = self.jobs.get(cell.id)
            if job is not None and self._ended(job):
                del self.jobs[cell.id]
                if not self.sweep.folder.is_done(cell):
                    reason = f"job {job.job_id}: {self._problem(job) or 'ended without DONE'}"
                    self.sweep.fail(cell, reason, self.sweep.folder.newest_log(cell) or job.paths.stderr)

    def _state(self) -> str:
        begun = sum(self.sweep.folder.run(cell).path.exists() for cell in self.sweep.open_cells())
        total = len(self.sweep.plan.cells)
        return f"[{len(self.sweep.progress.done)}/{total} done] {begun} begun, {len(self.sweep.open_cells()) - begun} to begin"

    @contextlib.contextmanager
    def _cancelling(self) -> Iterator[None]:
        """Whatever ends this process but SIGKILL ends its jobs."""
        try:
            yield
        except BaseException:
            jobs = [job for job in self.jobs.values() if not job.done()]
            for job in jobs:
                job.cancel(check=False)
            deadline = time.monotonic() + CANCEL_SECONDS
            while time.monotonic() < deadline and not all(job.done() for job in jobs):
                time.sleep(POLL_SECONDS)
            raise

    def _ended(self, job: Any) -> bool:
        """Whether a job has a result, or has left the queue without one: killed, on a Slurm without accounting to say so."""
        if job.done():
            return True
        if self.cluster != "slurm" or self._queued(job):
            self.missing.pop(job.job_id, None)
            return False
        return time.monotonic() - self.missing.setdefault(job.job_id, time.monotonic()) > LOST_SECONDS

    def _queued(self, job: Any) -> bool:
        """Whether Slurm has the job, waiting or running; also True if it does not answer."""
        asked, listed = self.queue
        if time.monotonic() - asked > QUEUE_SECONDS:
            listed = _queue()
            self.queue = time.monotonic(), listed
        return listed is None or str(job.job_id) in listed

    def _problem(self, job: Any) -> str | None:
        """Why a job that has ended failed, or None."""
        if not job.done():  # its result would be waited for, for ever
            return "left the queue without a result; it was killed, or its node was lost"
        try:
            return job.result()
        except Exception as error:  # what the job raised, or that it was killed
            lines = str(error).strip().splitlines()
            return lines[-1] if lines else type(error).__name__


def _queue() -> set[str] | None:
    """Ids of this user's jobs that wait or run; None if Slurm does not answer."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(answer.stdout.split()) if answer.returncode == 0 else None
