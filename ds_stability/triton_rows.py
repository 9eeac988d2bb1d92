"""Triton kernels over rows of raw logits: the statistics of a token in one read, the gradient in a second one, in place.

Imported by `triton_pass.py` alone, where a run asks for it (`loss_kernel`); triton is an optional extra. They do what `Pass._statistics`
and `Pass._tile` do with elementwise passes over fp32 work buffers, which remain the reference. One program works on one row: nothing is
added by two programs, so the bits are the same on every run. All arithmetic is fp32, whatever the logits are kept in.

A row is read once with a running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867): when it rises by d, sums of exp(x - peak) shrink
by exp(-d), and the sum of exp(x - peak) (x - peak) takes d times the other one before it does. All its terms are at most 0 and so is
its correction, and it is subtracted from log(total) >= 0: the entropy of a collapsed model does not cancel.

Run in triton's interpreter on CPUs (TRITON_INTERPRET=1) and compiled for NVIDIA GPUs, but never run on one.

Shape suffixes: C rows, V vocabulary, W words of a block of it, K results.
"""

import math

import torch
import triton
import triton.language as tl

from ds_stability.linear_spec import LossSpec
from ds_stability.objectives.token import ClosedForm

#: Rows of what `statistics` returns: the first five as `FIELDS`, then for label smoothing the number of words of a probability above 0
#: and the mean of their logits.
RESULTS = 7
#: Words that a program looks at at a time: 8 a thread, 16 bytes in half precision. Not tuned: no GPU was there to time it on.
BLOCK = 2048
#: No fused multiply-adds, so that a GPU rounds as the interpreter does, up to exp and log: memory is what such kernels wait for.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _transformed(raw, factor, cap, slope, CAPPED: tl.constexpr):
    """(logits, d logits / d raw) in fp32: cap * tanh(factor * raw), or factor * raw; `slope` is the model's scale."""
    x = raw.to(tl.float32) * factor
    steep = slope
    if CAPPED:
        # tanh by hand: no library function is there for every device and the interpreter. Near 0 its series, exact to fp32.
        square = x * x
        near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
        shrunk = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - shrunk) / (1.0 + shrunk)
        steep = slope * 4.0 * shrunk / ((1.0 + shrunk) * (1.0 + shrunk))  # 1 - tanh^2, which would cancel
        x = cap * tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
    return x, steep


@triton.jit
def _above(low):
    """At least -200, where exp() is 0 in fp32: 0 * -inf would be NaN. A NaN stays one, which tl.maximum would drop."""
    return tl.where(low < -200.0, -200.0, low)


