"""The governor's held-out probe: a few sequences that are read forward only, the same number of forwards on every rank.

Legend: S sequences of the probe, T tokens, B micro-batch. A forward reads one
sequence, and no loss is computed. The pass has an accumulator of its own; its sums are reduced apart from the step's one collective.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from deepspeed import comm as dist

from ds_stability.collective import reduce_tokens, require_equal
from ds_stability.console import agree
from ds_stability.errors import StabilityConfigError
from ds_stability.loss import IGNORE_INDEX, StabilityLoss, TokenAccumulator
from ds_stability.stabilizers.governance import Governance

#: What a missing or too short column of a sequence is filled with.
FILL = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0, "position_ids": 0}


class HeldOut:
    """Sequences that every rank has, dealt out to ranks and cut into micro-batches.

    Args:
        sequences: mappings with input_ids and labels (and attention_mask, position_ids), [T] or batches [B, T]; the same
            on every rank. Unequal lengths are padded on the right.
        size: sequences to use at most, from the front.
        micro_batch: sequences of a forward.
        rank, world_size: which share is this process's.

    Raises:
        StabilityConfigError: nothing to read, or a sequence without labels.
    """

    def __init__(self, sequences: Iterable[Mapping[str, torch.Tensor]], size: int, micro_batch: int, rank: int, world_size: int):
        rows = first_rows(sequences, size)
        if not rows or not any(bool((row["labels"][1:] != IGNORE_INDEX).any()) for row in rows):
            raise StabilityConfigError("the governor's held-out data has no supervised token; give sequences with labels")
        self.columns = _stacked(rows)
        digest = hashlib.sha256()
        for column in self.columns.values():
            digest.update(column.numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        share = -(-len(rows) // world_size)
        self.batches = [self._batch(range(rank * share + start, rank * share + min(start + micro_batch, share)), len(rows))
                        for start in range(0, share, micro_batch)]  # fmt: skip

    def _batch(self, indices: range, count: int) -> dict[str, torch.Tensor]:
        """Sequences `indices`; those past the end are copies without labels, so that every rank has as many."""
        chosen = torch.tensor([min(index, count - 1) for index in indices])
        batch = {name: column[chosen].clone() for name, column in self.columns.items()}
        batch["labels"][torch.tensor([index >= count for index in indices])] = IGNORE_INDEX
        return batch

    @torch.no_grad()
    def sums(self, engine, loss: StabilityLoss, device: torch.device) -> torch.Tensor:
        """This rank's sums over its share, fp64 [TOKEN_FIELDS and the histogram]: as `TokenAccumulator.vector`."""
        accumulator, other = TokenAccumulator(device), loss.evaluation
        loss.evaluation, loss.statistics_only = accumulator, True
        try:
            with evaluating(engine.module):
                for batch in self.batches:
                    engine(**{name: column.to(device) for name, column in batch.items()}, use_cache=False)
        finally:
            loss.evaluation, loss.statistics_only = other, False
        return accumulator.vector()


class GovernorProbe:
    """Measures for the governor at the first training forward of a step, on every rank alike.

    Args:
        engine: the live engine, or a weak proxy of it.
        governance: the governor's stabilizer, which says when a measurement is due.
    """

    def __init__(self, engine, loss: StabilityLoss, governance: Governance, group, device: torch.device):
        self.engine, self.loss, self.governance, self.group, self.device = engine, loss, governance, group, device
        self.held_out: HeldOut | None = None

    @property
    def missing(self) -> bool:
        """Whether `set` must still be called before the first step."""
        return self.governance.control.needs_probe and self.held_out is None

    def set(self, sequences: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Take the sequences to measure on. Collective; the same ones on every rank.

        Args:
            sequences: mappings with input_ids and labels (attention_mask, position_ids), [T] or batches [B, T]; the first
                `controller.probe_size` sequences are used.

        Raises:
            StabilityConfigError: on every rank; nothing to read in them, or other sequences on another rank, or than those
                on which this run has measured.
        """
        world_size, rank = dist.get_world_size(group=self.group), dist.get_rank(group=self.group)
        size = self.governance.control.probe_size
        held_out = agree(lambda: HeldOut(sequences, size, 1, rank, world_size))
        require_equal({"sequences": held_out.fingerprint}, self.device, self.group, "governor's held-out data",
                      "give every rank the same sequences, without random choices in a data collator")  # fmt: skip
        self.governance.take_held_out(held_out.fingerprint)
        self.held_out = held_out

    def measure(self) -> bool:
        """Measure if that is due; whether it was.

        Raises:
            StabilityConfigError: on every rank; no held-out sequences, or no high-frequency set, were given.
        """
        control = self.governance.control
        if control.statistic == "high_frequency_mass" and self.loss.high_frequency_V is None:
            raise StabilityConfigError(
                "stability.controller.statistic is high_frequency_mass, and no high-frequency set is known; give "
                "stability.statistics.high_frequency_file, or call engine.stability.set_high_frequency before training"
            )
        if not self.governance.due():
            return False
        if self.held_out is None:
            raise StabilityConfigError(
                f"the governor (target {control.target}, probe_interval {control.probe_interval}) measures on held-out text "
                "and has none; call engine.stability.set_held_out(sequences) before training, or give a number as the target and set "
                "stability.controller.probe_interval to 0"
            )
        self.governance.measure(reduce_tokens(self.held_out.sums(self.engine, self.loss, self.device), self.group))
        return True


def first_rows(sequences: Iterable[Mapping[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """The first `size` sequences as [T] tensors on the CPU, from sequences or batches of them."""
    rows: list[dict[str, torch.Tensor]] = []
    for item in sequences:
        if "input_ids" not in item or "labels" not in item:
            raise StabilityConfigError(f"the governor's held-out data has the columns {', '.join(map(str, item))}; each sequence "
                                       "needs input_ids and labels")  # fmt: skip
        tensors = {name: torch.as_tensor(item[name]).cpu() for name in FILL if name in item}
        many = tensors["input_ids"].dim() == 2
        for index in range(len(tensors["input_ids"]) if many else 1):
            rows.append({name: tensor[index] if many else tensor for name, tensor in tensors.items()})
            if len(rows) == size:
                return rows
    return rows


def _stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Columns [S, T], padded on the right; padding gets a mask where it could be attended to."""
    length = max(len(row["input_ids"]) for row in rows)
    names = set(rows[0])
    if any(set(row) != names for row in rows):
        raise StabilityConfigError("the governor's held-out sequences have different columns; give each the same ones")
    if "position_ids" not in names and "attention_mask" not in names and any(len(row["input_ids"]) < length for row in rows):
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        names |= {"attention_mask"}
    return {name: torch.stack([torch.nn.functional.pad(row[name], (0, length - len(row[name])), value=FILL[name])
                               for row in rows]) for name in FILL if name in names}  # fmt: skip


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside; what was in training mode before is so again afterwards."""
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True
