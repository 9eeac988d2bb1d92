"""transformers and TRL trainers: `enable()` before the trainer is built, and nothing else.

`enable` replaces the attribute `deepspeed.initialize`, which Accelerate and TRL look up when they build an engine, and
adds a callback to transformers' defaults that writes metrics.jsonl and TensorBoard into `output_dir`. With
`stability.ema`, `Trainer.evaluate` and `.predict` use the average of the weights. `disable` undoes all of it. Engines without an optimizer (a reference model, an evaluation before training) stay as DeepSpeed made them.

TRL's SFTTrainer computes its loss from a fused head that never builds logits (trl/trainer/sft_trainer.py, 1.16,
`compute_loss`). At level 0 it is left alone, and token statistics are null. Above level 0 (or with `loss_path` "linear" or "chunked")
its loss goes through transformers' `Trainer.compute_loss`: the same sum over token losses with the same divisor; TRL's own
figures (entropy, mean_token_accuracy, num_tokens) are then not computed. So it is in evaluation too: ZeRO-3 prefetches
weights as training used them, and TRL's fused head, which gathers its weight by itself, meets it in flight.
"""

import functools
import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice

import deepspeed
import transformers
from deepspeed import comm as dist
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ds_stability import engine as stability_engine
from ds_stability.config import StabilityConfig, split_config
from ds_stability.console import agree
from ds_stability.deepspeed_config import load_ds_config
from ds_stability.effect import outlook
from ds_stability.errors import StabilityConfigError
from ds_stability.gathered import random_state_kept
from ds_stability.integrations.alarm import alarm_from_file
from ds_stability.integrations.logs import add_tags, has_tensorboard, loggable, say, shorten_printed
from ds_stability.loss_kernel import require_kernel
from ds_stability.objectives.config import UnlikelihoodSequence
from ds_stability.probe import Probe, prompts_from_file
from ds_stability.recorder import Recorder
from ds_stability.run_dir import RunDir

logger = logging.getLogger(__name__)
_undo: list[Callable[[], None]] = []
_training: list[weakref.ref] = []  # the trainer that trains now: callbacks are not told
_recording: weakref.WeakSet = weakref.WeakSet()  # Stability objects with a recorder of ours
_rerouted: set[type] = set()  # trainer classes whose compute_loss is ours


def enable() -> None:
    """Give every engine that a Trainer builds from now on the `stability` block of its DeepSpeed config.

    Calling it twice is the same as calling it once.
    """
    if _undo:
        return
    plain = deepspeed.initialize
    deepspeed.initialize = _initialize
    _undo.append(lambda: setattr(deepspeed, "initialize", plain))
    callbacks = transformers.trainer.DEFAULT_CALLBACKS
    callbacks.append(StabilityCallback)
    _undo.append(lambda: callbacks.remove(StabilityCallback))
    train = transformers.Trainer.train
    transformers.Trainer.train = _remembered(train)
    _undo.append(lambda: setattr(transformers.Trainer, "train", train))
    for name in ("evaluate", "predict"):
        _average(name)


def disable() -> None:
    """Undo `enable`. Engines that were built in between stay as they are."""
    while _undo:
        _undo.pop()()


def _remembered(train: Callable) -> Callable:
    """`Trainer.train` during which the trainer is known to the callback, whose governor measures on its eval_dataset."""

    @functools.wraps(train)
    def wrapped(self, *args, **kwargs):
        _training.append(weakref.ref(self))
        try:
            return train(self, *args, **kwargs)
        finally:
            _training.pop()

    return wrapped


def _average(name: str) -> None:
    """Let `Trainer.evaluate` or `.predict` run with the average of the weights, where the engine keeps one (`stability.ema`)."""
    method = vars(transformers.Trainer)[name]

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        engine = stability_engine.engine_of(self.model)
        with engine.stability.averaged_weights() if engine is not None else nullcontext():
            return method(self, *args, **kwargs)

    setattr(transformers.Trainer, name, wrapped)
    _undo.append(lambda: setattr(transformers.Trainer, name, method))


