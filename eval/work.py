"""The units of a cell: claimed one by one, journaled as they are done, merged in order at the end.

Every rank asks one counter for its next unit, so that a slow rank holds nobody up, and appends what comes out to a file of
its own, a line a unit. What a unit holds depends on the suite only: a run that was killed goes on with any number of
ranks, and its results are the same bytes. The last line of a killed rank's file may be torn; it is done again.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ds_stability.errors import UserError
from ds_stability.safe_read import parse_json

from .ranks import Ranks
from .records import Task

Records = list[dict[str, Any]]
Key = tuple[str, str]  # (task, unit)
SAMPLES = "samples"  # name of the task whose records are the samples
LINE_SECONDS = 15.0
TTY_SECONDS = 0.5
_FILE_NAME = re.compile(r"rank-(\d+)-(\d+)\.jsonl")


class Place(NamedTuple):
    """Bytes of a journal file."""

    path: Path
    start: int
    size: int


class UnitRecords(Iterable[dict[str, Any]]):
    """The records of some units, in order, read from the journal each time they are gone through, a unit at a time."""

    def __init__(self, places: Sequence[Place]):
        self.places = places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in dict.fromkeys(place.path for place in self.places)}
            for path, start, size in self.places:
                files[path].seek(start)
                yield from _unit(parse_json(files[path].read(size)))[1]


class Journal:
    """cells/ID/journal/rank-RRRRR-AAAA.jsonl: what rank R did in attempt A, one line {"task", "unit", "records"} a unit."""

    def __init__(self, folder: Path):
        self.folder = folder

    def files(self) -> list[Path]:
        """By attempt, then rank."""
        found = []
        for path in self.folder.glob("rank-*.jsonl"):
            match = _FILE_NAME.fullmatch(path.name)
            if match:
                found.append((int(match.group(2)), int(match.group(1)), path))
        return [path for _, _, path in sorted(found)]

    def next_attempt(self) -> int:
        return 1 + max((int(_FILE_NAME.fullmatch(path.name).group(2)) for path in self.files()), default=0)

    def path(self, rank: int, attempt: int) -> Path:
        return self.folder / f"rank-{rank:05d}-{attempt:04d}.jsonl"

    def read(self) -> dict[Key, Records]:
        """Everything that was done; of a unit that stands there twice, the first.

        Raises:
            UserError: a line that is broken, and is not the torn last one of its file.
        """
        done: dict[Key, Records] = {}
        for path in self.files():
            for key, records in read_journal(path):
                done.setdefault(key, records)
        return done

    def places(self) -> dict[Key, Place]:
        """Where each unit stands, the first of two; UserError as in `read`. A hundred bytes a unit, whatever it holds."""
        found: dict[Key, Place] = {}
        for path in self.files():
            for key, _, start, size in _units(path):
                found.setdefault(key, Place(path, start, size))
        return found

    def open(self, rank: int, attempt: int) -> "JournalWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        return JournalWriter(self.path(rank, attempt))


class JournalWriter:
    """Appends to one journal file; each unit is on the disk before `append` returns."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)

    def append(self, task: str, unit: str, records: Records) -> None:
        data = dump_line({"task": task, "unit": unit, "records": records}).encode("utf-8")
        while data:  # one write, but for a full disk or a signal
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)

    def __enter__(self) -> "JournalWriter":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)


def dump_line(value: Any) -> str:
    """One line of strict JSON. ValueError for NaN and infinity, which are not JSON: a task must say null."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def read_journal(path: Path) -> list[tuple[Key, Records]]:
    """The units in a journal file. A last line without its end was cut off with its process, and is left out."""
    return [(key, records) for key, records, _, _ in _units(path)]


def _units(path: Path) -> Iterator[tuple[Key, Records, int, int]]:
    """Each unit, with the first byte of its line and the number of them; one at a time in memory."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield *_unit(parse_json(line)), start, len(line)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} line {number}: is no line of a journal; remove the line, and its unit is done "
                                "again") from None  # fmt: skip
            start += len(line)


