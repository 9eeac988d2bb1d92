"""The fp32 master partitions that ZeRO optimizers step: what of ours needs them, and the parameters that follow from them."""

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ds_stability.config import StabilityConfig
from ds_stability.errors import StabilityConfigError


def require_masters(config: StabilityConfig, partitions: list[torch.Tensor]) -> None:
    """Raises StabilityConfigError where the block has a part that works on fp32 masters, and `partitions` are none."""
    needing = [f"stabilizer {name!r}" for name in ("clipping", "averaging") if config.max_level(name) > 0]
    penalty = config.families.get("regularization")
    if penalty is not None and penalty.kind == "init_decay" and config.max_level("regularization") > 0:
        needing.append("stabilizer 'init_decay'")
    if config.ema is not None:
        needing.append("stability.ema")
    if needing and not partitions:
        raise StabilityConfigError(f"{needing[0]} needs zero_optimization.stage 1, 2 or 3; this engine has stage 0")
    if needing and any(partition.dtype != torch.float32 for partition in partitions):
        raise StabilityConfigError(f"{needing[0]} needs fp32 master weights; these are {partitions[0].dtype}")


def release_parameters(engine) -> None:
    """Free what is gathered of ZeRO-3's parameters, also what is under way, before their partitions change."""
    if type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3:
        engine.optimizer.checkpoint_event_prologue()
        get_accelerator().synchronize()  # with offloaded parameters the host would write what is still being copied


@torch.no_grad()
def refresh_parameters(engine) -> None:
    """Make the parameters anew from the masters, as DeepSpeed does at the end of a step. Collective, between steps.

    At stage 3 call `release_parameters` first; the parameters that stay whole (stage3_param_persistence_threshold) are
    gathered again.
    """
    optimizer = engine.optimizer
    if type(optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        optimizer.update_lp_params()
        return
    for index in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()
