"""The `ema` section of the stability block. No torch."""

from typing import Annotated

from pydantic import Field

from ds_stability.config_describe import Section


class EmaConfig(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="decay of the average of the weights per applied step")
    start_step: Annotated[int, Field(ge=0, le=10**9)] = Field(
        0, description="applied step after which the average begins, with the weights of that moment"
    )
    warmup: bool = Field(
        True, description="the decay of the average's t-th step is at most (1 + t)/(10 + t), so that it soon forgets the weights it began with"
    )
