"""Triton's row kernels, on a GPU or in the interpreter on CPUs (conftest.py): fp64 oracles, and the passes of torch that they replace.

The interpreter cuts fp32 off to bf16 where a GPU rounds, so gradients in bf16 are held to a whole unit in the last place.
"""

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_oracle import HIDDEN, OBJECTIVES, SETTING, TOKENS, TRANSFORMS, VOCAB, check, close, make_head, transformed

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from ds_stability import linear_loss as loss_module
from ds_stability import linear_pass, triton_rows
from ds_stability.linear_loss import linear_loss
from ds_stability.linear_spec import LogitTransform, LossSpec
from ds_stability.loss import statistics_in_place
from ds_stability.objectives.token import closed_form
from ds_stability.triton_pass import TritonPass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CLOSED = {name: objective for name, objective in OBJECTIVES.items() if closed_form(objective) is not None}
#: (dtype, transform, objective): every one of them, not each with each; a program takes milliseconds in the interpreter.
LAWS = [(torch.float32, transform, objective) for transform in TRANSFORMS for objective in ("cross_entropy", "both")]
LAWS += [(torch.float32, "both", objective) for objective in ("z_loss", "smoothing")]
LAWS += [(dtype, transform, "both") for dtype in DTYPES[1:] for transform in ("plain", "both")]
TIGHT = 2e-6 if DEVICE == "cpu" else 1e-5  # a GPU's exp is an approximation
NAMES = ("surprisal", "entropy", "top1_mass", "log_partition", "high_frequency_mass")


@pytest.fixture(params=[16, 2048], ids=["blocks", "block"])
def block(request, monkeypatch):
    """Three blocks of a row, the last one of five words; and one block, wider than the row."""
    monkeypatch.setattr(triton_rows, "BLOCK", request.param)


