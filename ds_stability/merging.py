"""A peft adapter merged into its base model, apart from the live one; and, before training, the proof that this will work."""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ds_stability.errors import UserError
from ds_stability.gathered import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A forward that reads the matrix itself passes an adapter on the layer by; asking for its dtype or type does not.
READS_WEIGHT = r"self\.{name}\.weight\s*(?:@|\)|,(?!\s*torch\.Tensor))"


def merge_adapter(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> "PreTrainedModel":
    """The base model with the active adapters merged in, on the CPU, built apart from the live one.

    Each matrix is merged in fp32 and rounded to its own dtype once.

    Args:
        state: whole tensors under the names of the peft model's state dict.
    """
    twin = _twin(module)
    twin.load_state_dict(dict(state), assign=True)
    merged = _merge(twin)
    inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
    # An adapter on one of two tied matrices has parted them.
    if inputs is not None and outputs is not None and not torch.equal(inputs.weight, outputs.weight):
        merged.config.tie_word_embeddings = False
    return merged


def check_merge(module: torch.nn.Module) -> None:
    """Do on the meta device what `merge_adapter` will do, and what saving does with names: seconds, no memory, no collective.

    Raises:
        UserError: the adapter cannot be merged, or would not act in the live model as it does merged.
    """
    for name, fault in unsuitable_layers(module):
        if _is_adapted(module.get_submodule(name)):
            raise UserError(f"--lora_target_modules: no adapter can act on {name}: {fault}; leave it out (the default does)")
    try:
        from peft import get_peft_model_state_dict

        twin = _twin(module)
        names, wanted = twin.state_dict().keys(), module.state_dict().keys()
        if names != wanted:
            raise ValueError(f"a model built from the config has other weights: {min(names ^ wanted)}")
        for adapter in twin.peft_config:
            get_peft_model_state_dict(twin, adapter_name=adapter)
        check_saving(_merge(twin))
    except Exception as error:  # whatever peft or the model's code stumbles over would otherwise end the run at its end
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter cannot be merged into this model ({type(error).__name__}: {reason}); give other "
                        "--lora_target_modules") from error  # fmt: skip


def check_saving(model: "PreTrainedModel") -> None:
    """Turn the model's names and shapes back into the stored ones (experts that are fused in memory, ...), as saving will.

    Raises whatever transformers stumbles over. No weight is read; the model may be partitioned.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = {id(parameter): getattr(parameter, "ds_shape", parameter.shape) for parameter in model.parameters()}
    state = {name: torch.empty(parameters.get(id(value), value.shape), device="meta")
             for name, value in model.state_dict(keep_vars=True).items()}  # fmt: skip
    revert_weight_conversion(model, state)


def unsuitable_layers(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """(name, reason) of linear layers on which an adapter would not act, or not as it does merged."""
    for path, parent in model.named_modules():
        for name, child in parent.named_children():
            layer = child.get_base_layer() if _is_adapted(child) else child
            fault = _fault(type(parent), name, layer) if isinstance(layer, torch.nn.Linear) else None
            if fault is not None:
                yield f"{path}.{name}" if path else name, fault


def _fault(parent: type, name: str, layer: torch.nn.Linear) -> str | None:
    own = type(layer).forward
    if own is not torch.nn.Linear.forward and own.__module__.startswith("transformers"):
        return f"{type(layer).__name__} is more than a matrix (a router, for example)"
    if not parent.__module__.startswith("transformers"):
        return None
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):  # no source at hand
        return None
    if re.search(READS_WEIGHT.format(name=re.escape(name)), source):
        return f"{parent.__name__} reads its matrix without calling the layer"
    return None


def _is_adapted(module: torch.nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _twin(module: torch.nn.Module) -> Any:
    """A peft model like `module` on the meta device."""
    from peft import get_peft_model

    base = base_model(module)
    with torch.device("meta"):
        fresh = type(base)(copy.deepcopy(base.config))
    fresh.generation_config = base.generation_config
    configs = {name: _without_init(config) for name, config in module.peft_config.items()}
    first, *others = configs
    bare = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
    twin = get_peft_model(fresh, configs[first], adapter_name=first, **bare)
    for name in others:
        twin.add_adapter(name, configs[name], **bare)
    twin.base_model.set_adapter(module.active_adapters)
    return twin


def _merge(twin: Any) -> "PreTrainedModel":
    for layer in twin.modules():
        if not _is_adapted(layer):
            continue
        # Layers of experts are wrapped once for each of their parameters, and have no `weight`.
        parameters = list(layer.parameters())
        dtypes = [parameter.dtype for parameter in parameters]
        for parameter in parameters:
            # A copy, also in fp32: merging writes in place, and the matrix may be tied to one without an adapter.
            parameter.data = parameter.data.to(torch.float32, copy=True)
        layer.merge()
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
    return twin.unload()


def _without_init(config: Any) -> Any:
    """The adapter's config, with no initialization that would read weights (there are none on the meta device)."""
    from peft import LoraConfig

    config = copy.deepcopy(config)
    if isinstance(config, LoraConfig):
        config.init_lora_weights = False
    return config
