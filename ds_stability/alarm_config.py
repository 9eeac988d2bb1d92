"""The `alarm` section of the stability block. No torch."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ds_stability.config_describe import Section
from ds_stability.config_errors import InvalidValue


def _path(value: str) -> str:
    if "\0" in value:  # no system call takes it
        raise InvalidValue("", value, "a path, in which no NUL character can stand")
    return value


class AlarmConfig(Section):
    action: Literal["off", "warn", "stop", "govern"] = Field(
        "off", description="at every probe: nothing; a warning; for collapse also a checkpoint and the end of the run (stop), or the start "
        "of a governor that waits for it (govern)",
    )
    reference_file: Annotated[str, Field(min_length=1), AfterValidator(_path)] | None = Field(
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