def _trainer() -> transformers.Trainer | None:
    """The trainer that trains now; None for one whose `train` is its own (TRL's PPOTrainer)."""
    return _training[-1]() if _training else None


def _log(values: dict) -> None:
    """Through the trainer's log, to its loggers."""
    trainer = _trainer()
    if trainer is not None and values:
        trainer.log(loggable(values))


def _held_out(count: int) -> list[dict]:
    """The first `count` rows of the trainer's eval_dataset, each through its data collator; on every rank alike.

    The random state of the training is kept.

    Raises:
        StabilityConfigError: there is none, or its rows or the collator fail.
    """
    trainer = _trainer()
    rows = trainer.eval_dataset if trainer is not None else None
    if isinstance(rows, dict):
        rows = next(iter(rows.values()), None)
    if rows is None:
        raise StabilityConfigError(
            "the governor (stability.controller) measures on held-out text, and the trainer has no eval_dataset; give it one, or "
            "give a number as the target and set stability.controller.probe_interval to 0"
        )
    try:
        with random_state_kept():
            rows, collator = _as_evaluated(trainer, rows)
            return [collator([row]) for row in islice(iter(rows), count)]
    except Exception as error:  # user code raises whatever it likes
        raise StabilityConfigError(
            f"the governor's held-out text: a row of the trainer's eval_dataset fails in the data collator ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); give an eval_dataset that trainer.evaluate() takes"
        ) from error


def _as_evaluated(trainer: transformers.Trainer, rows) -> tuple:
    """(rows, collator) without the columns that the model does not take, as `Trainer._get_dataloader` does it."""
    datasets = sys.modules.get("datasets")  # imported, if the rows are such a data set
    if datasets is not None and isinstance(rows, datasets.Dataset):
        return trainer._remove_unused_columns(rows, description="evaluation"), trainer.data_collator
    return rows, trainer._get_collator_with_removed_columns(trainer.data_collator, description="evaluation")


def _initialize(*args, **kwargs):
    _reroute_sft()  # by now a TRL script has imported its trainer
    return stability_engine.initialize_for_trainer(*args, **kwargs)


def _reroute_sft() -> None:
    """Let trl.SFTTrainer use the model's own loss where a level above 0 has to act on it."""
    module = sys.modules.get("trl.trainer.sft_trainer")
    if module is None or module.SFTTrainer in _rerouted:
        return
    trainer_class, original = module.SFTTrainer, module.SFTTrainer.compute_loss
    trainer_class.compute_loss = _through_the_model(original)
    _rerouted.add(trainer_class)

    def undo() -> None:
        trainer_class.compute_loss = original
        _rerouted.discard(trainer_class)

    _undo.append(undo)


def _through_the_model(original: Callable) -> Callable:
    """`SFTTrainer.compute_loss` that is transformers' own for an engine with our loss, else TRL's."""

    @functools.wraps(original)
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        engine = stability_engine.engine_of(self.model)
        controlled = engine is not None and engine.stability.loss is not None and engine.stability.loss.chunked
        if not controlled:
            return original(self, model, inputs, return_outputs, num_items_in_batch)
        if self.args.loss_type != "nll":
            raise StabilityConfigError(
                f"SFTConfig.loss_type is {self.args.loss_type!r}, a loss of its own, which no stability level above 0 can act "
                "on; use 'nll', or set stability.level to 0"
            )
        if self.aux_loss_enabled:  # the model would add it with another weight than TRL does
            raise StabilityConfigError(
                "SFTTrainer adds its router loss beside the model's loss, which does not work with a stability level above 0; "
                "set SFTConfig.router_aux_loss_coef to 0.0, or use transformers.Trainer"
            )
        inputs["use_cache"] = False
        return transformers.Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    return compute_loss


