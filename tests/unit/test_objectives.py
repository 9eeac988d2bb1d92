"""Every objective against its paper's formula, written out token by token in fp64, and its gradient against a closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.config import StabilityConfig
from ds_stability.errors import StabilityConfigError
from ds_stability.loss import RowObjective, StabilityLoss, cross_entropy, objective_at
from ds_stability.objectives import token
from ds_stability.objectives.build import token_objective
from ds_stability.objectives.reverse_kl import divergence, reverse_kl
from ds_stability.objectives.rows import MicroBatch, micro_batch
from ds_stability.objectives.unlikelihood import (
    candidates,
    log_complement,
    repeated_ngrams,
    sequence_level,
    token_level,
)
from ds_stability.same_block import difference, training_part
from ds_stability.stabilizers.regularization import Regularization

VOCAB, PADDED = 7, 2  # ids that are words, and ids behind them with logits of -inf


def probabilities(row):
    """[(log p, p)] of one row of logits, by the definition, in Python floats; -inf has p = 0."""
    peak = max(row)
    total = sum(math.exp(x - peak) for x in row)
    return [(x - peak - math.log(total), math.exp(x - peak) / total) for x in row]


def oracle_ce(row, label):
    return -probabilities(row)[label][0]


def oracle_smoothing(row, label, e):
    logs = [log for log, p in probabilities(row) if log > -math.inf]
    return (1 - e) * oracle_ce(row, label) - e * sum(logs) / len(logs)


def oracle_focal(row, label, gamma):
    table = probabilities(row)
    rest = sum(p for j, (_, p) in enumerate(table) if j != label)
    return rest**gamma * -table[label][0]


def oracle_tofu(row, label, gamma, beta):
    table, warm = probabilities(row), probabilities([x / beta for x in row])
    log_p, p = table[label]
    rest = sum(q for j, (_, q) in enumerate(table) if j != label)
    focal = rest**gamma - gamma * p * rest ** (gamma - 1) * log_p
    return -focal * beta * warm[label][0]


def oracle_entropy(row, label, b):
    return oracle_ce(row, label) + b * sum(p * log for log, p in probabilities(row) if p > 0)


def oracle_gem(row, label, beta, h):
    table, q = probabilities(row), probabilities([x / beta for x in row])
    total = 0.0
    for j, (log, _) in enumerate(table):
        if log > -math.inf:
            slope = 1.0 if h == "linear" else 1 / (1 + math.exp(-0.01 * (row[j] - row[label])))
            total += q[j][1] * slope * (log - table[label][0])
    return total


CASES = {
    "cross_entropy": (cross_entropy, oracle_ce, ()),
    "smoothing_0": (token.label_smoothing(0.0), oracle_smoothing, (0.0,)),
    "smoothing": (token.label_smoothing(0.3), oracle_smoothing, (0.3,)),
    "smoothing_1": (token.label_smoothing(1.0), oracle_smoothing, (1.0,)),
    "focal_0": (token.focal(0.0), oracle_focal, (0.0,)),
    "focal_half": (token.focal(0.5), oracle_focal, (0.5,)),
    "focal_2": (token.focal(2.0), oracle_focal, (2.0,)),
    "tofu": (token.tofu(3.0, 0.8), oracle_tofu, (3.0, 0.8)),
    "tofu_warm": (token.tofu(1.0, 1.5), oracle_tofu, (1.0, 1.5)),
    "entropy": (token.entropy_regularized(0.4), oracle_entropy, (0.4,)),
    "gem": (token.gem(0.7, "linear"), oracle_gem, (0.7, "linear")),
    "gem_logsigmoid": (token.gem(0.7, "logsigmoid"), oracle_gem, (0.7, "logsigmoid")),
}
#: Gradients of these hold parts of the formula fixed, so they have closed forms instead of finite differences.
STOPPED = ("tofu", "tofu_warm", "gem", "gem_logsigmoid")

rows_of_logits = st.lists(st.lists(st.floats(-12, 12, width=32), min_size=VOCAB, max_size=VOCAB), min_size=1, max_size=4)


def tensors(rows, padded):
    logits = torch.tensor(rows)
    if padded:
        logits = torch.cat([logits, torch.full((len(rows), PADDED), -math.inf)], dim=1)
    return logits, torch.arange(len(rows)) * 3 % VOCAB


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40, deadline=None)
@given(rows=rows_of_logits, padded=st.booleans())
def test_values_are_the_formula(name, rows, padded):
    objective, oracle, arguments = CASES[name]
    logits, labels = tensors(rows, padded)
    wanted = [oracle(row, label, *arguments) for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(objective(logits, labels).double(), torch.tensor(wanted, dtype=torch.float64), rtol=2e-5, atol=2e-5)


def gradient(objective, logits, labels):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(objective(leaf, labels).sum(), leaf)[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name not in STOPPED])
def test_gradients_are_finite_differences_of_the_formula(name, padded):
    objective, oracle, arguments = CASES[name]
    logits, labels = tensors((3 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))).tolist(), padded)
    found = gradient(objective, logits, labels)
    assert found.isfinite().all()
    for i, (row, label) in enumerate(zip(logits.double().tolist(), labels.tolist(), strict=True)):
        for j in range(VOCAB):
            high, low = list(row), list(row)
            high[j] += 1e-5
            low[j] -= 1e-5
            slope = (oracle(high, label, *arguments) - oracle(low, label, *arguments)) / 2e-5
            assert float(found[i, j]) == pytest.approx(slope, abs=2e-5)
        assert not found[i, VOCAB:].any()


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_with_parts_held_fixed_are_their_closed_forms(padded):
    logits, labels = tensors((3 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))).tolist(), padded)
    exact = logits.double()
    hot = torch.nn.functional.one_hot(labels, logits.shape[1]).double()
    warm = (exact / 0.8).softmax(-1)
    p = (exact.softmax(-1) * hot).sum(-1)
    factor = (1 - p) ** 3 - 3 * p * (1 - p) ** 2 * p.log()
    torch.testing.assert_close(gradient(token.tofu(3.0, 0.8), logits, labels).double(), factor[:, None] * (warm - hot), rtol=1e-4, atol=1e-6)
    q = (exact / 0.7).softmax(-1)
    torch.testing.assert_close(gradient(token.gem(0.7, "linear"), logits, labels).double(), q - hot, rtol=1e-4, atol=1e-6)
    slope = q * torch.sigmoid(0.01 * (exact - (exact * hot).nan_to_num(0.0).sum(-1, keepdim=True)))
    wanted = slope - slope.sum(-1, keepdim=True) * hot  # sum_j w_j d(log p_j - log p_y): the normalizer cancels
    torch.testing.assert_close(gradient(token.gem(0.7, "logsigmoid"), logits, labels).double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_collapsed_distribution_has_finite_loss_and_gradient(name):
    objective = CASES[name][0]
    logits = torch.full((2, 5), -80.0)
    logits[:, 1] = 80.0
    labels = torch.tensor([1, 3])  # the label has all the mass, or none
    assert objective(logits, labels).isfinite().all() and gradient(objective, logits, labels).isfinite().all()
    # So early in training, from equal logits.
    assert gradient(objective, torch.zeros(2, 5), labels).isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_a_label_that_is_impossible_has_no_finite_loss(name):
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    if name != "smoothing_1":  # which does not look at the label... but 0 * inf is no number either
        assert not CASES[name][0](logits, torch.tensor([2])).isfinite().any()


def test_focal_has_the_figures_of_its_paper():
    """Lin et al. 2017, section 3.2: with gamma 2, p = .9 has 100 times and p ~ .968 about 1000 times lower loss than CE."""
    for p, factor in ((0.9, 100.0), (0.968, 1000.0)):
        logits, labels = torch.tensor([[math.log(p), math.log(1 - p)]]), torch.tensor([0])
        ratio = float(cross_entropy(logits, labels) / token.focal(2.0)(logits, labels))
        assert ratio == pytest.approx(factor, rel=0.03)


def test_label_smoothing_is_torchs_on_a_whole_vocabulary():
    logits, labels = torch.randn(6, 9, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 8, 3, 3, 1, 5])
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(token.label_smoothing(0.2)(logits, labels), wanted)


def test_limits_that_meet_cross_entropy():
    logits, labels = torch.randn(6, 9, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 8, 3, 3, 1, 5])
    ce = cross_entropy(logits, labels)
    same = (token.focal(0.0), token.label_smoothing(0.0), token.tofu(0.0, 1.0), token.entropy_regularized(0.0))
    for objective in same:
        torch.testing.assert_close(objective(logits, labels), ce)
    # GEM at beta 1 has another value, and the gradient of cross-entropy.
    torch.testing.assert_close(gradient(token.gem(1.0, "linear"), logits, labels), gradient(cross_entropy, logits, labels))


# ---- unlikelihood ---------------------------------------------------------------------------------------------------


def test_the_complement_is_exact_where_fp32_says_one():
    logits = torch.tensor([[60.0, 0.0, 1.0, -math.inf], [0.0, 0.0, 0.0, 0.0]])
    wanted = torch.tensor([[math.log(math.exp(-60) + math.exp(-59)), 0.0, 0.0, 0.0], [math.log(0.75)] * 4])
    torch.testing.assert_close(log_complement(logits), wanted, rtol=1e-6, atol=1e-6)
    leaf = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(-log_complement(leaf)[0, 0], leaf)
    assert float(slope[0, 0]) == pytest.approx(1.0)  # d/dz of -log(1 - p) is p
    assert slope.isfinite().all()


def brute_force_candidates(batch, row, place, label):
    start = int(batch.starts_BT[row, place])
    before = {int(batch.input_ids_BT[row, t]) for t in range(start, place + 1) if batch.present_BT[row, t]}
    return before - {label}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_candidates_are_the_documents_earlier_tokens(data):
    rows, width, vocabulary = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6)), 5
    ids = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 4), min_size=width, max_size=width), min_size=rows, max_size=rows)))
    begins = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)))
    starts = torch.where(begins, torch.arange(width).expand(rows, width), 0).cummax(dim=1).values
    positions = torch.arange(width) - starts
    present = torch.ones(rows, width, dtype=torch.long)
    present[0, : data.draw(st.integers(0, width - 1))] = 0
    batch = micro_batch({"input_ids": ids, "position_ids": positions, "attention_mask": present})
    assert torch.equal(batch.starts_BT, starts)
    labels = torch.randint(0, vocabulary, (rows * width,), generator=torch.Generator().manual_seed(0))
    first = data.draw(st.integers(0, rows * width - 1))
    found = candidates(batch, slice(first, None), labels[first:], vocabulary)
    for index, mask in enumerate(found, start=first):
        wanted = brute_force_candidates(batch, index // width, index % width, int(labels[index]))
        assert set(mask.nonzero().flatten().tolist()) == wanted


def whole(ids):
    return MicroBatch(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))


def test_token_level_is_its_formula_in_any_chunks():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCAB, (2, 5), generator=generator)
    logits, labels = 2 * torch.randn(10, VOCAB, generator=generator), torch.randint(0, VOCAB, (10,), generator=generator)
    objective = token_level(0.7, whole(ids))
    wanted = []
    for i, row in enumerate(logits.double().tolist()):
        table = probabilities(row)
        negatives = brute_force_candidates(whole(ids), i // 5, i % 5, int(labels[i]))
        wanted.append(-table[int(labels[i])][0] - 0.7 * sum(math.log(1 - table[c][1]) for c in negatives))
    for size in (10, 3, 1):
        parts = [objective_at(objective, slice(a, a + size))(logits[a : a + size], labels[a : a + size]) for a in range(0, 10, size)]
        torch.testing.assert_close(torch.cat(parts).double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    order = torch.tensor([7, 2, 9])  # rows by index, for a caller that leaves unsupervised tokens out
    torch.testing.assert_close(objective_at(objective, order)(logits[order], labels[order]).double(),
                               torch.tensor(wanted, dtype=torch.float64)[order], rtol=1e-5, atol=1e-5)  # fmt: skip


def test_repeated_ngrams_are_those_seen_before():
    text = torch.tensor([[1, 2, 3, 1, 2, 3, 4, 1, 2], [1, 1, 1, 1, 5, 6, 7, 8, 9]])
    assert repeated_ngrams(text, 2).int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0, 0]]
    assert repeated_ngrams(text, 3).int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0, 0]]
    assert not repeated_ngrams(text, 10).any()


def test_sequence_level_penalizes_the_repeated_tokens_alone():
    repeated = torch.tensor([[False, False, True, True]])
    logits, labels = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(5)), torch.tensor([2, 4, 6, 0])
    found = objective_at(sequence_level(repeated), slice(0, 4))(logits, labels)
    wanted = [0.0, *(-math.log(1 - probabilities(logits[t].double().tolist())[int(labels[t])][1]) for t in (1, 2)), 0.0]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


# ---- a reference model ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_logits, padded=st.booleans())
def test_divergence_is_the_reverse_kl(rows, padded):
    logits, _ = tensors(rows, padded)
    reference = logits.flip(0) * 0.5
    wanted = []
    for p_row, r_row in zip(logits.double().tolist(), reference.double().tolist(), strict=True):
        wanted.append(sum(p * (log_p - log_r) for (log_p, p), (log_r, _) in
                          zip(probabilities(p_row), probabilities(r_row), strict=True) if p > 0))  # fmt: skip
    torch.testing.assert_close(divergence(logits, reference).double(), torch.tensor(wanted, dtype=torch.float64), rtol=2e-5, atol=2e-5)


def test_reverse_kl_is_zero_at_the_reference_and_infinite_off_its_support():
    logits, labels = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(6)), torch.tensor([0, 1, 2])
    alone = objective_at(reverse_kl(2.0, 0.0, logits), slice(0, 3))
    torch.testing.assert_close(alone(logits, labels), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(alone, logits, labels), torch.zeros(3, VOCAB), atol=1e-6, rtol=0)
    beside = objective_at(reverse_kl(2.0, 0.5, logits.roll(1, 1)), slice(0, 3))(logits, labels)
    torch.testing.assert_close(beside, 2 * divergence(logits, logits.roll(1, 1)) + 0.5 * cross_entropy(logits, labels))
    narrow = logits.clone()
    narrow[0, 0] = -math.inf
    assert divergence(logits, narrow)[0] == math.inf and divergence(narrow, logits).isfinite().all()


# ---- how they are used ----------------------------------------------------------------------------------------------


def test_every_name_of_the_block_is_built():
    given = {"unlikelihood_sequence": {"max_new_tokens": 4}, "reverse_kl": {"reference": "somewhere"}}
    names = ("cross_entropy", "label_smoothing", "focal", "tofu", "entropy_regularized", "gem", "unlikelihood_token", *given)
    for name in names:
        config = StabilityConfig.parse({"objective": {"name": name, **given.get(name, {})}})
        assert (token_objective(config.objective) is cross_entropy) == (name == "cross_entropy" or config.prepares_batches)
        path = "chunked" if config.prepares_batches else "linear"
        assert config.resolved_loss_path == ("stock" if name == "cross_entropy" else path)


@pytest.mark.parametrize("kind", ["z_loss", "label_smoothing"])
def test_regularization_acts_on_the_objective(kind):
    logits, labels = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(7)), torch.arange(6)
    part = Regularization(lambda step: 1.0, kind, 0.25)
    loss = StabilityLoss(torch.nn.Linear(1, 1), None, True, "cpu")
    base = token_level(1.0, whole(torch.arange(6).view(1, 6)))
    for objective in (token.focal(2.0), base):
        loss.base_objective = objective
        part.prepare(0, loss)
        value = objective_at(objective, slice(0, 6))(logits, labels)
        uniform = -logits.log_softmax(-1).mean(-1)
        wanted = 0.75 * value + 0.25 * uniform if kind == "label_smoothing" else value + 0.25 * logits.logsumexp(-1) ** 2
        torch.testing.assert_close(objective_at(loss.objective, slice(0, 6))(logits, labels), wanted)


def run_loss(objective, logits, labels, gain):
    module = torch.nn.Linear(1, 1).train()
    loss = StabilityLoss(module, None, True, "cpu", chunk_size=3)
    loss.objective = objective
    loss.setting.gain, loss.setting.mu, loss.setting.sigma, loss.setting.mean_weight = gain, 2.0, 1.0, 1.3
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, labels)
    value.backward()
    return value.detach(), leaf.grad


def test_weights_multiply_the_objective_and_come_from_surprisal():
    generator = torch.Generator().manual_seed(8)
    ids, logits = torch.randint(0, VOCAB, (2, 5), generator=generator), 2 * torch.randn(2, 5, VOCAB, generator=generator)
    labels = ids.clone()
    labels[0, :2] = -100
    flat, targets = logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
    keep = targets != -100
    surprisal = cross_entropy(flat[keep], targets[keep])
    weight = torch.exp(-0.8 * (surprisal - 2.0).clamp(-3, 3)) / 1.3
    for objective in (token.gem(0.7, "linear"), token_level(0.5, whole(ids))):
        value, slope = run_loss(objective, logits, labels, 0.8)
        places = torch.arange(10).view(2, 5)[:, :-1].reshape(-1)[keep]
        leaf = logits.clone().requires_grad_()
        per_token = objective_at(objective, places)(leaf[:, :-1].reshape(-1, VOCAB)[keep], targets[keep])
        wanted = (weight * per_token).sum() / keep.sum()
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slope, torch.autograd.grad(wanted, leaf)[0], rtol=1e-4, atol=1e-6)


def test_a_run_is_resumed_with_its_objective_only():
    blocks = [StabilityConfig.parse({"objective": {"name": "focal", "gamma": gamma}}).to_dict() for gamma in (1.0, 2.0)]
    assert training_part(blocks[0]) != training_part(blocks[1])
    assert difference(*map(training_part, blocks)) == "stability.objective.gamma: 1.0 there, 2.0 here"
    watched = {**blocks[0], "alarm": {**blocks[0]["alarm"], "action": "warn"}}  # that only looks on
    assert training_part(watched) == training_part(blocks[0])


def test_an_objective_made_for_other_tokens_is_an_error():
    with pytest.raises(StabilityConfigError, match="was made for 4 tokens"):
        run_loss(RowObjective(lambda rows: cross_entropy, 4), torch.zeros(1, 5, VOCAB), torch.zeros(1, 5, dtype=torch.long), 0.0)
    with pytest.raises(StabilityConfigError, match="token ids"):
        micro_batch({"inputs_embeds": torch.zeros(1, 2, 3)})
