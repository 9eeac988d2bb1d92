"""Whether DeepSpeed's accelerator computes in the precision that a DeepSpeed config asks for. No torch until one does.

On CPUs fp16 needs AVX-512 FP16 or AMX; DeepSpeed asks for it when the engine is built, which is after the model is loaded.
"""

from typing import Any

from ds_stability.deepspeed_config import precision, section
from ds_stability.errors import StabilityConfigError

BF16_NAMES = ("torch.bfloat16", "bf16", "bfloat16")


def asked_precision(ds_config: dict[str, Any]) -> tuple[str, str] | None:
    """("fp16" or "bf16", the key that asks for it); None for fp32, and for an "auto" that nobody has filled in."""
    name = precision(ds_config)
    if name in ("bf16", "fp16"):
        return name, f"{name}.enabled"
    autocast = section(ds_config, "torch_autocast")
    if autocast.get("enabled") is True and autocast.get("dtype", "bfloat16") in BF16_NAMES:
        return "bf16", "torch_autocast.enabled"
    return None


def missing_precision(ds_config: dict[str, Any]) -> str | None:
    """A sentence where the accelerator of this machine does not compute in the precision that `ds_config` asks for."""
    asked = asked_precision(ds_config)
    if asked is None:
        return None
    from deepspeed.accelerator import get_accelerator

    accelerator, (name, key) = get_accelerator(), asked
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if supported[name]():
        return None
    device = accelerator.device_name()
    needs = " (it takes AVX-512 FP16 or AMX)" if (device, name) == ("cpu", "fp16") else ""
    instead = "".join(f", or {other}.enabled true" for other in supported if other != name and supported[other]())
    return f"{key} true: DeepSpeed's accelerator {device} has no {name} on this machine{needs}; take fp32 ({key} false){instead}"


def require_precision(ds_config: dict[str, Any]) -> None:
    """Raises StabilityConfigError where DeepSpeed would refuse the precision, at level 0 too; before a model is loaded."""
    problem = missing_precision(ds_config)
    if problem is not None:
        raise StabilityConfigError(problem)
