"""The ranks that a launcher started beside this one, on the same host: which of them have ended."""

import os
import time

import psutil

# Name of the global rank, and of the number of ranks of this host, in a child's environment, by launcher.
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
_COUNTS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
LOOKS, LOOK_SECONDS = 10, 0.05


def ended_ranks() -> list[int]:
    """Global ranks of this host whose processes have ended; empty where the launcher does not tell who belongs here."""
    count = next((int(os.environ[name]) for name in _COUNTS if name in os.environ), 0)
    if not count or "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        return []
    first = int(os.environ["RANK"]) - int(os.environ["LOCAL_RANK"])
    return sorted(set(range(first, first + count)) - _living() - {int(os.environ["RANK"])})


def ended_soon() -> list[int]:
    """`ended_ranks`, after some looks: the connections of a process that was killed can be closed before it is gone."""
    for _ in range(LOOKS):
        if ended := ended_ranks():
            return ended
        time.sleep(LOOK_SECONDS)
    return []


def _living() -> set[int]:
    """Ranks of the processes that this one's parent still runs. A zombie has no environment: it has ended."""
    ranks = set()
    try:
        children = psutil.Process(os.getppid()).children(recursive=True)
    except psutil.Error:  # it ended just now, and this process has another parent
        return ranks
    for process in children:
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        ranks |= {int(environment[name]) for name in _RANKS if name in environment}
    return ranks
