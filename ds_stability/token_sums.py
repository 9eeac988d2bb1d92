"""Sums of token statistics on the device.

Shape suffixes: C tokens of a chunk, K fields.
"""

import torch

from ds_stability.histogram import EDGES, NUM_BINS
from ds_stability.statistics import TOKEN_FIELDS


class TokenAccumulator:
    """Sums of TOKEN_FIELDS [K] and of the surprisal histogram [NUM_BINS, 3], fp64, on the device; no host sync."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.edges = torch.tensor(EDGES, dtype=torch.float32, device=self.device)
        self.bin_ids = torch.arange(NUM_BINS, device=self.device).unsqueeze(1)
        self.reset()

    def reset(self) -> None:
        self.sums_K = torch.zeros(len(TOKEN_FIELDS), dtype=torch.float64, device=self.device)
        self.bins = torch.zeros(NUM_BINS, 3, dtype=torch.float64, device=self.device)

    def add(self, values_KC: torch.Tensor, mask_C: torch.Tensor) -> None:
        """Add per-token `values_KC` (any float dtype) of the tokens in `mask_C`."""
        values_KC = torch.where(mask_C, values_KC.double(), 0.0)  # a masked token must not bring in its NaN
        self.sums_K += values_KC.sum(dim=1)
        # A matrix product instead of index_add: no atomics, so the same bits on every run on CUDA as well.
        chosen = (torch.bucketize(values_KC[1].float(), self.edges, right=True) == self.bin_ids) & mask_C
        columns = torch.stack([mask_C.double(), values_KC[1], values_KC[2]], dim=1)
        self.bins += chosen.double() @ columns

    def fresh(self) -> "TokenAccumulator":
        """An empty one that shares the constants."""
        twin = object.__new__(TokenAccumulator)
        twin.device, twin.edges, twin.bin_ids = self.device, self.edges, self.bin_ids
        twin.reset()
        return twin

    def merge(self, other: "TokenAccumulator") -> None:
        self.sums_K += other.sums_K
        self.bins += other.bins

    def vector(self) -> torch.Tensor:
        return torch.cat([self.sums_K, self.bins.reshape(-1)])


def mask_of(token_ids: list[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """1 at each of `token_ids`, else 0; fp32 [V]."""
    mask_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)
    mask_V[torch.tensor(token_ids, dtype=torch.long, device=device)] = 1.0
    return mask_V
