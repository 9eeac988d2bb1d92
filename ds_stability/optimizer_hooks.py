"""What happens inside the base optimizer's `step`: averaging, the pull to the initial weights, the update ratio.

`torch.optim.Optimizer.register_step_pre_hook` is public and has the same contract in every DeepSpeed from 0.14 on: it is
called once per parameter partition with the fp32, unscaled, clipped gradient in `p.grad`, and not at all in a skipped
step. The gradient is changed here and nowhere else, never in a bf16 buffer.
"""

import torch
from deepspeed import comm as dist

from ds_stability.gradients import ReducedGradients
from ds_stability.norms import products, squared_norm
from ds_stability.stabilizers.averaging import Averaging
from ds_stability.stabilizers.regularization import Regularization

#: Elements of a piece of the parameters whose AdamW update is computed again; on a CPU what stays in the cache.
PIECE = {"cpu": 2**17}
PIECE_DEFAULT = 2**20


class UpdateMeter:
    """|update|^2 and |parameters|^2 of this rank's partitions, in every `interval`-th applied step (0: never).

    The values of a step are known after its collective, so they travel with a later one. torch's AdamW leaves behind what
    its update was made of; for another optimizer the parameters are copied before the step.
    """

    def __init__(self, interval: int, device: torch.device):
        self.interval, self.device = interval, device
        self.before: dict[int, torch.Tensor] = {}
        self.active = False
        self.clear()

    def clear(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def prepare(self, step: int) -> None:
        self.active = self.interval > 0 and step % self.interval == 0

    def start(self, index: int, parameter: torch.Tensor) -> None:
        """Keep the parameters of a partition for `finish`."""
        if self.active:
            self.before[index] = parameter.detach().clone()

    def finish(self, index: int, parameter: torch.Tensor) -> None:
        before = self.before.pop(index, None)
        if before is not None:
            parameter_sq = squared_norm([before])
            update_sq = squared_norm([before.sub_(parameter.detach())])
            self.add(torch.stack([update_sq, parameter_sq]))

    def add(self, norms: torch.Tensor) -> None:
        if self.active:
            self.sums += norms.to(self.device, non_blocking=True)

    def pending(self, group) -> list[float]:
        """The sums that still wait, over all ranks; a collective."""
        dist.all_reduce(sums := self.sums.clone(), group=group)
        return torch.nan_to_num(sums, nan=0.0, posinf=0.0, neginf=0.0).tolist()  # for JSON

    def restore(self, pending: list[float], group) -> None:
        """Wait with what `pending` gave: it is global already, so one rank brings it in again."""
        self.clear()
        if dist.get_rank(group=group) == 0:
            self.sums += torch.tensor(pending, dtype=torch.float64, device=self.device)


def is_plain_adamw(optimizer: torch.optim.Optimizer, group: dict) -> bool:
    """Whether `adamw_norms` knows this optimizer's step."""
    return type(optimizer) is torch.optim.AdamW and not group["amsgrad"] and not group["maximize"]


@torch.no_grad()
def adamw_norms(parameter: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
    """(|update|^2, |parameters before|^2) of the step that torch's AdamW just took, fp64 [2]; no host sync.

    With u = lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), p_after = (1 - lr wd) p_before - u (arXiv 1711.05101).
    """
    (beta1, beta2), decay = group["betas"], group["lr"] * group["weight_decay"]
    step = state["step"].double().to(parameter.device, non_blocking=True)
    rate, root = group["lr"] / (1.0 - beta1**step), (1.0 - beta2**step).sqrt()
    norms = torch.zeros(2, dtype=torch.float64, device=parameter.device)
    size = PIECE.get(parameter.device.type, PIECE_DEFAULT)
    for start in range(0, parameter.numel(), size):
        after, mean, square = (t.view(-1)[start : start + size] for t in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        update = square.sqrt().div_(root).add_(group["eps"]).reciprocal_().mul_(mean).mul_(rate)
        before = (after + update).div_(1.0 - decay)
        update.add_(before, alpha=decay)
        norms += torch.stack([squared_norm([update]), squared_norm([before])])
    return norms


class OptimizerHooks:
    """Registers on the base optimizers of an engine and dispatches by partition index."""

    def __init__(
        self,
        gradients: ReducedGradients,
        averaging: Averaging | None,
        regularization: Regularization | None,
        meter: UpdateMeter,
    ):
        self.gradients, self.averaging, self.regularization, self.meter = gradients, averaging, regularization, meter
        self.index = {id(p): index for index, p in enumerate(gradients.partitions())}
        self.handles = []
        if self.index:
            for optimizer in gradients.base_optimizers():
                self.handles.append(optimizer.register_step_pre_hook(self._before))
                self.handles.append(optimizer.register_step_post_hook(self._after))

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    @torch.no_grad()
    def _before(self, optimizer, args, kwargs) -> None:
        for index, parameter, group in self._stepped(optimizer):
            if not self._replayable(optimizer, group):
                self.meter.start(index, parameter)
            if self.regularization is not None:
                self.regularization.apply(index, parameter, group["lr"])
            if self.averaging is not None:
                self.averaging.apply(index, parameter.grad)

    @torch.no_grad()
    def _after(self, optimizer, args, kwargs) -> None:
        for index, parameter, group in self._stepped(optimizer):
            if self.meter.active and self._replayable(optimizer, group):
                self.meter.add(adamw_norms(parameter.data, optimizer.state[parameter], group))
            else:
                self.meter.finish(index, parameter)

    def _replayable(self, optimizer, group) -> bool:
        """Whether the update can be known without a copy of the parameters: AdamW, and no pull before it."""
        pulled = self.regularization is not None and self.regularization.kind == "init_decay"
        return not pulled and is_plain_adamw(optimizer, group)

    def _stepped(self, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) in self.index:
                    yield self.index[id(parameter)], parameter, group

    def products(self, device: torch.device) -> torch.Tensor:
        """This rank's share of |gradient|^2, <gradient, running mean> and |running mean|^2, fp64 [3], loss scale divided out."""
        found = torch.zeros(3, dtype=torch.float64, device=device)
        if self.averaging is None or not self.averaging.means:
            found[0] = self.gradients.squared_norm(device)
            return found
        scale = self.gradients.loss_scale
        for index, tensors in enumerate(self.gradients.tensors()):
            if not tensors:
                continue
            if index not in self.averaging.means:  # of a part that has not been stepped yet
                found[0] += squared_norm(tensors).to(device, non_blocking=True)
                continue
            found[:2] += products(tensors, self.averaging.means[index]).to(device, non_blocking=True)
            found[2] += self.averaging.squared_mean(index).to(device, non_blocking=True)
        found[0] /= scale**2
        found[1] /= scale
        return found
