"""Whether this machine can run the kernels that `stability.loss_kernel` asks for. No torch until that is asked."""

import importlib.util
import os

from ds_stability.config import StabilityConfig
from ds_stability.errors import StabilityConfigError

INTERPRETER = "TRITON_INTERPRET"


def missing_package(config: StabilityConfig) -> str | None:
    """A sentence where the block asks for triton and the package is not installed; nothing is imported."""
    if config.loss_kernel != "triton" or importlib.util.find_spec("triton") is not None:
        return None
    return 'stability.loss_kernel: "triton" needs the package triton; pip install \'ds_stability[triton]\', or set it to "torch"'


def require_kernel(config: StabilityConfig) -> None:
    """Raises StabilityConfigError where triton is asked for and not installed, or where there is no CUDA device for it."""
    problem = missing_package(config)
    if problem is not None:
        raise StabilityConfigError(problem)
    if config.loss_kernel != "triton" or os.environ.get(INTERPRETER) == "1":
        return
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().device_name()
    if device != "cuda":
        raise StabilityConfigError(
            f'stability.loss_kernel: "triton" needs CUDA, and DeepSpeed runs on {device}; set it to "torch", or {INTERPRETER}=1 for '
            "triton's interpreter, which is for tests (very slow)"
        )
