"""ds_stability: train language models under DeepSpeed ZeRO at a controlled, measured level of stabilization.

Importing the package is cheap: torch and deepspeed are imported when `initialize` or `attach` is first used.
"""

from typing import TYPE_CHECKING

from ds_stability.errors import SkippedStepsError, StabilityConfigError, UserError

if TYPE_CHECKING:
    from ds_stability.config import StabilityConfig
    from ds_stability.engine import attach, engine_of, initialize

__version__ = "0.1.0"
__all__ = [
    "SkippedStepsError",
    "StabilityConfig",
    "StabilityConfigError",
    "UserError",
    "attach",
    "engine_of",
    "initialize",
]


def __getattr__(name: str):
    if name == "StabilityConfig":
        from ds_stability.config import StabilityConfig

        return StabilityConfig
    if name in ("initialize", "attach", "engine_of"):
        from ds_stability import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'ds_stability' has no attribute {name!r}")
