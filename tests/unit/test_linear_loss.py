"""Oracles: the law on full fp64 logits with plain autograd (linear_oracle.py), finite differences."""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_oracle import (
    HIDDEN,
    OBJECTIVES,
    ROUNDING,
    SETTING,
    TOKENS,
    TRANSFORMS,
    VOCAB,
    check,
    close,
    make_head,
    oracle,
)

from ds_stability import linear_loss as loss_module
from ds_stability import linear_pass as module
from ds_stability.controller import Setting
from ds_stability.linear_loss import linear_loss
from ds_stability.linear_spec import LogitTransform, LossSpec

CHUNKS = [1, 5, TOKENS, 1000, None]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6), st.sampled_from(CHUNKS), st.floats(-2.0, 4.0), st.floats(0.5, 5.0), st.floats(0.3, 3.0),
    st.floats(0.1, 1.0), st.booleans(), st.booleans(), st.sampled_from(sorted(OBJECTIVES)), st.sampled_from(sorted(TRANSFORMS)),
    st.sampled_from([0.0, 0.2, -0.7]), st.sampled_from([1, 3 * VOCAB, 2**18]),
)  # fmt: skip
def test_loss_gradients_and_statistics_are_the_law(
    seed, chunk, gain, mu, sigma, supervised, bias, high, objective, transform, entropy, work
):
    spec = LossSpec(Setting(gain, mu, sigma, 0.5 + supervised), OBJECTIVES[objective], entropy, TRANSFORMS[transform],
                    (torch.arange(VOCAB) % 3 == 0).float() if high else None, chunk)  # fmt: skip
    with mock.patch.object(module, "WORK_ELEMENTS", {"cpu": work}):  # parts of one row, of three, of a whole chunk
        check(spec, seed, bias=bias, supervised=supervised)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("chunk", "work", "words"), [(5, 2**18, 4096), (None, 3 * VOCAB, 4096), (None, 2**18, 5)])
def test_half_precision_to_its_rounding(monkeypatch, dtype, transform, objective, chunk, work, words):
    """Tiles computed once more, and all logits in one block or in eight."""
    monkeypatch.setattr(module, "WORK_ELEMENTS", {"cpu": work})
    monkeypatch.setattr(module, "BLOCK_WORDS", words)
    for entropy in (0.0, 0.1):
        spec = LossSpec(SETTING, OBJECTIVES[objective], entropy, TRANSFORMS[transform], chunk_size=chunk)
        check(spec, 2, dtype=dtype, upstream=64.0)


@pytest.mark.parametrize("tokens", [1, 2, HIDDEN - 1, HIDDEN, HIDDEN + 1, 4 * HIDDEN])
@pytest.mark.parametrize("words", [1, 5, 7, VOCAB - 1, VOCAB, 4096])
def test_a_gradient_never_reaches_logits_that_are_still_needed(monkeypatch, tokens, words):
    """And is the whole block of its own, from the start of the buffer."""
    monkeypatch.setattr(module, "BLOCKS", VOCAB)
    monkeypatch.setattr(module, "BLOCK_WORDS", words)
    blocks = module.Blocks(tokens, VOCAB, HIDDEN)
    blocks.allocate(torch.empty(0))
    blocks.buffer.fill_(-1.0)
    for number, (_, raw_NW) in enumerate(blocks):
        raw_NW.fill_(float(number))
    gradient_VD = blocks.gradient()
    assert gradient_VD.shape == (VOCAB, HIDDEN) and gradient_VD._base is None
    covered = 0
    for number, (columns, raw_NW) in enumerate(blocks):
        assert columns.start == covered and bool((raw_NW == number).all())
        gradient_VD[columns].fill_(1000.0)
        assert number > 0 or bool((raw_NW == 0).all())  # not even of the block at work
        covered = columns.stop
    assert covered == VOCAB and bool((gradient_VD == 1000.0).all())