def _check_loss(args: transformers.TrainingArguments) -> None:
    """Refuse flags that take the loss away from the model; only where our loss is to train.

    Raises:
        StabilityConfigError: on every rank.
    """
    fused = (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
    for flag, given, instead in (
        ("label_smoothing_factor", args.label_smoothing_factor, "the regularization family has kind 'label_smoothing'"),
        ("use_liger_kernel", args.use_liger_kernel and fused, "--liger_kernel_config '{\"fused_linear_cross_entropy\": false}'"),
    ):
        if given:
            raise StabilityConfigError(
                f"--{flag} {given} takes the loss away from the model, where a stability level above 0 acts; leave it out "
                f"({instead}), or set stability.level to 0"
            )


def _check_block(args: transformers.TrainingArguments, config: StabilityConfig) -> None:
    """What is right in a loop of one's own, and cannot work in a Trainer.

    Raises:
        StabilityConfigError: on every rank.
    """
    config.require_starter()
    require_kernel(config)
    if isinstance(config.objective, UnlikelihoodSequence) and not args.average_tokens_across_devices:
        raise StabilityConfigError(
            "--average_tokens_across_devices False is not allowed with stability.objective unlikelihood_sequence, whose generated "
            "tokens are averaged over all ranks; leave it out"
        )


class StabilityCallback(TrainerCallback):
    """Checks what the trainer does with its loss, and records each step of the engine into `output_dir`."""

    def __init__(self):
        self.engine = None
        self.training = self.stopped = False

    @property
    def recorder(self) -> Recorder | None:
        return self.engine.stability.recorder if self.engine is not None else None

    def on_init_end(self, args, state, control, **kwargs):
        """What is wrong in the block or the flags is said before anything is loaded or patched."""
        if args.deepspeed:
            config = split_config(load_ds_config(args.deepspeed))[1]
            _check_block(args, config)
            if config.resolved_loss_path != "stock":
                _check_loss(args)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.engine = engine = stability_engine.engine_of(model)
        if engine is None:
            logger.warning("ds_stability is enabled, but this Trainer runs without DeepSpeed: nothing is controlled")
            return
        self.training, self.stopped = True, False
        engine.stability.config.require_average(state.max_steps)
        _check_block(args, engine.stability.config)  # again: DeepSpeed may be configured through Accelerate, not through the arguments
        if engine.stability.loss is not None and engine.stability.loss.chunked:
            _check_loss(args)
        resumed = state.global_step if state.global_step > 0 else None
        trainer = _trainer()
        if trainer is not None:
            shorten_printed(trainer)
        own_board = trainer is None or not has_tensorboard(trainer)
        # torch.distributed knows who writes; a Trainer that was set up otherwise (Axolotl on CPUs) says yes on every rank.
        recorder = agree(lambda: _open_recorder(args.output_dir, resumed, own_board) if dist.get_rank() == 0 else None)
        if recorder is not None:
            engine.stability.recorder = recorder
            engine.stability.listeners.append(recorder.record)
            _recording.add(engine.stability)
        anew = engine.stability.begun_anew
        say(outlook(engine.stability.config, state.max_steps, engine.stability.applied_steps if anew is not None else 0, anew or ()))

    def on_step_begin(self, args, state, control, processing_class=None, **kwargs):
        stability = self.engine.stability if self.engine is not None else None
        if stability is not None and stability.needs_held_out:
            stability.set_held_out(agree(lambda: _held_out(stability.config.controller.probe_size)))
        if stability is not None and stability.probe is None and stability.config.probe.interval > 0:
            stability.probe = agree(lambda: _make_probe(self.engine, processing_class, args))
            if stability.config.alarm.action != "off":
                stability.alarm = agree(lambda: alarm_from_file(stability.probe))

    def on_step_end(self, args, state, control, **kwargs):
        stability = self.engine.stability if self.engine is not None else None
        if stability is not None and stability.probe is not None and stability.probe.due(state.global_step):
            values = stability.probe.run(state.global_step)  # on every rank
            if stability.alarm is not None and values:
                values |= stability.alarm.check(state.global_step, values)
                if stability.alarm.stop and state.global_step < state.max_steps:
                    self.stopped = control.should_save = control.should_training_stop = True
                    if args.save_strategy == SaveStrategy.BEST:
                        control.should_evaluate = False  # Trainer would take back the wish to save
            stability.restart_clock()
            if self.recorder is not None:
                self.recorder.record(state.global_step, values)
            _log(values)
        first = stability is not None and stability.applied_steps == 1
        if first and not stability.metrics["stability/tokens"] and dist.get_rank() == 0:
            logger.warning(
                "this trainer's loss does not pass through the model's loss function: token statistics are null"
                " (for SFTTrainer, \"loss_path\": \"linear\" in the stability block gives them)"
            )

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # Trainer takes a stop for the end of the epoch, which it is not
            control.should_evaluate = control.should_save = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        """All our tags go to the trainer's loggers, whose callbacks come after this one."""
        if self.engine is not None and "loss" in logs:
            add_tags(logs, self.engine.stability.metrics)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.engine is None or self.engine.stability.loss is None:
            return
        values = self.engine.stability.evaluation_metrics()  # on every rank: a collective
        if not values["eval/tokens"]:
            return
        name = _evaluation_name(metrics)
        values = {key.replace("eval/", f"eval/{name}/", 1) if name else key: value for key, value in values.items()}
        if self.recorder is not None:
            self.recorder.record(state.global_step, values)
            if not self.training:  # after training nothing else closes the line
                self.recorder.flush()
        if self.training:
            _log(values)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        if self.engine is not None and self.engine.stability.loss is not None:
            self.engine.stability.loss.evaluated()  # or the next evaluation would count these passes too

    def on_save(self, args, state, control, **kwargs):
        if self.recorder is not None:
            self.recorder.flush()

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False
        if self.recorder is not None:
            self.recorder.flush()
        if self.engine is not None:
            say(self.engine.stability.summary())


def _make_probe(engine, tokenizer, args: transformers.TrainingArguments) -> Probe:
    """The probe of a script that only calls `enable`: its prompts come from a file, its tokenizer from the trainer."""
    config = engine.stability.config.probe
    if config.prompts_file is None or tokenizer is None:
        missing = "stability.probe.prompts_file is null" if config.prompts_file is None else "the trainer has no processing_class"
        raise StabilityConfigError(
            f"stability.probe.interval is {config.interval}, but {missing}; a probe needs a file of prompts, one a line, and a "
            "tokenizer, or set the interval to 0"
        )
    prompts = prompts_from_file(config.prompts_file, tokenizer, config.num_prompts)
    return Probe(engine, tokenizer, config, engine.stability.high_frequency_ids, RunDir(args.output_dir), prompts, args.seed)


def _open_recorder(output_dir: str, resume_step: int | None, tensorboard: bool) -> Recorder:
    run = RunDir(output_dir).create()
    for stability in [other for other in _recording if other.recorder.path == run.metrics]:  # of an earlier `train` of this script
        _recording.discard(stability)
        stability.recorder.close()
        stability.listeners.remove(stability.recorder.record)
        stability.recorder = None
    if resume_step is None and run.metrics.exists():  # Trainer may train twice into one folder: keep the older lines
        count = len(list(run.path.glob("metrics-*.jsonl")))
        run.metrics.rename(run.path / f"metrics-{count + 1}.jsonl")
    return Recorder(run, tensorboard=tensorboard, resume_step=resume_step)


def _evaluation_name(metrics: dict) -> str:
    """Which data set an evaluation was of: "" for Trainer's only one, else its name (prefix eval_NAME, or one of its own)."""
    suffix = "_samples_per_second"
    prefix = next((key.removesuffix(suffix) for key in metrics if key.endswith(suffix)), "eval")
    return prefix.removeprefix("eval").removeprefix("_")
