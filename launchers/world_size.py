"""Going on with another number of processes than wrote the checkpoint: what must agree, and the converted checkpoint."""

import os
import shutil
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback

from ds_stability import engine_of
from ds_stability.checkpoint_files import UNIVERSAL
from ds_stability.console import agree
from ds_stability.errors import UserError
from ds_stability.launchers.arguments import Command, TrainArguments
from ds_stability.launchers.starting_point import step_of
from ds_stability.run_dir import RunDir, utc_now
from ds_stability.universal import convert, partitions_of


def world_has_changed(command: Command) -> bool:
    """Whether the checkpoint to continue from is cut for another number of processes than this run has; a collective."""
    if command.resume is None:
        return False
    parts = [agree(lambda: partitions_of(Path(command.resume)) if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(parts, src=0)
    return parts[0] not in (None, dist.get_world_size())


def require_same_batch(command: Command, run: RunDir) -> None:
    """Another number of processes is allowed if an optimizer step takes as many blocks as before.

    Raises:
        UserError: it takes more or fewer; one line that says which flag to change.
    """
    manifest, now = run.read_manifest(), dist.get_world_size()
    try:
        flags, ranks = manifest["config"]["training"], manifest["world_size"]
        before = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"] * ranks
    except (KeyError, TypeError):
        raise UserError(f"{run.manifest}: does not say which batch the run was trained with") from None
    size, steps = command.training["per_device_train_batch_size"], command.training["gradient_accumulation_steps"]
    if size * steps * now == before:
        return
    given = f"--per_device_train_batch_size {size} x --gradient_accumulation_steps {steps} x {now} processes"
    raise UserError(f"--output_dir {run.path}: its run takes {before} blocks a step, this command {size * steps * now} ({given}); "
                    f"{_advice(before, size, steps, now)}")  # fmt: skip


def _advice(before: int, size: int, steps: int, ranks: int) -> str:
    if before % (size * ranks) == 0:
        return f"give --gradient_accumulation_steps {before // (size * ranks)}"
    if before % ranks == 0:
        per_rank = before // ranks
        best = max(divisor for divisor in range(1, min(size, per_rank) + 1) if per_rank % divisor == 0)
        return f"give --per_device_train_batch_size {best} --gradient_accumulation_steps {per_rank // best}"
    return f"start with a number of processes that divides {before}"


def check_flags(args: TrainArguments) -> None:
    """Raise UserError for what another number of processes does not work with."""
    if args.load_best_model_at_end:
        raise UserError("--load_best_model_at_end true: the best checkpoint may be one of the earlier number of processes, which "
                        "cannot be loaded at the end; leave it out, or resume with as many processes as wrote the checkpoint")


def convert_checkpoint(command: Command) -> Path:
    """The converted checkpoint that Trainer is to resume from; a collective. Rank 0 holds the run's lock by now.

    Raises:
        UserError: it cannot be converted, or a host does not see it.
    """
    paths = [agree(lambda: _convert(command) if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(paths, src=0)
    agree(lambda: _require_visible(paths[0]))
    return paths[0]


def _convert(command: Command) -> Path:
    checkpoint, run, ranks = Path(command.resume), RunDir(command.output_dir), dist.get_world_size()
    print(f"note: {checkpoint.name} was written by {partitions_of(checkpoint)} processes and is converted for {ranks}", flush=True)
    step = step_of(checkpoint)
    folder = convert(checkpoint, run.path / f"{UNIVERSAL}{step}")
    if command.branches:  # whose manifest has its number of processes
        return folder
    manifest = run.read_manifest()
    change = {"after_step": step, "world_size": ranks, "at": utc_now()}
    run.write_manifest({**manifest, "world_size_changes": [*manifest.get("world_size_changes", []), change]})
    return folder


def _require_visible(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: not seen on this host; --output_dir must lie on a file system that all hosts share")


class LoadedOnce(TrainerCallback):
    """Deletes the converted checkpoint as soon as every rank has read it, and makes later loads plain ones again."""

    def __init__(self, folder: str):
        self.folder = folder

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        engine_of(model)._config.load_universal_checkpoint = False

    def on_step_end(self, args, state, control, **kwargs):
        self._remove(state)  # by now every rank has begun a step, so has read its random state too

    def on_train_end(self, args, state, control, **kwargs):
        dist.barrier()
        self._remove(state)

    def _remove(self, state) -> None:
        if dist.get_rank() == 0 and os.path.isdir(self.folder):
            shutil.rmtree(self.folder)
