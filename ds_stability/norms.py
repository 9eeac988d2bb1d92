"""Sums over large tensors: squared norms and dot products, in fp32 or better, without a copy of their size and without a host sync.

On a CPU a bf16 tensor is widened a piece at a time into a buffer that stays in the cache: torch's own norm of bf16 in fp32 takes
several times as long (docs/log.md), and a sum over pieces in fp64 is more exact than one long fp32 sum.
"""

from collections.abc import Iterable, Iterator

import torch

#: Elements of a piece on a CPU: two fp32 buffers of it fit into an L2 cache.
PIECE = 2**17


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same part of each flat tensor of equal length, one part after the other; on an accelerator the whole at once."""
    length = len(tensors[0])
    size = PIECE if tensors[0].device.type == "cpu" else max(length, 1)
    if length <= size:
        yield tensors
        return
    yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)


def widened(tensor: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """`tensor` in fp32 or better: itself, or in `buffer` (fp32, at least as long)."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float() if buffer is None else buffer[: len(tensor)].copy_(tensor)


def entries(tensor: torch.Tensor) -> torch.Tensor:
    """What a norm is taken of: a sparse gradient's values, each place once; any other tensor itself."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def squares(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Scalars on the tensor's device, fp32 or better, that add up to its squared norm."""
    tensor = entries(tensor)
    if tensor.device.type != "cpu":
        return [torch.linalg.vector_norm(tensor, dtype=torch.float32).square()]
    found, flat = [], tensor.reshape(-1)
    if len(flat) <= PIECE and flat.dtype == torch.float32:  # most parameters of a small model: no more Python than this
        return [torch.dot(flat, flat)]
    buffer = new_buffer(flat)
    for (part,) in pieces(flat):
        wide = widened(part, buffer)
        found.append(torch.dot(wide, wide))
    return found


def new_buffer(flat: torch.Tensor) -> torch.Tensor | None:
    """For `widened`, where it needs one."""
    if flat.dtype in (torch.float32, torch.float64):
        return None
    return flat.new_empty(min(len(flat), PIECE) if flat.device.type == "cpu" else len(flat), dtype=torch.float32)


def total(scalars: Iterable[torch.Tensor]) -> torch.Tensor:
    """fp64 sum of scalars that are on one device."""
    return torch.stack(list(scalars)).double().sum()


def squared_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum of squares over all tensors, which are on one device, as an fp64 scalar there."""
    if tensors[0].device.type != "cpu":
        tensors = [entries(tensor) for tensor in tensors]
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).double().square().sum()
    return total(scalar for tensor in tensors for scalar in squares(tensor))


def products(tensors: list[torch.Tensor], other: torch.Tensor) -> torch.Tensor:
    """(sum of squares of `tensors`, their dot product with the flat fp32 `other`), which is as long as all of them; fp64 [2]."""
    own, mixed, offset = [], [], 0
    for tensor in tensors:
        flat = tensor.reshape(-1)
        beside, offset, buffer = other.narrow(0, offset, len(flat)), offset + len(flat), new_buffer(flat)
        for part, there in pieces(flat, beside.to(flat.device)):
            wide = widened(part, buffer)
            own.append(torch.dot(wide, wide))
            mixed.append(torch.dot(wide, there))
    return torch.stack([total(own), total(mixed)])
