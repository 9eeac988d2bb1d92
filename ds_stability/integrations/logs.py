"""Our tags in what a Trainer logs: all of them to its loggers (wandb, mlflow, TensorBoard), a few to the terminal."""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial

import transformers
from deepspeed import comm as dist
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


def shorten_printed(trainer: transformers.Trainer) -> None:
    """Let what `trainer` prints have few of our tags; once. What other callbacks get is left alone, whatever their order."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PrinterCallback | ProgressCallback) and "on_log" not in vars(callback):
            callback.on_log = partial(_print_short, callback.on_log)


def _print_short(on_log: Callable, args, state, control, logs: dict, **kwargs):
    return on_log(args, state, control, logs=shortened(logs), **kwargs)


def shortened(logs: Mapping[str, float | int]) -> dict[str, float | int]:
    """`logs` with those of our tags that are in SHOWN, by short names."""
    ours = {key.removeprefix("stability/"): value for key, value in logs.items() if _is_ours(key)}
    return {key: value for key, value in logs.items() if not _is_ours(key)} | {key: ours[key] for key in SHOWN if key in ours}


def _is_ours(key: str) -> bool:
    return key.startswith("stability/") or key in _BARE


def has_tensorboard(trainer: transformers.Trainer) -> bool:
    """Whether `trainer` writes to a TensorBoard folder of its own, in which our tags are then too."""
    return any(isinstance(callback, TensorBoardCallback) for callback in trainer.callback_handler.callbacks)


def say(lines: list[str]) -> None:
    """On rank 0, one line each."""
    if dist.get_rank() == 0:
        for line in lines:
            print(f"ds_stability: {line}", file=sys.stderr, flush=True)
