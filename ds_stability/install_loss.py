"""Puts our loss in the place of a model's own, for one engine."""

import weakref

import torch
from deepspeed import comm as dist

from ds_stability.config import StabilityConfig
from ds_stability.errors import StabilityConfigError
from ds_stability.gathered import hook_ids
from ds_stability.loss import StabilityLoss


def install_loss(engine, model, config: StabilityConfig, device: torch.device, group) -> StabilityLoss | None:
    """The loss that `model` computes from now on, or None where there is no model whose loss we know, at level 0.

    Args:
        engine: that trains `model`. model: transformers causal LM inside it, or None. config: the resolved block.
        device: of the engine. group: its data-parallel communicator.

    Raises:
        StabilityConfigError: no such model, and something is to act through its loss.
    """
    path = config.resolved_loss_path
    ours = path != "stock"
    if model is None:
        if ours or config.active:
            raise StabilityConfigError(
                f"{type(engine.module).__name__} does not compute its loss with transformers' ForCausalLMLoss, which a "
                "level above 0 and the governor act through; train a transformers causal LM, or set stability.level to 0"
            )
        return None
    if isinstance(model.loss_function, StabilityLoss):  # of an earlier engine
        model.loss_function.release()
    stock = model.loss_function
    loss = StabilityLoss(model, stock, ours, device, config.statistics.chunk_size)
    loss.rank, loss.kernel = dist.get_rank(group=group), config.loss_kernel
    loss.interleaved = ours and engine.zero_optimization_stage() == 3
    if engine.zero_optimization_stage() < 3:  # there what a user gets of the logits does not lie below the loss
        # DeepSpeed divides a direct loss.backward() by the accumulation steps at the loss, and once more at the logits, which are
        # an output too: where ours stand in for them, so is our loss (docs/footguns.md).
        loss.per_tensor = weakref.WeakMethod(engine._backward_prologue_per_tensor)
    if path == "linear":
        from ds_stability.fused_head import fuse_head  # imports transformers

        fuse_head(model, loss, engine.module, frozenset(hook_ids(engine)))
    model.loss_function = loss
    return loss
