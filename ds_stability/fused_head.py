"""Where the linear loss enters a transformers model: inside its head, so that ZeRO-3's own hooks gather the weight.

`find_transform` learns what a model does between head and loss by running the model's own forward once on stubs (no weight
is touched, nothing is communicated), so it needs no list of architectures. `FusedHead` then computes the loss in the head's
forward, from the labels that a hook saw at the model's entrance, and hands the model a carrier of shape [batch, sequence, 1]
in place of logits; the model's `loss_function` takes the finished loss for it. In such a forward `outputs.logits` is a
`NoLogits`, which says so to whoever uses it.
"""

import copy
import inspect
import math
import sys
from types import MethodType

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, ModelOutput

from ds_stability.errors import StabilityConfigError
from ds_stability.linear_loss import linear_loss
from ds_stability.linear_spec import LogitTransform, LossSpec
from ds_stability.loss import IGNORE_INDEX, StabilityLoss

SLOPE_AT = 2.0**-10  # where softcap * tanh(x / softcap) is x to fp32 rounding, for caps above 1
SATURATED_AT = 2.0**30
STUB_LOSS = 0.625
#: Of the first carrier; large enough to show a soft-cap, and the same in every dtype.
CARRIER_CHECK = 16.0
_PROBES = (0.0, SLOPE_AT, -SLOPE_AT, -0.3, 1.0, 2.7, -7.0, 19.0, -45.0, 300.0, SATURATED_AT, -SATURATED_AT)


class UnknownHead(Exception):
    """Why a model cannot have its head fused: the end of a sentence."""


class NoLogitsError(StabilityConfigError, AttributeError):
    """Somebody used the logits of a forward that has none. An AttributeError, so that `hasattr` stays a question."""

    def __init__(self, *_):
        super().__init__(
            "above stability level 0 the model's head computes the loss, and a training forward has no logits: evaluate under "
            'torch.no_grad(), and set stability.loss_path to "chunked" if something has to read them in training; if the training loss is computed from them, outside '
            "of the model, no level can act on it: set stability.level to 0"
        )


