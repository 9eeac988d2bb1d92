"""The one collective of an optimizer step, where it has one: pack, all-reduce, unpack.

One fp64 vector of under 4 KB, summed on the data-parallel communicator. ZeRO-3's own traffic runs on WORLD, and this one
on `engine.seq_data_parallel_group`, a communicator of its own that is quiet at the step boundary, after backward
(deepspeed-notes section 5). The only host synchronization of the step is the copy at the end.
"""

import hashlib
import json

import torch
from deepspeed import comm as dist

from ds_stability.errors import StabilityConfigError
from ds_stability.statistics import INDEX, STEP_FIELDS, TOKEN_FIELDS, VECTOR_SIZE, StepSums

#: A wish to stop is heard after about so long (longer once, where steps suddenly take longer), or a step.
HEAR_SECONDS = 1.0


def reduce_step(vector: torch.Tensor, group) -> StepSums:
    """Sum `vector`, fp64 [VECTOR_SIZE], over `group` and bring it to the host."""
    if vector.shape != (VECTOR_SIZE,) or vector.dtype != torch.float64:
        raise ValueError(f"expected fp64 [{VECTOR_SIZE}], got {vector.dtype} {tuple(vector.shape)}")
    dist.all_reduce(vector, op=dist.ReduceOp.SUM, group=group)
    return StepSums(vector.cpu().numpy())


class Pace:
    """Which steps have the all-reduce: all, but at level 0 few of those that measure nothing (`statistics.interval` above 1).

    ZeRO-3's own norm of the gradient is all that such a step knows, and every rank has it. What is left to hear is a wish to
    stop, so there is an all-reduce about every second. All ranks decide alike: by numbers that came with the last one.
    """

    def __init__(self, group, interval: int):
        self.group, self.interval = group, interval
        self.left = 0  # steps that still go without

    def measures(self, applied_steps: int) -> bool:
        """Whether a step has more to send than a norm and a wish."""
        return applied_steps % self.interval == 0

    def reduce(self, vector: torch.Tensor, applied_steps: int, grad_sq: torch.Tensor | None) -> StepSums:
        """As `reduce_step`, or with nothing in it but `grad_sq`, which every rank knows where `interval` is above 1."""
        if self.left > 0 and not self.measures(applied_steps):
            self.left -= 1
            known = torch.zeros_like(vector)
            known[INDEX["grad_sq"]] = grad_sq
            return StepSums(known.cpu().numpy())
        sums = reduce_step(vector, self.group)
        seconds = sums["seconds"] / dist.get_world_size(group=self.group)
        # Once heard, a wish is heard in every step: a loop may look for it in every tenth one.
        hurried = seconds <= 0 or sums["stop_requests"] > 0
        self.left = 0 if hurried else max(0, int(HEAR_SECONDS / seconds) - 1)
        return sums


def reduce_tokens(vector: torch.Tensor, group) -> StepSums:
    """Global sums of an accumulator's vector, outside the optimizer step; fp64 [TOKEN_FIELDS and the histogram]."""
    count = len(TOKEN_FIELDS)
    padding = torch.zeros(len(STEP_FIELDS), dtype=torch.float64, device=vector.device)
    return reduce_step(torch.cat([vector[:count], padding, vector[count:]]), group)


def require_equal(value: dict, device: torch.device, group, what: str, hint: str = "give every rank the same config file") -> None:
    """Stop every rank when `value` differs between ranks.

    Raises:
        StabilityConfigError: on all ranks alike, before the first training collective could hang.
    """
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.float32, device=device)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(low, high):
        raise StabilityConfigError(
            f"the {what} differs between ranks (here sha256 {digest.hex()[:12]}); {hint}"
        )
