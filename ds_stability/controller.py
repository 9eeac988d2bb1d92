"""The feedback controller: from the global sums of a step to the gain of the next one.

A plain state machine on Python floats, without torch: the same sums give the same state on every rank, so nothing is
broadcast. The law is design section 3: a feed-forward solve on the smoothed surprisal histogram finds the gain whose
variance ratio is 1 - level, and a small PI term trims what the solve gets wrong.
"""

import math
from dataclasses import asdict, dataclass, field

import numpy as np

from ds_stability import histogram as hist
from ds_stability.config_controller import WINDOW_TOKENS
from ds_stability.statistics import StepSums

HISTOGRAM_DECAY = 0.75  # smooths the histogram over about 4 steps


@dataclass
class Setting:
    """What the loss of the next step uses: fixed before the step, equal on all ranks."""

    gain: float = 0.0
    mu: float = 0.0  # nats
    sigma: float = 1.0  # nats
    mean_weight: float = 1.0
    entropy_bonus: float = 0.0  # b: the objective of a token becomes objective - b H; below 0 it is a penalty


def remembered(decay: float, tokens: float) -> float:
    """What a step of `tokens` leaves of the sums before it: `decay`, or more where that would forget too many tokens."""
    return max(decay, 1.0 - tokens / WINDOW_TOKENS)


@dataclass
class SurprisalState:
    """Sums over the tokens of past steps, decaying: what token weights are standardized and normalized with.

    Every token counts the same, whatever step it came in; sums are divided by their own count, so nothing is biased to 0.
    """

    tokens: float = 0.0
    surprisal: float = 0.0  # nats
    surprisal_sq: float = 0.0  # nats^2
    histogram: list[float] = field(default_factory=lambda: [0.0] * (3 * hist.NUM_BINS))

    def observe(self, sums: StepSums, decay: float) -> None:
        """Take in an applied step with supervised tokens; `decay` is that of the moments."""
        count = sums["tokens"]
        keep = remembered(decay, count)
        self.tokens = keep * self.tokens + count
        self.surprisal = keep * self.surprisal + sums["surprisal"]
        self.surprisal_sq = keep * self.surprisal_sq + sums["surprisal_sq"]
        keep = remembered(HISTOGRAM_DECAY, count)
        self.histogram = (keep * np.array(self.histogram) + sums.bins.ravel()).tolist()

    def standardization(self) -> tuple[float, float, np.ndarray, np.ndarray]:
        """(mu, sigma, points [P], masses [P]), in nats; at least one step must have been observed."""
        mu = self.surprisal / self.tokens
        sigma = math.sqrt(max(self.surprisal_sq / self.tokens - mu**2, 1e-12))
        return mu, sigma, *hist.quadrature(np.array(self.histogram).reshape(hist.NUM_BINS, 3))


@dataclass
class ControllerState(SurprisalState):
    """Everything that a resumed run needs; JSON-ready."""

    applied_steps: int = 0
    measured: list[float] = field(default_factory=lambda: [0.0] * 7)  # sums of the trim's window, see `_measure`
    integral: float = 0.0
    trim: float = 0.0
    saturated: bool = False
    setting: Setting = field(default_factory=Setting)


