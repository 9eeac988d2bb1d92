"""What a sweep keeps on disk: runs/SWEEP/{sweep.json, attempts.jsonl, configs/, locks/, logs/, CELL/, CELL.attempt-K/}.

The state of a cell is read from the file system: DONE in its folder, a lock that is held, checkpoints. Nothing here is
ever deleted; a partial run without a checkpoint is moved aside.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

from ds_stability.errors import UserError
from ds_stability.launchers.sweep_plan import Cell, Plan
from ds_stability.locks import TRAIN_LOCK, is_locked, try_lock
from ds_stability.run_dir import RunDir, utc_now, write_json_atomic
from ds_stability.safe_read import parse_json, read_json

VERSION = 1
MANIFEST = "sweep.json"


class SweepFolder:
    """Paths and records of one sweep. `path` is absolute: runs are identified by the files they were given."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).resolve()
        self.manifest = self.path / MANIFEST
        self.attempts = self.path / "attempts.jsonl"

    def run(self, cell: Cell) -> RunDir:
        return RunDir(self.path / cell.id)

    def config(self, cell: Cell) -> Path:
        return self.path / "configs" / f"{cell.id}.json"

    def log(self, cell: Cell, attempt: int) -> Path:
        return self.path / "logs" / f"{cell.id}.attempt-{attempt}.log"

    def is_done(self, cell: Cell) -> bool:
        return self.run(cell).done.exists()

    def claim(self, cell: Cell) -> int | None:
        """A lock on the cell; None if a sweep, the launcher of one that was killed, or a training holds it."""
        descriptor = self.lock(cell.id)
        if descriptor is not None and is_locked(self.run(cell).path / TRAIN_LOCK):
            os.close(descriptor)
            return None
        return descriptor

    def lock(self, name: str) -> int | None:
        return try_lock(self.path / "locks" / f"{name}.lock")

    def write_manifest(self, plan: Plan) -> tuple[list[str], list[str], list[str]]:
        """Write sweep.json; (kept, new, removed) ids of cells, against the one that was there."""
        before = self._read_manifest()
        entries = [cell_entry(cell) for cell in plan.cells]
        now = {entry["id"] for entry in entries}
        known = {entry["id"]: entry for entry in before.get("cells", []) + before.get("removed", [])}
        removed = [entry for name, entry in known.items() if name not in now]
        write_json_atomic(self.manifest, {
            "version": VERSION, "name": plan.name, "fingerprint": plan.fingerprint, "source": plan.source, "cells": entries,
            "evaluate": plan.evaluate, "removed": removed,
        })  # fmt: skip
        earlier = {entry["id"] for entry in before.get("cells", [])}
        return sorted(now & earlier), sorted(now - earlier), sorted(earlier - now)

    def _read_manifest(self) -> dict[str, Any]:
        if not self.manifest.exists():
            if self.path.is_dir() and RunDir(self.path).manifest.exists():
                raise UserError(f"--output_dir {self.path}: holds a single run; give another folder for the sweep")
            return {}
        try:
            manifest = read_json(self.manifest)
            if not all(isinstance(entry, dict) and isinstance(entry.get("id"), str)
                       for key in ("cells", "removed") for entry in manifest.get(key, [])):  # fmt: skip
                raise ValueError("a cell without an id")
            return manifest
        except (ValueError, AttributeError, TypeError):
            raise UserError(f"{self.manifest}: is no plan of a sweep; move it away, and start the sweep again") from None

    def newest_log(self, cell: Cell) -> Path | None:
        """The log of a cell's last attempt; None before the first."""
        number = self._attempts_at(cell)
        return self.log(cell, number) if number else None

    def _attempts_at(self, cell: Cell) -> int:
        return sum(row["event"] == "start" and row["cell"] == cell.id for row in self.read_attempts())

    def begin_attempt(self, cell: Cell, resumed_from: int | None) -> int:
        """Record an attempt at a cell (whose lock is held); its number, from 1."""
        number = 1 + self._attempts_at(cell)
        self._append({"event": "start", "cell": cell.id, "attempt": number, "resumed_from": resumed_from})
        return number

    def end_attempt(self, cell: Cell, number: int, outcome: str, seconds: float, code: int | None = None) -> None:
        """outcome: done, failed, interrupted, or refused (another process has the folder). An attempt whose sweep was killed
        has no end."""
        self._append({"event": "end", "cell": cell.id, "attempt": number, "outcome": outcome, "exit_code": code,
                      "seconds": round(seconds, 1)})  # fmt: skip

    def read_attempts(self) -> list[dict[str, Any]]:
        """All records; a line that was cut off by a crash is left out."""
        rows = []
        if self.attempts.exists():
            for line in self.attempts.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = parse_json(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and {"event", "cell", "attempt"} <= row.keys():
                    rows.append(row)
        return rows

    def seconds(self, cell: Cell) -> float | None:
        """Wall time of a finished cell over all its attempts; None if that is not known."""
        ends = [row for row in self.read_attempts() if row["event"] == "end" and row["cell"] == cell.id]
        return sum(row["seconds"] for row in ends) if any(row["outcome"] == "done" for row in ends) else None

    def _append(self, record: dict[str, Any]) -> None:
        record = {**record, "at": utc_now(), "host": socket.gethostname(), "pid": os.getpid()}
        # The newline in front ends a line that a crash cut off; one write, so that two sweeps' lines never mix.
        descriptor = os.open(self.attempts, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, ("\n" * _cut_off(self.attempts) + json.dumps(record) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def checkpoint_to_resume(self, cell: Cell) -> int | None:
        """Step of the newest checkpoint that was written to its end; None without one."""
        run = self.run(cell)
        try:
            found = run.complete_checkpoints() if run.checkpoints() else []
        except UserError:  # no manifest
            return None
        return found[-1][0] if found else None

    def set_aside(self, cell: Cell) -> Path | None:
        """Move what an attempt left to CELL.attempt-K, with the first K that is free; None if it left nothing."""
        path = self.run(cell).path
        if not path.exists():
            return None
        number = 1
        while (target := path.with_name(f"{cell.id}.attempt-{number}")).exists():
            number += 1
        path.rename(target)
        return target


def cell_entry(cell: Cell) -> dict[str, Any]:
    """A cell as sweep.json has it."""
    block = cell.ds_config(cell.block).get("stability", {})
    return {"id": cell.id, "arm": cell.arm, "axes": cell.axes, "flags": cell.flags, "stability": block, "needs": list(cell.needs)}


def _cut_off(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"
