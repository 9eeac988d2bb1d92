"""The run directory's first files, and what happens in it while Trainer trains."""

import dataclasses
import hashlib
import json
import os
import time
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ds_stability import engine_of
from ds_stability.checkpoint_files import remove_remains
from ds_stability.console import agree
from ds_stability.data.fingerprint import corpus_fingerprint
from ds_stability.data.frequency import FILE_NAME, HighFrequencySet, make_high_frequency_set
from ds_stability.data.overlap import MAX_TOKENS, overlapping_share, supervised_ids
from ds_stability.data.packing import PaddedBlocks
from ds_stability.data.tokenizer import tokenizer_hash
from ds_stability.errors import AlarmStoppedError, StoppedError, UserError
from ds_stability.integrations.alarm import Alarm, blocks_of_file
from ds_stability.launchers.arguments import Command, TrainArguments, trainer_ds_config
from ds_stability.launchers.branch import branch_entry, branch_identity, overruled, require_same_order, require_trunk
from ds_stability.launchers.data_order import Batches
from ds_stability.launchers.starting_point import step_of
from ds_stability.launchers.world_size import require_same_batch
from ds_stability.locks import TRAIN_LOCK, try_lock
from ds_stability.preemption import StopSignals
from ds_stability.probe import Probe, prompts_from_blocks, prompts_from_file
from ds_stability.run_dir import RunDir, build_manifest, check_output_dir, set_aside
from ds_stability.same_block import without_absent

PROMPT_TOKENS = 16
VISIBLE_SECONDS = 30.0


def high_frequency(command: Command, tokenizer: Any, config: Any, train_data: Any, facts: dict) -> HighFrequencySet:
    """The set that this run measures with: another run's file if one is given, else counted on the training blocks."""
    vocab_size = config.get_text_config().vocab_size
    statistics = command.stability.statistics
    if statistics.high_frequency_file is not None:
        return HighFrequencySet.load(statistics.high_frequency_file, vocab_size, tokenizer_hash(tokenizer))
    return make_high_frequency_set(train_data, tokenizer, vocab_size, statistics.high_frequency_coverage,
                                   facts["corpus_fingerprint"])  # fmt: skip


def require_same_run(command: Command, run: RunDir, identity: dict[str, Any]) -> None:
    """A checkpoint is only continued by the run that wrote it: same model, data, global batch and stability block; or by a
    branch of it, which needs less."""
    if command.branches:
        require_trunk(command, identity)
    if command.continues:
        check_output_dir(run.path, True, identity)
        require_same_order(command, run)
        require_same_batch(command, run)
    elif command.resume_mode == "auto" and run.manifest.exists():  # a run that died early: start it anew, but no other one's
        check_output_dir(run.path, True, identity)
        if command.trunk is None and "branch" in run.read_manifest():
            trunk = run.read_manifest()["branch"]["checkpoint"]
            raise UserError(f"--output_dir {run.path}: its run is a branch of {trunk} and has no checkpoint yet; give --branch_from {trunk}, or "
                            "a new --output_dir")  # fmt: skip


def start_run(command: Command, run: RunDir, identity: dict[str, Any], facts: dict, frequent: HighFrequencySet,
              args: TrainArguments, batches: Batches) -> None:  # fmt: skip
    """Lock the folder; for a new run write the manifest and high_frequency.json. On rank 0, after all that can be wrong
    was checked."""
    if dist.get_rank() != 0:
        return
    hold_run(run.create(), command.continues or command.resume_mode == "auto")
    remove_remains(run.path)
    if command.continues:
        for line in overruled(command, run):
            print(f"note: {line}", flush=True)
        _leave_behind(command, run)
        return
    if command.resume_mode == "auto":
        earlier = set_aside(run)
        if earlier is not None:
            print(f"note: no whole checkpoint to go on from; what the run had written is in {earlier}", flush=True)
    resolved = {
        "model": dataclasses.asdict(command.model),
        "data": command.spec.to_dict(),
        "training": {k: v for k, v in args.to_sanitized_dict().items() if k != "deepspeed"},
        "deepspeed": trainer_ds_config(command),
        "stability": identity["stability"],
    }
    seeds = {"seed": args.seed, "data_seed": args.data_seed if args.data_seed is not None else args.seed}
    manifest = build_manifest(config=resolved, identity=identity, seeds=seeds, data=facts, world_size=args.world_size, hosts=_hosts())
    run.write_manifest(manifest | (branch_entry(command, batches) if command.branches else {}))
    frequent.save(os.fspath(run.path / FILE_NAME))