def make_rows(dtype, rows=4, words=VOCAB, scale=3.0, padded=0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    raw = (scale * torch.randn(rows, words, generator=rng)).to(dtype)
    if padded:
        raw[:, -padded:] = -math.inf
    labels = torch.randint(words - padded, (rows,), generator=rng)
    return raw.to(DEVICE), labels.to(DEVICE)


def high_set(words=VOCAB):
    return (torch.arange(words, device=DEVICE) % 3 == 0).float()


def one(value=1.0):
    return torch.full((), value, device=DEVICE)


def law(raw, labels, spec):
    """([5, C], gradient [C, V] of each row's objective) in fp64; columns of -inf are left out and come back as 0."""
    real = (raw != -math.inf).all(dim=0)
    leaf = raw[:, real].double().requires_grad_()
    logits, place = transformed(spec.transform, leaf), real.cumsum(0) - 1
    log_p, at = logits.log_softmax(-1), place[labels]
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    value = spec.objective(logits, at) + spec.entropy_coefficient * entropy
    gradient = torch.zeros(raw.shape, dtype=torch.float64, device=raw.device)
    gradient[:, real] = torch.autograd.grad(value.sum(), leaf)[0]
    high = log_p.exp() @ (torch.zeros(len(real), device=raw.device) if spec.high_frequency_V is None else spec.high_frequency_V)[real].double()
    surprisal = -log_p.gather(1, at[:, None])[:, 0]
    return torch.stack([surprisal, entropy, log_p.exp().amax(-1), logits.logsumexp(-1), high]).detach(), gradient


def run(raw, labels, spec, gradient=True, width=None, boost=1.0):
    work = raw.clone()
    found = triton_rows.statistics(work, labels, raw.shape[1], width or raw.shape[1], one(boost), spec, closed_form(spec.objective), gradient)
    return found, work


@pytest.mark.parametrize(("dtype", "transform", "objective"), LAWS)
def test_statistics_and_gradients_are_the_law(block, dtype, transform, objective):
    padded = 0 if TRANSFORMS[transform].softcap else 4  # a soft-cap makes -inf finite, as in the model's own logits
    raw, labels = make_rows(dtype, padded=padded)
    spec = LossSpec(SETTING, CLOSED[objective], 0.3, TRANSFORMS[transform], high_set())
    found, gradient = run(raw, labels, spec)
    statistics, wanted = law(raw, labels, spec)
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    for name, mine, exact in zip(NAMES, found, statistics, strict=False):
        close(mine, exact, TIGHT, name)
    close(gradient, wanted, ULP[dtype], "gradient")
    if closed_form(spec.objective).smoothing:
        assert torch.equal(found[5], torch.full_like(found[5], VOCAB - padded))
        logits = transformed(spec.transform, raw.double())
        close(found[6], logits[:, : VOCAB - padded].mean(-1), TIGHT, "mean logit")
    assert torch.equal(run(raw, labels, spec, gradient=False)[1], raw)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_vocabulary_of_one_word_gives_the_transform_and_its_slope(transform):
    """log Z is the logit itself, its gradient by z-loss 2 z log Z times the slope: each to its own rounding, from 1e-5 to far beyond a cap."""
    raw = torch.tensor([1e-5, 0.05, 0.24, 0.26, 0.5, 0.7, 0.8, 1.3, -0.1, -2.0, 8.0, 60.0, -300.0], device=DEVICE)[:, None]
    labels, spec = torch.zeros(len(raw), dtype=torch.long, device=DEVICE), LossSpec(objective=CLOSED["z_loss"], transform=TRANSFORMS[transform])
    found, gradient = run(raw, labels, spec)
    leaf = raw.double().requires_grad_()
    logits = transformed(spec.transform, leaf)
    wanted = torch.autograd.grad(0.3 * logits.square().sum(), leaf)[0]
    torch.testing.assert_close(found[3].double(), logits.detach()[:, 0], rtol=TIGHT / 10, atol=0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=TIGHT, atol=1e-7)  # p (1 + 2 z log Z) - 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.01, 3.0, 60.0]), st.floats(-1e4, 1e4), st.booleans())
def test_any_row_equals_the_portable_passes(seed, words, scale, offset, holes):
    """Vocabularies of 1 to 40 words in blocks of 8, large offsets, -inf in any place but the label's."""
    raw, labels = make_rows(torch.float32, rows=3, words=words, scale=scale, seed=seed)
    raw += offset
    if holes:
        keep = torch.zeros_like(raw, dtype=torch.bool).scatter_(1, labels[:, None], True)
        raw[(torch.rand(raw.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < 0.6) & ~keep] = -math.inf
    spec = LossSpec(high_frequency_V=high_set(words))
    before, triton_rows.BLOCK = triton_rows.BLOCK, 8
    try:
        found = run(raw, labels, spec, gradient=False)[0]
    finally:
        triton_rows.BLOCK = before
    logits = raw.clone()
    wanted = statistics_in_place(logits, torch.empty_like(logits), labels[:, None], spec.high_frequency_V)[0]
    torch.testing.assert_close(found[:5], wanted, rtol=TIGHT, atol=TIGHT)


def test_a_collapsed_model_keeps_its_small_entropy(monkeypatch):
    monkeypatch.setattr(triton_rows, "BLOCK", 16)
    raw, labels = make_rows(torch.float32, rows=24, scale=40.0)
    found, statistics = run(raw, labels, LossSpec(), gradient=False)[0].double(), law(raw, labels, LossSpec())[0]
    torch.testing.assert_close(found[1], statistics[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[0], statistics[0], rtol=TIGHT, atol=1e-7)
    assert statistics[1].min() < 1e-4 and statistics[0].max() > 104


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_nan_and_infinities_are_judged_as_by_torch(block, dtype):
    """NaN in the last block, +inf, -inf everywhere, a label of -inf, a first block of -inf, logits at the ends of the range,
    two blocks of the lowest number."""
    raw, labels = make_rows(dtype, rows=10)
    raw[0, -1], raw[1, 0], raw[2, 5], raw[3] = math.nan, math.nan, math.inf, -math.inf
    raw[4, labels[4]] = -math.inf
    raw[5, :17], labels[5] = -math.inf, 20
    raw[6, 3], raw[6, 30] = torch.finfo(dtype).min, torch.finfo(dtype).max
    raw[7, :] = torch.finfo(dtype).min
    raw[8, :33], labels[8] = torch.finfo(dtype).min, 35  # two blocks of what masks take for -inf, then the others
    found, gradient = run(raw, labels, LossSpec(high_frequency_V=high_set()))
    logits = raw.float()
    wanted = statistics_in_place(logits, torch.empty_like(logits), labels[:, None], high_set())[0]
    torch.testing.assert_close(found[:5], wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert found[:5, :4].isnan().all() and found[0, 4] == math.inf and found[1:5, 4:].isfinite().all()
    assert gradient[:4].isnan().any(dim=1).all() and gradient[4:].isfinite().all()
    assert torch.equal(gradient[5, :17], torch.zeros_like(gradient[5, :17]))


def test_a_label_that_is_no_word_is_seen_in_the_loss():
    raw, labels = make_rows(torch.float32, rows=3)
    labels[0], labels[1] = VOCAB, -5
    found, _ = run(raw, labels, LossSpec())
    assert found[0, :2].isnan().all() and found[:5, 2].isfinite().all() and found[1:5].isfinite().all()


def test_a_mask_of_another_length_is_refused():
    raw, labels = make_rows(torch.float32)
    with pytest.raises(ValueError, match="36 entries for a vocabulary of 37"):
        run(raw, labels, LossSpec(high_frequency_V=high_set(VOCAB - 1)))


@pytest.mark.parametrize("width", [3, 10, VOCAB - 1])
def test_blocks_of_the_vocabulary_behind_one_another(width):
    """As the pass keeps all logits of a bf16 micro-batch: [C, width] per block, the last one narrower."""
    raw, labels = make_rows(torch.float32)
    spec = LossSpec(SETTING, CLOSED["both"], 0.2, TRANSFORMS["both"], high_set())
    starts = range(0, VOCAB, width)
    behind = torch.cat([raw[:, left : left + width].reshape(-1) for left in starts])
    found = triton_rows.statistics(behind, labels, VOCAB, width, one(), spec, closed_form(spec.objective), True)
    gradient = torch.cat([part.view(len(raw), -1) for part in behind.split([len(raw) * min(width, VOCAB - left) for left in starts])], dim=1)
    wanted, whole = run(raw, labels, spec)
    torch.testing.assert_close(found, wanted, rtol=TIGHT, atol=TIGHT)
    torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("objective", "entropy"), [("cross_entropy", -0.4), ("z_loss", 0.0), ("both", 0.3)])
def test_a_tile_from_known_statistics(monkeypatch, transform, objective, entropy):
    monkeypatch.setattr(triton_rows, "BLOCK", 16)
    raw, labels = make_rows(torch.float32)
    spec, form = LossSpec(SETTING, CLOSED[objective], entropy, TRANSFORMS[transform]), closed_form(CLOSED[objective])
    found, _ = run(raw, labels, spec, gradient=False)
    wanted = law(raw, labels, spec)[1]
    for left, right in ((0, 9), (9, VOCAB)):
        tile = raw[:, left:right].contiguous()
        triton_rows.tile_gradient(tile, labels, left, found[3], found[1], found[5], one(4.0), spec, form)
        close(tile, 4.0 * wanted[:, left:right], 1e-5, f"from {left}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", ["plain", "both"])
@pytest.mark.parametrize(("objective", "chunk", "words"), [("both", 5, 4096), ("cross_entropy", None, 4096), ("both", None, 5)])
def test_the_linear_loss_is_the_law(monkeypatch, dtype, transform, objective, chunk, words):
    """Chunks, tiles computed once more, and all logits in one block or in eight; bias, weights, entropy, high-frequency set."""
    if DEVICE != "cpu":
        pytest.skip("the oracle's head is on the CPU; tests/gpu has its like")
    monkeypatch.setattr(linear_pass, "BLOCK_WORDS", words)
    monkeypatch.setattr(linear_pass, "TILE_TOKENS", 8)
    spec = LossSpec(SETTING, CLOSED[objective], 0.1, TRANSFORMS[transform], high_set(), chunk, kernel="triton")
    check(spec, 2, dtype=dtype, upstream=64.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_linear_loss_with_either_kernel(monkeypatch, dtype):
    """With the rows that an accelerator does not leave out, and permuted weights, which take a pass of their own."""
    monkeypatch.setattr(loss_module, "_supervised_rows", lambda mask_N: None)
    backwards = lambda weight_N, mask_N: torch.zeros_like(weight_N).masked_scatter(mask_N, weight_N[mask_N].flip(0))  # noqa: E731
    spec, results = LossSpec(SETTING, CLOSED["both"], -0.2, LogitTransform(0.5, 4.0), high_set(), 6, backwards), {}
    for kernel in ("torch", "triton"):
        hidden, weight, bias, targets = (t.detach().to(DEVICE) for t in make_head(3, dtype, supervised=0.5))
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        loss, _, tokens = linear_loss(*leaves, targets, dataclasses.replace(spec, kernel=kernel))
        values = [loss.detach(), tokens.values_KN[:, tokens.mask_N]]
        results[kernel] = values, torch.autograd.grad(loss, leaves)
    for mine, theirs in zip(results["triton"][0], results["torch"][0], strict=True):
        close(mine, theirs, TIGHT)
    for mine, theirs in zip(results["triton"][1], results["torch"][1], strict=True):
        close(mine, theirs, TIGHT if dtype == torch.float32 else 2 * ULP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_supervised_and_nothing_at_all(dtype):
    for targets in (torch.full((TOKENS,), -100), torch.empty(0, dtype=torch.long)):
        hidden, weight, bias, _ = (t.detach().to(DEVICE) for t in make_head(7, dtype, tokens=len(targets)))
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        loss, _, tokens = linear_loss(*leaves, targets.to(DEVICE), LossSpec(SETTING, kernel="triton"))
        assert loss == 0 and not tokens.mask_N.any()
        assert all(torch.equal(found, torch.zeros_like(found)) for found in torch.autograd.grad(loss, leaves))


def test_the_rest_stays_with_torch_and_the_kernels_need_no_work_buffers():
    def made(objective=CLOSED["z_loss"], dtype=torch.float32, kernel="triton"):
        hidden, weight = torch.zeros(6, HIDDEN, dtype=dtype), torch.zeros(VOCAB, HIDDEN, dtype=dtype)
        return loss_module._pass(hidden, weight, None, (True, True, False), LossSpec(objective=objective, kernel=kernel))

    for dtype in DTYPES:
        assert type(made(dtype=dtype)) is TritonPass and made(dtype=dtype).buffers == []
    others = [made(OBJECTIVES["focal"]), made(dtype=torch.float64), made(kernel="torch")]
    assert all(type(work) is linear_pass.Pass and work.buffers[1].numel() for work in others)


def test_sizes_that_wide_loads_may_count_on():
    """Each row of each block begins at a multiple of ALIGNED elements, whatever the number of rows."""
    for words, width in ((151_936, 18_992), (50_257, 6_283), (49_152, 6_144), (40, 12), (37, 37), (128_256, 128_256)):
        aligned = triton_rows._sizes(words, width)["ALIGNED"]
        for left in range(0, words, width):
            assert left % aligned == 0 and min(width, words - left) % aligned == 0
    assert triton_rows._sizes(151_936, 18_992) == {"BLOCK": triton_rows.BLOCK, "ALIGNED": 16}


COMPILE = """
import itertools
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ds_stability import triton_rows

FLOATS = dict.fromkeys(("coefficient", "smoothing", "z", "factor", "cap", "slope"), "fp32")
POINTERS = dict.fromkeys(("found_ptr", "boost_ptr", "log_partition_ptr", "entropy_ptr", "possible_ptr"), "*fp32")
TYPES = {"labels_ptr": "*i64", "high_ptr": "*u8", **dict.fromkeys(("rows", "words", "width", "left"), "i32"), **POINTERS, **FLOATS}
MULTIPLES = {"raw_ptr", "words", "width"}
KINDS = [("*fp32", True, 90), ("*bf16", True, 90), ("*fp16", True, 90), ("*bf16", False, 90), ("*bf16", True, 80)]
for kernel, (logits, on, capability) in itertools.product((triton_rows._statistics_kernel, triton_rows._tile_kernel), KINDS):
    names = kernel.arg_names
    constants = {name: on for name in names if name.isupper()} | {"ALIGNED": 16, "BLOCK": triton_rows.BLOCK}
    if "GRADIENT" in names:
        constants["GRADIENT"] = True
    if on and "rows" in names:
        constants["rows"] = 1  # a launch makes a constant of it
    types = TYPES | {"raw_ptr": logits} | dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in MULTIPLES}
    source = ASTSource(kernel, {name: types[name] for name in names}, constants, attributes)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=triton_rows.OPTIONS)
    assert len(built.asm["cubin"]) > 1000
    wide = [line for line in built.asm["ptx"].splitlines() if "ld.global.v4.b32" in line]
    assert wide and "st.global.v4.b32" in built.asm["ptx"], (kernel, logits, on)
print("compiled")
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """What the interpreter does not mind: types that change in a loop, say. To machine code, with 16 bytes a load; no GPU is needed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True,
                          timeout=300, cwd=Path(__file__).resolve().parents[2])  # fmt: skip
    assert done.returncode == 0 and done.stdout == "compiled\n", done.stderr[-3000:]
