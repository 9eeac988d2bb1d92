"""Train a causal language model under DeepSpeed at a controlled stabilization level.

    deepspeed --num_gpus 2 launchers/train.py --model_name_or_path PATH --train_file a.txt \
        --deepspeed ds_configs/zero3_bf16.json --stability_level 0.5 --output_dir runs/a --max_steps 200

Flags are those of transformers.TrainingArguments, the model and data flags of launchers/arguments.py, and
--stability_level. `--config recipe.yaml` gives defaults for any flag. The level lives in the "stability" block of the
DeepSpeed config; the flag replaces it. --stability_target initial holds the model's diversity instead
(docs/governor.md). On a machine without GPUs set DS_ACCELERATOR=cpu.

Writes OUTPUT_DIR/{manifest.json, metrics.jsonl, tensorboard/, samples/, checkpoint-N/, high_frequency.json, description/, final/, DONE}.
Success is the file DONE. Exit codes: 0 done, 2 a mistake in what was given (one line says which), 3 too many steps in a
row had numbers that were not finite, 4 stopped by the alarm with a checkpoint saved, 70 the export failed, 69 another rank or host was lost,
74 the file system failed, 75 stopped by SIGTERM or SIGUSR1 with a checkpoint saved. After the last three, start again with
--resume_from_checkpoint auto.
"""

import dataclasses
import os
import sys
from datetime import timedelta

from ds_stability.console import agree, global_rank, quiet_libraries, run_script

quiet_libraries()

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import default_data_collator, set_seed  # noqa: E402

from ds_stability import engine_of  # noqa: E402
from ds_stability.data import load_blocks  # noqa: E402
from ds_stability.data.packing import IGNORE, pad_to_multiple  # noqa: E402
from ds_stability.errors import AlarmStoppedError, StoppedError, UserError  # noqa: E402
from ds_stability.export import check_exportable  # noqa: E402
from ds_stability.failures import cluster_failures, gather_hosts  # noqa: E402
from ds_stability.integrations.logs import loggable  # noqa: E402
from ds_stability.integrations.transformers import enable  # noqa: E402
from ds_stability.launch_environment import complete_environment  # noqa: E402
from ds_stability.launchers.arguments import Command, TrainArguments, parse_command, trainer_ds_config  # noqa: E402
from ds_stability.launchers.branch import BranchingTrainer, global_batches, require_trunk  # noqa: E402
from ds_stability.launchers.checkpoints import WholeCheckpoints, checkpoint_to_load  # noqa: E402
from ds_stability.launchers.data_order import OrderedTrainer, check_order, in_order  # noqa: E402
from ds_stability.launchers.final_model import export_final, prepare_final  # noqa: E402
from ds_stability.launchers.packing import flatten, needs_flattening, say_packing, say_stream, settle_packing  # noqa: E402
from ds_stability.launchers.schedules import ScheduledTrainer, check_schedule  # noqa: E402
from ds_stability.launchers.setup_model import build_model, check_pretrained, load_config, load_tokenizer  # noqa: E402
from ds_stability.launchers.setup_run import (  # noqa: E402
    RunCallback,
    early_identity,
    finish_run,
    high_frequency,
    require_same_run,
    require_visible,
    run_identity,
    settings_identity,
    start_run,
    warn_of_overlap,
)
from ds_stability.launchers.world_size import LoadedOnce, check_flags, convert_checkpoint, world_has_changed  # noqa: E402
from ds_stability.loss_kernel import require_kernel  # noqa: E402
from ds_stability.precision_support import require_precision  # noqa: E402
from ds_stability.preemption import StopSignals  # noqa: E402
from ds_stability.run_dir import RunDir, check_output_dir  # noqa: E402
from ds_stability.shared_memory import forget_buffers  # noqa: E402
from ds_stability.siblings import look_around  # noqa: E402
from ds_stability.universal import load_universal  # noqa: E402


class StabilityTrainer(BranchingTrainer, ScheduledTrainer, OrderedTrainer, WholeCheckpoints):
    """Trainer whose evaluation loss is exact over tokens, and which makes sure that the run is as distributed as asked."""

    checked = False
    flat = False  # whether a batch is given to the model as one row

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.checked:
            self.checked = True
            require_distributed(model, inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**(flatten(inputs) if self.flat else inputs), "use_cache": False}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, *args, **kwargs):
        """As Trainer's, but the loss is the mean over all supervised tokens, not over batches of unequal size."""
        output = super().evaluation_loop(*args, **kwargs)
        stability = engine_of(self.model).stability
        values = stability.evaluation_metrics()
        output.metrics.update(loggable(values), eval_loss=values["eval/cross_entropy"])  # a named tuple: not assigned
        if stability.recorder is not None:
            stability.recorder.record(self.state.global_step, values)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(model, inputs, True, ignore_keys)  # logits would be gathered over ranks


