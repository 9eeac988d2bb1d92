"""The governor: from a measured statistic of the model to the output that holds it at a set point.

A plain state machine on Python floats, without torch: the same measurements give the same state on every rank. The output
u is a spread: above 0 it pushes the next-token distribution apart, below 0 it pulls it together. An actuator turns it into
token weights of gain -u or into an entropy bonus u (stabilizers/governance.py).

    e  = sign (set point - value) / scale      positive: the distribution has to spread
    u* = clip(kp e + I, -limit, limit)         I += (ki e + D) n, n: steps since the last measurement, at most 10
    u  follows u* by at most slew_rate an applied step

D += ki^2 e n / 10 once the set point rests: a model in training drifts, the output that holds it changes from step to step, and
an integral alone stays behind by a constant error (a loop of type 2 follows a ramp without one; Franklin, Powell &
Emami-Naeini, Feedback Control of Dynamic Systems, section 4.2). The factor keeps the loop overdamped where K / (1 + kp K) is .4 or
more, K what an output of 1 moves the statistic by in units of its scale: with kp .6 from K = .53 on.

I and D stand still while a bound or the slew rate holds the output back and the error pushes against it (conditional
integration; Astrom & Hagglund, Advanced PID Control, 2006, section 3.5).

Start. After warm-up the governor coasts at output 0 as long as the model is on its way to the target by itself and would be
there within two ramps of the set point: a model that learns from scratch comes down from ln(vocabulary), and hurrying it costs
cross-entropy. Then it engages: the set point starts at what is measured and moves to the target in a straight line over
setpoint_ramp_steps, so that switching on gives no jolt (bumpless transfer).
"""

import math
from dataclasses import asdict, dataclass

#: Statistic -> (sign of its answer to a spread, an error of this size counts as 1). Scales: on a small language model the
#: same gain that moves entropy by 1 nat moves the masses by about .1.
STATISTICS = {"entropy": (1.0, 1.0), "top1_mass": (-1.0, 0.1), "high_frequency_mass": (-1.0, 0.1)}
#: A measurement stands for this many applied steps at most, and rarer ones act more gently by the ratio of the intervals: the
#: loop would outrun the model's answer otherwise.
MAX_HOLD_STEPS = 10
TREND_STEPS = 20  # memory of the slope that tells whether to coast
MIN_TREND_STEPS = 10  # applied steps that must be known for it
LANDING_STEPS = 20  # coasting ends so many steps before the model would be at the target, which is then approached more slowly
COAST_RAMPS = 2  # a model that will be at the target by itself within so many ramps of the set point is let do so
DRIFT_SHARE = 0.1  # gain of D in units of ki^2
SATURATED_STEPS = 10  # applied steps at the bound, in a row, after which the user is told


@dataclass
class GovernorState:
    """Everything that a resumed run needs; JSON-ready."""

    applied_steps: int = 0
    waiting: bool = False  # for `start`
    output: float = 0.0  # u in force in the coming step
    command: float = 0.0  # u*
    integral: float = 0.0
    drift: float = 0.0  # what the integral changes by in a step without an error
    trend_from: int | None = None  # applied steps at the first measurement after warm-up
    trend_sum: float = 0.0  # weighted slopes per applied step before the governor is engaged, and the weights
    trend_weight: float = 0.0
    engaged_step: int | None = None  # applied steps when coasting ended
    start: float | None = None  # value measured then
    measured_step: int | None = None  # applied steps at the last measurement of any kind
    value: float | None = None  # what was measured then
    target: float | None = None  # where the set point moves to
    initial: float | None = None  # value of the untouched model, for the target "initial"
    saturated_steps: int = 0  # in a row


