"""Norm of each rank's gradient before reduction, for the gradient noise scale.

One hook per parameter (`torch.Tensor.register_hook`, public) adds up squared norms during backward; nothing is kept but
a list of device scalars, and the host is not asked. The gradient of a micro-batch is turned into the gradient of the
mean loss over its own tokens by the incoming gradient of the loss itself, so loss scale, accumulation and the caller's
own normalization need not be known.
"""

import torch

from ds_stability.norms import squares, total


class MicroGradientMeter:
    """Sums over micro-batches: |gradient of the mean token loss|^2 times tokens, and the coefficient behind the reduced one.

    Weighting by tokens keeps the estimate unbiased when micro-batches are unequal: E|G_b|^2 = |G|^2 + tr(Sigma) / b, so the
    weighted mean is |G|^2 + tr(Sigma) * micro-batches / tokens.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device, divisor: int):
        self.device, self.divisor = device, divisor  # ranks over which gradients are averaged; 1 where they are added up
        self.squares: list[torch.Tensor] = []
        self.scale = self.tokens = None
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.handles: list = []
        self.clear()

    def listen(self, wanted: bool) -> None:
        """Whether the coming backward passes are measured: without hooks a step that is not costs nothing."""
        if wanted and not self.handles:
            self.handles = [p.register_hook(self._tap) for p in self.parameters if p.requires_grad]  # some may be frozen since
        while not wanted and self.handles:
            self.handles.pop().remove()

    def clear(self) -> None:
        """(micro_grad_sq, micro_batches, coefficient), fp64 [3]."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def start(self, grad_output: torch.Tensor, denominator, tokens: torch.Tensor) -> None:
        """A backward begins: d loss / d token loss is grad_output / denominator for each of `tokens`."""
        self.close()
        scale = grad_output.double() / denominator * tokens
        self.scale = torch.where(tokens > 0, scale, 0.0).to(self.device)  # Trainer's denominator may be 0 then
        self.tokens = tokens

    def _tap(self, grad: torch.Tensor) -> None:
        if self.scale is not None:
            self.squares += squares(grad)

    def close(self) -> None:
        """Fold the finished micro-batch into the sums."""
        if self.scale is not None and self.squares:
            squared = total(self.squares).to(self.device)
            some = self.scale > 0  # a micro-batch without supervised tokens has no gradient of its own
            micro = torch.where(some, self.tokens.to(self.device) * squared / self.scale.square(), 0.0)
            self.sums += torch.stack([micro, some.double(), self.scale / self.divisor])
        self.squares, self.scale = [], None
