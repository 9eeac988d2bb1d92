"""The ranks that a launcher started beside this one, on the same host: which of them have ended."""

import os
import time

import psutil

# Name of the global rank, and of the number of ranks of this host, in a child's environment, by launcher.
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
# What all ranks of a job have in common when they start, and other jobs on the host do not.
_JOB = ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE")
# deepspeed's comes first: under it Accelerate sets LOCAL_WORLD_SIZE to 1 on CPUs, whatever there is.
_COUNTS = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")
LOOKS, LOOK_SECONDS = 10, 0.05
_seen: set[int] | None = None


def look_around() -> None:
    """Note which ranks can be seen from here while all are there: one in a container of its own never is."""
    global _seen
    _seen = _living()


def ended_ranks() -> list[int]:
    """Global ranks of this host whose processes have ended; empty where the launcher does not tell who belongs here."""
    count = next((int(os.environ[name]) for name in _COUNTS if name in os.environ), 0)
    if not count or "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        return []
    first = int(os.environ["RANK"]) - int(os.environ["LOCAL_RANK"])
    expected = set(range(first, first + count)) if _seen is None else _seen & set(range(first, first + count))
    return sorted(expected - _living() - {int(os.environ["RANK"])})


def ended_soon() -> list[int]:
    """`ended_ranks`, after some looks: the connections of a process that was killed can be closed before it is gone."""
    for _ in range(LOOKS):
        if ended := ended_ranks():
            return ended
        time.sleep(LOOK_SECONDS)
    return []


def _living() -> set[int]:
    """Ranks of this job that run on this host. A zombie has no environment: it has ended.

    All processes are looked at, not only the launcher's children: a rank may run inside a wrapper script.
    """
    job = _job(psutil.Process().environ())
    ranks = set()
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):  # gone, or another user's
            continue
        if _job(environment) == job:
            ranks |= {int(environment[name]) for name in _RANKS if environment.get(name, "").isdigit()}
    return ranks


def _job(environment: dict[str, str]) -> list[str | None]:
    return [environment.get(name) for name in _JOB]
