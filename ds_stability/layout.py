"""Where the elements of each parameter lie in a rank's flat fp32 partitions, and how slices of two layouts overlap.

ZeRO-3 cuts every parameter into as many equal slices as there are ranks in the parameter's group, the last one padded, and lays this rank's slices
one behind the other (runtime/zero/partition_parameters.py, `_partition_param`). Stages 1 and 2 lay whole parameters one
behind the other and cut that line (runtime/zero/stage_1_and_2.py; runtime/bf16_optimizer.py). In both, a partition is a
list of pieces: a stretch of a parameter at an offset, named so that another number of ranks, or stage, can find it again.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_stability.errors import StabilityConfigError


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of the flattened parameter `name` lie at [offset, offset + numel) of a partition.

    `total` is the number of elements of the whole parameter.
    """

    name: str
    start: int
    offset: int
    numel: int
    total: int


def sliced_pieces(cuts: Iterable[tuple[str, int, int, int]]) -> list[Piece]:
    """One partition of ZeRO-3: of each parameter (name, numel, rank, ranks) slice `rank` of `ranks`, padding left out."""
    pieces, offset = [], 0
    for name, total, rank, ranks in cuts:
        width = -(-total // ranks)
        start = min(rank * width, total)
        pieces.append(Piece(name, start, offset, min(width, total - start), total))
        offset += width
    return [piece for piece in pieces if piece.numel > 0]


def ranged_pieces(places: Mapping[str, tuple[int, int]], start: int, size: int) -> list[Piece]:
    """One partition of stages 1 and 2: [start, start + size) of a line on which `places` are (offset, numel) by name."""
    pieces = []
    for name, (at, total) in places.items():
        low, high = max(at, start), min(at + total, start + size)
        if low < high:
            pieces.append(Piece(name, low - at, low - start, high - low, total))
    return pieces


def overlap(piece: Piece, start: int, numel: int) -> tuple[int, int] | None:
    """The [low, high) of the parameter that `piece` shares with its elements [start, start + numel); None if nothing."""
    low, high = max(piece.start, start), min(piece.start + piece.numel, start + numel)
    return (low, high) if low < high else None


def partition_layout(optimizer) -> list[list[Piece]]:
    """The pieces of this rank's partitions, in the order of `ReducedGradients.partitions()`; none at stage 0.

    Raises:
        StabilityConfigError: DeepSpeed has cut a parameter in another way than this module knows.
    """
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        partitions = optimizer.fp32_partitioned_groups_flat
        return [_slices_of_group(optimizer.param_names, *pair) for pair in zip(optimizer.fp16_groups, partitions, strict=True)]
    if type(optimizer) is DeepSpeedZeroOptimizer:
        lines = []
        for group, meta, offsets in zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_meta,
                                        optimizer.round_robin_bit16_offsets, strict=True):  # fmt: skip
            names = [optimizer.param_names[parameter] for parameter in group]
            lines.append({name: (at, tensor.numel()) for name, at, tensor in zip(names, offsets, meta, strict=True)})
        return _ranges_of_lines(optimizer, lines, optimizer.single_partition_of_fp32_groups)
    if type(optimizer) is BF16_Optimizer:
        lines = [_one_behind_the_other(optimizer.param_names, group) for group in optimizer.bf16_groups]
        return _ranges_of_lines(optimizer, lines, optimizer.fp32_groups_flat_partition)
    return []


def clear_padding(partitions: Iterable[torch.Tensor], layout: list[list[Piece]]) -> None:
    """Zero what belongs to no parameter: ZeRO-3 leaves it uninitialized, and it would enter norms over partitions."""
    for partition, pieces in zip(partitions, layout, strict=True):
        ends = [0, *(piece.offset + piece.numel for piece in pieces)]
        starts = [*(piece.offset for piece in pieces), partition.numel()]
        for end, start in zip(ends, starts, strict=True):
            partition.data[end:start].zero_()


def _slices_of_group(names: Mapping[torch.nn.Parameter, str], group, partition: torch.Tensor) -> list[Piece]:
    """Each parameter is cut over a group of its own: that of an expert is smaller than the optimizer's."""
    cuts, size = [], 0
    for parameter in group:
        ranks, rank = dist.get_world_size(group=parameter.ds_process_group), dist.get_rank(group=parameter.ds_process_group)
        width = parameter.partition_numel()
        if width != -(-parameter.ds_numel // ranks):
            raise StabilityConfigError(
                f"{names[parameter]} has {parameter.ds_numel} elements and DeepSpeed holds {width} of them on each of {ranks} ranks, "
                "which ds_stability does not understand; use plain deepspeed.initialize"
            )
        cuts.append((names[parameter], parameter.ds_numel, rank, ranks))
        size += width
    if size != partition.numel():
        raise StabilityConfigError(
            f"the slices of {names[group[0]]} and its neighbors have {size} elements and their partition {partition.numel()}, which "
            "ds_stability does not understand; use plain deepspeed.initialize"
        )
    return sliced_pieces(cuts)


def _one_behind_the_other(names: Mapping[torch.nn.Parameter, str], group) -> dict[str, tuple[int, int]]:
    sizes = [parameter.numel() for parameter in group]
    offsets = itertools.accumulate([0, *sizes[:-1]])
    return {names[parameter]: (at, size) for parameter, at, size in zip(group, offsets, sizes, strict=True)}


def _ranges_of_lines(optimizer, lines: list[dict[str, tuple[int, int]]], partitions) -> list[list[Piece]]:
    layout = []
    for index, (places, partition) in enumerate(zip(lines, partitions, strict=True)):
        rank = dist.get_rank(group=optimizer.real_dp_process_group[index])
        layout.append(ranged_pieces(places, rank * partition.numel(), partition.numel()))
    return layout
