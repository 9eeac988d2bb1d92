"""A branch: a run with a folder of its own that goes on from a checkpoint of another run, its trunk.

Weights, optimizer state, step count, random state and position in the data are the trunk's; of the stability state what
fits the branch's block (ds_stability/takeover.py). Flags and the DeepSpeed JSON are the branch's own: schedules are those of a run that
had them from step 0. What the state depends on must be the trunk's: model, adapter, tokenizer, data and their order, block size,
seed, optimizer, precision, ZeRO stage. The trunk's folder is read, and nothing is written there.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedSchedulerWrapper
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from ds_stability import engine_of
from ds_stability.checkpoint_files import MANIFEST
from ds_stability.data.fingerprint import corpus_fingerprint
from ds_stability.data.loading import split_share
from ds_stability.data.spec import DataSpec
from ds_stability.errors import UserError
from ds_stability.launchers.arguments import Command, TrainArguments
from ds_stability.launchers.data_order import Batches
from ds_stability.launchers.starting_point import step_of
from ds_stability.run_dir import RunDir, difference

STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
IN_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
HELD_OUT = ("validation_files", "dataset_validation_split", "validation_split_percentage")
_AGREEING = {
    "zero_optimization": ("stage", "sub_group_size"), "optimizer": ("type",), "scheduler": ("type",),
}  # fmt: skip


class BranchingTrainer(Trainer):
    """A Trainer that can start as a branch: what the flags say of the optimizer and the schedule holds, not what is in the checkpoint.

    Attributes:
        trunk: the trunk's checkpoint if training starts from that, else None.
    """

    trunk: str | None = None

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.trunk is not None:  # the engine is there, and the checkpoint is not loaded yet
            engine_of(self.model).stability.branching = True
            self._given = [{key: value for key, value in group.items() if key not in ("params", "lr")}
                           for group in self.optimizer.param_groups]  # fmt: skip
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        if self.trunk is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        engine_of(self.model).stability.branching = False
        for group, given in zip(self.optimizer.param_groups, self._given, strict=True):
            group.update(given)
        if isinstance(self.lr_scheduler, LambdaLR):
            steps = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)["last_epoch"]
            go_on_at(self.lr_scheduler, self.optimizer.param_groups, steps)
        elif isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):  # DeepSpeed has loaded its step
            self.lr_scheduler.scheduler.step(self.lr_scheduler.scheduler.last_batch_iteration)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if dist.get_rank() == 0:
            print(announcement(self.trunk, engine_of(self.model).stability.begun_anew), flush=True)

    def _init_training_state(self, max_steps, *args):
        places = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # Trainer keeps the checkpoint's --save_steps, whatever is given now
        if self.trunk is not None:  # the best of the branch: the trunk's may be deleted, and was measured under other settings
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        return places


def go_on_at(scheduler: LambdaLR, groups: list[dict], steps: int) -> None:
    """Set `scheduler`, as it was made, and the learning rates of `groups` to what they are after `steps` steps."""
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    rates = [base * scale(steps) for base, scale in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def announcement(trunk: str, begun_anew: list[str] | None) -> str:
    anew = f"; what begins there: {'; '.join(begun_anew)}" if begun_anew else ", and so does all of the stability state"
    return f"branch of {trunk}: weights, optimizer, steps and data go on{anew}"


# ---- what must agree ------------------------------------------------------------------------------------------------------


def require_trunk(command: Command, identity: Mapping[str, Any]) -> None:
    """Refuse a branch whose trunk's state would not mean the same in it.

    Args:
        identity: as far as it is known (setup_run.py); the stability block in it is free.

    Raises:
        UserError: names the first setting that differs, with both values.
    """
    manifest = trunk_of(command).read_manifest()
    free = ("stability", "branch")
    recorded = {key: value for key, value in _mapping(manifest.get("identity")).items() if key in identity and key not in free}
    asked = {key: value for key, value in identity.items() if key not in free}
    config = _mapping(manifest.get("config"))
    asked["data"] = _training_data(command.spec, _mapping(config.get("data")), identity["data"])
    before, now = _settings(_mapping(config.get("training")), _mapping(config.get("deepspeed"))), _settings(
        command.training, command.ds_config)
    order = data_order(manifest)
    found = difference(recorded | before | order, asked | now | order_of(command, order))
    if found is not None:
        raise UserError(f"--branch_from {command.trunk}: {found}; a branch goes on with the trunk's, or starts from its weights "
                        "(--model_name_or_path RUN/final)")  # fmt: skip


def _training_data(spec: DataSpec, before: Mapping[str, Any], fingerprint: str) -> str:
    """The command's fingerprint as it is with the trunk's held-out text: that is free, unless it is a share of the training text."""
    held_out = {key: before[key] for key in HELD_OUT if key in before}
    trunk = dataclasses.replace(spec, **{key: tuple(value) if isinstance(value, list) else value for key, value in held_out.items()})
    same = trunk == spec or split_share(trunk) != split_share(spec) or not all(map(os.path.isfile, trunk.validation_files))
    return fingerprint if same else corpus_fingerprint(trunk)


def trunk_of(command: Command) -> RunDir:
    return RunDir(Path(os.path.realpath(command.trunk)).parent)


def _settings(training: Mapping[str, Any], ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a DeepSpeed checkpoint can only be loaded under."""
    found = {name: bool(training.get(name)) for name in ("bf16", "fp16")}
    found["optim"] = _text(training.get("optim"))
    schedule = _text(training.get("lr_scheduler_type"))
    found["lr_scheduler_type"] = schedule if schedule in STATEFUL_SCHEDULES else "a function of the step"
    for section, keys in _AGREEING.items():
        given = _mapping(ds_config.get(section))
        found |= {f"{section}.{key}": given.get(key) for key in keys}
    return found


