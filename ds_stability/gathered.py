"""Whole weights of a live DeepSpeed engine for a while, leaving no trace in the training.

Under ZeRO-3 a forward pass gathers and frees each submodule's weights through module hooks, in lockstep on all ranks,
against a recorded trace of the step. Generating text that way would gather every weight once per token, and would
leave another trace behind. `standalone_module` gathers all weights once and lends the module *without* those hooks, so
that each rank runs what it likes, as if the model were a plain one; DeepSpeed's coordinator never notices.
"""

import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from ds_stability.errors import UserError

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers import PreTrainedModel


def base_model(module: torch.nn.Module) -> "PreTrainedModel":
    """The transformers model itself, taken out of a peft wrapper if it is in one; UserError for any other module."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        return module
    if is_peft(module):
        return module.get_base_model()
    raise UserError(f"model is a {type(module).__name__}; generation and export need a transformers model")


def is_peft(module: torch.nn.Module) -> bool:
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(module, PeftModel)


def is_partitioned(engine: "DeepSpeedEngine") -> bool:
    """Whether the weights are spread over the ranks (ZeRO-3)."""
    return engine.zero_optimization_partition_weights()


def weight_bytes(engine: "DeepSpeedEngine") -> int:
    """Bytes that all weights take when they are whole."""
    zero3 = is_partitioned(engine)
    parameters = engine.module.parameters()
    return sum((p.ds_numel if zero3 else p.numel()) * p.element_size() for p in parameters)


@contextmanager
def whole(engine: "DeepSpeedEngine", parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Gather parameters for reading and free them again. A collective under ZeRO-3: call it on every rank.

    A parameter that is whole already (persistent ones are, between steps) stays as it is, before and after.
    """
    if not is_partitioned(engine):
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # After an evaluation weights are still on their way, prefetched for a backward that never came. The next forward
    # waits for the same handles, again at no cost, and frees what they brought.
    for handle in list(engine.module.ds_inflight_param_registry.values()):
        handle.wait()
    absent = [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    with deepspeed.zero.GatheredParameters(absent, modifier_rank=None, enabled=bool(absent)):
        yield


@contextmanager
def standalone_module(engine: "DeepSpeedEngine") -> Iterator[torch.nn.Module]:
    """Lend `engine.module` in eval mode with whole weights and without DeepSpeed's hooks, under no_grad.

    On leaving, every attribute and buffer of every submodule, and all random states, are what they were. A collective
    under ZeRO-3: enter on every rank; inside, ranks need not keep step. Do not change weights inside.
    """
    module = engine.module
    with ExitStack() as stack:
        stack.enter_context(random_state_kept())
        stack.enter_context(whole(engine, module.parameters()))
        stack.enter_context(_module_state_kept(module))
        _set_hooks_aside(module, hook_ids(engine))
        module.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(_autocast(engine))
        yield module


def _autocast(engine: "DeepSpeedEngine"):
    from deepspeed.runtime.torch_autocast import autocast_if_enabled

    return autocast_if_enabled(engine)


@contextmanager
def random_state_kept() -> Iterator[None]:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = accelerator.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        accelerator.set_rng_state(device)


@contextmanager
def _module_state_kept(module: torch.nn.Module) -> Iterator[None]:
    # Shallow copies: mode flags, generation configs, caches, rotary tables and bound methods are attributes that
    # generation replaces rather than edits.
    saved = [(m, dict(vars(m)), dict(m._buffers)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes, buffers in saved:
            vars(m).clear()
            vars(m).update(attributes)
            m._buffers.clear()
            m._buffers.update(buffers)


def hook_ids(engine: "DeepSpeedEngine") -> set[int]:
    """Ids (unique in the process) of the forward hooks that DeepSpeed put on the module: timers, autocast, ZeRO-3."""
    handles = [engine.module_forward_pre_hook, engine.module_forward_post_hook]
    if is_partitioned(engine):
        offload = engine.optimizer.parameter_offload
        handles += [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    return {handle.id for handle in handles}


def _set_hooks_aside(module: torch.nn.Module, ids: set[int]) -> None:
    # New dicts in the place of the old: the originals, with their order, come back untouched with the attributes.
    # Removing and registering again (as others do) would reorder hooks, renumber modules and drop the trace.
    for m in module.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = vars(m)[name]
            vars(m)[name] = OrderedDict((key, hook) for key, hook in hooks.items() if key not in ids)
