"""Oracles: the law written out in fp64 with plain autograd, and transformers' own ForCausalLMLoss."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from ds_stability.controller import Setting
from ds_stability.histogram import EDGES
from ds_stability.loss import StabilityLoss, TokenAccumulator, cross_entropy, shift_labels, token_statistics
from ds_stability.stabilizers.regularization import label_smoothing_objective, z_loss_objective
from ds_stability.statistics import TOKEN_FIELDS

BATCH, LENGTH, VOCAB = 3, 7, 11
SETTING = Setting(gain=1.3, mu=2.6, sigma=0.9, mean_weight=1.7)
CHUNKS = [1, 3, BATCH * LENGTH, None]
OBJECTIVES = {"cross_entropy": cross_entropy, "z_loss": z_loss_objective(0.3), "smoothing": label_smoothing_objective(0.2)}


def make_loss(chunked=True, chunk_size=None, setting=None, stock=ForCausalLMLoss):
    loss = StabilityLoss(torch.nn.Linear(1, 1), stock, chunked, "cpu", chunk_size)
    loss.setting = setting or Setting()
    return loss


def make_batch(seed=0, dtype=torch.float32, supervised=0.7, scale=2.0, vocab=VOCAB):
    rng = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(BATCH, LENGTH, vocab, generator=rng)).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (BATCH, LENGTH), generator=rng)
    labels[torch.rand(BATCH, LENGTH, generator=rng) >= supervised] = -100
    labels[0, 1] = 3  # at least one supervised token
    return logits, labels


def shifted(labels):
    """Targets [N] by an explicit loop."""
    rows = [[*row[1:].tolist(), -100] for row in labels]
    return torch.tensor(rows).reshape(-1)


def oracle(logits, targets, setting, denominator=None, objective=cross_entropy):
    """(loss, gradient) of sum_i (w_i / wbar) objective_i / D in fp64 by plain autograd."""
    leaf = logits.detach().double().reshape(-1, logits.shape[-1]).requires_grad_()
    mask = targets != -100
    rows, labels = leaf[mask], targets[mask]
    with torch.no_grad():
        weight = torch.exp(-setting.gain * ((cross_entropy(rows, labels) - setting.mu) / setting.sigma).clamp(-3, 3))
    loss = (weight / setting.mean_weight * objective(rows, labels)).sum()
    loss = loss / (int(mask.sum()) if denominator is None else denominator)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient.reshape(logits.shape)


def assert_matches(loss, logits, expected, tolerance=1e-5, scale=1.0):
    (gradient,) = torch.autograd.grad(loss * scale, logits)
    assert gradient.dtype == logits.dtype and loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-6)
    wanted = expected[1] * scale
    torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.sampled_from(CHUNKS), st.floats(-2.0, 8.0), st.floats(0.0, 5.0), st.floats(0.05, 3.0),
    st.floats(0.1, 1.0), st.sampled_from([None, "int", "tensor"]), st.sampled_from(sorted(OBJECTIVES)),
)  # fmt: skip
def test_loss_and_gradient_are_the_law(seed, chunk, gain, mu, sigma, supervised, items, objective):
    logits, labels = make_batch(seed, supervised=supervised)
    setting = Setting(gain, mu, sigma, 0.5 + supervised)
    loss = make_loss(chunk_size=chunk, setting=setting)
    loss.objective = OBJECTIVES[objective]
    given_items = {None: None, "int": 37, "tensor": torch.tensor(37)}[items]
    value = loss(logits, labels, vocab_size=VOCAB, num_items_in_batch=given_items)
    assert_matches(value, logits, oracle(logits, shifted(labels), setting, items and 37, loss.objective))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk", [3, None])
def test_half_precision_logits_are_computed_in_fp32(dtype, tolerance, objective, chunk):
    logits, labels = make_batch(1, dtype)
    loss = make_loss(chunk_size=chunk, setting=SETTING)
    loss.objective = OBJECTIVES[objective]
    value = loss(logits, labels)
    assert_matches(value, logits, oracle(logits, shifted(labels), SETTING, None, loss.objective), tolerance, scale=1024.0)


def test_shift_labels_argument_is_used_as_it_is():
    logits, labels = make_batch(2)
    value = make_loss(setting=SETTING)(logits, None, shift_labels=labels)
    assert_matches(value, logits, oracle(logits, labels.reshape(-1), SETTING))
    torch.testing.assert_close(shift_labels(labels), shifted(labels), rtol=0, atol=0)


@pytest.mark.parametrize("ignored", [-1, -7, 10**6])
def test_another_ignore_index_is_respected(ignored):
    logits, labels = make_batch(3)
    labels[labels == -100] = ignored
    value = make_loss(setting=SETTING)(logits, labels, ignore_index=ignored)
    targets = shifted(labels)
    assert_matches(value, logits, oracle(logits, targets.masked_fill(targets == ignored, -100), SETTING))


def test_weights_carry_no_gradient():
    """With clipping out of the way, a weight with a gradient would change the direction: the oracle detaches it."""
    logits, labels = make_batch(4)
    setting = Setting(2.0, 2.5, 5.0, 1.0)
    leaf = logits.detach().double().requires_grad_()
    s = F.cross_entropy(leaf.reshape(-1, VOCAB), shifted(labels), reduction="none", ignore_index=-100)
    attached = (torch.exp(-2.0 * (s - 2.5) / 5.0) * s * (shifted(labels) != -100)).sum() / (shifted(labels) != -100).sum()
    wrong = torch.autograd.grad(attached, leaf)[0]
    gradient = torch.autograd.grad(make_loss(setting=setting)(logits, labels), logits)[0]
    assert (gradient - wrong).abs().max() > 0.1 * wrong.abs().max()


@pytest.mark.parametrize("items", [None, 50])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_gain_zero_is_the_stock_loss(chunk, items):
    logits, labels = make_batch(5)
    value = make_loss(chunk_size=chunk)(logits, labels, vocab_size=VOCAB, num_items_in_batch=items)
    stock = ForCausalLMLoss(logits, labels, VOCAB, num_items_in_batch=items)
    torch.testing.assert_close(value, stock, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (value, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 50, torch.tensor(50)])
def test_stock_path_is_bit_identical(dtype, items):
    logits, labels = make_batch(6, dtype)
    value = make_loss(chunked=False, setting=SETTING)(logits, labels, vocab_size=VOCAB, num_items_in_batch=items)
    stock = ForCausalLMLoss(logits, labels, VOCAB, num_items_in_batch=items)
    ours, theirs = (torch.autograd.grad(x * 512, logits)[0] for x in (value, stock))
    assert torch.equal(value, stock) and torch.equal(ours, theirs)


def expected_sums(logits, targets, setting, weighted, high_frequency):
    """Sums of TOKEN_FIELDS and bins by a loop over tokens, fp64."""
    sums, bins = dict.fromkeys(TOKEN_FIELDS, 0.0), np.zeros((64, 3))
    for row, target in zip(logits.detach().double().reshape(-1, logits.shape[-1]), targets.tolist(), strict=True):
        if target == -100:
            continue
        p, log_partition = row.softmax(0), float(row.logsumexp(0))
        s = float(log_partition - row[target])
        w = math.exp(-setting.gain * min(max((s - setting.mu) / setting.sigma, -3.0), 3.0)) if weighted else 1.0
        token = {"tokens": 1.0, "surprisal": s, "surprisal_sq": s * s, "weight": w, "weighted_surprisal": w * s}
        token |= {"weighted_surprisal_sq": w * s * s, "weight_sq": w * w, "entropy": float(torch.special.entr(p).sum())}
        token |= {"top1_mass": float(p.max()), "log_partition": log_partition}
        token |= {"high_frequency_mass": float(p[high_frequency].sum()) if high_frequency else 0.0}
        token |= {"loss": w / setting.mean_weight * s if weighted else s}
        sums = {name: sums[name] + token[name] for name in sums}
        bins[np.searchsorted(EDGES, s, side="right")] += [1.0, s, s * s]
    return sums, bins


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("chunked, training", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("high_frequency", [None, [0, 4, 5]])
def test_every_statistic_is_its_definition(chunk, chunked, training, high_frequency):
    loss = make_loss(chunked, chunk, SETTING)
    loss.module.train(training)
    if high_frequency:
        loss.high_frequency_V = torch.zeros(VOCAB).index_fill_(0, torch.tensor(high_frequency), 1.0)
    wanted = dict.fromkeys(TOKEN_FIELDS, 0.0), np.zeros((64, 3))
    for seed in (7, 8):  # two micro-batches add up
        logits, labels = make_batch(seed, scale=3.0)
        with torch.set_grad_enabled(training):
            value = loss(logits, labels, vocab_size=VOCAB)
        if training:
            value.backward()
        sums, bins = expected_sums(logits, shifted(labels), SETTING, chunked and training, high_frequency)
        wanted = {name: wanted[0][name] + sums[name] for name in sums}, wanted[1] + bins
    used, unused = (loss.train, loss.evaluation) if training else (loss.evaluation, loss.train)
    assert unused.vector().abs().sum() == 0
    got = dict(zip(TOKEN_FIELDS, used.vector().tolist(), strict=False))
    assert got == pytest.approx(wanted[0], rel=1e-5)
    np.testing.assert_allclose(used.bins.numpy(), wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["z_loss", "smoothing"])
def test_the_controlled_statistic_stays_surprisal_under_another_objective(objective):
    logits, labels = make_batch(9)
    plain, other = make_loss(setting=SETTING), make_loss(setting=SETTING)
    other.objective = OBJECTIVES[objective]
    plain(logits, labels).backward()
    value = other(logits, labels)
    value.backward()
    last = TOKEN_FIELDS.index("loss")
    assert torch.equal(plain.train.sums_K[:last], other.train.sums_K[:last])
    mean = other.train.sums_K[last] / other.train.sums_K[0]
    torch.testing.assert_close(mean, value.double(), rtol=1e-5, atol=0)


def test_accumulator_adds_up_and_resets():
    accumulator = TokenAccumulator("cpu")
    values = torch.rand(len(TOKEN_FIELDS), 5)
    values[:, 3] = math.nan  # masked
    mask = torch.tensor([True, True, False, False, True])
    accumulator.add(values, mask)
    accumulator.add(values, mask)
    torch.testing.assert_close(accumulator.sums_K, 2 * values[:, mask].double().sum(1))
    assert accumulator.bins[:, 0].sum() == 6 and accumulator.vector().dtype == torch.float64
    accumulator.reset()
    assert accumulator.vector().abs().sum() == 0


# ---- entropy at the extremes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_vocabulary_adds_nothing(dtype):
    logits, labels = make_batch(10, dtype)
    padded = F.pad(logits.detach(), (0, 5), value=-math.inf).requires_grad_()
    plain, wide = make_loss(setting=SETTING), make_loss(setting=SETTING)
    plain.high_frequency_V, wide.high_frequency_V = torch.ones(VOCAB), torch.ones(VOCAB + 5)
    value, padded_value = plain(logits, labels), wide(padded, labels)
    torch.testing.assert_close(wide.train.vector(), plain.train.vector(), rtol=1e-6, atol=1e-6)
    gradient, padded_gradient = torch.autograd.grad(value, logits)[0], torch.autograd.grad(padded_value, padded)[0]
    torch.testing.assert_close(padded_gradient[..., :VOCAB], gradient)
    assert (padded_gradient[..., VOCAB:] == 0).all() and torch.isfinite(padded_value)


@pytest.mark.parametrize("vocab", [2, 1000])
@pytest.mark.parametrize("gap", [0.0, 1.0, 5.0, 10.0, 14.0, 18.0, 25.0, 40.0, 60.0, 80.0])
def test_entropy_of_a_collapsing_distribution(gap, vocab):
    """Far below what 1 + tiny can hold in fp32 the entropy keeps its order of magnitude, and is never negative."""
    logits = torch.zeros(1, vocab)
    logits[0, 0] = gap
    x = logits.double() + 37.25
    entropy = float(torch.special.entr(x.softmax(-1)).sum())
    s, h, top1, log_partition, _ = token_statistics((logits + 37.25), torch.tensor([0]), None)
    assert float(h) == pytest.approx(entropy, rel=0.07) and float(h) == pytest.approx(entropy, rel=1e-6, abs=2e-6)
    assert float(h) >= 0.0 and float(s) >= 0.0
    assert float(top1) == pytest.approx(float(x.softmax(-1).max()), rel=1e-6)
    assert float(log_partition) == pytest.approx(float(x.logsumexp(-1)), rel=1e-6)


def test_huge_logits_give_finite_statistics_and_gradient():
    logits = torch.tensor([[[3e4, -3e4, 0.0], [1e30, -1e30, 0.0], [-3e38, -3e38, -3e38]]], requires_grad=True)
    targets = torch.tensor([[0, 0, 2]])
    loss = make_loss(setting=SETTING)
    value = loss(logits, None, shift_labels=targets)
    assert_matches(value, logits, oracle(logits, targets.reshape(-1), SETTING))
    assert loss.train.vector().isfinite().all()
    assert float(loss.train.sums_K[TOKEN_FIELDS.index("entropy")]) == pytest.approx(math.log(3.0))
    assert float(loss.train.sums_K[TOKEN_FIELDS.index("top1_mass")]) == pytest.approx(2.0 + 1 / 3)


def test_model_copies_get_the_stock_loss():
    module = torch.nn.Linear(2, 2)
    module.loss_function = make_loss(setting=SETTING)
    twin = copy.deepcopy(module)
    assert twin.loss_function is ForCausalLMLoss and module.loss_function.stock is ForCausalLMLoss


def test_only_the_logits_are_kept_for_backward():
    """No fp32 tensor of [tokens, vocab] lives between forward and backward."""
    logits, labels = make_batch(11, torch.bfloat16, vocab=1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        value = make_loss(setting=SETTING)(logits, labels)
    large = [x for x in kept if x.numel() >= logits.numel()]
    assert len(large) == 1 and large[0].dtype == torch.bfloat16 and value.requires_grad


# ---- entropy bonus ----------------------------------------------------------------------------------------------------


def bonus_oracle(logits, targets, setting, objective=cross_entropy):
    """As `oracle`, of objective - b H."""

    def with_bonus(rows, labels):
        log_p = torch.log_softmax(rows, dim=-1)
        return objective(rows, labels) + setting.entropy_bonus * (log_p.exp() * log_p.clamp(min=-1e4)).sum(dim=-1)

    return oracle(logits, targets, setting, None, with_bonus)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(CHUNKS), st.floats(-2.0, 2.0), st.floats(-1.0, 1.0), st.sampled_from(sorted(OBJECTIVES)))
def test_loss_and_gradient_with_an_entropy_bonus(seed, chunk, gain, bonus, objective):
    logits, labels = make_batch(seed)
    setting = Setting(gain, 2.6, 0.9, 1.7, bonus)
    loss = make_loss(chunk_size=chunk, setting=setting)
    loss.objective = OBJECTIVES[objective]
    value = loss(logits, labels, vocab_size=VOCAB)
    assert_matches(value, logits, bonus_oracle(logits, shifted(labels), setting, loss.objective), tolerance=2e-5)


def test_entropy_bonus_of_a_padded_vocabulary_is_finite():
    logits, labels = make_batch(1)
    with torch.no_grad():
        logits[..., -2:] = -math.inf
        labels[labels >= VOCAB - 2] = 0
    loss = make_loss(setting=Setting(entropy_bonus=0.5))
    value = loss(logits, labels, vocab_size=VOCAB)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all() and (gradient[..., -2:] == 0).all()


def test_recorded_loss_has_the_bonus_and_the_statistics_do_not():
    logits, labels = make_batch(2)
    plain, bonus = make_loss(), make_loss(setting=Setting(entropy_bonus=0.7))
    plain(logits, labels), bonus(logits, labels)
    first, second = plain.train.sums_K, bonus.train.sums_K
    at = TOKEN_FIELDS.index
    torch.testing.assert_close(second[at("loss")], first[at("loss")] - 0.7 * first[at("entropy")])
    rest = [index for index, name in enumerate(TOKEN_FIELDS) if name != "loss"]
    assert torch.equal(first[rest], second[rest])
