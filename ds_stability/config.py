"""The `stability` block of a DeepSpeed JSON: its keys, their ranges, and one-line errors for everything else.

    config, stability = split_config(load_ds_config("ds_configs/loop_zero3.json"))
    stability.resolve(pretrained=True).family_level("feedback", step=120)

Importing this module is cheap: no torch, no deepspeed, no transformers.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationError, model_validator
from typing_extensions import TypedDict

from ds_stability.alarm_config import AlarmConfig, Count, NonEmptyPath, ProbeConfig
from ds_stability.config_controller import (
    LEVEL_KEYS,
    WARMUP_PRETRAINED,
    WARMUP_SCRATCH,
    WARMUP_SCRATCH_GOVERNOR,
    ControllerConfig,
    Steps,
    parse_target,
)
from ds_stability.config_describe import STRICT, KeyInfo, Section, describe_model, translate
from ds_stability.config_errors import InvalidValue, did_you_mean, one_line, show_value
from ds_stability.deepspeed_config import find_auto, load_ds_config, unsupported_features, zero_stage
from ds_stability.ema_config import EmaConfig
from ds_stability.errors import StabilityConfigError
from ds_stability.objectives.config import PREPARED, CrossEntropy, Objectives, UnlikelihoodSequence
from ds_stability.schedule import (
    LEVEL_ALLOWED,
    Schedule,
    format_level,
    level_at,
    max_level,
    parse_level_flag,
    parse_schedule,
)

__all__ = ["KeyInfo", "Schedule", "StabilityConfig", "describe", "find_auto", "format_level", "level_at",
           "load_ds_config", "max_level", "parse_level_flag", "split_config", "unsupported"]  # fmt: skip

BLOCK = "stability"
REGULARIZATION_MAX = {"z_loss": 1e-2, "label_smoothing": 0.3, "init_decay": 0.1}

_Level = Annotated[Any, PlainValidator(parse_schedule)]
_OptionalLevel = Annotated[Any, PlainValidator(lambda value: None if value is None else parse_schedule(value))]
_Share = Annotated[float, Field(gt=0, lt=1)]


def _family_level(meaning: str) -> Any:
    return Field(None, description=f"{meaning}; null = the block's level",
                 json_schema_extra={"allowed": f"{LEVEL_ALLOWED}, or null"})  # fmt: skip


class FeedbackConfig(Section):
    level: _OptionalLevel = _family_level("level L of feedback, whose target variance ratio is 1 - L")
    permute: bool = Field(
        False,
        description="control: multiply the losses by the same weights in random order, so that no weight is tied to its "
        "token's surprisal",
    )
    replay: NonEmptyPath | None = Field(
        None,
        description="control: metrics.jsonl of a run whose gains are used again, step by step, whatever the ratio is (open loop)",
    )


class ClippingConfig(Section):
    level: _OptionalLevel = _family_level(
        "level L of clipping at mean + k sd of earlier log gradient norms, k = 4(1 - L)/L - 4L"
    )
    ema_decay: _Share = Field(0.97, description="decay per applied step of the log gradient norm's mean and variance")


class AveragingConfig(Section):
    level: _OptionalLevel = _family_level("level L of gradient averaging, whose decay is beta_max * L")
    beta_max: _Share = Field(0.99, description="decay of the gradient average at level 1 (kept in fp32)")


class RegularizationConfig(Section):
    level: _OptionalLevel = _family_level("level L of regularization, whose coefficient is max * L^2")
    kind: Literal["z_loss", "label_smoothing", "init_decay"] = Field(
        "z_loss", description="penalty on the squared log-partition, label smoothing, or pull to the initial weights"
    )
    max: _Share | None = Field(
        None, description="coefficient at level 1; null = 0.01 (z_loss), 0.3 (label_smoothing) or 0.1 (init_decay)"
    )


class Stabilizers(TypedDict, total=False):
    """The families that the level drives, by name; an absent family is off."""

    __pydantic_config__ = STRICT
    feedback: FeedbackConfig
    clipping: ClippingConfig
    averaging: AveragingConfig
    regularization: RegularizationConfig


class StatisticsConfig(Section):
    high_frequency_coverage: _Share = Field(
        0.5, description="share of the training tokens that the high-frequency set covers"
    )
    high_frequency_file: NonEmptyPath | None = Field(
        None, description="high_frequency.json of another run, used as the set; null = count the training data"
    )
    ema_decay: _Share = Field(0.9, description="decay per applied step of the surprisal moments")
    interval: Count = Field(
        1, description="measure token statistics every so many optimizer steps; above 1 on the stock loss path only"
    )
    gradient_noise_scale: bool = Field(True, description="measure the gradient noise scale")
    update_ratio_interval: Steps = Field(
        10, description="measure update norm over weight norm every so many optimizer steps; 0 = off"
    )
    chunk_size: Count | None = Field(
        None, description="tokens per chunk of the loss; null = chosen from the vocabulary size and the device"
    )


class StabilityConfig(Section):
    """The `stability` block, frozen. Build it with `parse`, for one-line errors; `describe()` lists every key."""

    level: _Level = Field(
        0.0,
        description="requested stabilization level over applied steps: 0 = plain training, 1 = extreme",
        json_schema_extra={"allowed": LEVEL_ALLOWED},
    )
    stabilizers: Stabilizers | None = Field(
        None, description="families that the level drives; null = feedback alone, {} = none"
    )
    objective: Objectives = Field(
        CrossEntropy(), discriminator="name", description="what is optimized, per token; the token weights multiply it"
    )
    controller: ControllerConfig = Field(ControllerConfig(), description="the feedback loop, or the governor")
    statistics: StatisticsConfig = Field(StatisticsConfig(), description="what is measured at every step")
    probe: ProbeConfig = Field(ProbeConfig(), description="generation during training")
    alarm: AlarmConfig = Field(AlarmConfig(), description="warnings when the probe's texts leave the band of the reference text")
    ema: EmaConfig | None = Field(
        None, description="average of the weights, with which the model is evaluated and exported; null = none"
    )
    loss_path: Literal["stock", "chunked", "linear"] | None = Field(
        None, description="the model's own loss with statistics beside it, ours from the logits, or ours from the hidden states; "
        "null = stock if nothing is above 0, else linear",
    )
    loss_kernel: Literal["torch", "triton"] = Field(
        "torch", description="what computes statistics and gradients of the linear loss: torch's operators, or Triton kernels, which need CUDA "
        "and the extra triton and have never been timed on a GPU; objectives without a closed form, and fp64, take torch's",
    )
    max_skipped_steps: Count = Field(10, description="skipped optimizer steps in a row that end the run")

    @model_validator(mode="after")
    def _check_governor(self) -> "StabilityConfig":
        above = max_level(self.level) > 0 or self.max_level("feedback") > 0
        if self.governed and above:
            raise InvalidValue(".controller.mode", "governor", '"level" where a level is above 0; or set level to 0: the '
                               "governor takes the place of feedback, and the two would pull against each other")  # fmt: skip
        own_text_alone = isinstance(self.objective, UnlikelihoodSequence) and self.objective.probability == 1.0
        if own_text_alone and (self.governed or self.max_level("feedback") > 0):
            acting = "the governor" if self.governed else "feedback at a level above 0"
            raise InvalidValue(".objective.probability", 1.0, f"below 1 with {acting}, which rests in steps on generated text")
        return self

    @model_validator(mode="after")
    def _check_loss_path(self) -> "StabilityConfig":
        if self.loss_path == "stock" and self._acts_through_loss():
            raise InvalidValue(
                ".loss_path", "stock",
                '"linear", "chunked" or null, as feedback, z_loss and label_smoothing above level 0, the governor, and every '
                "objective but cross_entropy act through our loss",
            )  # fmt: skip
        if self.loss_path == "linear" and self.prepares_batches:
            raise InvalidValue(
                ".loss_path", "linear", f'"chunked" or null, as objective {self.objective.name} looks at the logits of whole sequences'
            )
        if self.loss_kernel == "triton" and self.resolved_loss_path != "linear":
            raise InvalidValue(".loss_kernel", "triton", f'"torch" where loss_path is {self.resolved_loss_path}, or set loss_path to "linear"')
        feedback = self.families.get("feedback")
        if feedback is not None and (feedback.permute or feedback.replay) and self.max_level("feedback") == 0:
            key = "replay" if feedback.replay else "permute"
            raise InvalidValue(
                f".stabilizers.feedback.{key}", getattr(feedback, key),
                "left out at level 0, where every weight is 1; give feedback the level of the run that this one controls for",
            )  # fmt: skip
        if self.statistics.interval != 1 and self.resolved_loss_path != "stock":
            raise InvalidValue(
                ".statistics.interval", self.statistics.interval,
                "1 unless loss_path is stock, as our loss and its controller need every step",
            )  # fmt: skip
        if self.alarm.action != "off" and self.probe.interval == 0:
            raise InvalidValue(
                ".probe.interval", 0, 'an integer from 1 where alarm.action is not "off", as the alarm reads the probe\'s texts'
            )
        waits = self.governed and self.controller.start == "alarm"
        if self.alarm.action == "govern" and not waits:
            raise InvalidValue(
                ".alarm.action", "govern", '"off", "warn" or "stop" unless controller.mode is "governor" and controller.start is "alarm"'
            )
        return self

    @classmethod
    def parse(cls, block: Any, source: str = BLOCK) -> "StabilityConfig":
        """Validate a JSON block. Raises StabilityConfigError with one line, whose key path starts with `source`."""
        if isinstance(block, cls):
            return block
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            raise StabilityConfigError(translate(error, cls, source)) from None

    @property
    def families(self) -> dict[str, Any]:
        """The families in use by name, with their configs; {"feedback": FeedbackConfig()} where none are named."""
        return {"feedback": FeedbackConfig()} if self.stabilizers is None else dict(self.stabilizers)

    def family_schedule(self, family: str) -> Schedule:
        """The family's own schedule, else the block's; 0.0 if the family is absent."""
        config = self.families.get(family)
        if config is None:
            return 0.0
        return self.level if config.level is None else config.level

    def family_level(self, family: str, step: int) -> float:
        """Level of a family at applied step `step`; 0.0 if the family is absent."""
        return level_at(self.family_schedule(family), step)

    def max_level(self, family: str) -> float:
        """The highest level that the family ever reaches; 0.0 if it is absent."""
        return max_level(self.family_schedule(family))

    @property
    def governed(self) -> bool:
        """Whether the governor takes the place of feedback."""
        return self.controller.mode == "governor"

    def require_starter(self) -> None:
        """For programs in which nobody calls `start_governor`. Raises StabilityConfigError for a governor that would never begin."""
        if self.governed and self.controller.start == "alarm" and self.alarm.action != "govern":
            raise StabilityConfigError(
                f'stability.controller.start: "alarm" is not allowed with stability.alarm.action "{self.alarm.action}", as the governor would '
                'never begin; set the action to "govern", or start to "warmup" (a loop of your own may call start_governor())'
            )

    def require_average(self, steps: int) -> None:
        """Raises StabilityConfigError for an average of the weights that would not begin in a run of `steps` optimizer steps."""
        if self.ema is not None and self.ema.start_step >= steps:
            raise StabilityConfigError(
                f"stability.ema.start_step: {self.ema.start_step} is not allowed in a run of {steps} steps; must be below that"
            )

    @property
    def active(self) -> bool:
        """Whether anything acts on training: a family that is ever above level 0, or the governor."""
        return self.governed or any(self.max_level(family) > 0 for family in self.families)

    def _acts_through_loss(self) -> bool:
        penalty = self.families.get("regularization")
        penalized = penalty is not None and penalty.kind != "init_decay" and self.max_level("regularization") > 0
        return penalized or self.governed or self.objective.name != "cross_entropy" or self.max_level("feedback") > 0

    @property
    def resolved_loss_path(self) -> Literal["stock", "chunked", "linear"]:
        """The loss path of the run: as asked, else stock for cross-entropy with nothing that acts on training, else linear.

        Objectives that see each micro-batch before its forward need logits: chunked. A model whose head is not recognized takes
        the chunked loss for linear (`fused_head.py`).
        """
        if self.loss_path is not None:
            return self.loss_path
        if self.prepares_batches:
            return "chunked"
        return "linear" if self.active or self.objective.name != "cross_entropy" else "stock"

    @property
    def prepares_batches(self) -> bool:
        """Whether the objective has to see each micro-batch before its forward (and so acts in the chunked loss only)."""
        return self.objective.name in PREPARED

    def with_level(self, level: Schedule, source: str = BLOCK) -> "StabilityConfig":
        """This block at another level (the `--stability_level` flag). Families with a level of their own keep it."""
        return self.parse({**self.to_dict(), "level": level}, source)

    def with_target(self, target: str) -> "StabilityConfig":
        """This block as a governor at `target` (the `--stability_target` flag); a level is taken back to 0."""
        block = self.to_dict()
        try:
            value = parse_target(target)
        except InvalidValue as error:
            raise StabilityConfigError(f"--stability_target: {show_value(target)} is not allowed; must be {error.allowed}") from None
        controller = {key: item for key, item in block["controller"].items() if key not in LEVEL_KEYS}
        return self.parse({**block, "level": 0.0, "controller": controller | {"mode": "governor", "target": value}})

    def resolve(self, pretrained: bool) -> "StabilityConfig":
        """This block with every null filled that does not depend on model or data: what a manifest records.

        Still null afterwards: files that are not given, and `chunk_size`.
        """
        block = self.to_dict()
        if block["controller"]["warmup_steps"] is None:
            scratch = WARMUP_SCRATCH_GOVERNOR if self.governed else WARMUP_SCRATCH
            block["controller"]["warmup_steps"] = WARMUP_PRETRAINED if pretrained else scratch
        block["stabilizers"] = {name: config.model_dump(mode="json") for name, config in self.families.items()}
        for name, family in block["stabilizers"].items():
            family["level"] = self.family_schedule(name)
        penalty = block["stabilizers"].get("regularization")
        if penalty is not None and penalty["max"] is None:
            penalty["max"] = REGULARIZATION_MAX[penalty["kind"]]
        block["loss_path"] = self.resolved_loss_path
        return self.parse(block)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every key present; `parse` reads them back to an equal object."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON. Compare resolved blocks: a null and what it resolves to differ here."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def describe() -> list[KeyInfo]:
    """Every key of the block in order, with default, what is allowed and its meaning, for tables and reports."""
    return list(describe_model(StabilityConfig))


def split_config(ds_config: dict[str, Any]) -> tuple[dict[str, Any], StabilityConfig]:
    """The DeepSpeed config without its `stability` block, and the block (level 0 if there is none).

    Raises StabilityConfigError for a wrong block and for a top-level key that looks like the block or a key of it:
    DeepSpeed ignores unknown top-level keys, so a misspelled block would train at level 0 without a word.
    """
    for key, value in ds_config.items():
        if isinstance(key, str) and key != BLOCK:
            _refuse_near_miss(key, value)
    rest = {key: value for key, value in ds_config.items() if key != BLOCK}
    return rest, StabilityConfig.parse(ds_config[BLOCK]) if BLOCK in ds_config else StabilityConfig()


def _refuse_near_miss(key: str, value: object) -> None:
    shown = f"{one_line(key, 60)}: unknown top-level key (value {show_value(value)})"
    if key.lower().startswith("stabil") or did_you_mean(key, [BLOCK], cutoff=0.75):
        raise StabilityConfigError(f'{shown}; did you mean "{BLOCK}"? the block must have exactly this name')
    if key in StabilityConfig.model_fields:
        raise StabilityConfigError(f'{shown}; did you mean "{BLOCK}.{key}"? it must stand inside the "{BLOCK}" block')


def unsupported(ds_config: dict[str, Any], stability: StabilityConfig | None = None) -> list[str]:
    """One sentence for each thing in the config that ds_stability does not work with yet; [] if all is well.

    Args:
        ds_config: DeepSpeed config, with or without the block.
        stability: the block; None reads it from `ds_config`.
    """
    if stability is None:
        ds_config, stability = split_config(ds_config)
    problems = unsupported_features(ds_config)
    if zero_stage(ds_config) == 0:
        problems += [
            f"{BLOCK}.stabilizers.{family}: gradient {family} works at ZeRO stages 1 to 3 and "
            "zero_optimization.stage is 0; set a stage, or leave the family out"
            for family in ("clipping", "averaging")
            if stability.max_level(family) > 0
        ]
    if stability.ema is not None and zero_stage(ds_config) == 0:
        problems.append(
            f"{BLOCK}.ema: the average of the weights works at ZeRO stages 1 to 3 and zero_optimization.stage is 0; set a stage, or "
            "leave ema out"
        )
    return problems
