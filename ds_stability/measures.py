"""How stable the training itself is, measured apart from the law that changes it (design section 3).

Deviation of the plain cross-entropy and of the log gradient norm over the last steps, spikes, and the gradient noise
scale. Python floats only, updated once per applied step from global values: the same on every rank.
"""

import math
from dataclasses import asdict, dataclass, field

from ds_stability.statistics import StepSums, noise_scale_terms

WINDOW = 50  # applied steps
MIN_WINDOW = 10  # fewer values give no deviation and no spike
SPIKE_DEVIATIONS = 5.0
NOISE_SCALE_DECAY = 0.95


@dataclass
class Window:
    """The last WINDOW values of a series, and how many of all values were spikes (above mean + 5 sd of the window)."""

    values: list[float] = field(default_factory=list)
    spikes: int = 0

    def push(self, value: float) -> None:
        mean, deviation = self.mean_deviation()
        if deviation is not None and value > mean + SPIKE_DEVIATIONS * deviation:
            self.spikes += 1
        self.values = [*self.values, value][-WINDOW:]

    def mean_deviation(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation (n - 1) of the window, or (None, None) with fewer than MIN_WINDOW values."""
        count = len(self.values)
        if count < MIN_WINDOW:
            return None, None
        mean = math.fsum(self.values) / count
        return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (count - 1))


@dataclass
class StabilityMeasures:
    loss: Window = field(default_factory=Window)  # plain cross-entropy, nats
    log_grad_norm: Window = field(default_factory=Window)
    noise_trace: float = 0.0
    noise_gradient_sq: float = 0.0

    def update(self, sums: StepSums) -> None:
        """Take in one applied step, whose sums are finite."""
        if not sums.finite:
            raise ValueError("non-finite sums must not reach the measures")
        if sums["tokens"] > 0:
            self.loss.push(sums["surprisal"] / sums["tokens"])
        if sums["grad_sq"] > 0:
            self.log_grad_norm.push(0.5 * math.log(sums["grad_sq"]))
        terms = noise_scale_terms(sums)
        if terms is not None:
            keep, tokens = NOISE_SCALE_DECAY, sums["tokens"]  # a step counts by its tokens, which their ratio forgets
            self.noise_trace = keep * self.noise_trace + tokens * terms[0]
            self.noise_gradient_sq = keep * self.noise_gradient_sq + tokens * terms[1]

    @property
    def noise_scale(self) -> float | None:
        """tr(Sigma) / |G|^2 in tokens, from separate averages of both terms; None while |G|^2 is not positive."""
        return self.noise_trace / self.noise_gradient_sq if self.noise_gradient_sq > 0 else None

    def metrics(self) -> dict[str, float | None]:
        return {
            "stability/loss_deviation": self.loss.mean_deviation()[1],
            "stability/log_grad_norm_deviation": self.log_grad_norm.mean_deviation()[1],
            "stability/loss_spikes": self.loss.spikes,
            "stability/grad_norm_spikes": self.log_grad_norm.spikes,
            "stability/gradient_noise_scale": self.noise_scale,
        }

    def state_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict) -> "StabilityMeasures":
        return cls(**{**state, "loss": Window(**state["loss"]), "log_grad_norm": Window(**state["log_grad_norm"])})
