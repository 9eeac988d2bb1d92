"""Our tags in what a Trainer logs: all of them to its loggers (wandb, mlflow, TensorBoard), a few to the terminal."""

import math
import sys
from collections.abc import Mapping

import transformers
from deepspeed import comm as dist
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

#: Keys (without "stability/") that are printed beside the loss.
SHOWN = ("level", "variance_ratio", "governor_statistic", "governor_target", "entropy")
#: Trainer has these itself, as means over its logging steps.
TRAINERS = ("loss", "grad_norm", "learning_rate")
_BARE = ("cross_entropy", "tokens_per_second", "step_seconds", "skipped")


def loggable(values: Mapping[str, float | int | None]) -> dict[str, float | int]:
    """What a logger takes: the numbers, under Trainer's names (eval_x for what is our eval/x)."""
    return {f"eval_{key[5:]}" if key.startswith("eval/") else key: value
            for key, value in values.items() if value is not None and math.isfinite(value)}  # fmt: skip


def add_tags(logs: dict, metrics: Mapping[str, float | int | None]) -> None:
    """Our metrics of the last step, beside what Trainer logs of its own."""
    for key, value in loggable(metrics).items():
        if key not in TRAINERS:
            logs.setdefault(key, value)


class ShortLogs(TrainerCallback):
    """Stands before the callback that prints: of forty tags it leaves the few in SHOWN."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in [key for key in logs if key.startswith("stability/") or key in _BARE]:
            value, short = logs.pop(key), key.removeprefix("stability/")
            if short in SHOWN:
                logs[short] = round(value, 4)


def shorten_printed(trainer: transformers.Trainer) -> None:
    """Let `trainer` print few tags; once."""
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, ShortLogs) for callback in callbacks):
        return
    printers = [place for place, callback in enumerate(callbacks) if isinstance(callback, PrinterCallback | ProgressCallback)]
    callbacks.insert(printers[0] if printers else len(callbacks), ShortLogs())


def has_tensorboard(trainer: transformers.Trainer) -> bool:
    """Whether `trainer` writes to a TensorBoard folder of its own, in which our tags are then too."""
    return any(isinstance(callback, TensorBoardCallback) for callback in trainer.callback_handler.callbacks)


def say(lines: list[str]) -> None:
    """On rank 0, one line each."""
    if dist.get_rank() == 0:
        for line in lines:
            print(f"ds_stability: {line}", file=sys.stderr, flush=True)
