"""The governor as a stabilizer: reads its statistic, and turns its output into token weights or an entropy bonus.

Both actuators spread the distribution for an output above 0 and concentrate it below 0:

    token_weight    gain = -output: surprising tokens weigh more; weights as in feedback (design section 3)
    entropy_bonus   the objective of a token is objective - BONUS * output * H; the weights are 1
"""

import math
from dataclasses import asdict

from ds_stability import histogram as hist
from ds_stability.config_controller import ControllerConfig
from ds_stability.controller import Setting, SurprisalState, remembered
from ds_stability.errors import StabilityConfigError
from ds_stability.governor import SATURATED_STEPS, Governor
from ds_stability.statistics import StepSums

#: Entropy bonus of an output of 1. Within the same steps, a bonus of .5 moved a small model about as far as a gain of -1.
BONUS = 0.5


class Governance:
    """Holds `control.statistic` at `control.target`; `control` is a resolved section in mode "governor".

    Attributes:
        warning: a sentence for the user, set by the update in which the output has been at its bound for some steps.
    """

    def __init__(self, control: ControllerConfig, ema_decay: float):
        self.control, self.ema_decay = control, ema_decay
        self.governor = Governor(control.statistic, control.kp, control.ki, control.dead_band, control.slew_rate,
                                 control.output_limit, control.warmup_steps, control.setpoint_ramp_steps)  # fmt: skip
        self.governor.state.waiting = control.start == "alarm"
        self.surprisal, self.setting = SurprisalState(), Setting()
        self.warned, self.warning = False, None
        self.measured = [0.0] * 3  # sums over the last tokens of the training steps: count, statistic, surprisal
        self.held_out: str | None = None  # fingerprint of the sequences that the probe reads

    def prepare(self, step, loss):
        loss.setting, loss.permutation_step = self.setting, None

    # ---- the held-out probe -------------------------------------------------------------------------------------

    def take_held_out(self, fingerprint: str) -> None:
        """The sequences that are measured on from now on.

        Raises:
            StabilityConfigError: the governor has measured on other ones, in this run or before it was resumed.
        """
        measured = self.governor.state.measured_step is not None
        if measured and self.held_out is not None and fingerprint != self.held_out:
            raise StabilityConfigError(
                f"the governor's held-out text (sha256 {fingerprint[:12]}) is not the one that this run has measured on "
                f"({self.held_out[:12]}), so its target would not mean the same; give the same held-out text, or start a new run"
            )
        self.held_out = fingerprint

    def due(self) -> bool:
        """Whether the held-out probe must be measured before the coming step."""
        state, control = self.governor.state, self.control
        if state.measured_step == state.applied_steps:
            return False
        if control.target == "initial" and state.initial is None:
            return True
        since = state.applied_steps - control.warmup_steps
        return not state.waiting and control.probe_interval > 0 and since >= 0 and since % control.probe_interval == 0

    def measure(self, sums: StepSums) -> None:
        """Take in the probe's global sums.

        Raises:
            StabilityConfigError: on every rank; the untouched model has no finite value to hold.
        """
        value, cross_entropy = sums.per_token(self.control.statistic), sums.per_token("surprisal")
        state = self.governor.state
        if value is None:
            raise StabilityConfigError("the governor's held-out sequences have no supervised token; give other ones")
        if self.control.target == "initial" and state.initial is None:
            if not math.isfinite(value):
                raise StabilityConfigError(
                    f"the untouched model's {self.control.statistic} on the held-out probe is not finite, so "
                    'stability.controller.target "initial" has no value; check the model, or give a number'
                )
            state.initial = value
        if self.control.probe_interval > 0:
            self.governor.measure(value, self._target(cross_entropy))
        else:
            state.measured_step = state.applied_steps
        self._choose_setting()

    def _target(self, cross_entropy: float) -> float:
        named = {"initial": self.governor.state.initial, "data": cross_entropy}
        return named.get(self.control.target, self.control.target)

    # ---- the training step --------------------------------------------------------------------------------------

    def update(self, sums: StepSums) -> None:
        if not sums.finite:
            raise ValueError("non-finite sums must not reach the governor")
        count = sums["tokens"]
        if count > 0:
            self.surprisal.observe(sums, self.ema_decay)
            if self.control.probe_interval == 0:
                fresh, keep = [count, sums[self.control.statistic], sums["surprisal"]], remembered(0.0, count)
                self.measured = [keep * old + new for old, new in zip(self.measured, fresh, strict=True)]
                tokens, statistic, surprisal = self.measured
                self.governor.measure(statistic / tokens, self._target(surprisal / tokens))
        self.governor.advance()
        self._choose_setting()
        self._tell_saturation()

    def settle(self) -> None:
        self._choose_setting()

    def _choose_setting(self) -> None:
        """The setting of the coming step; token weights as feedback predicts them from the smoothed histogram."""
        self.setting, output = Setting(), self.governor.state.output
        if self.control.actuator == "entropy_bonus":
            self.setting.entropy_bonus = BONUS * output
        if self.surprisal.tokens == 0:
            return
        mu, sigma, points, masses = self.surprisal.standardization()
        self.setting.mu, self.setting.sigma = mu, sigma
        if self.control.actuator == "token_weight" and output != 0.0:
            self.setting.gain = -output
            self.setting.mean_weight = hist.mean_weight(points, masses, -output, mu, sigma)

    def _tell_saturation(self) -> None:
        state, control = self.governor.state, self.control
        self.warning = None
        if state.saturated_steps >= SATURATED_STEPS and not self.warned:
            self.warned = True
            self.warning = (
                f"the governor is saturated: {control.statistic} is {state.value:.4g}, its set point {self.governor.setpoint:.4g}, "
                f"and the {control.actuator} has been at its bound {state.output:+.3g} for {SATURATED_STEPS} steps; choose a "
                "nearer target, or raise stability.controller.output_limit"
            )

    def metrics(self):
        governor, setting = self.governor, self.setting
        state, observed = governor.state, self.surprisal.tokens > 0
        return {
            "stability/governor_statistic": state.value,
            "stability/governor_target": state.target,
            "stability/governor_setpoint": governor.setpoint,
            "stability/governor_error": governor.error,
            "stability/governor_output": state.output,
            "stability/governor_integral": state.integral,
            "stability/saturated": int(governor.saturated),
            "stability/gain": setting.gain,
            "stability/entropy_bonus": setting.entropy_bonus,
            "stability/mu": setting.mu if observed else None,
            "stability/sigma": setting.sigma if observed else None,
            "stability/mean_weight": setting.mean_weight,
        }

    def state_dict(self):
        return {"governor": self.governor.state_dict(), "surprisal": asdict(self.surprisal), "setting": asdict(self.setting),
                "measured": self.measured, "warned": self.warned, "held_out": self.held_out}  # fmt: skip

    def load_state_dict(self, state):
        self.governor.load_state_dict(state["governor"])
        self.surprisal, self.setting = SurprisalState(**state["surprisal"]), Setting(**state["setting"])
        self.warned, self.measured = state["warned"], state["measured"]
        given, self.held_out = self.held_out, state.get("held_out")  # older checkpoints have none
        if given is not None:  # before the checkpoint was loaded
            self.take_held_out(given)


def check_target(control: ControllerConfig, vocab_size: int) -> None:
    """A set point that no distribution over `vocab_size` tokens can have.

    Raises:
        StabilityConfigError: one line.
    """
    highest = math.log(vocab_size)
    if control.statistic == "entropy" and isinstance(control.target, float) and control.target > highest:
        raise StabilityConfigError(
            f"stability.controller.target: {control.target:g} is not allowed; must be from 0 to {highest:.4g} nats, the entropy "
            f"of a uniform distribution over this model's {vocab_size} tokens"
        )