class NoLogits:
    """Stands for the logits of such a forward; every use of it raises NoLogitsError."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NoLogitsError

    def __getitem__(self, index):
        raise NoLogitsError

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise NoLogitsError


class _Outputs(BaseModelOutputWithPastAndCrossAttentions):
    """What a stubbed backbone returns: hidden states, and None for whatever else is asked of it."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class _Backbone(torch.nn.Module):
    """Stands for any part with parameters, and for the parts of it that a model calls directly (OPT's decoder)."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self

    def forward(self, *args, **kwargs):
        return _Outputs(last_hidden_state=torch.zeros(1, 2, 1))


class _ProbeHead(torch.nn.Linear):
    """Returns given logits; `weight` is as small as a weight can be."""

    def __init__(self, logits_11V: torch.Tensor):
        super().__init__(1, 1, bias=False)
        self.logits_BTV, self.calls = logits_11V.expand(1, 2, -1), 0

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)  # draws no random number

    def forward(self, hidden):
        self.calls += 1
        return self.logits_BTV.clone()


def find_transform(model) -> LogitTransform:
    """What `model` does between its head and its loss.

    Raises:
        UnknownHead: no plain linear head that is called once, or something other than scaling and soft-capping follows.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise UnknownHead(f"its head is a {type(head).__name__}, not a torch.nn.Linear")
    if not any(child is head for child in model._modules.values()):
        raise UnknownHead("its head is not a direct child of the model")
    own = [name for name, parameter in model._parameters.items() if parameter is not None]
    if own:
        raise UnknownHead(f"it has a parameter of its own beside its parts ({own[0]}), which may act on its logits")
    # As wide as the head, so that a model which treats some tokens in another way is seen to.
    width = max(head.out_features, len(_PROBES))
    probes_V = torch.tensor(_PROBES, dtype=torch.float64).repeat(-(-width // len(_PROBES)))[:width]
    found_V = _follow(model, head, probes_V)
    transform = _fit(probes_V, found_V)
    _follow(model, head, probes_V[1:2])  # the carrier is one wide: whatever minds that, minds it here
    return transform


def _follow(model, head, logits_V: torch.Tensor) -> torch.Tensor:
    """What reaches the loss function when the head returns `logits_V` at each position."""
    shell, probe, seen = copy.copy(model), _ProbeHead(logits_V), []
    shell.__dict__["_modules"] = {name: probe if child is head else _stub(child) for name, child in model._modules.items()}

    loss = torch.tensor(STUB_LOSS)

    def loss_function(logits, labels, *args, **kwargs):
        seen.append((logits, labels, kwargs))
        return loss

    shell.__dict__.update(_loss_function=loss_function, training=True)
    labels = torch.zeros(1, 2, dtype=torch.long)
    output = _run(shell, type(model).forward, labels)
    if probe.calls != 1 or len(seen) != 1:
        raise UnknownHead(f"its forward calls its head {probe.calls} times and its loss function {len(seen)} times")
    _require_loss(output, loss)
    found, targets, kwargs = seen[0]
    if targets is not labels or kwargs.get("shift_labels") is not None:
        raise UnknownHead("it changes the labels before its loss")
    if found.shape != probe.logits_BTV.shape or not torch.equal(found[0, 0], found[0, 1]):
        raise UnknownHead(f"its logits change shape on the way from {tuple(probe.logits_BTV.shape)} to {tuple(found.shape)}")
    return found[0, 0].double()


def _run(shell, forward, labels):
    """Output of `forward` on a model of stubs; draws nothing from torch's generator."""
    # A router's logits come from its backbone; their loss is added to ours without a look at the logits.
    extra = {"output_router_logits": False} if "output_router_logits" in inspect.signature(forward).parameters else {}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a dropout of the model's own may draw
            return forward(shell, input_ids=torch.zeros(1, 2, dtype=torch.long), labels=labels, **extra)
    except Exception as error:  # foreign code on stubs may raise anything, and every reason means the same
        raise UnknownHead(f"its forward needs more than its hidden states after them ({error})") from error


def _require_loss(output, loss: torch.Tensor) -> None:
    """Raises UnknownHead unless `output` holds the loss as the loss function gave it (Bamba adds a z-loss of the logits)."""
    if not isinstance(output, ModelOutput | tuple):
        raise UnknownHead(f"its forward returns a {type(output).__name__}, not a ModelOutput or a tuple")
    given = output.get("loss") if isinstance(output, ModelOutput) else output[0]
    if given is not loss or float(loss) != STUB_LOSS:  # the second: changed in place
        raise UnknownHead("it changes its loss after its loss function")


def _stub(child: torch.nn.Module) -> torch.nn.Module:
    """Parts without parameters (dropout, an activation) stay; the backbone does not."""
    return child if next(child.parameters(), None) is None and type(child).__module__.startswith("torch.nn") else _Backbone()


def _fit(probes_V: torch.Tensor, found_V: torch.Tensor) -> LogitTransform:
    """The transform that explains every probe; soft-cap and scale are read off saturation and slope."""
    cap = float(found_V[_PROBES.index(SATURATED_AT)])
    scale = float(found_V[_PROBES.index(SLOPE_AT)]) / SLOPE_AT
    if not all(map(math.isfinite, (cap, scale))):
        raise UnknownHead("its logits become infinite after its head")
    linear = LogitTransform(scale)
    if _explains(linear, probes_V, found_V):
        return linear
    if cap > 0 and scale > 0:
        # The slope at SLOPE_AT is short by (scale * SLOPE_AT / cap)^2 / 3 of the slope at 0.
        scale = cap * math.atanh(float(found_V[_PROBES.index(SLOPE_AT)]) / cap) / SLOPE_AT
        capped = LogitTransform(scale, cap)
        if _explains(capped, probes_V, found_V):
            return capped
    raise UnknownHead("it changes its logits after its head by more than a scale or a soft-cap")


def _explains(transform: LogitTransform, probes_V, found_V) -> bool:
    return torch.allclose(transform.apply_(probes_V.clone()), found_V, rtol=1e-6, atol=1e-9)


class RoutedLinear(torch.nn.Linear):
    """The class of a fused head: a Linear that asks its `FusedHead` first."""

    def forward(self, input):
        carrier = self.fused(self, input)
        return super().forward(input) if carrier is None else carrier


class _Join(torch.autograd.Function):
    """`loss`, with a backward that also walks the carrier's graph: ZeRO-3's pre-backward hook of the head lies there.

    The gradients are ready, but autograd only accumulates one into a weight that has its full size: it must be gathered.
    """

    @staticmethod
    def forward(ctx, loss, carrier):
        ctx.shape = carrier.shape
        ctx.save_for_backward(carrier.new_zeros(()))
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, ctx.saved_tensors[0].expand(ctx.shape)


class FusedHead:
    """Routes the head of `model` through the linear loss whenever a training forward has labels.

    Args:
        model: transformers causal LM whose `loss_function` is `loss`.
        loss: asked for setting, objective, high-frequency set and chunk size of the step in each forward; takes the result.
        root: the module that is called in training, where that is not `model` itself: PEFT's tuners call the forward of
            their model without its hooks.
        engine_hooks: ids of DeepSpeed's forward hooks, which mind no carrier; any other hook on the head gets logits.

    Raises:
        UnknownHead: see `find_transform`.
    """

    def __init__(self, model, loss: StabilityLoss, root: torch.nn.Module | None = None, engine_hooks: frozenset[int] = frozenset()):
        head = model.get_output_embeddings()
        if type(head) is RoutedLinear and not head.fused.entrances:
            head.fused.leave_copy(head, model, root)
        self.transform = find_transform(model)
        self.model, self.loss, self.checked = model, loss, False
        self.entrances = (model,) if root is None or root is model else (model, root)
        self.signatures = {id(module): inspect.signature(type(module).forward) for module in self.entrances}
        self._disarm()
        head.__class__, head.fused = RoutedLinear, self
        # Their number, not their ids: ZeRO-3's hooks may be taken off and put back.
        self.head, self.hooks = head, sum(key in engine_hooks for key in head._forward_hooks)
        self.handles = [module.register_forward_pre_hook(self._enter, with_kwargs=True) for module in self.entrances]
        self.handles += [module.register_forward_hook(self._leave, always_call=True) for module in self.entrances]

    def _disarm(self) -> None:
        self.targets = self.pending = self.labels = self.carrier_shape = None

    def __deepcopy__(self, memo):
        """A copied model (a reference model, an EMA) has a plain head."""
        twin = object.__new__(FusedHead)
        twin.entrances = ()
        twin._disarm()
        return twin

    def leave_copy(self, head, *modules) -> None:
        """Make the head of a copied model a plain one, to be fused anew."""
        head.__class__ = torch.nn.Linear
        del head.fused
        for module in filter(None, modules):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, MethodType) and hook.__self__ is self]:
                    del hooks[key]

    def _enter(self, module, args, kwargs):
        """Arm the head when this forward ends in a training loss over every position."""
        if not any(module is entrance for entrance in self.entrances):  # a copy, whose hooks came along
            return
        self._disarm()
        signature = self.signatures[id(module)]
        given = signature.bind_partial(module, *args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        kept = given.get("logits_to_keep", 0)
        if not self.loss.calls.expected or torch.is_tensor(kept) or kept != 0:
            return
        if len(self.head._forward_hooks) != self.hooks:  # somebody wants to see, or to change, the logits
            return
        labels, shifted = given.get("labels"), given.get("shift_labels")
        if labels is None:  # without labels no model calls its loss function
            return
        ignore_index = given.get("ignore_index", IGNORE_INDEX)
        self.labels = (labels, shifted, ignore_index)
        if shifted is None:
            shifted = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        self.targets = shifted.reshape(-1)

    def __call__(self, head, hidden_BTD):
        """The carrier, or None where the head should give logits."""
        if self.targets is None or hidden_BTD.shape[:-1].numel() != self.targets.numel():
            return None
        if not (hidden_BTD.requires_grad or head.weight.requires_grad):
            return None
        targets_N, self.targets = self.targets.to(hidden_BTD.device), None
        loss, carrier, tokens = linear_loss(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), head.weight, head.bias,
                                            targets_N, self._spec(), self.labels[2])  # fmt: skip
        self.pending, self.carrier_shape = (loss, tokens), (*hidden_BTD.shape[:-1], 1)
        if not self.checked:
            carrier = carrier + CARRIER_CHECK
        return carrier.expand(self.carrier_shape).clone()  # a model may work on its logits in place

    def _spec(self) -> LossSpec:
        loss = self.loss
        permute = loss.permuted if loss.permutation_step is not None else None
        return LossSpec(loss.setting, loss.objective, -loss.setting.entropy_bonus, self.transform, loss.high_frequency_V,
                        loss.chunk_size, permute, loss.kernel)  # fmt: skip

    def take(self, carrier, labels, shifted, ignore_index):
        """(loss sum, tokens) of this forward, or None if its head gave logits.

        Raises:
            StabilityConfigError: the loss function was called with other labels than the model, or with other logits than the
                model's class makes of its head's (a forward patched into the model).
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        if self.labels[0] is not labels or self.labels[1] is not shifted or self.labels[2] != ignore_index:
            raise StabilityConfigError(
                f"{type(self.model).__name__} calls its loss function with other labels than it was given, so its loss cannot "
                'be computed in its head; set stability.loss_path to "chunked"'
            )
        if not self.checked:
            self._check(carrier)
        loss, tokens = pending
        return _Join.apply(loss, carrier), tokens

    def _check(self, carrier) -> None:
        """Once, with one host sync: what runs is the forward that was recognized."""
        self.checked = True
        wanted = self.transform.apply_(torch.full(carrier.shape, CARRIER_CHECK, device=carrier.device))
        if not torch.allclose(carrier.detach().float(), wanted, rtol=2.0**-6, atol=0.0):  # bf16 rounds more than once
            raise StabilityConfigError(
                f"the forward that runs in {type(self.model).__name__} changes its logits in another way than its class does (a "
                'patched forward?), so its loss cannot be computed in its head; set stability.loss_path to "chunked"'
            )

    def _leave(self, module, args, output):
        """Nobody should take the carrier for logits. Called after an exception as well, then with None."""
        if not any(module is entrance for entrance in self.entrances):
            return None
        shape = self.carrier_shape
        self._disarm()
        if shape is not None and isinstance(output, ModelOutput):
            output = type(output)(**{name: _hide(value, shape) for name, value in output.items()})
        elif shape is not None and isinstance(output, tuple):
            output = tuple(_hide(value, shape) for value in output)
        if module is self.entrances[-1] and self.loss.latest is not None and isinstance(output, ModelOutput | tuple):
            values = output.values() if isinstance(output, ModelOutput) else output
            self.loss.latest.logits_shown = any(isinstance(value, NoLogits) for value in values)
        return output if shape is not None else None

    def release(self) -> None:
        """Give the head back as it was: another engine may train the model."""
        if type(self.head) is RoutedLinear and self.head.fused is self:
            self.head.__class__ = torch.nn.Linear
            del self.head.fused
        for handle in self.handles:
            handle.remove()


def _hide(value, shape: tuple):
    """NoLogits for the carrier, which nothing else in an output has the shape of; a cast may have made another tensor of it."""
    return NoLogits() if torch.is_tensor(value) and value.shape == shape else value


def fuse_head(model, loss: StabilityLoss, root=None, engine_hooks: frozenset[int] = frozenset()) -> None:
    """Let the head of `model` compute `loss`. A head that is not understood goes on giving logits, which rank 0 says once."""
    try:
        loss.head = FusedHead(model, loss, root, engine_hooks)
    except UnknownHead as reason:
        if loss.rank == 0:
            print(f"ds_stability: the loss of {type(model).__name__} is computed from its logits (loss_path chunked): {reason}",
                  file=sys.stderr, flush=True)  # fmt: skip