def require_distributed(model, inputs: dict[str, torch.Tensor]) -> None:
    """The engine is DeepSpeed's, spans all processes, and no two ranks got the same first batch.

    Raises:
        UserError: on every rank. A Trainer on CPUs can fall back to one process per rank without a word.
    """
    world = dist.get_world_size()
    if not isinstance(model, deepspeed.DeepSpeedEngine) or model.world_size != int(os.environ.get("WORLD_SIZE", world)):
        raise UserError(
            f"the engine is a {type(model).__name__} for {dist.get_world_size()} of {os.environ.get('WORLD_SIZE')} "
            "processes, not a DeepSpeedEngine for all; launch with `deepspeed`, on CPUs with DS_ACCELERATOR=cpu"
        )
    batches = [None] * world
    trains = bool((inputs["labels"] != IGNORE).any())  # what fills an epoch's last step is the same on several ranks
    dist.all_gather_object(batches, inputs["input_ids"].cpu().numpy().tobytes() if trains else None)
    batches = [batch for batch in batches if batch is not None]
    if len(set(batches)) < len(batches):
        raise UserError(f"{len(batches)} ranks read only {len(set(batches))} different first batches; the data is not sharded over "
                        "ranks, or repeats itself: check --train_file and how the script is launched")  # fmt: skip


def training_arguments(command: Command) -> TrainArguments:
    """TrainingArguments of a checked command; needs the process group (Accelerate falls back to one process else)."""
    on_cpu = deepspeed.get_accelerator().device_name() == "cpu"
    values = {**command.training, "deepspeed": trainer_ds_config(command), "use_cpu": on_cpu,
              "resume_from_checkpoint": command.resume}  # fmt: skip
    try:
        args = TrainArguments(**values)
        if args.hf_deepspeed_config.mismatches:
            raise UserError(f"{command.training['deepspeed']} and the flags disagree: "
                            f"{'; '.join(' '.join(text.split()) for text in args.hf_deepspeed_config.mismatches)}; write \"auto\" in the "
                            "config, or give the flag the same value")  # fmt: skip
        return args
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # transformers' own checks of the flags, made one line
        raise UserError(" ".join(str(error).split())) from None


def load_data(command: Command, tokenizer, args: TrainArguments, positions: bool):
    """(training blocks, evaluation blocks, facts). One process of a host reads first, so that the others find its cache."""
    outcome: list = []
    with args.main_process_first(local=True, desc="tokenization"):
        try:
            outcome.append(load_blocks(command.spec, tokenizer, command.data.block_size, args.world_size,
                                       command.data.data_cache_dir, positions))  # fmt: skip
        except UserError as error:
            outcome.append(error)

    def result():
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]

    return agree(result)


def finish(trainer: StabilityTrainer, callback: RunCallback, run: RunDir, tokenizer, keeps_cache: bool) -> None:
    """Export, DONE."""
    if callback.evaluate_last and callback.evaluated_at != trainer.state.global_step:
        trainer.evaluate()  # a run that was resumed after its last step
    export_final(trainer, run, tokenizer, callback.frequent, keeps_cache)
    engine = engine_of(trainer.model)
    if engine.stability.recorder is not None:
        engine.stability.recorder.close()
    finish_run(run)


def main(argv: list[str]) -> None:
    complete_environment()
    command = parse_command(argv)
    require_kernel(command.stability)  # not in `parse_command`: a sweep is planned on a machine that may have neither package nor GPU
    require_precision(command.ds_config | {name: {"enabled": command.training[name]} for name in ("bf16", "fp16")})  # "auto" filled in
    run = RunDir(command.output_dir)
    if command.resume and run.done.exists() and command.resume_mode != "auto":
        raise UserError(f"--output_dir {run.path}: this run is complete (DONE); nothing is left to resume")
    config = load_config(command)  # before any process group: a wrong name or size costs seconds
    if run.done.exists() and command.resume_mode == "auto":
        check_output_dir(run.path, True, settings_identity(command, config))
        if global_rank() == 0:
            print(f"{run.path}: this run is complete (DONE)", flush=True)
        return
    check_pretrained(command, config)
    signals = StopSignals().install()
    again = "start again with --resume_from_checkpoint auto"
    with cluster_failures(["this host"], 0, again):  # nobody knows yet who the others are
        hosts = join(command)
    with cluster_failures(hosts, dist.get_rank(), again):
        train(command, run, config, signals)


