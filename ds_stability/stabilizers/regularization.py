"""Regularization: z-loss, label smoothing, or decay toward the initial weights; coefficient = level^2 * max.

z_loss: c * (log Z)^2 added to each token's objective (PaLM, arXiv 2204.02311, section 5). label_smoothing: (1 - c)
objective + c * mean over the vocabulary of -log p (Szegedy et al. 2016). Both act on the block's `objective`, whatever it
is. init_decay: theta -= lr * c * (theta - theta_0) before the optimizer step, decoupled as in AdamW (arXiv 1711.05101),
pulling as L2-SP (arXiv 1802.01483).
"""

from collections.abc import Callable

import torch

from ds_stability.objectives.token import ClosedForm, closed_form, smoothed
from ds_stability.weighted_loss import Objective, RowObjective, cross_entropy


def z_loss_objective(coefficient: float, base: Objective = cross_entropy) -> Objective:
    """The base objective + coefficient * logsumexp(logits)^2, per token; a `ClosedForm` where the base is one."""
    form = closed_form(base)
    if form is not None:
        return ClosedForm(form.smoothing, form.z + coefficient)

    def objective(logits_CV, labels_C):
        log_partition_C = torch.logsumexp(logits_CV, dim=-1)
        return base(logits_CV, labels_C) + coefficient * log_partition_C.square()

    return objective


def label_smoothing_objective(coefficient: float, base: Objective = cross_entropy) -> Objective:
    """(1 - coefficient) times the base objective + coefficient * uniform cross-entropy, per token; as above."""
    form = closed_form(base)
    if form is not None:
        return ClosedForm(coefficient + (1.0 - coefficient) * form.smoothing, (1.0 - coefficient) * form.z)
    return lambda logits_CV, labels_C: smoothed(base(logits_CV, labels_C), logits_CV, coefficient)


class Regularization:
    """Sets the coming step's objective (z_loss, label_smoothing), or the pull that the hooks apply (init_decay)."""

    def __init__(self, level_at: Callable[[int], float], kind: str, maximum: float):
        self.level_at, self.kind, self.maximum = level_at, kind, maximum
        self.coefficient = 0.0
        self.initial: dict[int, torch.Tensor] = {}  # partition index -> initial fp32 weights, for init_decay

    def prepare(self, step, loss):
        self.coefficient = self.level_at(step) ** 2 * self.maximum
        loss.objective = self.around(loss.base_objective)

    def around(self, base: Objective | RowObjective) -> Objective | RowObjective:
        """`base` with the penalty of the coming step; the very same where there is none."""
        if not self.coefficient or self.kind == "init_decay":
            return base
        if isinstance(base, RowObjective):
            return RowObjective(lambda rows: self.around(base.at(rows)), base.count)
        make = z_loss_objective if self.kind == "z_loss" else label_smoothing_objective
        return make(self.coefficient, base)

    def apply(self, index: int, parameter: torch.Tensor, learning_rate: float) -> None:
        """Pull `parameter` (flat fp32, partition `index`) toward its first value, in place."""
        if self.kind != "init_decay":
            return
        if index not in self.initial:
            self.initial[index] = parameter.detach().clone()
        parameter.data.lerp_(self.initial[index], learning_rate * self.coefficient)

    def update(self, sums):
        """Nothing is learned from a step."""

    def metrics(self):
        return {"stability/regularization_coefficient": self.coefficient}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Stateless but for the initial weights, which `checkpoint.py` keeps."""