@triton.jit
def _write_gradient(raw_ptr, row, rows, words, width, label, peak, log_total, inverse, entropy, share, spread, coefficient, smoothing,
                    boost, factor, cap, slope, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, ENTROPY: tl.constexpr,
                    ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Raw logits of a row become d (objective + coefficient * entropy) / d raw logits, times `boost`.

    p_j = exp(x_j - peak) * inverse and log p_j = x_j - peak - log_total; `share` is 1 + 2 z log Z and `spread` e / possible words.
    """
    first = tl.full((), 0, tl.int64)
    many = first + rows
    for left in range(0, words, width):
        wide = tl.multiple_of(tl.minimum(width, words - left), ALIGNED)
        for start in range(0, wide, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < wide
            where = raw_ptr + first + row * wide + at
            raw = tl.load(where, mask=inside, other=float("-inf"))
            x, steep = _transformed(raw, factor, cap, slope, CAPPED)
            low = _above(x - peak)
            gradient = tl.exp(low) * inverse
            if ENTROPY:  # d entropy / d logit = -p (log p + entropy)
                gradient *= share - coefficient * (low - log_total + entropy)
            else:
                gradient *= share
            if SMOOTHED:
                gradient -= tl.where(x != float("-inf"), spread, 0.0)
            gradient -= tl.where(left + at == label, 1.0 - smoothing, 0.0)
            tl.store(where, (gradient * steep * boost).to(raw_ptr.dtype.element_ty), mask=inside)
        first = tl.multiple_of(first + many * wide, ALIGNED)


@triton.jit
def _sums(raw_ptr, high_ptr, row, rows, words, width, factor, cap, slope, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr,
          HIGH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of a row: its largest logit, and sums over its words of e = exp(x - peak), e (x - peak), e in the high-frequency set, 1 and x."""
    first = tl.full((), 0, tl.int64)
    many = first + rows
    peak = tl.full((), float("-inf"), tl.float32)
    # A sum for each place of a block, added up at the end: one reduction a block, that of the maximum.
    totals = tl.zeros((BLOCK,), tl.float32)
    weighted, highs, possible, logits = totals, totals, totals, totals
    for left in range(0, words, width):
        wide = tl.multiple_of(tl.minimum(width, words - left), ALIGNED)
        for start in range(0, wide, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < wide
            raw = tl.load(raw_ptr + first + row * wide + at, mask=inside, other=float("-inf"))
            x, _steep = _transformed(raw, factor, cap, slope, CAPPED)
            x = tl.where(inside, x, float("-inf"))  # a soft-cap has made it finite
            # Whether a maximum keeps NaN differs between devices; here it never does, and the sums do.
            risen = tl.maximum(peak, tl.max(tl.where(x == x, x, float("-inf")), axis=0))
            # Nothing is summed yet, or only zeros; and a fall from the lowest number of fp32 must not make a sum of several infinite.
            fall = tl.where(peak == float("-inf"), 0.0, _above(peak - risen))
            shrink = tl.exp(fall)
            low = _above(x - tl.where(risen == float("-inf"), 0.0, risen))
            e = tl.exp(low)
            weighted = (weighted + fall * totals) * shrink + e * low
            totals = totals * shrink + e
            if HIGH:
                highs = highs * shrink + e * tl.load(high_ptr + left + at, mask=inside, other=0).to(tl.float32)
            if SMOOTHED:
                real = x != float("-inf")
                possible += tl.where(real, 1.0, 0.0)
                logits += tl.where(real, x, 0.0)
            peak = risen
        first = tl.multiple_of(first + many * wide, ALIGNED)
    return peak, tl.sum(totals, 0), tl.sum(weighted, 0), tl.sum(highs, 0), tl.sum(possible, 0), tl.sum(logits, 0)


@triton.jit
def _statistics_kernel(raw_ptr, labels_ptr, high_ptr, found_ptr, boost_ptr, rows, words, width, coefficient, smoothing, z, factor, cap,
                       slope, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, ENTROPY: tl.constexpr, HIGH: tl.constexpr,
                       GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 where rows * words does
    many = tl.full((), 0, tl.int64) + rows
    label = tl.load(labels_ptr + row)
    left = label // width * width
    where = left * many + row * tl.minimum(width, words - left) + label - left
    # An id that is none reads nothing and makes the loss NaN, which the engine sees.
    raw = tl.load(raw_ptr + where, mask=(label >= 0) & (label < words), other=float("nan"))
    label_x, _steep = _transformed(raw, factor, cap, slope, CAPPED)
    peak, total, weighted, high, possible, logits = _sums(raw_ptr, high_ptr, row, rows, words, width, factor, cap, slope, CAPPED,
                                                          SMOOTHED, HIGH, ALIGNED, BLOCK)  # fmt: skip
    total = tl.where(total > 0.0, total, float("nan"))  # every logit -inf: no distribution
    log_total = tl.log(total)
    entropy, log_partition = log_total - weighted / total, peak + log_total
    found_ptr += row
    tl.store(found_ptr, log_total - (label_x - peak))
    tl.store(found_ptr + many, entropy)
    tl.store(found_ptr + 2 * many, 1.0 / total)
    tl.store(found_ptr + 3 * many, log_partition)
    tl.store(found_ptr + 4 * many, high / total)
    spread = 0.0
    if SMOOTHED:
        spread = smoothing / possible
        tl.store(found_ptr + 5 * many, possible)
        tl.store(found_ptr + 6 * many, logits / possible)
    if GRADIENT:
        tl.debug_barrier()  # every warp has read the logit of the label
        share = 1.0 + 2.0 * z * log_partition
        _write_gradient(raw_ptr, row, rows, words, width, label, peak, log_total, 1.0 / total, entropy, share, spread, coefficient,
                        smoothing, tl.load(boost_ptr), factor, cap, slope, CAPPED, SMOOTHED, ENTROPY, ALIGNED, BLOCK)  # fmt: skip


@triton.jit
def _tile_kernel(raw_ptr, labels_ptr, log_partition_ptr, entropy_ptr, possible_ptr, boost_ptr, words, left, coefficient, smoothing, z,
                 factor, cap, slope, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, ENTROPY: tl.constexpr,
                 ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    log_partition = tl.load(log_partition_ptr + row)
    share = 1.0 + 2.0 * z * log_partition
    spread = 0.0
    if SMOOTHED:
        spread = smoothing / tl.load(possible_ptr + row)
    label = tl.load(labels_ptr + row) - left
    _write_gradient(raw_ptr, row, 1, words, words, label, log_partition, 0.0, 1.0, tl.load(entropy_ptr + row), share, spread,
                    coefficient, smoothing, tl.load(boost_ptr), factor, cap, slope, CAPPED, SMOOTHED, ENTROPY, ALIGNED, BLOCK)  # fmt: skip


def _law(spec: LossSpec, form: ClosedForm) -> tuple[dict[str, float], dict[str, bool]]:
    """Numbers and switches that both kernels take."""
    transform, cap = spec.transform, spec.transform.softcap
    numbers = {"coefficient": spec.entropy_coefficient, "smoothing": form.smoothing, "z": form.z,
               "factor": transform.scale / (cap or 1.0), "cap": cap or 1.0, "slope": transform.scale}  # fmt: skip
    switches = {"CAPPED": bool(cap), "SMOOTHED": form.smoothing != 0.0, "ENTROPY": spec.entropy_coefficient != 0.0}
    return {name: float(value) for name, value in numbers.items()}, switches


def _sizes(words: int, width: int) -> dict[str, int]:
    """Words at a time, and a power of two up to 16 that every row of every block begins at a multiple of: wide loads need one."""
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(width)), "ALIGNED": math.gcd(16, words, width)}


def statistics(raw, labels_C, words: int, width: int, boost, spec: LossSpec, form: ClosedForm, gradient: bool) -> torch.Tensor:
    """Statistics of every row, and with `gradient` d (objective + coefficient * entropy) / d raw logits in place of the raw logits.

    Args:
        raw: raw logits, fp32, bf16 or fp16, from the first of the first row on: blocks [C, width] of `words` columns one behind the
            other, the last one narrower. With `width` = `words` a matrix [C, words].
        labels_C: ids, int64. One outside of the vocabulary gives a surprisal of NaN.
        boost: fp32 scalar tensor; the gradient is multiplied with it before it is rounded.

    Returns:
        [7, C], fp32: surprisal, entropy (nats), top-1 probability, log-partition (nats), high-frequency probability (0 without a
        set); then, with label smoothing alone, the number of words of a probability above 0 and the mean of their logits. As in
        `statistics_in_place` a row with NaN or +inf in it is NaN throughout, and so is one of -inf alone.

    Raises:
        ValueError: the mask of the high-frequency set is not as long as the vocabulary.
    """
    high_V, rows = spec.high_frequency_V, len(labels_C)
    if high_V is not None and len(high_V) != words:
        raise ValueError(f"high_frequency_V has {len(high_V)} entries for a vocabulary of {words}")
    high_V = high_V if high_V is None else high_V.to(torch.uint8)  # read once a row: a quarter of the bytes
    found_KC = torch.empty(RESULTS, rows, dtype=torch.float32, device=raw.device)
    numbers, switches = _law(spec, form)
    if rows:
        with torch.cuda.device_of(raw):  # triton launches on the current device
            _statistics_kernel[(rows,)](raw, labels_C, high_V, found_KC, boost, rows, words, width, **numbers, **switches,
                                        HIGH=high_V is not None, GRADIENT=gradient, **_sizes(words, width), **OPTIONS)  # fmt: skip
    return found_KC


def tile_gradient(raw_CW, labels_C, left: int, log_partition_C, entropy_C, possible_C, boost, spec: LossSpec, form: ClosedForm) -> None:
    """Raw logits of the words from `left` on become d (objective + coefficient * entropy) / d raw logits, from known statistics.

    Args as of `statistics`; `possible_C` is read with label smoothing only.
    """
    (rows, words), (numbers, switches) = raw_CW.shape, _law(spec, form)
    if rows:
        with torch.cuda.device_of(raw_CW):
            _tile_kernel[(rows,)](raw_CW, labels_C, log_partition_C, entropy_C, possible_C, boost, words, left, **numbers, **switches,
                                  **_sizes(words, words), **OPTIONS)  # fmt: skip