def join(command: Command) -> list[str]:
    """Start the process group; the host of every rank."""
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() != "cpu":  # or the first collective of every rank runs on device 0
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(timeout=timedelta(seconds=command.training["ddp_timeout"]))
    hosts = gather_hosts()
    forget_buffers()
    look_around()
    return hosts


def raise_if_stopped(trainer, callback: RunCallback, run: RunDir, signals: StopSignals) -> None:
    """Raises StoppedError or AlarmStoppedError where the run ended before its last step."""
    if callback.stopped and callback.alarmed:
        alarm = engine_of(trainer.model).stability.alarm
        raise AlarmStoppedError(f"by the alarm at {alarm.reason}; step {trainer.state.global_step} is saved in "
                                f"{run.checkpoint(trainer.state.global_step)}")  # fmt: skip
    if callback.stopped:
        raise StoppedError(f"by {signals.received or 'a signal to another rank'} after step {trainer.state.global_step}, which is "
                           f"saved in {run.checkpoint(trainer.state.global_step)}; --resume_from_checkpoint auto goes on from it")


def settle(command: Command, config):
    """(command, what the model does with borders of documents, training arguments, whether the number of processes has changed).

    What is decided and checked within the process group before any data is read.
    """
    command, borders = settle_packing(command, config)
    command = dataclasses.replace(command, resume=checkpoint_to_load(command))
    changed = world_has_changed(command)
    if changed:
        command = dataclasses.replace(command, ds_config=load_universal(command.ds_config))
    args = training_arguments(command)
    check_order(args, command.data.streaming)
    check_schedule(args)
    if changed and not command.branches:
        check_flags(args)
    if command.branches:
        agree(lambda: require_trunk(command, early_identity(command, config)))
    return command, borders, args, changed


def train(command: Command, run: RunDir, config, signals: StopSignals) -> None:
    """The run, within the process group: data, model, training, export.

    Raises:
        StoppedError: a signal or the alarm stopped it; a checkpoint of the last step is saved.
    """
    keeps_cache = config.get_text_config().use_cache
    command, borders, args, changed = settle(command, config)
    set_seed(args.seed)
    tokenizer, config = agree(lambda: load_tokenizer(command, config))
    train_data, eval_data, facts = load_data(command, tokenizer, args, borders.positions)
    say_packing(command, borders, facts)
    frequent = agree(lambda: high_frequency(command, tokenizer, config, train_data, facts))
    identity = run_identity(command, config, facts)
    agree(lambda: require_same_run(command, run, identity))
    batches = agree(lambda: global_batches(command, args, train_data))
    model = agree(lambda: build_model(command, config, tokenizer, args))
    check_exportable(model)
    enable()
    agree(lambda: warn_of_overlap(command, train_data, eval_data))
    if eval_data is not None:
        eval_data = pad_to_multiple(eval_data, args.world_size * args.per_device_eval_batch_size)
    callback = RunCallback(command, run, tokenizer, train_data if eval_data is None else eval_data, frequent,
                           evaluate_last=eval_data is not None, signals=signals)  # fmt: skip
    trainer = StabilityTrainer(model=model, args=args, train_dataset=in_order(train_data, batches), batches=batches,
                               eval_dataset=eval_data, data_collator=default_data_collator, callbacks=[callback])  # fmt: skip
    trainer.flat = command.spec.packing == "pack" and needs_flattening(model)
    trainer.trunk = command.trunk if command.branches else None
    agree(lambda: start_run(command, run, identity, facts, frequent, args, batches))
    agree(lambda: require_visible(run))
    agree(lambda: prepare_final(run, model, tokenizer, frequent, keeps_cache))
    checkpoint = command.resume
    if changed:
        checkpoint = os.fspath(convert_checkpoint(command))
        trainer.add_callback(LoadedOnce(checkpoint))
    trainer.train(resume_from_checkpoint=checkpoint)
    if command.data.streaming:
        say_stream(train_data)
    raise_if_stopped(trainer, callback, run, signals)
    finish(trainer, callback, run, tokenizer, keeps_cache)


if __name__ == "__main__":
    sys.exit(run_script(main))