def _leave_behind(command: Command, run: RunDir) -> None:
    """Going back to a named checkpoint leaves the later ones behind: they are no newest ones any more."""
    step = step_of(command.resume)
    later = [path for number, path in run.checkpoints() if number > step] if command.resume_mode == "path" else []
    if later:
        print(f"note: {', '.join(path.name for path in later)} moved to {set_aside(run, later)}", flush=True)


def require_visible(run: RunDir) -> None:
    """UserError if this host does not see what rank 0 has written; a network file system gets some time."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not run.manifest.exists():
        if time.monotonic() > deadline:
            raise UserError(f"--output_dir {run.path}: this host does not see what rank 0 wrote; give a folder on a file system "
                            "that all hosts share")
        time.sleep(0.1)


def hold_run(run: RunDir, resume: bool) -> None:
    """Hold the run's lock for the life of this process.

    Raises:
        UserError: another process trains in this folder, or did so since the command line was checked.
    """
    if try_lock(run.path / TRAIN_LOCK) is None:
        raise UserError(f"--output_dir {run.path}: another process is training in this folder; wait for it, or give another "
                        "--output_dir")
    if run.done.exists() or (not resume and run.manifest.exists()):
        raise UserError(f"--output_dir {run.path}: another process has trained in this folder meanwhile; give another "
                        "--output_dir")


def run_identity(command: Command, config: Any, facts: dict) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued."""
    return settings_identity(command, config) | {
        "data": facts["corpus_fingerprint"], "tokenizer": facts["tokenizer_hash"], "packing": command.spec.packing,
        "truncation": command.spec.truncation}  # fmt: skip


def settings_identity(command: Command, config: Any) -> dict[str, Any]:
    """The part of `run_identity` that is known before any data is read."""
    model = command.model
    architecture = json.dumps(config.to_dict(), sort_keys=True, default=str).encode()
    return {
        "model": os.path.abspath(model.model_name_or_path) if os.path.isdir(model.model_name_or_path or "") else
        model.model_name_or_path or f"fresh {config.model_type}",
        "model_config": hashlib.sha256(architecture).hexdigest(),
        "adapter": [model.lora_r, model.lora_alpha, model.lora_target_modules] if model.use_peft else None,
        "block_size": command.data.block_size,
        "seed": command.training["seed"],
        "stability": without_absent(command.stability.to_dict()),
    } | ({"branch": branch_identity(command.trunk)} if command.trunk is not None else {})  # fmt: skip


def early_identity(command: Command, config: Any) -> dict[str, Any]:
    """The part of `run_identity` that costs no tokenizer."""
    settings = {key: value for key, value in settings_identity(command, config).items() if key != "model_config"}
    return settings | {"data": corpus_fingerprint(command.spec)}


def _hosts() -> list[str]:
    return [os.uname().nodename] if int(os.environ.get("CROSS_SIZE", "1")) == 1 else [
        f"{os.uname().nodename} and {int(os.environ['CROSS_SIZE']) - 1} more"
    ]


def governor_sequences(blocks: Any, count: int) -> list[dict[str, Any]]:
    """`count` held-out blocks for the governor, evenly spaced: the first ones may all come from one file."""
    blocks = blocks.blocks if isinstance(blocks, PaddedBlocks) else blocks
    places = np.unique(np.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().astype(int))
    return [blocks[int(place)] for place in places]