def data_order(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the order of the blocks depends on, besides the data and the global batch, as far as a manifest says."""
    config = _mapping(manifest.get("config"))
    known = {**_mapping(config.get("data")), **_mapping(config.get("training")), **_mapping(manifest.get("seeds"))}
    return {key: known[key] for key in ("max_train_samples", "shuffle_buffer", "train_sampling_strategy", "data_seed") if key in known}


def order_of(command: Command, keys: Collection[str]) -> dict[str, Any]:
    """As `data_order`, of a command."""
    training, spec = command.training, command.spec
    seed = training["seed"] if training["data_seed"] is None else training["data_seed"]
    order = {"max_train_samples": spec.max_train_samples, "shuffle_buffer": spec.shuffle_buffer, "data_seed": seed,
             "train_sampling_strategy": _text(training["train_sampling_strategy"])}  # fmt: skip
    return {key: order[key] for key in keys}


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def require_same_order(command: Command, run: RunDir) -> None:
    """Refuse a resume that would go on in other blocks."""
    order = data_order(run.read_manifest())
    found = difference(order, order_of(command, order))
    if found is not None:
        raise UserError(f"--output_dir {run.path}: {found}; give the same, or a new --output_dir")


def overruled(command: Command, run: RunDir) -> list[str]:
    """What a resumed run is given and does not take, as the optimizer in the checkpoint has it otherwise: a line for each."""
    before = _mapping(_mapping(run.read_manifest().get("config")).get("training"))
    return [f"--{flag} {command.training[flag]} has no effect: the run's is {before[flag]}, and goes on; a branch takes another one"
            for flag in IN_THE_OPTIMIZER if flag in before and before[flag] != command.training[flag]]  # fmt: skip


# ---- global batches ---------------------------------------------------------------------------------------------------------


def batches_of(run: RunDir) -> Batches:
    """The global batches that a run has had so far, by its manifest.

    Raises:
        UserError: the manifest does not say.
    """
    manifest = run.read_manifest()
    try:
        if "batches" in manifest:
            return [(int(first), int(batch)) for first, batch in manifest["batches"]]
        flags = manifest["config"]["training"]
        return [(0, flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"] * manifest["world_size"])]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{run.manifest}: does not say which batch the run was trained with") from None


def global_batches(command: Command, args: TrainArguments, blocks: Dataset) -> Batches:
    """Those of the run that is about to train on `blocks`.

    Raises:
        UserError: a branch with another batch than its trunk's, whose length is given in epochs, or that has ended.
    """
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if command.resume is None:
        return [(0, batch)]
    if not command.branches:
        return batches_of(RunDir(command.output_dir))
    step = step_of(command.trunk)
    before = [(first, size) for first, size in batches_of(trunk_of(command)) if first < step]
    if before[-1][1] == batch:
        steps = math.ceil(args.num_train_epochs * -(-len(blocks) // batch)) if args.max_steps <= 0 else args.max_steps
        if steps <= step:
            raise UserError(f"--num_train_epochs {args.num_train_epochs:g} makes {steps} steps, and the branch goes on from step {step} of its "
                            "trunk; give more")  # fmt: skip
        return before
    if args.max_steps <= 0:
        raise UserError(f"--branch_from {command.trunk}: a step of the trunk takes {before[-1][1]} blocks, one of this command {batch}, so "
                        "that epochs do not say where it ends; give --max_steps")  # fmt: skip
    return [*before, (step, batch)]


# ---- the manifest -------------------------------------------------------------------------------------------------------------


def branch_identity(trunk: str) -> dict[str, Any]:
    """Which state a branch goes on from; part of its identity."""
    return {"checkpoint": os.path.realpath(trunk), "step": step_of(trunk)}


def branch_entry(command: Command, batches: Batches) -> dict[str, Any]:
    """What the manifest of a branch says of its trunk; `fingerprint` is that of the hashes of all the checkpoint's files."""
    run = trunk_of(command)
    manifest = run.read_manifest()
    hashes = (Path(command.trunk) / MANIFEST).read_bytes()
    entry = {"run": os.path.realpath(run.path), **branch_identity(command.trunk), "fingerprint": hashlib.sha256(hashes).hexdigest(),
             "identity": manifest.get("identity"), "started_at": manifest.get("started_at")}  # fmt: skip
    return {"branch": entry} | ({"batches": [list(pair) for pair in batches]} if len(batches) > 1 else {})
