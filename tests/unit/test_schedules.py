"""Every schedule of transformers is built on DeepSpeed's optimizer, or refused in one line before anything is loaded."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from ds_stability.errors import UserError
from ds_stability.launchers import schedules
from ds_stability.launchers.schedules import ScheduledTrainer, check_schedule

NEEDED = {"cosine_with_min_lr": {"min_lr": 1e-5}, "cosine_warmup_with_min_lr": {"min_lr": 1e-5}, "warmup_stable_decay": {"num_decay_steps": 2}}


class Wrapped(torch.optim.Optimizer):
    """As DeepSpeed's optimizers: parameter groups, but no defaults."""

    def __init__(self, inner):
        self.inner, self.param_groups = inner, inner.param_groups


def arguments(tmp_path, kind, **options):
    needs_loss = {"eval_strategy": "steps", "eval_steps": 1} if kind in ("reduce_lr_on_plateau", "greedy") else {}
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, lr_scheduler_type=kind, **needs_loss, **options)


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_of_transformers(tmp_path, monkeypatch, kind):
    args = arguments(tmp_path, kind, lr_scheduler_kwargs=NEEDED.get(kind, {}))
    check_schedule(args)
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    wrapped = Wrapped(inner)
    monkeypatch.setattr(schedules, "engine_of", lambda model: SimpleNamespace(optimizer=wrapped, basic_optimizer=inner))
    trainer = object.__new__(ScheduledTrainer)
    trainer.args, trainer.model, trainer.optimizer, trainer.lr_scheduler = args, None, wrapped, None
    assert trainer.create_scheduler(10) is trainer.lr_scheduler and wrapped.defaults["lr"] == args.learning_rate


@pytest.mark.parametrize("kind, options", [("cosine", {"min_lr": 1e-5}), ("cosine_with_min_lr", {}), ("linear", {"power": 2})])
def test_wrong_arguments_are_one_line(tmp_path, kind, options):
    with pytest.raises(UserError, match=f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs"):
        check_schedule(arguments(tmp_path, kind, lr_scheduler_kwargs=options))
