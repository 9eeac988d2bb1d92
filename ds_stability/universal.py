"""A checkpoint of one number of ranks, converted so that another number can load it: DeepSpeed's universal checkpoint.

`convert` runs DeepSpeed's converter (deepspeed/checkpoint/ds_to_universal.py) in a process of its own: it forks workers and
holds whole optimizer shards, which a rank with live communicators should not. What it leaves out (our own slices, Trainer's
files) is linked beside its result. An engine whose config says `"checkpoint": {"load_universal": true}` loads that folder.

The files are unpickled: convert only checkpoints that you would load.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ds_stability.checkpoint import RANK_FILES
from ds_stability.errors import StorageError, UserError

OPTIMIZER_FILES = "*zero_pp_rank_*_optim_states.pt"
IMPOSSIBLE_CODE = 2
FULL_DISK = "No space left on device"


def load_universal(ds_config: dict) -> dict:
    """A copy of `ds_config` under which the engine loads universal checkpoints."""
    return {**ds_config, "checkpoint": {**ds_config.get("checkpoint", {}), "load_universal": True}}


def tag_folder(checkpoint: Path) -> Path:
    """The folder of DeepSpeed's files in a Trainer checkpoint.

    Raises:
        UserError: there is none.
    """
    try:
        return checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        raise UserError(f"{checkpoint}: has no file `latest`, so it is no DeepSpeed checkpoint") from None


def partitions_of(checkpoint: Path) -> int | None:
    """Over how many ranks the optimizer states in a checkpoint are cut; None at ZeRO stage 0, which any number can load."""
    return len(list(tag_folder(checkpoint).glob(OPTIMIZER_FILES))) or None


def convert(checkpoint: Path, target: Path) -> Path:
    """Convert a checkpoint-N into the folder `target` and return that; what was there is replaced.

    For one process, which holds the run's lock. The folder has the shape of a checkpoint, so that Trainer can resume from
    it; delete it once it is loaded.

    Raises:
        UserError: another number of ranks is not possible for this checkpoint; one line says why.
        StorageError: the disk is full.
    """
    part = target.with_name(f"{target.name}.part")
    for folder in (target, part):
        if folder.exists():
            shutil.rmtree(folder)
    tag = tag_folder(checkpoint)
    try:
        part.mkdir()
        _run_converter(tag, part / tag.name)
        _link_files(checkpoint, part, "*")
        for pattern in (RANK_FILES, "stability_state.json"):
            _link_files(tag, part / tag.name, pattern)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target


def _run_converter(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "ds_stability.universal_worker", os.fspath(source), os.fspath(target)]
    # In a session of its own: a signal to the ranks' group must not look like a checkpoint that cannot be converted.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", start_new_session=True)
    if done.returncode == 0:
        return
    if done.returncode < 0:
        raise RuntimeError(f"the conversion of {source.parent} was ended by signal {-done.returncode}; start again")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {done.returncode}"
    if FULL_DISK in done.stderr:
        raise StorageError(f"{target.parent}: {FULL_DISK}; converting {source.parent} needs about its size")
    if done.returncode == IMPOSSIBLE_CODE:
        raise UserError(f"{source.parent}: {last}")
    raise UserError(f"{source.parent}: DeepSpeed could not convert it for another number of processes ({last}); resume with as "
                    "many as wrote it")  # fmt: skip


def _link_files(source: Path, target: Path, pattern: str) -> None:
    """Hard links, or copies where the file system has none; files only."""
    for file in source.glob(pattern):
        if not file.is_file():
            continue
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)


def mend_loaded_optimizer(engine, folder: Path) -> None:
    """Put right what DeepSpeed 0.19.8 loads wrong from a universal checkpoint; `folder` is the one of the tag.

    At stage 3 every parameter group gets the first one's settings (weight decay too, which biases and norms must not have),
    and all sub-groups share one step tensor, which Adam then counts up once per sub-group
    (runtime/zero/stage3.py, `load_hp_checkpoint_state_from_checkpoint_dir_stage3`).
    """
    base = engine.optimizer.optimizer
    saved = torch.load(folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False, mmap=True)
    for group, settings in zip(base.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    for parameter, state in base.state.items():
        if torch.is_tensor(state.get("step")):  # its own, and where torch's Adam wants it
            state["step"] = state["step"].clone().to(parameter.device if on_device else "cpu")
