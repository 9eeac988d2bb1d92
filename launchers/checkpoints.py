"""Checkpoints of launchers/train.py: written beside and renamed, checked before they are loaded (checkpoint_files.py)."""

import os
import shutil
from pathlib import Path

import torch.distributed as dist
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from ds_stability.atomic import sync_directory
from ds_stability.checkpoint_files import (
    SAVING,
    Files,
    adopt_finished,
    describe_files,
    hash_fault,
    list_files,
    remove_checkpoint,
    size_fault,
    superfluous,
    write_manifest,
)
from ds_stability.console import agree
from ds_stability.errors import UserError
from ds_stability.launchers.arguments import Command
from ds_stability.locks import TRAIN_LOCK, try_lock
from ds_stability.run_dir import RunDir


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoint-N is there whole or not at all, and which deletes older ones only then."""

    _staging: Path | None = None
    _sealed: int | None = None  # the step that this process saved last
    _limit: int | None = None

    def train(self, *args, **kwargs):
        # Trainer deletes before the new one is safe, and at the end all but the best.
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.save_total_limit = self._limit

    def _get_output_dir(self, trial):
        return os.fspath(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        run, step = RunDir(self.args.output_dir), self.state.global_step
        if self._sealed == step:
            return  # asked for twice: by the stop signal and by the end of the epoch
        self._staging = run.path / f"{SAVING}{step}"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            folder, self._staging = self._staging / f"checkpoint-{step}", None
        self._note_best(run, folder)
        seal(folder, run.checkpoint(step), step)
        self._sealed = step
        if dist.get_rank() == 0:
            self._rotate(run, step)

    def _rotate(self, run: RunDir, step: int) -> None:
        # A later one is of a life that this run left behind (a damaged checkpoint): it must not push this one out.
        whole = [(number, path) for number, path in run.complete_checkpoints() if number <= step]
        if not whole or whole[-1][0] != step:
            return
        for path in superfluous(whole, self._limit, self.state.best_model_checkpoint):
            try:
                remove_checkpoint(path)
            except OSError as error:  # the new one is safe, and the next save tries again
                print(f"warning: {path}: could not be deleted ({error.strerror})", flush=True)

    def _note_best(self, run: RunDir, folder: Path) -> None:
        """Trainer looks for the best checkpoint beside the one that it writes, which is not where it will be."""
        if not self.state.best_global_step:
            return
        best = run.checkpoint(self.state.best_global_step)
        known = best.exists() or best.name == folder.name
        self.state.best_model_checkpoint = os.fspath(best) if known else None
        if dist.get_rank() == 0:
            self.state.save_to_json(os.fspath(folder / TRAINER_STATE_NAME))


def seal(folder: Path, target: Path, step: int) -> None:
    """Hash `folder`, a share on every rank, write its manifest, and rename it to `target`; a collective.

    Raises:
        StorageError, UserError: a file cannot be read, or the ranks do not see the same folder; on every rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # the files of all ranks are there
    listings: list[list[str]] = [[]] * world
    dist.all_gather_object(listings, agree(lambda: list_files(folder)))
    # The union: a network file system may not show every host all files yet.
    names = sorted({name for listing in listings for name in listing})
    parts: list[Files] = [{}] * world
    dist.all_gather_object(parts, agree(lambda: describe_files(folder, names[rank::world])))
    files = {name: entry for part in parts for name, entry in part.items()}
    agree(lambda: _publish(folder, target, files, step) if rank == 0 else None)


def _publish(folder: Path, target: Path, files: Files, step: int) -> None:
    write_manifest(folder, files, step, dist.get_world_size())
    fault = size_fault(folder)
    if fault is not None:
        raise UserError(f"{folder}: {fault} on this host; --output_dir must lie on a file system that all hosts share")
    if target.exists():  # a run that goes on from before it comes by its step again
        remove_checkpoint(target, lambda: folder.rename(target))
    else:
        folder.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(folder.parent, ignore_errors=True)


def checkpoint_to_load(command: Command) -> str | None:
    """The checkpoint that the command asks for, after reading it whole; a collective. Rank 0's view of the folder counts.

    With --resume_from_checkpoint true or auto a damaged one is named, and the one before it is taken.

    Raises:
        UserError: the named one is damaged, or none is whole; on every rank.
    """
    if command.resume_mode in ("true", "auto"):
        agree(lambda: _finish_saving(RunDir(command.output_dir)))
    found = RunDir(command.output_dir).checkpoints() if command.resume_mode in ("true", "auto") else []
    named = not found
    candidates = [[command.resume or command.trunk] if named else [os.fspath(path) for _, path in reversed(found)]]
    dist.broadcast_object_list(candidates, src=0)
    if candidates[0] == [None]:
        return None
    damaged = []
    for folder in map(Path, candidates[0]):
        fault = _first_fault(folder)
        if fault is None:
            if damaged and dist.get_rank() == 0:
                print(f"warning: {'; '.join(damaged)}; going on from {folder.name}", flush=True)
            return os.fspath(folder)
        damaged.append(f"{folder.name} is damaged ({fault})")
    advice = "give another checkpoint-N" if named else "no checkpoint is whole; start in a new --output_dir"
    error = UserError(f"--{'branch_from' if command.branches else 'resume_from_checkpoint'}: {'; '.join(damaged)}; {advice}")
    error.everywhere = True
    raise error


def _finish_saving(run: RunDir) -> None:
    """Rank 0: a checkpoint that was whole when its run was killed gets its name, unless another process trains there."""
    if dist.get_rank() != 0 or not run.path.is_dir():
        return
    lock = try_lock(run.path / TRAIN_LOCK)
    if lock is not None:
        adopt_finished(run.path)
        os.close(lock)


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