class FeedbackController:
    """Holds Var_w(s) / Var(s) at 1 - level.

    Args:
        level_at: requested level in [0, 1] by applied step, counted from 0.
        warmup_steps: applied steps with gain 0, in which the moments settle.
        ramp_steps: applied steps over which the gain is then faded in.
        gain_max: upper bound of the gain; level 1 ends there.
        trim_kp, trim_ki, trim_max: PI term on the ratio's error and the bound of its output, in units of gain.
        ema_decay: decay per applied step of the surprisal moments.
        gains: the gain of each applied step, used instead of a solved one (open loop); the last one is held after the end.
    """

    def __init__(self, level_at, warmup_steps, ramp_steps=5, gain_max=8.0, trim_kp=0.1, trim_ki=0.02, trim_max=0.5,
                 ema_decay=0.9, gains=None):  # fmt: skip
        self.gains = gains
        self.level_at = level_at
        self.warmup_steps, self.ramp_steps, self.gain_max = warmup_steps, ramp_steps, gain_max
        self.trim_kp, self.trim_ki, self.trim_max = trim_kp, trim_ki, trim_max
        self.ema_decay = ema_decay
        self.state = ControllerState()

    @property
    def setting(self) -> Setting:
        return self.state.setting

    @property
    def level(self) -> float:
        """Level asked for in the step that is being run."""
        return self.level_at(self.state.applied_steps)

    def update(self, sums: StepSums) -> None:
        """Advance by one applied step, whose finite global sums are `sums`. A skipped step must not call this."""
        if not sums.finite:
            raise ValueError("non-finite sums must not reach the controller")
        state = self.state
        target, ramp = 1.0 - self.level, self._ramp(state.applied_steps)
        if sums["tokens"] > 0:
            state.observe(sums, self.ema_decay)
            if ramp >= 1.0:
                self._measure(sums, target)
                if self.gains is None:
                    self._update_trim(target, min(1.0, sums["tokens"] / WINDOW_TOKENS))
        state.applied_steps += 1
        if state.tokens > 0:
            self._choose_setting()

    def _ramp(self, step: int) -> float:
        """Share of the gain in force at applied step `step`: 0 in warm-up, 1 after the ramp."""
        return min(max((step - self.warmup_steps + 1) / self.ramp_steps, 0.0), 1.0) if self.ramp_steps else float(
            step >= self.warmup_steps
        )

    def _measure(self, sums: StepSums, target: float) -> None:
        """Add a step to the sums that the trim's error comes from: the last `WINDOW_TOKENS` tokens, or more in one step."""
        state, count, scale = self.state, sums["tokens"], self.setting.mean_weight  # weights of different gains are added up
        weighted = [sums[name] / scale for name in ("weight", "weighted_surprisal", "weighted_surprisal_sq")]
        fresh = [count, sums["surprisal"], sums["surprisal_sq"], *weighted, count * target]
        keep = remembered(0.0, count)
        state.measured = [keep * old + new for old, new in zip(state.measured, fresh, strict=True)]

    @property
    def windowed_ratio(self) -> float | None:
        """Var_w / Var over the last tokens. Of one small step the ratio comes out too high: its variance lacks the tail."""
        n, s, ss, w, ws, wss, _ = self.state.measured
        variance = ss / n - (s / n) ** 2 if n > 0 else 0.0
        return max(wss / w - (ws / w) ** 2, 0.0) / variance if variance > 0.0 and w > 0.0 else None

    def _update_trim(self, target: float, share: float) -> None:
        """PI on the ratio's error. Positive error: too much variance is left, the gain has to grow.

        `share`: of a window in this step; the integral moves by so much of its step.
        """
        state, ratio = self.state, self.windowed_ratio
        if ratio is None or target >= 1.0 or state.saturated:
            state.trim = 0.0 if target >= 1.0 else state.trim
            return
        error = ratio - state.measured[-1] / state.measured[0]  # the target, too, is that of the window
        at_upper = state.setting.gain >= self.gain_max or state.trim >= self.trim_max
        at_lower = state.setting.gain <= 0.0 or state.trim <= -self.trim_max
        if not (at_upper and error > 0) and not (at_lower and error < 0):
            state.integral = _clip(state.integral + self.trim_ki * share * error, self.trim_max)
        state.trim = _clip(self.trim_kp * error + state.integral, self.trim_max)

    def settle(self) -> None:
        """Choose the setting of the coming step from a state that was loaded and had another block."""
        if self.state.tokens > 0:
            self._choose_setting()

    def _choose_setting(self) -> None:
        """Solve for the gain of the coming step, and predict the mean weight under it."""
        state = self.state
        mu, sigma, points, masses = state.standardization()
        target, ramp = 1.0 - self.level, self._ramp(state.applied_steps)
        gain, state.saturated = 0.0, False
        if self.gains is not None:
            gain = self.gains[min(state.applied_steps, len(self.gains) - 1)]
        elif ramp > 0.0 and target < 1.0:
            solved, state.saturated = hist.solve_gain(points, masses, target, self.gain_max, mu, sigma)
            trim = 0.0 if state.saturated else state.trim
            gain = ramp * min(max(solved + trim, 0.0), self.gain_max)
        weight = hist.mean_weight(points, masses, gain, mu, sigma) if gain else 1.0
        state.setting = Setting(gain, mu, sigma, weight)

    def state_dict(self) -> dict:
        return asdict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = ControllerState(**{**state, "setting": Setting(**state["setting"])})


def _clip(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)
