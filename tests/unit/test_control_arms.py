"""The control experiments of feedback: permuted weights, and gains that are replayed open loop."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from ds_stability.config import StabilityConfig
from ds_stability.controller import FeedbackController, Setting
from ds_stability.errors import StabilityConfigError
from ds_stability.loss import StabilityLoss, token_weights
from ds_stability.stabilizers.feedback import Feedback, read_gains
from ds_stability.statistics import STEP_FIELDS, TOKEN_FIELDS, StepSums

VOCAB = 13
SETTING = Setting(gain=1.5, mu=2.5, sigma=0.8, mean_weight=1.3)


def make_batch(seed, masked):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 12, VOCAB, generator=rng).mul(2).requires_grad_()
    labels = torch.randint(VOCAB, (2, 12), generator=rng)
    labels[torch.rand(2, 12, generator=rng) < masked] = -100
    labels[0, 1] = 5
    return logits, labels


def make_loss(step, rank=0):
    loss = StabilityLoss(torch.nn.Linear(1, 1), ForCausalLMLoss, True, "cpu", chunk_size=5)
    loss.setting, loss.rank = SETTING, rank
    loss.permutation_step = step
    return loss


def run(loss, logits, labels):
    value = loss(logits, labels, vocab_size=VOCAB)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient.reshape(-1, VOCAB)


def weights_of(gradient_NV, logits, labels):
    """The weight of each token, read off the gradient coefficient_i * (softmax - one-hot) at the label."""
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    mask = targets != -100
    probabilities = torch.softmax(logits.detach().reshape(-1, VOCAB)[mask].double(), dim=-1)  # fp32 loses a small p in p - 1
    at_label = probabilities.gather(1, targets[mask].unsqueeze(1)).squeeze(1) - 1
    tokens = int(mask.sum())
    read = gradient_NV[mask].gather(1, targets[mask].unsqueeze(1)).squeeze(1) / at_label * tokens * SETTING.mean_weight
    return read, token_weights(-torch.log(at_label + 1), SETTING), gradient_NV[~mask], -torch.log(at_label + 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.4, 0.9]), st.integers(0, 1000))
def test_permuted_weights_are_the_same_weights_elsewhere(seed, masked, step):
    logits, labels = make_batch(seed, masked)
    loss = make_loss(step)
    value, gradient = run(loss, logits, labels)
    read, tied, unsupervised, surprisal = weights_of(gradient, logits, labels)
    torch.testing.assert_close(read.sort().values, tied.sort().values, rtol=1e-4, atol=1e-5)
    assert not unsupervised.any()
    expected = (read * surprisal).sum() / SETTING.mean_weight / len(read)
    torch.testing.assert_close(value, expected.float(), rtol=1e-4, atol=1e-5)
    recorded = loss.train.sums_K[TOKEN_FIELDS.index("loss")] / len(read)
    torch.testing.assert_close(recorded.float(), value, rtol=1e-4, atol=1e-5)


def test_permutation_leaves_the_measured_moments_and_unties_weights():
    logits, labels = make_batch(0, 0.0)
    tied, permuted = make_loss(None), make_loss(7)
    run(tied, logits, labels)
    value, gradient = run(permuted, logits, labels)
    for name in ("weight", "weighted_surprisal", "weighted_surprisal_sq", "surprisal", "entropy"):
        index = TOKEN_FIELDS.index(name)
        assert permuted.train.sums_K[index] == tied.train.sums_K[index]
    read, own, _, _ = weights_of(gradient, logits, labels)
    assert (read - own).abs().max() > 0.1


def test_permutation_depends_on_step_micro_batch_and_rank_alone():
    logits, labels = make_batch(3, 0.2)
    first = run(make_loss(4), logits, labels)[1]
    assert torch.equal(first, run(make_loss(4), logits, labels)[1])
    assert not torch.equal(first, run(make_loss(5), logits, labels)[1])
    assert not torch.equal(first, run(make_loss(4, rank=1), logits, labels)[1])
    loss = make_loss(4)
    run(loss, logits, labels)
    assert not torch.equal(first, run(loss, logits, labels)[1])


def test_feedback_hands_the_step_to_the_loss():
    loss = make_loss(None)
    Feedback(FeedbackController(lambda step: 0.5, 1), permute=True).prepare(9, loss)
    assert loss.permutation_step == 9
    Feedback(FeedbackController(lambda step: 0.5, 1)).prepare(9, loss)
    assert loss.permutation_step is None


def step_sums(seed):
    """Global sums of a step, by the loss itself."""
    logits, labels = make_batch(seed, 0.0)
    loss = make_loss(None)
    run(loss, logits, labels)
    tokens, bins = loss.train.sums_K, loss.train.bins.reshape(-1)
    return StepSums(torch.cat([tokens, torch.zeros(len(STEP_FIELDS), dtype=torch.float64), bins]).numpy())


def test_replayed_gains_are_those_of_the_closed_loop():
    closed = FeedbackController(lambda step: 0.5, warmup_steps=3, ramp_steps=2)
    gains, settings_ = [], []
    for step in range(12):
        gains.append(closed.setting.gain)
        settings_.append(closed.setting)
        closed.update(step_sums(step))
    assert gains[0] == 0.0 and gains[-1] > 0.1
    opened = FeedbackController(lambda step: 0.5, warmup_steps=3, ramp_steps=2, gains=tuple(gains))
    for step in range(12):
        assert opened.setting == settings_[step]
        opened.update(step_sums(step))
    for step in range(3):  # past the end the last gain is held; whatever the ratio is, nothing reacts
        assert opened.setting.gain == gains[-1] and opened.state.trim == 0.0
        opened.update(step_sums(100 + step))


def test_gains_are_read_from_applied_steps(tmp_path):
    rows = [{"step": 1, "stability/gain": 0.0}, {"step": 2, "stability/gain": 9.0, "skipped": True}, {"step": 2, "eval/entropy": 1},
            {"step": 3, "stability/gain": 0.7}]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_gains(str(path)) == (0.0, 0.7)


@pytest.mark.parametrize("content", [None, "", "[1]\n", "{\n", '{"step": 1}\n', '{"stability/gain": null}\n', '{"stability/gain": -1}\n'])
def test_a_file_without_gains_is_one_line(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StabilityConfigError, match="replay") as caught:
        read_gains(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("feedback", [{"permute": True}, {"replay": "a.jsonl"}])
def test_controls_need_a_level(feedback):
    with pytest.raises(StabilityConfigError, match="level of the run"):
        StabilityConfig.parse({"level": 0.0, "stabilizers": {"feedback": feedback}})
    block = {"level": 0.0, "stabilizers": {"feedback": {**feedback, "level": 0.5}}}
    parsed = StabilityConfig.parse(block)
    assert StabilityConfig.parse(parsed.to_dict()) == parsed
