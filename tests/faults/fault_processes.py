"""The processes of one run, seen from outside: found by a variable in their environment, watched until they have ended."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

MARKER = "DS_STABILITY_FAULT_TRIAL"  # only read here: whoever inherited it belongs to the run


def start(command: Sequence[str], marker: str, log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start `command` as the leader of a session of its own, its output in the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as stream:
        return subprocess.Popen(list(command), stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                env={**environment, MARKER: marker}, start_new_session=True)  # fmt: skip


def processes_of(marker: str) -> list[psutil.Process]:
    """Every process that lives (no zombies) and has the marker: launchers, ranks and whatever these started."""
    return [process for process, _ in _with_environment(marker)]


def rank_process(marker: str, rank: int) -> psutil.Process | None:
    """The process of a global rank, or None as long as there is none: the launcher gives it RANK and --local_rank."""
    for process, environment in _with_environment(marker):
        try:
            if environment.get("RANK") == str(rank) and any(word.startswith("--local_rank") for word in process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None


def _with_environment(marker: str) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    own = os.getuid()
    for process in psutil.process_iter():
        try:
            if process.uids().real != own:
                continue
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if environment.get(MARKER) == marker and alive(process):
            yield process, environment


def alive(process: psutil.Process) -> bool:
    """False for a zombie, too: nothing of it runs any more."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def seconds_to_end(processes: Sequence[psutil.Process], limit: float) -> float | None:
    """Wall time until all of them have ended; None if one still lives after `limit` seconds."""
    started = time.monotonic()
    while any(alive(process) for process in processes):
        if time.monotonic() - started > limit:
            return None
        time.sleep(0.05)
    return time.monotonic() - started


def end_all(marker: str) -> None:
    """SIGKILL for everything with the marker: a run that hung must not stay behind."""
    for process in processes_of(marker):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