def warn_of_overlap(command: Command, train_data: Any, eval_data: Any) -> None:
    """Say on rank 0 when what the governor measures on is trained on as well. A stream is not looked into."""
    if not command.stability.controller.needs_probe or command.data.streaming or dist.get_rank() != 0:
        return
    sequences = governor_sequences(eval_data, command.stability.controller.probe_size)
    share = overlapping_share(sequences, (train_data[index] for index in range(len(train_data))))
    if share > 0:
        print(f"warning: {share:.0%} of the governor's held-out sequences stand in the training data as well; a model is "
              f"calibrated there on what it has memorized: give other text as --validation_file (the first {MAX_TOKENS:,} training tokens were searched)", flush=True)  # fmt: skip


class RunCallback(TrainerCallback):
    """Gives the engine the high-frequency set, what the governor measures on, and the probe, and asks for the last evaluation.

    Args:
        blocks: where prompts are cut from, if the block names no prompts_file.
        evaluate_last: evaluate after the last step, whatever --eval_strategy says.
        signals: the wish to stop; saved and obeyed after the step in which any rank had it.
    """

    def __init__(self, command: Command, run: RunDir, tokenizer: Any, blocks: Any, frequent: HighFrequencySet,
                 evaluate_last: bool, signals: StopSignals):  # fmt: skip
        self.evaluate_last, self.signals, self.stopped = evaluate_last, signals, False
        self.command, self.run, self.tokenizer, self.blocks, self.frequent = command, run, tokenizer, blocks, frequent
        self.evaluated_at: int | None = None  # step of the last held-out evaluation

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        engine = self.engine = engine_of(model)
        engine.stability.stop_wish = lambda: self.signals.received is not None
        # Groups that DeepSpeed makes have torch's default of 30 minutes, whatever the first one was given.
        _set_pg_timeout(timedelta(seconds=args.ddp_timeout), engine.seq_data_parallel_group)
        engine.stability.set_high_frequency(list(self.frequent.token_ids), self.frequent.vocab_size)
        if engine.stability.needs_held_out:
            sequences = agree(lambda: governor_sequences(self.blocks, self.command.stability.controller.probe_size))
            engine.stability.set_held_out(sequences)
        config = self.command.stability.probe
        if config.interval > 0:
            prompts = agree(lambda: self._prompts(config))
            engine.stability.probe = agree(lambda: Probe(engine, self.tokenizer, config, self.frequent.token_ids, self.run,
                                                         prompts, seed=args.seed))  # fmt: skip
            if self.command.stability.alarm.action != "off":
                engine.stability.alarm = agree(lambda: self._alarm(engine.stability.probe))

    def _alarm(self, probe: Probe) -> Alarm:
        path, size = self.command.stability.alarm.reference_file, self.command.data.block_size
        if path is not None:
            return Alarm(probe, blocks_of_file(path, self.tokenizer, size), self._prompt_length())
        return Alarm(probe, (supervised_ids(block).tolist() for block in self.blocks), self._prompt_length())

    def _prompt_length(self) -> int:
        return max(1, min(PROMPT_TOKENS, self.command.data.block_size // 2))

    def _prompts(self, config) -> list[list[int]]:
        if config.prompts_file is not None:
            return prompts_from_file(config.prompts_file, self.tokenizer, config.num_prompts)
        blocks = (block["input_ids"].tolist() for block in self.blocks)
        return prompts_from_blocks(blocks, config.num_prompts, self._prompt_length())

    @property
    def alarmed(self) -> bool:
        """Whether the alarm ends the run."""
        return self.engine.stability.alarm is not None and self.engine.stability.alarm.stop

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate |= self.evaluate_last  # the last step's line holds the final held-out figures
        elif self.engine.stability.stop_requested or self.alarmed:
            self.stopped = control.should_save = control.should_training_stop = True
            if args.save_strategy == SaveStrategy.BEST:
                control.should_evaluate = False  # Trainer would take back the wish to save

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # Trainer takes a stop for the end of the epoch, which it is not
            control.should_evaluate = control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        if self.stopped:
            self.signals.exit_code = (AlarmStoppedError if self.alarmed else StoppedError).exit_code

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated_at = state.global_step


def finish_run(run: RunDir) -> None:
    """DONE, last of all: every rank has closed its files."""
    dist.barrier()
    if dist.get_rank() == 0:
        run.mark_done()
