"""What one pass of the linear loss is given and what it gives: settings, logit transform, per-token results.

Shape suffixes: N tokens of a micro-batch, C tokens of a chunk, V vocabulary, K statistics.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ds_stability.controller import Setting
from ds_stability.weighted_loss import Objective, cross_entropy

#: Rows of `Tokens.values_KN`.
FIELDS = ("surprisal", "entropy", "top1_mass", "log_partition", "high_frequency_mass", "weight", "objective")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does between its head and its loss: softcap * tanh(scale * z / softcap), or scale * z without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """In place; `logits_CV` in fp32 or better."""
        factor = self.scale / (self.softcap or 1.0)
        if factor != 1.0:
            logits_CV.mul_(factor)
        return logits_CV.tanh_().mul_(self.softcap) if self.softcap else logits_CV

    def slope(self, logits_CV: torch.Tensor) -> torch.Tensor | float:
        """d transformed / d raw, at the transformed logits."""
        if not self.softcap:
            return self.scale
        return (logits_CV / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass
class LossSpec:
    """What one pass computes.

    Attributes:
        setting: gain, mu, sigma and mean weight of the step; weight_i = exp(-gain z_i) / mean_weight multiplies token i.
        objective: per-token objective; anything but a `ClosedForm` is differentiated by autograd, a chunk at a time.
        entropy_coefficient: adds coefficient * entropy_i (nats) to the objective, weighted alike; its gradient is exact.
        kernel: "torch", or "triton" for closed forms in fp32, bf16 and fp16 (`triton_pass.py`); the rest is torch's all the same.
        permute: (weight_N, mask_N) -> weight_N replaces the weights once all are known (a control experiment); costs a pass
            over the head without gradients before the pass proper.
    """

    setting: Setting = field(default_factory=Setting)
    objective: Objective = cross_entropy
    entropy_coefficient: float = 0.0
    transform: LogitTransform = field(default_factory=LogitTransform)
    high_frequency_V: torch.Tensor | None = None
    chunk_size: int | None = None
    permute: Callable | None = None
    kernel: str = "torch"


@dataclass
class Tokens:
    """Per-token results of a pass, fp32 (fp64 for an fp64 head), rows as FIELDS; where `mask_N` is False without meaning."""

    values_KN: torch.Tensor
    mask_N: torch.Tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values_KN[FIELDS.index(name)]