def _unit(row: Any) -> tuple[Key, Records]:
    task, unit, records = row["task"], row["unit"], row["records"]
    if not (isinstance(task, str) and isinstance(unit, str) and isinstance(records, list) and all(isinstance(one, dict) for one in records)):
        raise ValueError("no unit of a task")
    return (task, unit), records


@dataclass
class Progress:
    """Units done, rate and time left, on stderr: a line now and then, or one that is rewritten on a terminal."""

    label: str
    total: int
    before: int = 0  # units of earlier attempts: they say nothing about the rate

    def __post_init__(self) -> None:
        self.started = self.shown = time.monotonic()
        self.tty = sys.stderr.isatty()

    def show(self, done: int, last: bool = False) -> None:
        """`done`: units of this attempt."""
        now = time.monotonic()
        if not last and now - self.shown < (TTY_SECONDS if self.tty else LINE_SECONDS):
            return
        self.shown = now
        end = "\n" if last or not self.tty else ""
        print(("\r\x1b[K" if self.tty else "") + self.text(done, now - self.started), end=end, file=sys.stderr, flush=True)

    def text(self, done: int, seconds: float) -> str:
        finished = self.before + done
        share = 100 * finished // self.total if self.total else 100
        text = f"{self.label}: {finished} of {self.total} units ({share} %)"
        if done and seconds > 0 and finished < self.total:
            rate = done / seconds
            text += f", {rate:.2f} a second, {duration((self.total - finished) / rate)} left"
        return text


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def all_units(tasks: Sequence[Task]) -> list[Key]:
    """Every (task, unit), in the order of the suite.

    Raises:
        ValueError: two tasks of one name, or two units of one id: their records could not be told apart.
    """
    units = [(task.name, unit) for task in tasks for unit in task.units()]
    if len(set(units)) < len(units) or len({task.name for task in tasks}) < len(tasks):
        raise ValueError("two tasks, or two units of a task, have one name")
    return units


def run_units(tasks: Sequence[Task], journal: Journal, scratch: Path, ranks: Ranks, label: str, works: bool = True) -> None:
    """Do all units that the journal does not hold yet. Call on every rank; returns when all ranks are through.

    Args:
        label: names the cell, in progress lines and in the store; used once per process group.
        works: False for a rank that only waits (its device belongs to another rank's model).

    Raises:
        OtherRankFailed: another rank's unit failed. What this rank's own unit raised comes as it is.
    """
    def plan() -> tuple[list[Key], int, int]:
        units, done = all_units(tasks), journal.places()
        return [unit for unit in units if unit not in done], len(units), journal.next_attempt()

    pending, total, attempt = ranks.from_first(plan)
    by_name = {task.name: task for task in tasks}
    progress = Progress(label, total, total - len(pending))

    def show(last: bool = False) -> None:
        if ranks.is_first:
            progress.show(ranks.store.add(f"{label}/done", 0), last)

    if works and pending:
        with journal.open(ranks.rank, attempt) as writer:
            while (position := ranks.store.add(f"{label}/next", 1) - 1) < len(pending):
                ranks.check()
                name, unit = pending[position]
                writer.append(name, unit, by_name[name].run(unit, _scratch(scratch, name)))
                ranks.store.add(f"{label}/done", 1)
                show()
    ranks.wait(f"{label}/units", show)
    show(last=True)


def _scratch(scratch: Path, name: str) -> Path:
    folder = scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def merged(tasks: Sequence[Task], journal: Journal) -> dict[str, UnitRecords]:
    """The records of each task, in the order of its units, whoever did them and when; they stay on the disk.

    Raises:
        RuntimeError: a unit is missing, which `run_units` would have done.
    """
    done = journal.places()
    missing = [unit for unit in all_units(tasks) if unit not in done]
    if missing:
        raise RuntimeError(f"{len(missing)} units were not done, the first is {missing[0]}")
    return {task.name: UnitRecords([done[task.name, unit] for unit in task.units()]) for task in tasks}
