"""Triton's kernels of the linear loss on one CUDA device: against fp64 and torch's passes, and how long both take. Skipped where there is none.

tests/unit/test_triton_rows.py runs on the device as well, where there is one.
"""

import dataclasses
import statistics

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from ds_stability import triton_rows
from ds_stability.controller import Setting
from ds_stability.linear_loss import linear_loss
from ds_stability.linear_spec import LogitTransform, LossSpec
from ds_stability.loss import token_statistics
from ds_stability.objectives.token import ClosedForm

pytestmark = pytest.mark.gpu
SETTING = Setting(gain=0.7, mu=5.0, sigma=2.0, mean_weight=1.2)
SPEC = LossSpec(SETTING, ClosedForm(0.1, 1e-3), -0.2, LogitTransform(0.5, 20.0), kernel="triton")


def make_head(dtype, tokens, vocab, hidden):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, hidden, generator=generator).to("cuda", dtype).requires_grad_()
    weight = (0.2 * torch.randn(vocab, hidden, generator=generator)).to("cuda", dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator).to("cuda", dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::7] = -100
    return rows, weight, bias, targets.to("cuda")


def run(leaves, targets, spec):
    loss, _, tokens = linear_loss(*leaves, targets, spec)
    return [loss, tokens["entropy"][tokens.mask_N], tokens["surprisal"][tokens.mask_N], *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6), (torch.float16, 2**-8)])
@pytest.mark.parametrize(("tokens", "vocab"), [(700, 5003), (48, 50_304)])
def test_against_fp64(dtype, tolerance, tokens, vocab):
    """Tiles computed once more, and all logits kept; sizes with and without wide loads."""
    *leaves, targets = make_head(dtype, tokens, vocab, 64)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    for mine, theirs in zip(run(leaves, targets, SPEC), run(exact, targets, SPEC), strict=True):
        top = float(theirs.detach().abs().max())
        torch.testing.assert_close(mine.detach().double(), theirs.detach(), rtol=tolerance, atol=tolerance * top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_twice_and_no_waiting_for_the_device(dtype):
    *leaves, targets = make_head(dtype, 700, 5003, 64)
    first = run(leaves, targets, SPEC)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _, tokens = linear_loss(*leaves, targets, SPEC)
        gradients = torch.autograd.grad(loss, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    second = [loss, tokens["entropy"][tokens.mask_N], tokens["surprisal"][tokens.mask_N], *gradients]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 12 * 2**30, reason="needs 12 GiB")
def test_offsets_beyond_two_to_the_31():
    rows, words = 17_000, 131_072
    raw = torch.empty(rows, words, dtype=torch.bfloat16, device="cuda")
    for part in raw.split(1000):
        part.normal_()
    labels = torch.randint(0, words, (rows,), device="cuda")
    wanted = token_statistics(raw[-3:], labels[-3:], None)
    found = triton_rows.statistics(raw, labels, words, words, torch.ones((), device="cuda"), LossSpec(), ClosedForm(), False)
    torch.testing.assert_close(found[:5, -3:], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tokens", "vocab", "hidden"), [(torch.bfloat16, 8192, 151_936, 1024), (torch.bfloat16, 512, 49_152, 576),
                                                                  (torch.float32, 2048, 151_936, 256)])  # fmt: skip
def test_times_and_memory_of_both(capsys, dtype, tokens, vocab, hidden):
    """Prints; what is held is only that the kernels take no more memory, as they have no work buffers."""
    *leaves, targets = make_head(dtype, tokens, vocab, hidden)
    spec, seconds, peak = LossSpec(SETTING, entropy_coefficient=-0.2), {}, {}
    for kernel in ("torch", "triton"):
        mine = dataclasses.replace(spec, kernel=kernel)
        for _ in range(2):
            run(leaves, targets, mine)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(7):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run(leaves, targets, mine)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        seconds[kernel], peak[kernel] = statistics.median(times), torch.cuda.max_memory_allocated() - before
    with capsys.disabled():
        print(f"\n{dtype}, {tokens} tokens, vocabulary {vocab}, hidden {hidden}: " + ", ".join(
            f"{kernel} {seconds[kernel]:.2f} ms and {peak[kernel] / 2**20:.0f} MiB" for kernel in seconds))  # fmt: skip
    assert peak["triton"] <= 1.05 * peak["torch"]  # chunks may be larger where the device is small
