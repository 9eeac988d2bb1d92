"""Does held-out text stand in the training text? Windows of tokens are compared by a hash."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

WINDOW = 32  # tokens; a power of two. Natural texts hardly ever share that many in a row
MAX_TOKENS = 5_000_000  # of the training text that is looked at
_CHUNK = 1 << 20
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no shift loses bits


def overlapping_share(held_out: Iterable[Mapping[str, torch.Tensor]], training: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Share of the held-out sequences of which at least half the windows of 32 tokens stand in the training text as well.

    The first MAX_TOKENS training tokens are looked at, across the borders of sequences. Sequences too short for a window,
    and padding (label -100 at the end), count as not overlapping.
    """
    probes = [_windows(supervised_ids(row)) for row in held_out]
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *probes]))
    found = np.zeros(len(wanted), bool)
    for chunk in _chunks(training):
        hashes = _windows(chunk)
        places = np.searchsorted(wanted, hashes).clip(max=max(len(wanted) - 1, 0))
        if len(wanted):
            found[places[wanted[places] == hashes]] = True
    seen = [float(found[np.searchsorted(wanted, probe)].mean()) if len(probe) else 0.0 for probe in probes]
    return float(np.mean([share >= 0.5 for share in seen])) if seen else 0.0


def supervised_ids(row: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Token ids up to the last supervised one: without the padding behind it, even where the end token pads."""
    kept = torch.nonzero(row["labels"] != -100)
    return row["input_ids"][: int(kept[-1]) + 1 if len(kept) else 0].numpy()


def _chunks(rows: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[np.ndarray]:
    """Stretches of token ids that overlap by a window, up to MAX_TOKENS."""
    parts, size, total = [], 0, 0
    for row in rows:
        parts.append(row["input_ids"].numpy())
        size += len(parts[-1])
        total += len(parts[-1])
        if size >= _CHUNK or total >= MAX_TOKENS:
            chunk = np.concatenate(parts)
            yield chunk
            if total >= MAX_TOKENS:
                return
            parts = [chunk[-(WINDOW - 1) :]]
            size = len(parts[0])
    if parts:
        yield np.concatenate(parts)


def _windows(ids: np.ndarray) -> np.ndarray:
    """Polynomial hash of every window of `ids`, uint64 modulo 2^64; windows grow by doubling."""
    if len(ids) < WINDOW:
        return np.zeros(0, np.uint64)
    hashes, length, base = ids.astype(np.uint64) + np.uint64(1), 1, _BASE
    with np.errstate(over="ignore"):
        while length < WINDOW:
            hashes = hashes[:-length] + base * hashes[length:]
            length, base = 2 * length, base * base
    return hashes
