"""The runner of a sweep: train all cells, then evaluate them (`ds-stability sweep FILE.yaml`).

Started again after any kind of end, it goes on: what has DONE is skipped, an interrupted cell is resumed from its newest
complete checkpoint, or is set aside (CELL.attempt-K) and started anew. Several sweep processes on one folder, also of
several hosts, share the cells. launchers/sweep_plan.py describes the YAML, launchers/sweep_folder.py what is kept.
"""

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ds_stability.errors import AlarmStoppedError, UserError
from ds_stability.launchers.prepare import makes_tokenizer, prepare
from ds_stability.launchers.sweep_check import check_cells
from ds_stability.launchers.sweep_folder import SweepFolder
from ds_stability.launchers.sweep_hosts import EVAL_SCRIPT, TRAIN_SCRIPT, Hosts, run_script
from ds_stability.launchers.sweep_plan import Cell, Plan
from ds_stability.launchers.sweep_progress import Progress, clock, last_step
from ds_stability.launchers.sweep_values import flag_words
from ds_stability.locks import TRAIN_LOCK, is_locked
from ds_stability.run_dir import write_json_atomic
from ds_stability.safe_text import safe_text

WAIT_SECONDS = 2  # between looks at what another process does
TAIL_LINES = 25
PAGE = Path("report") / "index.html"  # of an evaluation, in its folder: what it writes last


@dataclass
class Outcome:
    """Cells that have no DONE at the end: id -> (reason, log or None)."""

    failed: dict[str, tuple[str, Path | None]] = field(default_factory=dict)

    def report(self) -> str:
        parts = [f"{len(self.failed)} cell{'s' * (len(self.failed) > 1)} failed:"]
        for cell, (reason, log) in self.failed.items():
            parts.append(f"\n{cell}: {reason}")
            if log is not None:
                parts.append(f"{log} ends:\n{tail(log)}")
        return "\n".join(parts)


