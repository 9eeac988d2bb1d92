"""The four families against their formulas in plain torch and numpy; the hooks on a plain torch optimizer."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability import optimizer_hooks
from ds_stability.config import REGULARIZATION_MAX as DEFAULT_MAX
from ds_stability.controller import FeedbackController
from ds_stability.histogram import histogram
from ds_stability.loss import StabilityLoss, cross_entropy
from ds_stability.norms import squared_norm
from ds_stability.optimizer_hooks import OptimizerHooks, UpdateMeter
from ds_stability.stabilizers.averaging import Averaging
from ds_stability.stabilizers.clipping import Clipping, threshold_deviations
from ds_stability.stabilizers.feedback import Feedback
from ds_stability.stabilizers.regularization import Regularization
from ds_stability.statistics import FIELDS, INDEX, VECTOR_SIZE, StepSums


def sums_of(**fields):
    vector = np.zeros(VECTOR_SIZE)
    for name, value in fields.items():
        vector[INDEX[name]] = value
    return StepSums(vector)


def make_loss():
    return StabilityLoss(torch.nn.Linear(1, 1), None, True, "cpu")


# ---- clipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level, k", [(0.0, math.inf), (0.25, 11.0), (0.5, 2.0), (0.75, -5 / 3), (1.0, -4.0)])
def test_threshold_deviations(level, k):
    assert threshold_deviations(level) == pytest.approx(k)


@pytest.mark.parametrize("level, k", [(0.25, 11.0), (0.5, 2.0), (0.75, -5 / 3), (1.0, -4.0)])
@pytest.mark.parametrize("decay, warmup", [(0.97, 10), (0.5, 0)])
def test_threshold_is_from_the_ema_of_earlier_log_norms(level, k, decay, warmup):
    rng, clipping, logs = np.random.default_rng(0), Clipping(lambda step: level, warmup, decay), []
    for step in range(60):
        clipping.prepare(step, None)
        if len(logs) < max(warmup, 2):
            assert clipping.threshold is None
        else:
            weights = decay ** np.arange(len(logs))[::-1]  # Adam-style correction: the weights sum to one
            mean = np.average(logs, weights=weights)
            deviation = math.sqrt(np.average((np.array(logs) - mean) ** 2, weights=weights))
            assert clipping.threshold == pytest.approx(math.exp(mean + k * deviation), rel=1e-6)
        assert clipping.metrics() == {"stability/clipping_level": level, "stability/clip_threshold": clipping.threshold}
        norm = rng.lognormal(1.0, 0.4)
        clipping.update(sums_of(grad_sq=0.0 if step == 30 else norm**2))
        logs += [] if step == 30 else [math.log(norm)]  # a step without a gradient has no norm to learn from


@pytest.mark.parametrize("level", [1e-300, 1e-9, 2e-3, 0.05])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_a_small_level_hardly_clips_and_never_fails(level, spread):
    """A schedule that leaves 0 passes through every small level: k is then in the thousands."""
    rng, clipping = np.random.default_rng(1), Clipping(lambda step: level, 2, 0.97)
    for step in range(30):
        norm = math.exp(spread * rng.normal())
        clipping.prepare(step, None)
        assert clipping.threshold is None or clipping.threshold > 0.9
        json.dumps(clipping.metrics(), allow_nan=False)
        clipping.update(sums_of(grad_sq=norm**2))


def test_clipping_state_round_trip():
    first = Clipping(lambda step: 0.5, 2, 0.97)
    for step in range(10):
        first.update(sums_of(grad_sq=1.0 + step))
    second = Clipping(lambda step: 0.5, 2, 0.97)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for part in (first, second):
        part.prepare(10, None)
        part.update(sums_of(grad_sq=3.3))
        part.prepare(11, None)
    assert first.threshold == second.threshold is not None and first.state == second.state


# ---- averaging ------------------------------------------------------------------------------------------------------


def explicit_mean(gradients, betas):
    """sum_i (1 - b_i) prod_{j > i} b_j g_i over the sum of these weights."""
    weights = [(1 - b) * math.prod(betas[i + 1 :]) for i, b in enumerate(betas)]
    return sum(w * g.double() for w, g in zip(weights, gradients, strict=True)) / sum(weights)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=12), st.integers(0, 10**6))
def test_averaging_is_the_bias_corrected_mean_under_a_changing_beta(levels, seed):
    rng = torch.Generator().manual_seed(seed)
    averaging = Averaging(lambda step: levels[step], 0.99)
    history = {0: [], 1: []}
    for step in range(len(levels)):
        averaging.prepare(step, None)
        assert averaging.metrics() == {"stability/averaging_beta": pytest.approx(0.99 * levels[step])}
        for index, size in ((0, 7), (1, 3)):
            grad = torch.randn(size, generator=rng)
            history[index].append(grad.clone())
            averaging.apply(index, grad)
            wanted = explicit_mean(history[index], [0.99 * level for level in levels[: step + 1]])
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-5)
        averaging.update(None)


@pytest.mark.parametrize("level", [0.25, 0.5, 1.0])
def test_constant_beta_is_adams_bias_correction(level):
    averaging, beta = Averaging(lambda step: level, 0.99), 0.99 * level
    m = torch.zeros(5, dtype=torch.float64)
    for step in range(1, 40):
        averaging.prepare(step, None)
        grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
        m = beta * m + (1 - beta) * grad.double()
        averaging.apply(0, grad)
        averaging.update(None)
        torch.testing.assert_close(grad.double(), m / (1 - beta**step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("earlier", [0.0, 0.9])
def test_beta_zero_is_the_identity_to_the_bit(earlier):
    """Also after steps with averaging: nothing of an old mean may be left in the gradient."""
    averaging = Averaging(lambda step: earlier if step < 5 else 0.0, 0.99)
    for step in range(15):
        averaging.prepare(step, None)
        grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
        grad[:3] = torch.tensor([1e-40, 3e38, -1e-30])
        before = grad.clone()
        averaging.apply(0, grad)
        averaging.update(None)
        assert (step < 5 and earlier) or torch.equal(grad.view(torch.int32), before.view(torch.int32))


def test_averaging_state_is_the_weight_and_a_skipped_step_leaves_it():
    averaging = Averaging(lambda step: 0.5, 0.99)
    for step in range(3):
        averaging.prepare(step, None)
        averaging.apply(0, torch.ones(2))
        averaging.update(None)
    averaging.prepare(3, None)
    averaging.prepare(3, None)  # a skipped step: prepared again, never applied
    state = json.loads(json.dumps(averaging.state_dict()))
    assert state == {"weight": pytest.approx(1 - 0.495**3)}
    resumed = Averaging(lambda step: 0.5, 0.99)
    resumed.load_state_dict(state)
    resumed.means = {0: averaging.means[0].clone()}
    resumed.prepare(3, None)
    grads = torch.full((2,), 7.0), torch.full((2,), 7.0)
    averaging.apply(0, grads[0])
    resumed.apply(0, grads[1])
    assert torch.equal(*grads)


# ---- regularization -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, maximum", [("z_loss", 1e-2), ("label_smoothing", 0.3), ("init_decay", 0.1)])
def test_coefficient_is_level_squared_times_max(kind, maximum):
    assert DEFAULT_MAX[kind] == maximum
    part = Regularization(lambda step: step / 10, kind, maximum)
    for step in range(11):
        part.prepare(step, make_loss())
        assert part.metrics() == {"stability/regularization_coefficient": pytest.approx((step / 10) ** 2 * maximum)}
    assert part.state_dict() == {}


@pytest.mark.parametrize("kind", ["z_loss", "label_smoothing"])
def test_objectives_are_their_formulas_and_follow_the_schedule(kind):
    logits, labels = 3 * torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 8, 3, 3, 1, 5])
    part, loss = Regularization(lambda step: [0.0, 0.5, 1.0, 0.0][step], kind, 0.3), make_loss()
    for step, c in enumerate([0.0, 0.3 * 0.25, 0.3, 0.0]):
        part.prepare(step, loss)
        assert (loss.objective is cross_entropy) == (c == 0.0)
        log_p = logits.double().log_softmax(-1)
        ce = -log_p[torch.arange(6), labels]
        if kind == "z_loss":
            wanted = ce + c * logits.double().exp().sum(-1).log() ** 2
        else:
            wanted = (1 - c) * ce - c * log_p.mean(-1)
        torch.testing.assert_close(loss.objective(logits, labels).double(), wanted, rtol=1e-5, atol=1e-6)


def test_only_init_decay_touches_weights():
    for kind in ("z_loss", "label_smoothing"):
        part, parameter = Regularization(lambda step: 1.0, kind, 0.1), torch.ones(4)
        part.prepare(0, make_loss())
        part.apply(0, parameter, 0.1)
        parameter += 1
        part.apply(0, parameter, 0.1)
        assert torch.equal(parameter, torch.full((4,), 2.0)) and part.initial == {}
    part, loss = Regularization(lambda step: 1.0, "init_decay", 0.1), make_loss()
    part.prepare(0, loss)
    assert loss.objective is cross_entropy


# ---- feedback -------------------------------------------------------------------------------------------------------


def test_feedback_hands_over_the_setting_and_reports_what_was_in_force():
    feedback, loss = Feedback(FeedbackController(lambda step: 0.1 * step, 1)), make_loss()
    rng = np.random.default_rng(0)
    feedback.prepare(0, loss)
    assert feedback.metrics()["stability/mu"] is None and feedback.metrics()["stability/sigma"] is None
    for step in range(9):
        feedback.prepare(step, loss)
        metrics, setting = feedback.metrics(), feedback.controller.setting
        assert loss.setting is setting
        assert metrics["stability/level"] == 0.1 * step and metrics["stability/target_ratio"] == 1 - 0.1 * step
        assert (metrics["stability/gain"], metrics["stability/mean_weight"]) == (setting.gain, setting.mean_weight)
        assert metrics["stability/saturated"] in (0, 1) and type(metrics["stability/saturated"]) is int
        s = rng.gamma(1.5, 2.0, 300)
        vector = sums_of(tokens=300, weight=300, surprisal=s.sum(), surprisal_sq=(s * s).sum(),
                         weighted_surprisal=s.sum(), weighted_surprisal_sq=(s * s).sum()).vector  # fmt: skip
        vector[len(FIELDS) :] = histogram(s).ravel()
        feedback.update(StepSums(vector))
    assert setting.gain > 0.0 and metrics["stability/mu"] == setting.mu
    resumed = Feedback(FeedbackController(lambda step: 0.1 * step, 1))
    resumed.load_state_dict(json.loads(json.dumps(feedback.state_dict())))
    assert resumed.metrics() == feedback.metrics()


# ---- hooks on a plain optimizer -------------------------------------------------------------------------------------


class PlainGradients:
    """What `OptimizerHooks` needs of `ReducedGradients`, over two flat partitions of a plain torch optimizer."""

    loss_scale = 4.0

    def __init__(self, parameters, optimizer):
        self.parameters, self.optimizer = parameters, optimizer

    def partitions(self):
        return self.parameters

    def base_optimizers(self):
        return [self.optimizer]

    def squared_norm(self, device):
        return sum(squared_norm(tensors) for tensors in self.tensors()) / self.loss_scale**2

    def tensors(self):
        return ([piece * self.loss_scale for piece in p.grad.split(2)] for p in self.parameters)


def make_run(seed=0, learning_rates=(0.01, 0.003)):
    rng = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=rng)) for size in (5, 3)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, learning_rates, strict=True)]
    return parameters, torch.optim.AdamW(groups, weight_decay=0.1)


def make_gradients(step):
    rng = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=rng) for size in (5, 3)]


def test_hooks_step_along_the_mean_and_pull_to_the_initial_weights():
    """Against AdamW that is handed the explicit mean, on weights pulled by theta -= lr c (theta - theta_0)."""
    parameters, optimizer = make_run()
    plain, plain_optimizer = make_run()
    start = [p.detach().clone() for p in plain]
    levels = [1.0, 0.5, 0.0, 0.9, 0.9, 0.7]
    averaging = Averaging(lambda step: levels[step], 0.99)
    pull = Regularization(lambda step: levels[step], "init_decay", 0.5)
    meter = UpdateMeter(2, torch.device("cpu"))
    hooks = OptimizerHooks(PlainGradients(parameters, optimizer), averaging, pull, meter)
    history = []
    for step, level in enumerate(levels):
        for part in (averaging, pull):
            part.prepare(step, make_loss())
        meter.prepare(step)
        history.append(make_gradients(step))
        for index, p in enumerate(parameters):
            p.grad = history[-1][index].clone()
        products = hooks.products(torch.device("cpu"))
        means = [averaging.means.get(index, torch.zeros_like(p)) for index, p in enumerate(parameters)]
        wanted = [sum(float(a @ b) for a, b in zip(*pair, strict=True))
                  for pair in ((history[-1], history[-1]), (history[-1], means), (means, means))]  # fmt: skip
        assert products.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        before = [p.detach().clone() for p in plain]
        for index, (p, lr) in enumerate(zip(plain, (0.01, 0.003), strict=True)):
            p.grad = explicit_mean([g[index] for g in history], [0.99 * x for x in levels[: step + 1]]).float()
            p.data -= lr * (level**2 * 0.5) * (p.data - start[index])
        optimizer.step()
        plain_optimizer.step()
        torch.testing.assert_close(parameters, plain, rtol=1e-4, atol=1e-5)
        update = sum(float((a - b).detach().square().sum()) for a, b in zip(plain, before, strict=True))
        size = sum(float(b.square().sum()) for b in before)
        assert meter.sums.tolist() == (pytest.approx([update, size], rel=1e-3) if step % 2 == 0 else [0.0, 0.0])
        meter.clear()
        averaging.update(None)
    assert len(hooks.handles) == 2


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["adamw", "fused", "amsgrad", "sgd"])
def test_the_update_of_adamw_is_known_without_a_copy_of_the_parameters(monkeypatch, kind, decay):
    """Against the parameters before and after each step; other optimizers are measured by a copy."""
    monkeypatch.setattr(optimizer_hooks, "PIECE", {"cpu": 2})
    parameters, _ = make_run(2)
    make = {"adamw": torch.optim.AdamW, "fused": functools.partial(torch.optim.AdamW, fused=True), "sgd": torch.optim.SGD,
            "amsgrad": functools.partial(torch.optim.AdamW, amsgrad=True)}[kind]  # fmt: skip
    optimizer = make([{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.01, 0.003), strict=True)], weight_decay=decay)
    meter = UpdateMeter(1, torch.device("cpu"))
    hooks = OptimizerHooks(PlainGradients(parameters, optimizer), None, None, meter)
    copies = []
    monkeypatch.setattr(meter, "start", lambda index, p: (copies.append(index), UpdateMeter.start(meter, index, p)))
    for step in range(4):
        meter.prepare(step)
        for p, g in zip(parameters, make_gradients(step), strict=True):
            p.grad = g
        before = [p.detach().double() for p in parameters]
        optimizer.step()
        update = sum(float((a - b.detach()).square().sum()) for a, b in zip(before, parameters, strict=True))
        assert meter.sums.tolist() == pytest.approx([update, sum(float(b.square().sum()) for b in before)], rel=1e-4)
        meter.clear()
    assert len(copies) == (0 if kind in ("adamw", "fused") else 8) and len(hooks.handles) == 2


def test_hooks_without_stabilizers_change_nothing_and_the_meter_can_be_off():
    (parameters, optimizer), (plain, plain_optimizer) = make_run(1), make_run(1)
    meter = UpdateMeter(0, torch.device("cpu"))
    hooks = OptimizerHooks(PlainGradients(parameters, optimizer), None, None, meter)
    for step in range(5):
        meter.prepare(step)
        for group in (parameters, plain):
            for p, g in zip(group, make_gradients(step), strict=True):
                p.grad = g
        wanted = sum(float(p.grad.square().sum()) for p in parameters)
        assert hooks.products(torch.device("cpu")).tolist() == [pytest.approx(wanted), 0.0, 0.0]
        optimizer.step()
        plain_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, plain, strict=True)) and meter.sums.tolist() == [0.0, 0.0]


def test_label_smoothing_of_a_constant_logit_row_is_log_vocab():
    part, loss = Regularization(lambda step: 1.0, "label_smoothing", 0.3), make_loss()
    part.prepare(0, loss)
    value = loss.objective(torch.zeros(1, 16), torch.tensor([3]))
    torch.testing.assert_close(value, F.cross_entropy(torch.zeros(1, 16), torch.tensor([3]), reduction="none"))
    assert float(value) == pytest.approx(math.log(16))
