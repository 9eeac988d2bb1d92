"""Diversity over several texts: distinct-n, compression, output entropy, Zipf exponent. All shrink or grow with the amount
of text, so each is taken at an equal, stated amount (layout.py).

Sources: distinct-n, Li et al. 2016 (arXiv 1510.03055); Miller-Madow correction, Miller 1955; Zipf exponent by maximum
likelihood, after Clauset et al. 2009 (arXiv 0706.1062) with ranks as the variable.
"""

import gzip
from array import array

import numpy as np

from ..records import Measured
from .gram_counts import GramCounts
from .layout import Layout, encode
from .pools import PoolCounts, Pools, pooled

GZIP_LEVEL = 9
ZIPF_MIN_TYPES = 50


def measure_distinct(layout: Layout, grams: GramCounts) -> list[Measured]:
    """distinct_1..4: distinct n-grams over n-grams in groups of equal token count; units are blocks of prompts."""
    rows = []
    for n, (distinct, total) in enumerate(zip(grams.group_distinct, grams.group_total, strict=True), start=1):
        name = f"distinct_{n}"
        settings = {"n": n, "group_tokens": layout.group_tokens, "groups": len(total), "size_from": layout.size_from}
        if not total.any():
            found = int(layout.lengths.sum())
            rows.append(layout.null(name, f"no group of {layout.group_tokens} tokens with a {n}-gram in it ({found} tokens)",
                                    settings=settings))  # fmt: skip
            continue
        rows.append(layout.per_block(name, grams.first_texts, distinct, total, "share", settings))
    return rows


def compressed_size(data: bytes) -> int:
    """Bytes of a gzip file with `data`, compressed once."""
    return len(gzip.compress(data, compresslevel=GZIP_LEVEL, mtime=0))


def measure_compression(layout: Layout) -> list[Measured]:
    """compression_ratio: bytes / gzip bytes of groups of equal size, texts joined by newlines; units are blocks of prompts.

    A small text compresses badly (18 bytes of header, nothing to refer back to), so texts are pooled and ratios of groups
    of another size are not comparable.
    """
    name, size = "compression_ratio", layout.group_texts * layout.text_bytes
    compressed, first, found = _compressed_groups(layout, size)
    settings = {"group_bytes": size, "groups": len(compressed), "gzip_level": GZIP_LEVEL, "size_from": layout.size_from}
    if not len(compressed):
        return [layout.null(name, f"{found} bytes of text, fewer than the {size} of a group", unit="ratio", settings=settings)]
    return [layout.per_block(name, first, np.full(len(compressed), size), compressed, "ratio", settings)]


def _compressed_groups(layout: Layout, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(bytes of each group once compressed, the text it starts in, bytes of the whole stream), a part of the stream at a time."""
    compressed, first, done, left = array("q"), array("q"), 0, b""  # `left`: behind the last group so far; `done` bytes before it
    start: int | None = None  # the text in which the next group starts, where that text lies in an earlier part
    for texts in layout.parts(layout.block_order):
        chosen = [(text, data) for text, data in zip(texts.tolist(), map(encode, layout.written(texts)), strict=True) if data]
        stream = left + b"".join(data + b"\n" for _, data in chosen)
        ends = np.cumsum([len(left), *(len(data) + 1 for _, data in chosen)])
        owners = [start, *(text for text, _ in chosen)]
        groups = len(stream) // size
        for group in range(groups):
            compressed.append(compressed_size(stream[group * size : (group + 1) * size]))
            first.append(owners[np.searchsorted(ends, group * size, side="right")])
        left = stream[groups * size :]
        done += groups * size
        start = owners[np.searchsorted(ends, groups * size, side="right")] if left else None
    return np.array(compressed), np.array(first), done + len(left)


def entropy_rows(counts: np.ndarray) -> np.ndarray:
    """Miller-Madow entropy in bits of each row of counts [F, K] -> [F]; NaN for an empty row."""
    total = counts.sum(axis=1)
    # c log2 c by table: counts are small whole numbers that recur.
    c_log_c = np.arange(int(counts.max(initial=0)) + 1, dtype=np.float64)
    c_log_c[1:] *= np.log2(c_log_c[1:])
    plug_in = np.log2(total) - c_log_c[counts].sum(axis=1) / total
    correction = ((counts > 0).sum(axis=1) - 1) / (2.0 * total * np.log(2.0))
    # A single type leaves rounding error where 0 is right.
    return np.maximum(plug_in, 0.0) + correction


def zipf_exponent(counts: np.ndarray) -> float:
    """Exponent s of p(rank) ~ rank^-s over the ranks 1..types, by maximum likelihood; NaN under 50 types.

    Args:
        counts: how often each type occurs; zeros and order do not matter.
    """
    frequency = np.sort(counts[counts > 0])[::-1].astype(np.float64)
    if len(frequency) < ZIPF_MIN_TYPES:
        return float("nan")
    log_rank = np.log(np.arange(1, len(frequency) + 1))
    observed = frequency @ log_rank / frequency.sum()
    exponent = 1.0
    # Newton on the score: the mean log rank under s is observed. The likelihood is concave; the bound keeps steps tame.
    for _ in range(100):
        weight = np.exp(-exponent * log_rank)
        weight /= weight.sum()
        mean = weight @ log_rank
        step = float(np.clip((mean - observed) / (weight @ log_rank**2 - mean**2), -0.5, 0.5))
        exponent += step
        if abs(step) < 1e-10:
            break
    return exponent


def measure_entropy(layout: Layout, pools: Pools) -> list[Measured]:
    """output_entropy_1, output_entropy_2 and zipf_exponent of pools of equal token count."""

    def zipf(pool: PoolCounts) -> np.ndarray:
        return np.array([zipf_exponent(row) for row in pool.counts])

    rows = [pooled(layout, pools, f"output_entropy_{n}", n, lambda pool: entropy_rows(pool.counts), "bits",
                   {"n": n, "correction": "Miller-Madow"}, f"no {n}-gram") for n in (1, 2)]  # fmt: skip
    settings = {"method": "maximum likelihood of rank^-s over the types' ranks", "min_types": ZIPF_MIN_TYPES}
    return [*rows, pooled(layout, pools, "zipf_exponent", 1, zipf, "exponent", settings,
                          f"fewer than {ZIPF_MIN_TYPES} types in a pool")]  # fmt: skip
