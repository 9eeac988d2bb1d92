"""Clipping: an adaptive threshold on the global gradient norm, from the norms of earlier applied steps.

In the spirit of ZClip (arXiv 2504.02507). The threshold is mu + k sigma of the *raw* log norm, so that clipping does not
feed on its own output. DeepSpeed clips with it, by the norm that every step has anyway: it costs no pass of its own.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ds_stability.statistics import StepSums

MAX_LOG_THRESHOLD = 80.0  # below the largest fp32 number, 88.7
#: What the loss of a step may be multiplied by: its gradient is scaled back where the weights are on average above that.
MAX_REALIZED_WEIGHT = 2.0


def threshold_deviations(level: float) -> float:
    """k(L) = 4 (1 - L) / L - 4 L: infinite at 0, 0 near L = .62, -4 at 1 (design section 3)."""
    return math.inf if level <= 0.0 else 4.0 * (1.0 - level) / level - 4.0 * level


def bounded_threshold(threshold: float | None, realized: float | None, sums: StepSums) -> tuple[float | None, float]:
    """(norm to clip this step at or None, by how much its weights exceed `MAX_REALIZED_WEIGHT`; 1 where they do not).

    Weights that the last steps did not foretell (the model, or the gain, moved by more than they spread) would scale the whole
    step. Clipping takes that back: it needs no pass over the gradients and is the same on every rank.

    Args:
        threshold: of the adaptive clipping, or None. realized: `realized_weight` of the step, or None.
    """
    overweight = max(1.0, (realized or 0.0) / MAX_REALIZED_WEIGHT)
    if overweight == 1.0:
        return threshold, overweight
    bound = math.sqrt(sums["grad_sq"]) / overweight
    return bound if threshold is None else min(threshold, bound), overweight


def clip_metrics(norm: float, *bounds: float | None) -> dict[str, float]:
    """What clipping does to a gradient of `norm`; a bound of 0 or None is none."""
    bound = min((bound for bound in bounds if bound), default=math.inf)
    return {"stability/grad_norm_clipped": min(norm, bound), "stability/clipped": int(norm > bound)}


@dataclass
class ClippingState:
    steps: int = 0
    mean: float = 0.0  # EMA of log norm, bias not yet divided out
    square: float = 0.0  # EMA of squared log norm


class Clipping:
    """Threshold of the coming step.

    Args:
        level_at: level in [0, 1] by applied step.
        warmup_steps: norms to observe before the first threshold.
        ema_decay: decay per applied step of the moments of the log norm.

    The effective clip is the smaller of `threshold` and DeepSpeed's own `gradient_clipping`.
    """

    def __init__(self, level_at: Callable[[int], float], warmup_steps: int, ema_decay: float):
        self.level_at, self.warmup_steps, self.ema_decay = level_at, warmup_steps, ema_decay
        self.state = ClippingState()
        self.level, self.threshold = 0.0, None

    def prepare(self, step, loss):
        self.level, self.threshold = self.level_at(step), None
        k = threshold_deviations(self.level)
        if math.isinf(k) or self.state.steps < max(self.warmup_steps, 2):
            return
        correction = 1.0 - self.ema_decay**self.state.steps
        mean = self.state.mean / correction
        deviation = math.sqrt(max(self.state.square / correction - mean**2, 0.0))
        exponent = mean + k * deviation
        # k grows without bound as the level nears 0: a threshold that no norm can reach is none.
        self.threshold = math.exp(exponent) if exponent < MAX_LOG_THRESHOLD else None

    def update(self, sums):
        if not sums.finite:
            raise ValueError("non-finite sums must not reach the controller")
        if sums["grad_sq"] > 0.0:
            log_norm, keep = 0.5 * math.log(sums["grad_sq"]), self.ema_decay
            self.state.steps += 1
            self.state.mean = keep * self.state.mean + (1 - keep) * log_norm
            self.state.square = keep * self.state.square + (1 - keep) * log_norm**2

    def metrics(self):
        return {"stability/clipping_level": self.level, "stability/clip_threshold": self.threshold}

    def state_dict(self):
        return asdict(self.state)

    def load_state_dict(self, state):
        self.state = ClippingState(**state)