class Governor:
    """PI with anti-windup, dead band, slew limit and a set point that starts at what is measured.

    Args:
        statistic: key of STATISTICS.
        kp, ki: gains on the scaled error; ki per applied step.
        dead_band: share of the set point within which the error counts as 0; beyond it the error counts from its edge.
        slew_rate: largest change of the output in one applied step.
        output_limit: bound of |output|.
        warmup_steps: applied steps before the first measurement may act.
        setpoint_ramp_steps: applied steps in which the set point then moves to the target, and how far a model that comes by
            itself is trusted; 0 acts at once.
    """

    def __init__(self, statistic="entropy", kp=0.6, ki=0.08, dead_band=0.001, slew_rate=0.02, output_limit=1.0,
                 warmup_steps=0, setpoint_ramp_steps=100):  # fmt: skip
        self.sign, self.scale = STATISTICS[statistic]
        self.kp, self.ki, self.dead_band = kp, ki, dead_band
        self.slew_rate, self.output_limit = slew_rate, output_limit
        self.warmup_steps, self.setpoint_ramp_steps = warmup_steps, setpoint_ramp_steps
        self.state = GovernorState()

    @property
    def setpoint(self) -> float | None:
        """What the statistic is held at in the coming step, in its unit; None before the governor is engaged."""
        state = self.state
        if state.engaged_step is None:
            return None
        passed = state.applied_steps - state.engaged_step
        share = min(passed / self.setpoint_ramp_steps, 1.0) if self.setpoint_ramp_steps else 1.0
        return state.target + (1.0 - share) * (state.start - state.target)

    @property
    def error(self) -> float | None:
        """Set point minus the last measured value, in the statistic's unit."""
        return None if self.setpoint is None or self.state.value is None else self.setpoint - self.state.value

    @property
    def saturated(self) -> bool:
        """Whether the output is at its bound and the set point asks for more."""
        return self.state.saturated_steps > 0

    def start(self) -> None:
        """End the wait of a governor that was made to wait (`state.waiting`); on every rank in the same step."""
        self.state.waiting = False

    def measure(self, value: float, target: float) -> None:
        """Take a measurement of the model as it is before the coming step. A non-finite one changes nothing: the output
        is held.

        Args:
            value: the statistic.
            target: where the set point is to end, in the same unit.
        """
        state = self.state
        before, previous, state.measured_step = state.measured_step, state.value, state.applied_steps
        if not (math.isfinite(value) and math.isfinite(target)):
            return
        state.value, state.target = value, target
        if state.applied_steps < self.warmup_steps or state.waiting:
            return
        elapsed = 1
        if state.engaged_step is None:
            if self._coasts(before, previous):
                return
            state.engaged_step, state.start = state.applied_steps, value
        elif before is not None:
            elapsed = max(state.applied_steps - before, 1)
        self._control(elapsed)

    def _coasts(self, before: int | None, previous: float | None) -> bool:
        """Whether to wait: too little is known, or the model is coming by itself. `previous` was measured at step `before`."""
        state = self.state
        if self.setpoint_ramp_steps == 0:
            return False
        if state.trend_from is None:
            state.trend_from = state.applied_steps
            return True
        passed = max(state.applied_steps - before, 1)
        keep = math.exp(-passed / TREND_STEPS)
        state.trend_sum = keep * state.trend_sum + (1 - keep) * _clip((state.value - previous) / passed, 1e6)
        state.trend_weight = keep * state.trend_weight + (1 - keep)
        if state.applied_steps - state.trend_from < MIN_TREND_STEPS:
            return True
        away, slope = state.target - state.value, state.trend_sum / state.trend_weight
        soon, late = abs(slope) * LANDING_STEPS, abs(slope) * COAST_RAMPS * self.setpoint_ramp_steps
        return away * slope > 0.0 and soon < abs(away) <= late

    def _control(self, elapsed: int) -> None:
        state = self.state
        share, held = min(1.0, MAX_HOLD_STEPS / elapsed), min(elapsed, MAX_HOLD_STEPS)
        error = self._scaled_error() * share
        if self._held_back() * error <= 0.0:  # free to move, or the error pulls back
            if state.applied_steps - state.engaged_step >= self.setpoint_ramp_steps:
                state.drift = _clip(state.drift + DRIFT_SHARE * self.ki**2 * error * share * held, self.slew_rate)
            state.integral = _clip(state.integral + (self.ki * error + state.drift) * held, self.output_limit)
        state.command = _clip(self.kp * error + state.integral, self.output_limit)

    def _held_back(self) -> float:
        """In which direction a bound or the slew rate holds the output back: its sign; 0.0 where it is free."""
        state = self.state
        if abs(state.command) >= self.output_limit:
            return state.command
        lag = state.command - state.output
        return lag if abs(lag) > 1e-9 * self.output_limit else 0.0

    def _scaled_error(self) -> float:
        band = self.dead_band * abs(self.setpoint)
        error = self.setpoint - self.state.value
        beyond = math.copysign(max(abs(error) - band, 0.0), error)
        return _clip(self.sign * beyond / self.scale, 1e6)

    def advance(self) -> None:
        """Close an applied step: the output moves towards the command. A skipped step must not call this."""
        state = self.state
        state.applied_steps += 1
        state.output = _clip(state.output + _clip(state.command - state.output, self.slew_rate), self.output_limit)  # rounding
        pushed = state.engaged_step is not None and self._scaled_error() * state.output > 0.0
        at_bound = abs(state.output) >= self.output_limit * (1.0 - 1e-9)
        state.saturated_steps = state.saturated_steps + 1 if at_bound and pushed else 0

    def state_dict(self) -> dict:
        return asdict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = GovernorState(**state)


def _clip(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)
