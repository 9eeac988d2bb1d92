"""Feedback: token weights that hold the variance ratio of surprisal at 1 - level (design section 3)."""

import math

from ds_stability.config_controller import LARGEST_GAIN
from ds_stability.controller import FeedbackController
from ds_stability.errors import StabilityConfigError
from ds_stability.safe_read import MAX_JSON_BYTES, parse_json, read_text


class Feedback:
    """Hands the controller's setting to the loss. Level 0 throughout (observation) keeps the gain at 0.

    `permute` is a control experiment: the loss gets the same weights in random order.
    """

    def __init__(self, controller: FeedbackController, permute: bool = False):
        self.controller, self.permute = controller, permute

    def prepare(self, step, loss):
        loss.setting = self.controller.setting
        loss.permutation_step = step if self.permute else None

    def update(self, sums):
        self.controller.update(sums)

    def settle(self):
        self.controller.settle()

    def metrics(self):
        state, setting = self.controller.state, self.controller.setting
        return {
            "stability/level": self.controller.level,
            "stability/target_ratio": 1.0 - self.controller.level,
            "stability/windowed_variance_ratio": self.controller.windowed_ratio,
            "stability/gain": setting.gain,
            "stability/mu": setting.mu if state.tokens > 0 else None,
            "stability/sigma": setting.sigma if state.tokens > 0 else None,
            "stability/mean_weight": setting.mean_weight,
            "stability/trim": state.trim,
            "stability/saturated": int(state.saturated),
        }

    def state_dict(self):
        return self.controller.state_dict()

    def load_state_dict(self, state):
        self.controller.load_state_dict(state)


def read_gains(path: str) -> tuple[float, ...]:
    """The gain in force at each applied step of another run, from its metrics.jsonl (`stabilizers.feedback.replay`).

    Raises:
        StabilityConfigError: there is no such file, or it holds no gain.
    """
    key = f"stability.stabilizers.feedback.replay {path}"
    try:
        lines = [parse_json(line) for line in read_text(path, MAX_JSON_BYTES).split("\n") if line.strip()]
        gains = tuple(float(line["stability/gain"]) for line in lines if "stability/gain" in line and not line.get("skipped"))
    except OSError as error:
        raise StabilityConfigError(f"{key}: {error.strerror or error}; give the metrics.jsonl of a finished run") from None
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise StabilityConfigError(f"{key}: is no metrics.jsonl (one JSON object a line); give that of a finished run") from None
    if any(gain > LARGEST_GAIN for gain in gains):
        raise StabilityConfigError(f"{key}: holds a gain of {max(gains):g}; {LARGEST_GAIN:g} is the largest whose weights stay finite")
    if not gains or not all(math.isfinite(gain) and gain >= 0 for gain in gains):
        raise StabilityConfigError(f"{key}: holds no gains; give the metrics.jsonl of a run with feedback")
    return gains
