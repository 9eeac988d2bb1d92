"""Checkpoints of launchers/train.py: written beside and renamed, checked before they are loaded (checkpoint_files.py)."""

import os
from pathlib import Path

import torch.distributed as dist
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from ds_stability.atomic import sync_directory
from ds_stability.checkpoint_files import (
    SAVING,
    Files,
    describe_files,
    hash_fault,
    read_manifest,
    remove_checkpoint,
    size_fault,
    superfluous,
    write_manifest,
)
from ds_stability.console import agree
from ds_stability.errors import UserError
from ds_stability.launchers.arguments import Command
from ds_stability.run_dir import RunDir


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoint-N is there whole or not at all, and which deletes older ones only then."""

    _staging: Path | None = None

    def _get_output_dir(self, trial):
        return os.fspath(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        run, step = RunDir(self.args.output_dir), self.state.global_step
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer would delete before the new one is safe
        self._staging = run.path / f"{SAVING}{step}"
        try:
            agree(lambda: self._clear_way(run.checkpoint(step)))
            super()._save_checkpoint(model, trial)
        finally:
            folder, self._staging = self._staging / f"checkpoint-{step}", None
            self.args.save_total_limit = limit
        if self.args.should_save:
            self._note_best(run, folder)
        seal(folder, run.checkpoint(step), step)
        if self.args.should_save:
            # A later one is of a life that this run left behind (a damaged checkpoint): it must not push this one out.
            whole = [(number, path) for number, path in run.complete_checkpoints() if number <= step]
            for path in superfluous(whole, limit, self.state.best_model_checkpoint):
                remove_checkpoint(path)

    def _clear_way(self, target: Path) -> None:
        """A run that goes on from before a damaged checkpoint comes by its step again."""
        if self.args.should_save and target.exists():
            remove_checkpoint(target)

    def _note_best(self, run: RunDir, folder: Path) -> None:
        """Trainer looks for the best checkpoint beside the one that it writes, which is not where it will be."""
        if self.state.best_global_step:
            best = run.checkpoint(self.state.best_global_step)
            known = best.exists() or best.name == folder.name
            self.state.best_model_checkpoint = os.fspath(best) if known else None
            self.state.save_to_json(os.fspath(folder / TRAINER_STATE_NAME))


def seal(folder: Path, target: Path, step: int) -> None:
    """Hash `folder`, a share on every rank, write its manifest, and rename it to `target`; a collective."""
    world = dist.get_world_size()
    dist.barrier()  # the files of all ranks are there
    parts: list[Files] = [{}] * world
    dist.all_gather_object(parts, describe_files(folder, (dist.get_rank(), world)))
    if dist.get_rank() == 0:
        write_manifest(folder, {name: entry for part in parts for name, entry in part.items()}, step, world)
        folder.rename(target)
        sync_directory(target.parent)
        folder.parent.rmdir()
    dist.barrier()


def checkpoint_to_load(command: Command) -> str | None:
    """The checkpoint that the command asks for, after reading it whole; a collective.

    With --resume_from_checkpoint true or auto a damaged one is named, and the one before it is taken.

    Raises:
        UserError: the named one is damaged, or none is whole; on every rank.
    """
    if command.resume is None:
        return None
    run = RunDir(command.output_dir)
    named = command.resume_mode == "path"
    given = [Path(command.resume)] if named else [path for _, path in reversed(run.checkpoints())]
    damaged = []
    for folder in given:
        fault = _first_fault(folder)
        if fault is None:
            if damaged and dist.get_rank() == 0:
                print(f"warning: {'; '.join(damaged)}; going on from {folder.name}", flush=True)
            return os.fspath(folder)
        damaged.append(f"{folder.name} is damaged ({fault})")
    advice = "give true, or another checkpoint-N" if named else "no checkpoint is whole; start in a new --output_dir"
    raise UserError(f"--resume_from_checkpoint: {'; '.join(damaged)}; {advice}")


def _first_fault(folder: Path) -> str | None:
    """The first rank's fault, on all ranks. A folder that is torn by sizes is not read."""
    world = dist.get_world_size()
    faults: list[str | None] = [None] * world
    torn = size_fault(folder) if dist.get_rank() == 0 else None
    dist.all_gather_object(faults, torn)
    if faults[0] is not None:
        return faults[0]
    dist.all_gather_object(faults, hash_fault(folder, (dist.get_rank(), world)))
    return next((fault for fault in faults if fault is not None), None)


def world_size_of(folder: str) -> int:
    """How many ranks wrote a whole checkpoint."""
    return read_manifest(Path(folder))["world_size"]