def test_all_logits_are_kept_only_where_that_takes_no_more_memory_than_a_chunk(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_WORDS", 5)
    kept = {}
    for tokens, chunk in ((HIDDEN, None), (HIDDEN, 3), (8 * HIDDEN, 3), (8 * HIDDEN, None)):
        hidden, weight, bias, _ = make_head(0, torch.bfloat16, tokens=tokens)
        work = module.Pass(hidden.detach(), weight.detach(), bias.detach(), (True, True, True), LossSpec(chunk_size=chunk))
        kept[tokens, chunk] = work.blocks is not None
        assert not kept[tokens, chunk] or work.blocks.elements <= weight.numel() + work.chunk * VOCAB
        frozen = module.Pass(hidden.detach(), weight.detach(), None, (True, False, False), LossSpec())
        assert frozen.blocks is None
    assert kept == {(HIDDEN, None): True, (HIDDEN, 3): True, (8 * HIDDEN, 3): False, (8 * HIDDEN, None): True}


@pytest.mark.parametrize("objective", ["cross_entropy", "z_loss", "focal"])
@pytest.mark.parametrize("transform", ["plain", "both"])
def test_a_half_precision_head_is_summed_in_fp32(monkeypatch, transform, objective):
    """256 tiles of two tokens, 511 chunks: a bf16 running sum would stop growing. Blocks of 19 and 18 of the vocabulary."""
    monkeypatch.setattr(module, "TILE_TOKENS", 2)
    spec = LossSpec(SETTING, OBJECTIVES[objective], 0.2, TRANSFORMS[transform], chunk_size=1)
    check(spec, 3, dtype=torch.bfloat16, tokens=511, tolerance=2**-8)


def test_fp16_gradients_below_its_range_survive_a_loss_scale():
    """A mean over many tokens needs the loss scale in fp16: it must reach the gradients before they are rounded."""
    hidden, weight, bias, targets = make_head(4, torch.float16)
    spec = LossSpec()
    for upstream in (2.0**15 / 1e6, 2.0**-12):
        loss, _, _ = linear_loss(hidden, weight, bias, targets, spec)
        gradients = torch.autograd.grad(loss * upstream, (hidden, weight))
        wanted = oracle(hidden, weight, bias, targets, spec)[1]
        for found, exact in zip(gradients, wanted, strict=False):
            close(found, exact * upstream, 2**-7)


class _Fresh(torch.autograd.Function):
    """gradcheck walks a graph several times; the linear loss allows one."""

    @staticmethod
    def forward(ctx, spec, targets, *leaves):
        ctx.save_for_backward(*leaves)
        ctx.spec, ctx.targets = spec, targets
        return linear_loss(leaves[0], leaves[1], leaves[2], targets, spec)[0]

    @staticmethod
    def backward(ctx, grad_output):
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            loss = linear_loss(*leaves, ctx.targets, ctx.spec)[0]
        return None, None, *torch.autograd.grad(loss, leaves, grad_output)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("entropy", [0.0, 0.4])
def test_gradcheck(transform, objective, entropy):
    """Gain 0: the weights carry no gradient, which finite differences would see."""
    hidden, weight, bias, targets = (t.detach().double() if t.is_floating_point() else t for t in make_head(5, tokens=4))
    spec = LossSpec(Setting(mean_weight=1.3), OBJECTIVES[objective], entropy, TRANSFORMS[transform], chunk_size=3)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *x: _Fresh.apply(spec, targets, *x), leaves, fast_mode=True)


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_padded_vocabulary_of_minus_infinity(objective, dtype, chunk):
    hidden, weight, bias, targets = make_head(6, dtype)
    tolerance, exact = ROUNDING[dtype], OBJECTIVES[objective]
    with torch.no_grad():
        bias[-5:] = -math.inf
        targets[targets >= VOCAB - 5] = 1
    spec = LossSpec(SETTING, exact, entropy_coefficient=0.3, high_frequency_V=torch.ones(VOCAB), chunk_size=chunk)
    loss, _, tokens = linear_loss(hidden, weight, bias, targets, spec)
    padded = torch.autograd.grad(loss, (hidden, weight, bias))
    short = [hidden, weight[:-5].detach().requires_grad_(), bias[:-5].detach().requires_grad_()]
    wanted_loss, wanted, statistics = oracle(*short, targets, LossSpec(SETTING, exact, entropy_coefficient=0.3))
    close(loss, wanted_loss, tolerance)
    close(tokens["entropy"][tokens.mask_N], statistics["entropy"], tolerance)
    close(tokens["high_frequency_mass"][tokens.mask_N], torch.ones(len(statistics["entropy"])), tolerance)
    close(padded[0], wanted[0], 4 * tolerance)
    for found, exact in zip(padded[1:], wanted[1:], strict=True):
        close(found[:-5], exact, 4 * tolerance)
        assert torch.equal(found[-5:], torch.zeros_like(found[-5:]))


