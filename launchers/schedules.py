"""The schedule of the learning rate, tried before anything expensive, and what it needs of DeepSpeed's optimizer."""

import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from ds_stability import engine_of
from ds_stability.errors import UserError

STEPS = 100  # of the schedule that is tried


class ScheduledTrainer(Trainer):
    """A Trainer whose schedules find the learning rate that they relate theirs to."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        if optimizer is None:  # DeepSpeed's optimizer, which hides the defaults of torch's
            engine = engine_of(self.model)
            engine.optimizer.defaults = engine.basic_optimizer.defaults
        return super().create_scheduler(num_training_steps, optimizer)


def check_schedule(args: TrainingArguments) -> None:
    """Raise UserError if --lr_scheduler_type cannot be built with --lr_scheduler_kwargs."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(STEPS), STEPS, args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise UserError(f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {error}; "
                        "give the arguments that transformers documents for it") from None  # fmt: skip
