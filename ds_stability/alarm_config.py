"""The `probe` and `alarm` sections of the stability block: the alarm reads the probe's texts. No torch."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ds_stability.config_controller import Steps
from ds_stability.config_describe import Section
from ds_stability.config_errors import InvalidValue
from ds_stability.schedule import MAX_STEP


def _path(value: str) -> str:
    if "\0" in value:  # no system call takes it; half surrogate pairs are refused by pydantic
        raise InvalidValue("", value, "a path, in which no NUL character can stand")
    return value


NonEmptyPath = Annotated[str, Field(min_length=1), AfterValidator(_path)]
Count = Annotated[int, Field(ge=1, le=MAX_STEP)]


class ProbeConfig(Section):
    interval: Steps = Field(0, description="generate from fixed prompts every so many optimizer steps; 0 = off")
    num_prompts: Count = Field(16, description="prompts of a probe")
    max_new_tokens: Count = Field(64, description="tokens generated per prompt")
    prompts_file: NonEmptyPath | None = Field(
        None, description="text file with one prompt a line; null = prompts from the held-out text"
    )
    max_gather_gib: float = Field(
        20.0, gt=0, le=10**6, description="skip the probe where the gathered weights would take more GiB than this"
    )


class AlarmConfig(Section):
    action: Literal["off", "warn", "stop", "govern"] = Field(
        "off", description="at every probe: nothing; a warning; for collapse also a checkpoint and the end of the run (stop), or the start "
        "of a governor that waits for it (govern)",
    )
    reference_file: NonEmptyPath | None = Field(
        None, description="text file that the bands are taken from; null = the held-out text of launchers/train.py"
    )
    start_step: Annotated[int, Field(ge=0, le=10**9)] | None = Field(
        None, description="optimizer step of the first check; null = after the controller's warm-up"
    )
    patience: Annotated[int, Field(ge=1, le=1000)] = Field(
        2, description="checks in a row outside the band before a warning, and inside it before the next one"
    )
    share_tolerance: float = Field(
        0.05, ge=0, lt=1, description="widens the bands of repetition and high-frequency share on both sides (absolute)"
    )
    entropy_tolerance: float = Field(
        0.25, gt=0, lt=1, description="half width of the band of entropy, relative to cross-entropy on the reference text"
    )
