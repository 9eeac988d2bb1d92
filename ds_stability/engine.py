"""`initialize`: a DeepSpeed engine that measures and, above level 0, controls the stability of training.

The live engine is extended by a dynamic subclass, so it stays a `DeepSpeedEngine` to Accelerate, Trainer and torch. One
optimizer step, top to bottom, is `StabilityMixin._take_model_step`; what it uses is gathered in `stability.py`.
"""

import copy
import inspect
import weakref
from pathlib import Path

import deepspeed
import torch

from ds_stability import checkpoint
from ds_stability.config import StabilityConfig, split_config, unsupported
from ds_stability.deepspeed_config import find_auto, load_ds_config
from ds_stability.errors import StabilityConfigError
from ds_stability.loss_kernel import require_kernel
from ds_stability.parallelism import require_data_parallelism
from ds_stability.precision_support import require_precision
from ds_stability.shared_memory import forget_buffers
from ds_stability.stability import Stability
from ds_stability.universal import mend_loaded_optimizer

_deepspeed_initialize = deepspeed.initialize
# Both ends weak: an engine holds its module, so a strong value would keep every engine of a process alive.
_ENGINES: "weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref]" = weakref.WeakKeyDictionary()


def initialize(*args, **kwargs):
    """`deepspeed.initialize` with a `stability` block in its config; same arguments, same returned tuple.

    An engine without an optimizer (for evaluation, or a frozen reference model) comes back as DeepSpeed made it.

    Raises:
        StabilityConfigError: the block is wrong, the config holds "auto" values (those are for Trainer, which fills them
            in), asks for a feature or a precision that is not supported, or differs between ranks.
    """
    return _initialize(args, kwargs, auto_allowed=False)


def initialize_for_trainer(*args, **kwargs):
    """`initialize` for Accelerate and TRL, which fill in "auto" values, or leave some to DeepSpeed's defaults."""
    return _initialize(args, kwargs, auto_allowed=True)


def _initialize(args, kwargs, auto_allowed: bool):
    bound = inspect.signature(_deepspeed_initialize).bind_partial(*args, **kwargs)
    given = bound.arguments.get("config") or bound.arguments.get("config_params")
    if given is None and bound.arguments.get("args") is not None:
        given = _take_config_flag(bound.arguments)
    ds_config, config = split_config(load_ds_config(given if given is not None else {}))
    for sentence in unsupported(ds_config, config):
        raise StabilityConfigError(sentence)
    require_kernel(config)
    require_precision(ds_config)
    auto = find_auto(ds_config)
    if auto and not auto_allowed:
        raise StabilityConfigError(
            f'{auto[0]} is "auto" (and {len(auto) - 1} more); only a transformers Trainer fills these in: write numbers, '
            "or start from ds_configs/loop_zero3.json"
        )
    bound.arguments.pop("config_params", None)
    bound.arguments["config"] = ds_config
    result = _deepspeed_initialize(*bound.args, **bound.kwargs)
    if result[0].optimizer_name() is not None:
        attach(result[0], config)
    return result


def _take_config_flag(arguments: dict):
    """The config that `args` names, by the flags of deepspeed.add_config_arguments: DeepSpeed takes one from one place only."""
    args = arguments["args"] = copy.copy(arguments["args"])
    old, new = (getattr(args, name, None) for name in ("deepscale_config", "deepspeed_config"))
    if old is not None and new is not None:
        return None  # DeepSpeed refuses that
    if old is not None:
        args.deepscale_config = None
    elif new is not None:
        args.deepspeed_config = None
    return old if old is not None else new


def attach(engine: deepspeed.DeepSpeedEngine, config: StabilityConfig) -> deepspeed.DeepSpeedEngine:
    """Extend a live `engine` in place, before its first step. Collective: every rank must call it.

    Raises:
        StabilityConfigError: unsupported optimizer or engine, or blocks that differ between ranks.
    """
    if isinstance(engine, StabilityMixin):
        raise StabilityConfigError("this engine already has a stability block attached; attach it once")
    require_data_parallelism(engine)
    stability = Stability(engine, config)
    forget_buffers()  # it has compared the ranks' blocks, so all of them are there
    object.__setattr__(engine, "stability", stability)  # not through nn.Module, which would look for submodules
    kind = type(engine)
    engine.__class__ = type(f"Stability{kind.__name__}", (StabilityMixin, kind), {})
    _ENGINES[engine.module] = weakref.ref(engine)
    return engine


def engine_of(module: torch.nn.Module) -> deepspeed.DeepSpeedEngine | None:
    """The extended engine that trains `module`, if there is one."""
    reference = _ENGINES.get(module)
    return reference() if reference is not None else None


class StabilityMixin:
    """What the dynamic subclass adds to a DeepSpeedEngine."""

    def forward(self, *inputs, **kwargs):
        stability = self.stability
        if stability.ema is not None:
            stability.ema.mend(self)
        if torch.is_grad_enabled():
            if stability.expects_training:
                stability.measure_held_out()
            if stability.preparation is not None or stability.alarm is not None:
                if inputs:
                    kwargs = {**inspect.signature(self.module.forward).bind_partial(*inputs).arguments, **kwargs}
                inputs, kwargs = (), stability.before_forward(kwargs)
        return super().forward(*inputs, **kwargs)

    def _take_model_step(self, lr_kwargs):
        stability = self.stability
        stability.require_own_weights("a training step")
        sums = stability.reduce()  # the one collective and the one host synchronization of the step
        with stability.in_force(sums):  # this step's clip threshold; a forced skip when a number is not finite
            super()._take_model_step(lr_kwargs)
        stability.finish(sums, applied=self.was_step_applied())

    def destroy(self):
        """As DeepSpeed's; the model is as it was before `initialize`, and another engine, or none, can train it."""
        self.stability.release()
        super().destroy()

    def save_checkpoint(self, save_dir, tag=None, client_state={}, save_latest=True, exclude_frozen_parameters=False):  # noqa: B006
        """As DeepSpeed's (same signature: Trainer inspects it), with the stability state beside the shards."""
        self.stability.require_own_weights("save_checkpoint")
        tag = str(tag if tag is not None else f"global_step{self.global_steps}")
        state = self.stability.state_dict()
        if self.stability.recorder is not None:
            self.stability.recorder.flush()  # a run that goes on from here must find the lines up to here
        checkpoint.save(self, save_dir, tag, state)  # before `latest`, which DeepSpeed writes last
        saved = super().save_checkpoint(save_dir, tag=tag, client_state={**client_state, checkpoint.KEY: state},
                                        save_latest=save_latest,
                                        exclude_frozen_parameters=exclude_frozen_parameters)  # fmt: skip
        self.stability.restart_clock()
        return saved

    def load_checkpoint(self, load_dir, *args, **kwargs):
        self.stability.require_own_weights("load_checkpoint")
        path, client_state = super().load_checkpoint(load_dir, *args, **kwargs)
        asked = inspect.signature(deepspeed.DeepSpeedEngine.load_checkpoint).bind(self, load_dir, *args, **kwargs)
        asked.apply_defaults()
        warm_start = asked.arguments["load_module_only"] or not asked.arguments["load_optimizer_states"]
        if path is not None and self.stability.ema is not None:
            self.stability.ema.clear()
        if path is not None and not warm_start:  # weights alone: the controller starts anew, as the optimizer does
            if self.load_universal_checkpoint():
                mend_loaded_optimizer(self, Path(path).parent)
            checkpoint.load(self, path, client_state)
        return path, client_state
