"""Train all cells of a sweep, then evaluate them: `ds-stability sweep FILE.yaml`.

Started again after any kind of end, it goes on: what has DONE is skipped, an interrupted cell is resumed from its newest
complete checkpoint, or is set aside (CELL.attempt-K) and started anew. Several sweep processes on one folder, also of
several hosts, share the cells. launchers/sweep_plan.py describes the YAML, launchers/sweep_folder.py what is kept.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_stability.errors import UserError
from ds_stability.launchers.arguments import Command, parse_command
from ds_stability.launchers.prepare import check_comparable, makes_tokenizer, prepare
from ds_stability.launchers.setup_model import load_config
from ds_stability.launchers.sweep_folder import SweepFolder
from ds_stability.launchers.sweep_hosts import EVAL_SCRIPT, TRAIN_SCRIPT, Hosts, Interrupted, run_script
from ds_stability.launchers.sweep_plan import Cell, Plan, flag_words
from ds_stability.launchers.sweep_progress import Progress, clock, last_step
from ds_stability.run_dir import write_json_atomic

WAIT_SECONDS = 2  # between looks at cells that another process trains
TAIL_LINES = 25


@dataclass
class Outcome:
    """Why cells have no DONE: id -> (reason, log or None)."""

    failed: dict[str, tuple[str, Path | None]] = field(default_factory=dict)

    def report(self) -> str:
        parts = [f"{len(self.failed)} cell{'s' * (len(self.failed) > 1)} failed:"]
        for cell, (reason, log) in self.failed.items():
            parts.append(f"\n{cell}: {reason}")
            if log is not None:
                parts.append(f"{log} ends:\n{tail(log)}")
        return "\n".join(parts)


class Sweep:
    """The runner of one plan in one folder."""

    def __init__(self, plan: Plan, folder: SweepFolder, hosts: Hosts, retries: int = 1, stream=None):
        self.plan, self.folder, self.hosts, self.retries = plan, folder, hosts, retries
        self.commands = check_cells(plan, folder)
        weights = {cell.id: max(1, self.commands[cell.id].training["max_steps"]) for cell in plan.cells}
        self.progress = Progress(weights if min(weights.values()) > 1 else dict.fromkeys(weights, 1), stream)
        self.outcome = Outcome()
        self.failures: Counter[str] = Counter()
        self.shared: dict[str, str] = {}

    def train(self) -> Outcome:
        """Train until every cell has DONE or has failed for good.

        Raises:
            Interrupted: SIGINT or SIGTERM; the children are gone.
        """
        self.folder.path.mkdir(parents=True, exist_ok=True)
        changes = self.folder.write_manifest(self.plan)
        if changes["kept"] and (changes["new"] or changes["removed"]):
            self.progress.say(f"the sweep has changed: {len(changes['kept'])} cells kept, new: {', '.join(changes['new']) or 'none'}, "
                              f"no longer in it (left where they are): {', '.join(changes['removed']) or 'none'}")  # fmt: skip
        self._prepare()
        for cell in self.plan.cells:
            if self.folder.is_done(cell):
                self.progress.finish(cell.id, self.folder.seconds(cell))
        if self.progress.done:
            self.progress.say(f"{len(self.progress.done)} of {len(self.plan.cells)} cells were done before")
        while any(self._is_open(cell) for cell in self.plan.cells):
            if not self._pass():
                self._wait()
        return self.outcome

    def _is_open(self, cell: Cell) -> bool:
        return cell.id not in self.progress.done and cell.id not in self.outcome.failed

    def _pass(self) -> bool:
        """Go through the open cells once; whether anything happened."""
        happened = False
        for cell in filter(self._is_open, self.plan.cells):
            broken = [need for need in cell.needs if need in self.outcome.failed]
            if broken:
                self.outcome.failed[cell.id] = (f"not run, as it needs files of {broken[0]}", None)
                happened = True
            elif all(need in self.progress.done for need in cell.needs):
                happened |= self._try(cell)
        return happened

    def _try(self, cell: Cell) -> bool:
        """Train a cell unless it is done, or another process has it; whether anything happened."""
        lock = self.folder.claim(cell)
        if lock is None:
            return False
        try:
            if not self.folder.is_done(cell):  # another sweep may have finished it
                self._attempt(cell, lock)
            else:
                self.progress.say(f"{cell.id}: done by another process")
            if self.folder.is_done(cell):
                self.progress.finish(cell.id, self.folder.seconds(cell))
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
        code = None

        def watch() -> bool:
            self.progress.show(last_step(run.metrics))
            return run.done.exists()

        try:
            code = run_script(self.hosts, TRAIN_SCRIPT, words, log, watch, keep_open=(lock,))
            outcome = "done" if run.done.exists() else "failed"
        except BaseException:
            self.folder.end_attempt(cell, number, "done" if run.done.exists() else "interrupted", time.monotonic() - started)
            raise
        seconds = time.monotonic() - started
        self.folder.end_attempt(cell, number, outcome, seconds, code)
        if outcome == "done":
            self.progress.say(f"{cell.id}: {f'resumed at step {step}, ' if step is not None else ''}done in {clock(seconds)}")
        else:
            self._failed(cell, step, code, log)

    def _failed(self, cell: Cell, resumed_from: int | None, code: int | None, log: Path) -> None:
        if resumed_from is not None and self.folder.checkpoint_to_resume(cell) == resumed_from:
            self.folder.set_aside(cell)  # it may be the checkpoint that is damaged
        self.failures[cell.id] += 1
        reason = f"failed {self.failures[cell.id]} time{'s' * (self.failures[cell.id] > 1)}, exit code {code}"
        # A mistake in what was given stays one, however often it is tried.
        if code == UserError.exit_code or self.failures[cell.id] > self.retries:
            self.outcome.failed[cell.id] = (reason, log)
            self.progress.say(f"{cell.id}: {reason}; {log}")
        else:
            self.progress.say(f"{cell.id}: {reason}; it is tried again ({log})")

    def _words(self, cell: Cell, resume: bool) -> list[str]:
        """The command line of a cell; writes its DeepSpeed config."""
        flags, block = cell.resolved(self.folder.path)
        write_json_atomic(self.folder.config(cell), cell.ds_config(block))
        shared = {"high_frequency_file": self.shared["high_frequency_file"]}
        if makes_tokenizer(self.commands[cell.id]):
            shared["tokenizer_name"] = self.shared["tokenizer_name"]
        own = {"deepspeed": str(self.folder.config(cell)), "output_dir": str(self.folder.run(cell).path)}
        return flag_words({"disable_tqdm": True, **flags, **shared, **own, "resume_from_checkpoint": resume or None})

    def _prepare(self) -> None:
        while (lock := self.folder.lock("prepare")) is None:
            self.progress.update("another process prepares the tokenizer and the high-frequency set")
            time.sleep(WAIT_SECONDS)
        try:
            self.shared = prepare(self.commands[self.plan.cells[0].id], self.folder.path)
        finally:
            os.close(lock)

    def _wait(self) -> None:
        """Until one of the cells that others train is free again."""
        names = [cell.id for cell in self.plan.cells if self._is_open(cell)]
        self.progress.update(f"[{len(self.progress.done)}/{len(self.plan.cells)} done] waiting for {len(names)} that another process "
                             f"trains: {', '.join(names[:3])}{', ...' * (len(names) > 3)}")  # fmt: skip
        time.sleep(WAIT_SECONDS)


def check_cells(plan: Plan, folder: SweepFolder) -> dict[str, Command]:
    """Parse every cell's command line as train.py would, so that a mistake costs seconds.

    Raises:
        UserError: names the first cell with a mistake.
    """
    commands: dict[str, Command] = {}
    configs: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch:
        for cell in plan.cells:
            try:
                commands[cell.id] = command = _parse(cell, Path(scratch), folder)
                key = str((command.model.config_name, command.model.config_overrides, command.data.block_size))
                if command.model.config_name is not None and key not in configs:
                    load_config(command)
                    configs.add(key)
            except UserError as error:
                raise UserError(f"{plan.source}: cell {cell.id}: {error}") from None
    check_comparable(list(commands.items()))
    return commands


def _parse(cell: Cell, scratch: Path, folder: SweepFolder) -> Command:
    base = folder.path if all((folder.path / need / "DONE").exists() for need in cell.needs) else scratch / "cells"
    flags, block = cell.resolved(base)
    if base != folder.path:
        _stand_in(flags, base)
        _stand_in(block, base)
    config = scratch / "ds_config.json"
    write_json_atomic(config, cell.ds_config(block))
    words = flag_words({**flags, "deepspeed": str(config), "output_dir": str(scratch / "run")})
    try:
        return parse_command(words)
    except UserError as error:
        raise UserError(str(error).replace(str(config), str(flags["deepspeed"])).replace(f"{base}/", "")) from None


def _stand_in(value: Any, base: Path) -> None:
    """Files of cells that are yet to be trained: something at the place, of the form that checks look for."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _stand_in(item, base)
    elif isinstance(value, str) and value.startswith(f"{base}/"):
        path = Path(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text('{"step": 1, "stability/gain": 0.0}\n', encoding="utf-8")
        else:
            path.mkdir(exist_ok=True)


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Interrupted once; a second one does not disturb the ending of the children."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handle(signum: int, frame: Any) -> None:
        for kind in kinds:
            signal.signal(kind, signal.SIG_IGN)
        raise Interrupted(signum)

    before = {kind: signal.signal(kind, handle) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def evaluate(sweep: Sweep) -> bool:
    """Evaluate all cells that are done with eval/run.py, which itself skips what was evaluated; whether it succeeded."""
    plan, folder = sweep.plan, sweep.folder
    models = [str(folder.run(cell).path) for cell in plan.cells if folder.is_done(cell)]
    output = evaluation_folder(folder.path)
    words = flag_words({
        "model": models, "suite": plan.evaluate["suite"], "seeds": plan.evaluate["seeds"], "output_dir": str(output),
        "reference_file": sweep.shared["high_frequency_file"],
    })  # fmt: skip
    while (lock := folder.lock("evaluate")) is None:
        sweep.progress.update("another process evaluates the cells")
        time.sleep(WAIT_SECONDS)
    try:
        for number in range(1, sweep.retries + 2):
            log = folder.path / "logs" / f"evaluate.attempt-{number}.log"
            sweep.progress.say(f"evaluating {len(models)} cells with the suite {plan.evaluate['suite']}: {log}")
            code = run_script(sweep.hosts, EVAL_SCRIPT, words, log, keep_open=(lock,))
            if code in (0, UserError.exit_code):
                break
        if code != 0:
            print(f"error: the evaluation failed, exit code {code}; {log} ends:\n{tail(log)}", file=sys.stderr)
            return False
        sweep.progress.say(f"\nds-stability report {os.path.relpath(output)}")
        return True
    finally:
        os.close(lock)


def evaluation_folder(path: Path) -> Path:
    """runs/NAME -> evals/NAME beside runs; elsewhere evals/NAME beside NAME."""
    parent = path.parent.parent if path.parent.name == "runs" else path.parent
    return parent / "evals" / path.name


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:])


def run_sweep(plan: Plan, output_dir: str | None, hosts: Hosts, retries: int = 1, with_evaluation: bool = True) -> int:
    """Exit code of the whole sweep: 0, 1 if a cell or the evaluation failed, 128 + signal if it was ended."""
    folder = SweepFolder(output_dir or Path("runs") / plan.name)
    sweep = Sweep(plan, folder, hosts, retries)
    try:
        with signals():
            outcome = sweep.train()
            if outcome.failed:
                print(f"error: {outcome.report()}", file=sys.stderr)
            complete = True
            if with_evaluation and plan.evaluate is not None and sweep.progress.done:
                complete = evaluate(sweep)
    except Interrupted as interrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return interrupt.exit_code
    return 0 if complete and not outcome.failed else 1
