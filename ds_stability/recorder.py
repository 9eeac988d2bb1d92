"""metrics.jsonl and TensorBoard of one run, written by rank 0, and by nobody else: a lock sees to it.

One line per optimizer step with global values, under the keys of tags.py. The line of a step stays open until a later
step, `flush` or `close`, so that an evaluation or a probe after the step lands in the same line; then it is appended
in one write. (What is recorded for a step after its `flush` makes a second line; `read_metrics` merges the two.)
Whatever cannot be written raises: a run whose results are lost has failed.

TensorBoard gets every step of the first 1,000, then every 10th up to step 10,000, every 100th up to 100,000 and so on:
some 900 points more per tag and decade. Every step would make a gigabyte of events in some 420,000 steps (59 bytes a value),
and TensorBoard shows 1,000 points of a tag unless told otherwise. Evaluations, probes and skipped steps are written whenever they come.
"""

import json
import math
import numbers
import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_stability.errors import UserError
from ds_stability.locks import NoLocksError, try_lock, unlock
from ds_stability.run_dir import RunDir, write_atomic
from ds_stability.safe_read import parse_json
from ds_stability.tags import TAGS, Tag, is_known, tag_table_markdown

__all__ = ["TAGS", "Recorder", "Tag", "read_metrics", "tag_table_markdown"]

LOCK = "metrics.lock"  # beside metrics.jsonl, which is replaced whole on resume
LOCK_SECONDS = 10.0  # the workers of a data loader outlive a rank that was killed for some seconds, and hold its lock
Value = float | int | bool | None
RARE = ("eval/", "probe/", "alarm/")  # keys with an interval of their own


class Recorder:
    """Writer of a run's metrics; make one on rank 0 only, after `RunDir.create`.

    Args:
        tensorboard: also write TensorBoard events, under the same keys, in fewer and fewer steps (see above).
        resume_step: the step of the checkpoint that the run goes on from: later lines are cut and later TensorBoard
            events are purged. None for a new run, which must have no lines yet.

    Raises:
        UserError: another process or another Recorder writes this file; it holds another run's lines, or a broken line that is
            not the last.
    """

    def __init__(self, run_dir: RunDir, tensorboard: bool = True, resume_step: int | None = None):
        self.path, self._lock, self._file = run_dir.metrics, _hold(run_dir.path / LOCK, run_dir.metrics), None
        # Of a recorder that nobody closes: a script that has let go of a trainer may train into the folder again.
        self._lost = weakref.finalize(self, os.close, self._lock) if self._lock is not None else None
        self._step: int | None = resume_step
        self._line: dict[str, Value] = {}
        self._writer = None
        try:
            _repair(run_dir.metrics, resume_step)
            self._file = os.open(run_dir.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        finally:
            if self._file is None:
                self._release()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = None if resume_step is None else resume_step + 1
            self._writer = SummaryWriter(os.fspath(run_dir.tensorboard), purge_step=purge_step)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the line of `step`; a key given again in the same step replaces the earlier value.

        Numbers, bools and None only; NaN and infinity become null.

        Raises:
            KeyError: a key that tags.py does not know. ValueError: a step before the current one, or after `close`.
            TypeError: a value that is not a number. OSError: the previous line could not be written.
        """
        if self._file is None:
            raise ValueError("the recorder is closed")
        if self._step is not None and step < self._step:
            raise ValueError(f"step {step} comes after step {self._step}")
        clean = {key: _number(key, value) for key, value in values.items()}
        if step != self._step:
            self._write_line()
        self._step = step
        self._line.update(clean)

    def flush(self) -> None:
        """Write out the open line and bring everything to disk. Call it when a checkpoint is saved."""
        self._write_line()
        if self._file is not None:
            os.fsync(self._file)
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self.flush()
        finally:
            os.close(self._file)
            self._file = None
            self._release()
            if self._writer is not None:
                self._writer.close()

    def _release(self) -> None:
        if self._lock is not None:
            self._lost.detach()
            unlock(self._lock)
            self._lock = None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_line(self) -> None:
        if not self._line:
            return
        line = (json.dumps({"step": self._step, **self._line}, allow_nan=False) + "\n").encode()
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"metrics.jsonl: only {written} of {len(line)} bytes were written; is the disk full?")
        if self._writer is not None:
            due = self._step % tensorboard_interval(self._step) == 0 or self._line.get("skipped")
            for key, value in self._line.items():
                if value is not None and (due or key.startswith(RARE)):
                    self._writer.add_scalar(key, value, self._step)
        self._line = {}


def _hold(lock: Path, metrics: Path) -> int | None:
    """The descriptor of the run's lock; None on a file system without locks."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            descriptor = try_lock(lock)
        except NoLocksError:
            return None
        if descriptor is not None:
            return descriptor
        if time.monotonic() > deadline:
            raise UserError(
                f"{metrics}: another process, or another Recorder in this one, writes it; make one Recorder, where "
                "torch.distributed.get_rank() is 0, and give each run a folder of its own"
            )
        time.sleep(0.1)


def tensorboard_interval(step: int) -> int:
    """TensorBoard gets every so many steps around `step`; by the step alone, so that a resumed run writes the same points."""
    return 10 ** max(0, len(str(step - 1)) - 3) if step > 0 else 1


def _number(key: str, value: Any) -> Value:
    if key == "step" or not is_known(key):
        raise KeyError(f"{key!r} is not in the tag table (ds_stability/tags.py)")
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{key}: {type(value).__name__} is not a number")
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """One dict per step of a metrics.jsonl, in order; a torn last line (of a live or killed run) is left out.

    Raises:
        UserError: no such file, or a broken line before the last, by its number.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise UserError(f"{path}: cannot be read ({(isinstance(error, OSError) and error.strerror) or error})") from None
    steps: list[dict[str, Any]] = []
    for _, row in _rows(Path(path), data):
        if steps and steps[-1]["step"] == row["step"]:
            steps[-1].update(row)
        else:
            steps.append(row)
    return steps


def _rows(path: Path, data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """(line with its newline, parsed) of each whole line."""
    lines = data.splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append((line, row))
        elif number < len(lines):
            raise UserError(f"{path}: line {number} is broken; restore the file, or delete that line, before going on")
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    # Without its newline a line is torn even if it happens to parse: "1" may be the start of "12".
    if not line.endswith(b"\n"):
        return None
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and all(map(_is_value, row.values())) else None


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _repair(path: Path, resume_step: int | None) -> None:
    """Drop a torn last line, and on resume every line after the checkpoint's step; the file is replaced whole."""
    if not path.exists():
        return
    data = path.read_bytes()
    rows = _rows(path, data)
    if resume_step is None and rows:
        raise UserError(f"{path}: holds the metrics of another run; give a new --output_dir, or resume that run")
    kept = b"".join(line for line, row in rows if row["step"] <= (resume_step or 0))
    if kept != data:
        write_atomic(path, kept)
