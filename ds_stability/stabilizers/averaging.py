"""Averaging: the optimizer steps along the running mean of the gradient instead of the gradient itself.

m = b m + (1 - b) g with b = beta_max * level, and g' = m / W, where W is the weight that m has gathered (W = 1 - b^t for a
constant b, Adam's bias correction, arXiv 1412.6980). It acts on the reduced, clipped, fp32 gradient partition, in a step
pre-hook of the base optimizer, and keeps one fp32 copy of that partition and nothing else of its size, on the device where the
optimizer has it: the CPU with `offload_optimizer`.
"""

from collections.abc import Callable

import torch

from ds_stability.norms import pieces, squares, total


class Averaging:
    """Running mean of the gradient, one flat fp32 tensor per optimizer partition."""

    def __init__(self, level_at: Callable[[int], float], beta_max: float):
        self.level_at, self.beta_max = level_at, beta_max
        self.beta, self.weight = 0.0, 0.0
        self.means: dict[int, torch.Tensor] = {}  # partition index -> mean, as the hooks fill it
        self.squared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # partition index -> that mean, its squared norm

    def prepare(self, step, loss):
        self.beta = self.beta_max * self.level_at(step)

    @property
    def coming_weight(self) -> float:
        return self.beta * self.weight + (1.0 - self.beta)

    def apply(self, index: int, grad: torch.Tensor) -> None:
        """Replace `grad` (flat fp32, partition `index`) by the bias-corrected mean, in place."""
        mean = self.means.get(index)
        if mean is None:
            mean = self.means[index] = torch.zeros_like(grad)
        found = []
        for mean_P, grad_P in pieces(mean, grad):  # one pass over memory: a piece stays in the cache
            if self.beta > 0.0:
                torch.div(mean_P.lerp_(grad_P, 1.0 - self.beta), self.coming_weight, out=grad_P)
            else:
                mean_P.copy_(grad_P)
            found += squares(mean_P)
        self.squared[index] = (mean, total(found))

    def squared_mean(self, index: int) -> torch.Tensor:
        """|running mean|^2 of a partition, fp64 scalar on its device: known since `apply`, unless the mean has been loaded."""
        mean = self.means[index]
        known = self.squared.get(index)
        if known is None or known[0] is not mean:
            self.squared[index] = (mean, total(scalar for (mean_P,) in pieces(mean) for scalar in squares(mean_P)))
        return self.squared[index][1]

    def update(self, sums):
        self.weight = self.coming_weight

    def metrics(self):
        return {"stability/averaging_beta": self.beta}

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]
