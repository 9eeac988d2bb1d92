"""The `controller` section of the stability block: the level's feedback loop, or the governor that takes its place."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from ds_stability.config_describe import Section
from ds_stability.config_errors import InvalidValue
from ds_stability.schedule import MAX_STEP

Steps = Annotated[int, Field(ge=0, le=MAX_STEP)]
WARMUP_PRETRAINED, WARMUP_SCRATCH = 10, 100
#: The governor waits longer from scratch: early entropy is far above any set point, and holding it back costs cross-entropy.
WARMUP_SCRATCH_GOVERNOR = 250
MAX_NATS = 100.0
#: A weight over the mean weight is at most exp(2 * 3 * gain): up to here that times a loss is a finite fp32 (and bf16) number.
LARGEST_GAIN = 14
#: Supervised tokens that every average remembers at least: fewer have no tail, and a ratio of their variances is biased.
WINDOW_TOKENS = 512.0
TARGET_ALLOWED = 'a number (nats from 0 to ln(vocabulary) for entropy, 0 to 1 for a mass), "initial" or "data"'
_NUMBER = re.compile(r"\s*[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,3})?\s*", re.ASCII)
#: Keys that one mode alone reads.
LEVEL_KEYS = ("ramp_steps", "gain_max", "trim_kp", "trim_ki", "trim_max")
GOVERNOR_KEYS = ("statistic", "target", "actuator", "start", "kp", "ki", "dead_band", "slew_rate", "output_limit",
                 "setpoint_ramp_steps", "probe_interval", "probe_size")  # fmt: skip


def read_target(value: object) -> float | str:
    """The target that a JSON value stands for. Raises InvalidValue."""
    if isinstance(value, str) and value in ("initial", "data"):
        return value
    # NaN fails the comparison, too; no vocabulary has e^100 tokens.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_NATS:
        raise InvalidValue("", value, TARGET_ALLOWED)
    return float(value)


def parse_target(text: str) -> float | str:
    """A target as the `--stability_target` flag takes it: "4.5", "initial" or "data". Raises InvalidValue."""
    return read_target(float(text) if _NUMBER.fullmatch(text) else text)


class ControllerConfig(Section):
    mode: Literal["level", "governor"] = Field(
        "level", description="what the loop holds: the variance ratio that a level asks for, or a statistic of the model"
    )
    warmup_steps: Steps | None = Field(
        None,
        description=f"applied steps before the loop starts, at gain 0; null = {WARMUP_PRETRAINED} from pretrained "
        f"weights, {WARMUP_SCRATCH} from scratch ({WARMUP_SCRATCH_GOVERNOR} for a governor)",
    )
    ramp_steps: Steps = Field(5, description="level: applied steps over which the gain is then faded in")
    gain_max: float = Field(
        8.0, gt=0, le=LARGEST_GAIN, description="level: largest gain of the token weights; a level that asks for more is saturated"
    )
    trim_kp: float = Field(0.1, ge=0, le=10, description="level: proportional part of the trim on the ratio's error")
    trim_ki: float = Field(0.02, ge=0, le=10, description="level: integral part of the trim, per applied step")
    trim_max: float = Field(0.5, ge=0, le=LARGEST_GAIN, description="level: largest trim, in units of gain; 0 = feed-forward only")
    statistic: Literal["entropy", "top1_mass", "high_frequency_mass"] = Field(
        "entropy", description="governor: the mean of the unweighted next-token distribution that is held"
    )
    target: Annotated[Any, PlainValidator(read_target)] = Field(
        "initial",
        description="governor: the set point; initial = the untouched model's value on the held-out probe, data = the probe's "
        "cross-entropy, so that the model is calibrated",
        json_schema_extra={"allowed": TARGET_ALLOWED},
    )
    actuator: Literal["token_weight", "entropy_bonus"] = Field(
        "token_weight", description="governor: what it acts with; the gain of the token weights, or b in the objective s - b H"
    )
    start: Literal["warmup", "alarm"] = Field(
        "warmup",
        description="governor: when it begins; after warm-up, or only once an alarm, or engine.stability.start_governor(), says so",
    )
    kp: float = Field(0.6, ge=0, le=100, description="governor: proportional gain, output per nat of entropy or per .1 of a mass")
    ki: float = Field(0.08, ge=0, le=10, description="governor: integral gain, per applied step")
    dead_band: float = Field(0.001, ge=0, lt=1, description="governor: error that is left alone, as a share of the set point")
    slew_rate: float = Field(0.02, gt=0, le=16, description="governor: largest change of the output in one applied step")
    output_limit: float = Field(
        1.0, gt=0, le=8, description="governor: bound of |gain| or 2 |b|; a set point that asks for more is saturated"
    )
    setpoint_ramp_steps: Steps = Field(
        100, description="governor: applied steps in which the set point moves from what is measured to the target; a model that "
        "gets there by itself in twice that time is let do so"
    )
    probe_interval: Steps = Field(
        10, description="governor: measure on the held-out probe every so many applied steps; 0 = on each training step"
    )
    probe_size: Annotated[int, Field(ge=1, le=MAX_STEP)] = Field(32, description="governor: sequences of the held-out probe")

    @model_validator(mode="after")
    def _check_mode(self) -> "ControllerConfig":
        foreign = GOVERNOR_KEYS if self.mode == "level" else LEVEL_KEYS
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                other = "governor" if self.mode == "level" else "level"
                raise InvalidValue(f".{name}", getattr(self, name),
                                   f'left out, or controller.mode must be "{other}", which reads it')  # fmt: skip
        if self.mode == "governor":
            self._check_target()
        return self

    def _check_target(self) -> None:
        if self.target == "data" and self.statistic != "entropy":
            raise InvalidValue(".target", "data", f'a number or "initial" for {self.statistic}; "data" is for entropy alone')
        if self.target == "data" and self.probe_interval == 0:
            raise InvalidValue(".probe_interval", 0, 'above 0 with target "data": a training step would calibrate the model on '
                               "what it memorizes")  # fmt: skip
        if isinstance(self.target, float) and self.statistic != "entropy" and self.target > 1:
            raise InvalidValue(".target", self.target, f'from 0 to 1 for {self.statistic}, or "initial"')

    @property
    def needs_probe(self) -> bool:
        """Whether the governor reads held-out sequences."""
        return self.mode == "governor" and (self.probe_interval > 0 or isinstance(self.target, str))
