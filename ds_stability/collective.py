"""The one collective of an optimizer step: pack, all-reduce, unpack.

One fp64 vector of under 4 KB, summed on the data-parallel communicator. ZeRO-3's own traffic runs on WORLD, and this one
on `engine.seq_data_parallel_group`, a communicator of its own that is quiet at the step boundary, after backward
(deepspeed-notes section 5). The only host synchronization of the step is the copy at the end.
"""

import hashlib
import json

import torch
from deepspeed import comm as dist

from ds_stability.errors import StabilityConfigError
from ds_stability.statistics import STEP_FIELDS, TOKEN_FIELDS, VECTOR_SIZE, StepSums


def reduce_step(vector: torch.Tensor, group) -> StepSums:
    """Sum `vector`, fp64 [VECTOR_SIZE], over `group` and bring it to the host."""
    if vector.shape != (VECTOR_SIZE,) or vector.dtype != torch.float64:
        raise ValueError(f"expected fp64 [{VECTOR_SIZE}], got {vector.dtype} {tuple(vector.shape)}")
    dist.all_reduce(vector, op=dist.ReduceOp.SUM, group=group)
    return StepSums(vector.cpu().numpy())


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