class Sweep:
    """One plan in one folder, trained cell by cell by this process.

    Args:
        retries: how often a cell that failed is tried again. shared: flags that all cells get; None makes them.
    """

    def __init__(self, plan: Plan, folder: SweepFolder, hosts: Hosts, retries: int = 1, shared: dict[str, str] | None = None,
                 stream=None):  # fmt: skip
        self.plan, self.folder, self.hosts, self.retries, self.shared = plan, folder, hosts, retries, shared
        self.commands = check_cells(plan, folder.path)
        steps = {cell.id: self.commands[cell.id].training["max_steps"] for cell in plan.cells}
        # A cell counts by its steps where all cells say how many they have.
        self.progress = Progress(steps if min(steps.values()) > 0 else dict.fromkeys(steps, 1), stream)
        self.outcome = Outcome()
        self.failures: Counter[str] = Counter()

    def begin(self) -> None:
        """Write the manifest and what all cells share; take note of what is done."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        kept, new, removed = self.folder.write_manifest(self.plan)
        if kept and (new or removed):
            self.progress.say(f"the sweep has changed: {len(kept)} cells kept; new: {', '.join(new) or 'none'}; no longer in it, "
                              f"left where they are: {', '.join(removed) or 'none'}")  # fmt: skip
        if self.shared is None:
            self.shared = self._prepare()
        self._note_done()
        if self.progress.done:
            self.progress.say(f"{len(self.progress.done)} of {len(self.plan.cells)} cells were done before")

    def train(self) -> Outcome:
        """Train until every cell has DONE or has failed for good; after `begin`."""
        while self.open_cells():
            happened = [self._try(cell) for cell in self.ready_cells()]
            if not any(happened):
                self._wait()
        return self.outcome

    def open_cells(self) -> list[Cell]:
        return [cell for cell in self.plan.cells if cell.id not in self.progress.done and cell.id not in self.outcome.failed]

    def ready_cells(self) -> list[Cell]:
        """Open cells that need no other, or none that is not done; those that wait for a failed one fail."""
        self._note_done()
        for cell in self.open_cells():
            broken = [need for need in cell.needs if need in self.outcome.failed]
            if broken:
                self.outcome.failed[cell.id] = (f"not run, as it needs files of {broken[0]}", None)
        return [cell for cell in self.open_cells() if all(need in self.progress.done for need in cell.needs)]

    def fail(self, cell: Cell, reason: str, log: Path | None, for_good: bool = False) -> None:
        """Count a failure; after `retries` more, or if it is `for_good`, the cell is given up."""
        self.failures[cell.id] += 1
        times = self.failures[cell.id]
        if for_good or times > self.retries:
            self.outcome.failed[cell.id] = (f"{reason} (tried {times} time{'s' * (times > 1)})", log)
        again = "" if cell.id in self.outcome.failed else "; it is tried again"
        self.progress.say(f"{cell.id}: {reason}{again}{f' ({log})' if log else ''}")

    def _note_done(self) -> None:
        """DONE counts even while its process still holds the lock: ending can hang."""
        for cell in self.open_cells():
            if self.folder.is_done(cell):
                self.progress.finish(cell.id, self.folder.seconds(cell))

    def _try(self, cell: Cell) -> bool:
        """Train a cell, unless another process has it; whether anything happened."""
        if self.folder.is_done(cell):
            return True
        lock = self.folder.claim(cell)
        if lock is None:
            return False
        try:
            if not self.folder.is_done(cell):  # nor did another process finish it just now
                self._attempt(cell, lock)
        finally:
            os.close(lock)
        return True

    def _attempt(self, cell: Cell, lock: int) -> None:
        step = self.folder.checkpoint_to_resume(cell)
        if step is None and (aside := self.folder.set_aside(cell)) is not None:
            self.progress.say(f"{cell.id}: left off without a complete checkpoint; kept as {aside.name}, and trained anew")
        words = self._words(cell, resume=step is not None)
        number = self.folder.begin_attempt(cell, step)
        log, run, started = self.folder.log(cell, number), self.folder.run(cell), time.monotonic()
        self.progress.begin(cell.id)

        def watch() -> bool:
            self.progress.show(last_step(run.metrics))
            return run.done.exists()

        code, outcome = None, "interrupted"
        try:
            code = run_script(self.hosts, TRAIN_SCRIPT, words, log, watch, (lock,))
            outcome = "failed"
        finally:
            seconds = time.monotonic() - started
            if run.done.exists():
                outcome = "done"
            elif outcome == "failed" and is_locked(run.path / TRAIN_LOCK):
                outcome = "refused"  # ranks of a launcher that was killed are still at it
            self.folder.end_attempt(cell, number, outcome, seconds, code)
        if outcome == "done":
            self.progress.finish(cell.id, self.folder.seconds(cell))
            self.progress.say(f"{cell.id}: {f'resumed at step {step}, ' if step is not None else ''}done in {clock(seconds)}")
        elif outcome == "failed":
            # A lost rank, a full disk or a signal says nothing about the checkpoint.
            if code == 1 and step is not None and self.folder.checkpoint_to_resume(cell) == step:
                self.folder.set_aside(cell)  # it may be the checkpoint that is damaged
            # A mistake in what was given stays one, however often it is tried, and so does a collapse.
            self.fail(cell, f"failed with exit code {code}", log, for_good=code in (UserError.exit_code, AlarmStoppedError.exit_code))

    def _words(self, cell: Cell, resume: bool) -> list[str]:
        """The command line of a cell; writes its DeepSpeed config."""
        flags, block = cell.resolved(self.folder.path)
        write_json_atomic(self.folder.config(cell), cell.ds_config(block))
        shared = {"high_frequency_file": self.shared["high_frequency_file"]}
        if makes_tokenizer(self.commands[cell.id]):
            shared["tokenizer_name"] = self.shared["tokenizer_name"]
        own = {"deepspeed": str(self.folder.config(cell)), "output_dir": str(self.folder.run(cell).path)}
        return flag_words({"disable_tqdm": True, **flags, **shared, **own, "resume_from_checkpoint": resume or None})

    def _prepare(self) -> dict[str, str]:
        lock = self._lock("prepare", "prepares the tokenizer and the high-frequency set")
        try:
            return prepare(self.commands[self.plan.cells[0].id], self.folder.path)
        finally:
            os.close(lock)

    def _lock(self, name: str, meaning: str) -> int:
        while (lock := self.folder.lock(name)) is None:
            self.progress.update(f"another process {meaning}; waiting for it")
            time.sleep(WAIT_SECONDS)
        return lock

    def _wait(self) -> None:
        """For the cells that others train, or that need these."""
        names = [f"{cell.id} (step {last_step(self.folder.run(cell).metrics)})" for cell in self.open_cells()]
        if names:
            self.progress.update(f"[{len(self.progress.done)}/{len(self.plan.cells)} done] another process trains {names[0]}"
                                 f"{f'; {len(names) - 1} more to do' * (len(names) > 1)}")  # fmt: skip
        time.sleep(WAIT_SECONDS)

    def evaluate(self) -> bool:
        """Evaluate all cells that are done with eval/run.py, which itself skips what was evaluated; whether it succeeded."""
        suite, output = self.plan.evaluate["suite"], evaluation_folder(self.folder.path)
        runs = [self.folder.run(cell).path for cell in self.plan.cells if self.folder.is_done(cell)]
        words = flag_words({"model": [str(run) for run in runs], "suite": suite, "seeds": self.plan.evaluate["seeds"],
                            "output_dir": str(output), "reference_file": self.shared["high_frequency_file"]})  # fmt: skip
        marks = [output / "cells" / run.name / "DONE" for run in runs]
        lock = self._lock("evaluate", "evaluates the cells")
        try:
            for number in range(1, self.retries + 2):
                log = self.folder.path / "logs" / f"evaluate.attempt-{number}.log"
                self.progress.say(f"evaluating {len(runs)} cells with the suite {suite}; {log}")
                code = self._evaluation(words, log, marks, lock)
                if code in (0, UserError.exit_code):
                    break
        finally:
            os.close(lock)
        if code != 0:
            print(f"error: the evaluation failed with exit code {code}; {log} ends:\n{tail(log)}", file=sys.stderr)
            return False
        self.progress.say(f"evaluated; its report: {os.path.relpath(output / PAGE)}")
        return True

    def _evaluation(self, words: list[str], log: Path, marks: list[Path], lock: int) -> int | None:
        """Exit code of one evaluation; 0 for one that had to be ended after all was done, the page too."""
        before = sum(mark.exists() for mark in marks)
        page = evaluation_folder(self.folder.path) / PAGE
        drawn = _changed_at(page)

        def watch() -> bool:
            done = sum(mark.exists() for mark in marks)
            self.progress.update(f"{done} of {len(marks)} cells evaluated")
            return before < done == len(marks) and _changed_at(page) != drawn

        code = run_script(self.hosts, EVAL_SCRIPT, words, log, watch, keep_open=(lock,))
        return 0 if code is None else code


def _changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def evaluation_folder(path: Path) -> Path:
    """runs/NAME -> evals/NAME beside runs; elsewhere evals/NAME beside NAME."""
    parent = path.parent.parent if path.parent.name == "runs" else path.parent
    return parent / "evals" / path.name


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The end of a log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return safe_text("\n".join(text.splitlines()[-lines:]))