@pytest.mark.parametrize("targets", [torch.full((TOKENS,), -100), torch.empty(0, dtype=torch.long)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_supervised_gives_zero_and_zero_gradients(targets, dtype):
    hidden, weight, bias, _ = make_head(7, dtype, tokens=len(targets))
    loss, _, tokens = linear_loss(hidden, weight, bias, targets, LossSpec(SETTING))
    assert loss == 0 and not tokens.mask_N.any()
    for gradient in torch.autograd.grad(loss, (hidden, weight, bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("ignored", [-1, -7, 10**6])
def test_another_ignore_index(ignored):
    hidden, weight, bias, targets = make_head(8)
    loss, _, _ = linear_loss(hidden, weight, bias, targets.masked_fill(targets == -100, ignored), LossSpec(SETTING), ignored)
    close(loss, oracle(hidden, weight, bias, targets, LossSpec(SETTING))[0], 1e-5)


def test_collapsed_and_extreme_logits_keep_their_small_numbers():
    """A collapsed model: entropy of 1e-5 nats and less, to the accuracy of its fp32 logits; surprisal beyond exp's range."""
    hidden, weight, _, targets = make_head(9, scale=60.0, bias=False)
    raw = (hidden @ weight.t()).detach()  # the rounding of the product is not ours: compare from these logits
    eye = torch.eye(VOCAB).requires_grad_()
    loss, _, tokens = linear_loss(raw, eye, None, targets, LossSpec())
    wanted_loss, _, statistics = oracle(raw, eye, None, targets, LossSpec())
    close(loss, wanted_loss, 1e-5)
    for name in ("entropy", "surprisal", "top1_mass", "log_partition"):
        found = tokens[name][tokens.mask_N].double()
        torch.testing.assert_close(found, statistics[name], rtol=1e-4, atol=1e-12 if name == "surprisal" else 1e-7)
    assert statistics["entropy"].min() < 1e-5 and statistics["surprisal"].max() > 104


def test_a_lost_step_is_seen_in_every_gradient():
    hidden, weight, bias, targets = make_head(10)
    with torch.no_grad():
        bias[int(targets[0])] = -math.inf  # infinite surprisal, finite softmax
    loss, _, _ = linear_loss(hidden, weight, bias, targets, LossSpec())
    assert not loss.isfinite()
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    assert gradients[0][targets != -100].isnan().all() and all(g.isnan().all() for g in gradients[1:])


def test_only_what_needs_a_gradient_gets_one_and_the_graph_is_walked_once():
    hidden, weight, bias, targets = make_head(11)
    loss, _, _ = linear_loss(hidden, weight.detach(), bias.detach(), targets, LossSpec(SETTING))
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    close(gradient, oracle(hidden, weight, bias, targets, LossSpec(SETTING))[1][0], 1e-5)
    with pytest.raises(RuntimeError, match="one backward pass"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsupervised_rows_cost_nothing_on_a_cpu_and_change_nothing(monkeypatch, dtype):
    def backwards(weight_N, mask_N):
        return torch.full_like(weight_N, torch.nan).masked_scatter(mask_N, weight_N[mask_N].flip(0))

    def run():
        hidden, weight, bias, targets = make_head(12, dtype, supervised=0.4)
        spec = LossSpec(SETTING, chunk_size=4, permute=backwards)
        loss, _, tokens = linear_loss(hidden, weight, bias, targets, spec)
        return [loss, *torch.autograd.grad(loss, (hidden, weight, bias))], tokens

    left_out, few = run()
    monkeypatch.setattr(loss_module, "_supervised_rows", lambda mask_N: None)  # as on an accelerator
    computed, all_of_them = run()
    assert few.mask_N.all() and len(few.mask_N) == int(all_of_them.mask_N.sum()) < TOKENS
    torch.testing.assert_close(few.values_KN, all_of_them.values_KN[:, all_of_them.mask_N], rtol=1e-5, atol=1e-5)
    for found, wanted in zip(left_out, computed, strict=True):
        close(found, wanted, 1e-5 if dtype == torch.float32 else 2**-6)


def test_autocast_casts_what_linear_would():
    hidden, weight, bias, targets = make_head(12)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, tokens = linear_loss(hidden, weight, bias, targets, LossSpec(SETTING))
    halves = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    wanted, _, _ = linear_loss(*halves, targets, LossSpec(SETTING))
    assert torch.equal(loss, wanted) and tokens["entropy"].dtype == torch.float32
    for found, exact in zip(torch.autograd.grad(loss, (hidden, weight, bias)), torch.autograd.grad(wanted, halves), strict=True):
        assert found.dtype == torch.float32
        close(found, exact.float(), 2**-8)


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    self.seen = max(self.seen, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    for objective in OBJECTIVES.values():
        hidden, weight, bias, targets = make_head(13, tokens=500)
        with Largest() as mode:
            loss, _, _ = linear_loss(hidden, weight, bias, targets, LossSpec(SETTING, objective, chunk_size=16))
            torch.autograd.grad(loss, (hidden, weight, bias))
        assert mode.seen <= max(500 * HIDDEN, 500 * len(module.FIELDS)) < 500 * VOCAB


@pytest.mark.parametrize(
    ("dtype", "tokens", "vocab", "gib", "wanted"),
    [(torch.bfloat16, 8192, 151_936, 80, 512), (torch.float32, 2048, 151_936, 16, 205), (torch.bfloat16, 100, 2048, 80, 100),
     (torch.bfloat16, 4096, 256_000, 1, 64)],
)  # fmt: skip
def test_chunks_on_cuda_are_chosen_from_its_memory(monkeypatch, dtype, tokens, vocab, gib, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))
    hidden = SimpleNamespace(shape=(tokens, 4), device=SimpleNamespace(type="cuda"), dtype=dtype)
    assert module.chunk_tokens(hidden, vocab, None) == wanted
    assert module.chunk_tokens(hidden, vocab, 7) == 7


def test_fp16_gradients_of_the_head_do_not_overflow_in_a_sum_over_tokens():
    """A loss scale could not help: it multiplies later. One label everywhere, an outlier of the hidden states."""
    hidden, weight, bias, targets = make_head(5, torch.float16, tokens=512, supervised=1.1)
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = 300.0, 0.0
    targets.fill_(3)
    spec = LossSpec(SETTING)
    loss, _, _ = linear_loss(hidden, weight, bias, targets, spec)
    gradients = torch.autograd.grad(loss / 512, (hidden, weight))
    for found, exact in zip(gradients, oracle(hidden, weight, bias, targets, spec)[1], strict=False):
        close(found, exact / 512, 2**-8)
    outlier, rest = found[:, 0].abs().max(), found[:, 1:].abs().max()
    assert outlier > 100 * rest  # each column to its own rounding
    close(found[:, 1:], exact[:, 1:] / 512, 2**-8)


def test_fp16_gradients_of_unlikely_tokens_are_not_flushed_to_zero():
    """Probabilities of about 2^-29 are zero in fp16, their gradients times a loss scale are not."""
    hidden, weight, _, targets = make_head(6, torch.float16, supervised=1.1)
    bias = torch.full((VOCAB,), -10.0, dtype=torch.float16)
    bias[3] = 10.0
    targets.fill_(3)
    with torch.no_grad():
        weight.mul_(0.01)
    loss, _, _ = linear_loss(hidden, weight, bias, targets, LossSpec())
    found = torch.autograd.grad(loss * 2.0**20, weight)[0]
    exact = oracle(hidden, weight, bias, targets, LossSpec())[1][1] * 2.0**20
    assert exact[4].abs().max() > 2.0**-10
    torch.testing.assert_close(found[4].double(), exact[4], rtol=0.02, atol=0.02 * float(exact[4].abs().max()))


def test_fp16_gradients_with_large_weights_and_scales_are_finite():
    hidden, weight, bias, targets = make_head(7, torch.float16, supervised=1.1)
    with torch.no_grad():
        weight.mul_(200.0)
        hidden.mul_(1e-3)
    spec = LossSpec(transform=LogitTransform(50.0))
    loss, _, _ = linear_loss(hidden, weight, bias, targets, spec)
    for found, exact in zip(torch.autograd.grad(loss / 64, (hidden, weight)),
                            oracle(hidden, weight, bias, targets, spec)[1], strict=False):  # fmt: skip
        close(found, exact / 64, 2**-5)
