"""transformers and TRL trainers: `enable()` before the trainer is built, and nothing else.

`enable` replaces the attribute `deepspeed.initialize`, which Accelerate looks up when it builds the engine, and adds a
callback to transformers' defaults that writes metrics.jsonl and TensorBoard into `output_dir`. TRL's SFTTrainer computes
its loss from a fused head without the model's loss function (trl/trainer/sft_trainer.py, `compute_loss`); above level 0 it
is sent through transformers' `Trainer.compute_loss`, which is the same objective. `disable` undoes all of it.
"""

import logging
import sys

import deepspeed
import transformers
from transformers import TrainerCallback

from ds_stability import engine as stability_engine
from ds_stability.errors import StabilityConfigError
from ds_stability.recorder import Recorder
from ds_stability.run_dir import RunDir

logger = logging.getLogger(__name__)
_undo: list = []


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


def disable() -> None:
    """Undo `enable`. Engines that were built in between stay as they are."""
    while _undo:
        _undo.pop()()


def _initialize(*args, **kwargs):
    _send_sft_through_the_model()  # by now a TRL script has imported its trainer
    return stability_engine.initialize(*args, **kwargs)


def _send_sft_through_the_model() -> None:
    """Let trl.SFTTrainer use the model's own loss where a level above 0 has to act on it."""
    module = sys.modules.get("trl.trainer.sft_trainer")
    if module is None or isinstance(module.SFTTrainer.__dict__["compute_loss"], _ModelLoss):
        return
    original = module.SFTTrainer.compute_loss
    module.SFTTrainer.compute_loss = _ModelLoss(original)
    _undo.append(lambda: setattr(module.SFTTrainer, "compute_loss", original))


class _ModelLoss:
    """Replacement of `SFTTrainer.compute_loss`: transformers' own while a chunked stability loss is training."""

    def __init__(self, original):
        self.original = original

    def __get__(self, trainer, kind=None):
        return self if trainer is None else lambda *args, **kwargs: self.compute(trainer, *args, **kwargs)

    def compute(self, trainer, model, inputs, return_outputs=False, num_items_in_batch=None):
        engine = stability_engine.engine_of(trainer.model)
        controlled = engine is not None and engine.stability.loss is not None and engine.stability.loss.chunked
        if not controlled or not trainer.model.training:
            return self.original(trainer, model, inputs, return_outputs, num_items_in_batch)
        if trainer.args.loss_type != "nll" or trainer.compute_loss_func is not None:
            raise StabilityConfigError(
                f"SFTConfig.loss_type is {trainer.args.loss_type!r}, whose loss does not pass through the model; "
                "use 'nll' without compute_loss_func, or set stability.level to 0"
            )
        inputs["use_cache"] = False
        return transformers.Trainer.compute_loss(trainer, model, inputs, return_outputs, num_items_in_batch)


class StabilityCallback(TrainerCallback):
    """Checks what the trainer does with its loss, and records each step of the engine into `output_dir`."""

    def __init__(self):
        self.engine = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.engine = engine = stability_engine.engine_of(model)
        if engine is None:
            logger.warning("ds_stability is enabled, but this Trainer runs without DeepSpeed: nothing is controlled")
            return
        self._check_loss(args, engine.stability)
        if state.is_world_process_zero:
            resumed = state.global_step if state.global_step > 0 else None
            recorder = Recorder(RunDir(args.output_dir).create(), tensorboard=True, resume_step=resumed)
            engine.stability.recorder = recorder
            engine.stability.listeners.append(recorder.record)

    @staticmethod
    def _check_loss(args, stability) -> None:
        if stability.loss is None or not stability.loss.chunked:
            return
        for flag, given in (("label_smoothing_factor", args.label_smoothing_factor), ("use_liger_kernel", args.use_liger_kernel)):
            if given:
                raise StabilityConfigError(
                    f"--{flag} {given} takes the loss away from the model, and a stability level above 0 acts there; leave "
                    "it out, or set stability.level to 0 (smoothing: the regularization family has kind 'label_smoothing')"
                )

    @property
    def recorder(self) -> Recorder | None:
        return self.engine.stability.recorder if self.engine is not None else None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show in the progress log that the level is reached."""
        if self.engine is None or "loss" not in logs:
            return
        for key in ("level", "variance_ratio", "entropy"):
            value = self.engine.stability.metrics.get(f"stability/{key}")
            if value is not None:
                logs[key] = round(value, 4)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.engine is None or self.engine.stability.loss is None:
            return
        values = self.engine.stability.evaluation_metrics()  # on every rank: a collective
        if values["eval/tokens"] and self.recorder is not None:
            self.recorder.record(state.global_step, values)
            if not state.global_step < state.max_steps:  # after training nothing else closes the line
                self.recorder.flush()

    def on_save(self, args, state, control, **kwargs):
        if self.recorder is not None:
            self.recorder.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.recorder is not None:
            self.recorder.flush()
