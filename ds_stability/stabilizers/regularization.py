"""Regularization: z-loss, label smoothing, or decay toward the initial weights; coefficient = level^2 * max.

z_loss: c * (log Z)^2 added to each token's loss (PaLM, arXiv 2204.02311, section 5). label_smoothing: (1 - c) CE + c * mean
over the vocabulary of -log p (Szegedy et al. 2016; torch.nn.functional.cross_entropy). init_decay: theta -= lr * c *
(theta - theta_0) before the optimizer step, decoupled as in AdamW (arXiv 1711.05101), pulling as L2-SP (arXiv 1802.01483).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ds_stability.loss import Objective, cross_entropy


def z_loss_objective(coefficient: float) -> Objective:
    """CE + coefficient * logsumexp(logits)^2, per token."""

    def objective(logits_CV, labels_C):
        log_partition_C = torch.logsumexp(logits_CV, dim=-1)
        return cross_entropy(logits_CV, labels_C) + coefficient * log_partition_C.square()

    return objective


def label_smoothing_objective(coefficient: float) -> Objective:
    """(1 - coefficient) CE + coefficient * uniform cross-entropy, per token."""

    def objective(logits_CV, labels_C):
        return F.cross_entropy(logits_CV, labels_C, reduction="none", label_smoothing=coefficient)

    return objective


class Regularization:
    """Sets the coming step's objective (z_loss, label_smoothing), or the pull that the hooks apply (init_decay)."""

    def __init__(self, level_at: Callable[[int], float], kind: str, maximum: float):
        self.level_at, self.kind, self.maximum = level_at, kind, maximum
        self.coefficient = 0.0
        self.initial: dict[int, torch.Tensor] = {}  # partition index -> initial fp32 weights, for init_decay

    def prepare(self, step, loss):
        self.coefficient = self.level_at(step) ** 2 * self.maximum
        if self.coefficient and self.kind == "z_loss":
            loss.objective = z_loss_objective(self.coefficient)
        elif self.coefficient and self.kind == "label_smoothing":
            loss.objective = label_smoothing_objective(self.coefficient)
        else:
            loss.objective = cross_entropy

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
