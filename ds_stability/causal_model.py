"""The part of a module that the loss is taken from."""

import sys

import torch

from ds_stability.loss import StabilityLoss


def causal_lm(module: torch.nn.Module):
    """The transformers model below `module` (through PEFT) whose loss is ForCausalLMLoss, or None."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    peft = sys.modules.get("peft")  # a PEFT model cannot exist before peft was imported
    if peft is not None and isinstance(module, peft.PeftModel):
        module = module.get_base_model()
    if not isinstance(module, PreTrainedModel) or not module.can_generate():
        return None
    function = module.loss_function
    return module if function is ForCausalLMLoss or isinstance(function, StabilityLoss) else None


def has_pretrained_weights(model) -> bool:
    """Best guess for a missing warmup_steps: a model made by from_pretrained knows where its weights came from.

    A fresh model whose config came from a folder or the hub looks the same: state controller.warmup_steps there.
    """
    return model is not None and bool(model.name_or_path) and not model.name_or_path.endswith(".json")
