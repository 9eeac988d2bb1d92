"""Which forward is training: the one that is differentiated, whatever mode the model is in.

`from_pretrained` returns a model in eval mode, and DeepSpeed trains it; others evaluate in eval mode and forget `torch.no_grad()`.
The mode cannot tell the two apart, and nothing can at the time of the forward. So a forward that could be differentiated keeps its
statistics to itself. Its backward adds them to the step. Without a backward until the step ends they are those of an evaluation, if
the model was in eval mode, or nothing. A forward that activation checkpointing repeats is not differentiated a second time.
"""

from collections.abc import Callable
from typing import Any

import torch

from ds_stability.errors import StabilityConfigError


class Forward:
    """One forward that can be differentiated.

    Attributes:
        sums: its own TokenAccumulator.
        measured: whether `sums` belong to the step's statistics, if it is trained on.
        number: how many such forwards there were before it since the last step.
        training: the model's mode.
        notes: called when it is differentiated, before anything is counted.
        logits_shown: whether the model's output stood in for logits (fused_head.py).
    """

    def __init__(self, sums: Any, measured: bool, number: int, training: bool, notes: list[Callable[[], None]]):
        self.sums, self.measured, self.number, self.training, self.notes = sums, measured, number, training, notes
        self.counted = self.logits_shown = False


class Forwards:
    """The differentiable forwards of `module` since the last step.

    Attributes:
        begun, differentiated: how many there were, and of how many of them a backward came.
        notes: for the coming forward; see `Forward`.
        mode: the model's mode in the last forward that was differentiated; before the first, that in which it was given.
    """

    def __init__(self, module: torch.nn.Module):
        self.module, self.mode = module, module.training
        self.notes: list[Callable[[], None]] = []
        self.waiting: list[Forward] = []  # in eval mode, not differentiated so far
        self.begun = self.differentiated = 0

    @property
    def expected(self) -> bool:
        """Whether the coming forward is likely to be differentiated: its mode is one that is trained in."""
        return torch.is_grad_enabled() and (self.module.training or not self.mode)

    def begin(self, sums: Any, measured: bool) -> Forward:
        """A forward that can be differentiated."""
        forward = Forward(sums, measured, self.begun, self.module.training, self.notes)
        self.notes, self.begun = [], self.begun + 1
        if not forward.training:
            self.waiting.append(forward)
        return forward

    def count(self, forward: Forward, interleaved: bool) -> bool:
        """`forward` is being differentiated; whether for the first time.

        Raises:
            StabilityConfigError: with `interleaved`, where ZeRO-3 would lose its gradients, as another forward came in between.
        """
        if forward.counted:
            return False
        if interleaved and forward.number != self.begun - 1:
            raise StabilityConfigError(
                "a backward came to a forward after which there was another one, and DeepSpeed's ZeRO-3 loses gradients then: call "
                "backward after each forward, add no losses of two forwards up, and evaluate under torch.no_grad()"
            )
        forward.counted = True
        for note in forward.notes:
            note()
        self.waiting = [other for other in self.waiting if other is not forward]
        self.differentiated += 1
        self.mode = forward.training
        return True

    def settle(self, evaluation: Any) -> None:
        """Those in eval mode without a backward were an evaluation."""
        for forward in self.waiting:
            evaluation.merge(forward.sums)
        self.waiting = []

    def close_step(self, evaluation: Any) -> None:
        self.settle(evaluation)
        self.begun = self.differentiated = 0
