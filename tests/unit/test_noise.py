"""MicroGradientMeter on a plain torch model, against gradients of each micro-batch's own mean loss in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from ds_stability import install_loss as install_module
from ds_stability.config import StabilityConfig
from ds_stability.controller import Setting
from ds_stability.loss import StabilityLoss
from ds_stability.noise import MicroGradientMeter
from ds_stability.statistics import INDEX, STEP_FIELDS, VECTOR_SIZE, StepSums, noise_scale_terms

VOCAB, WIDTH = 9, 6
SETTING = Setting(gain=0.8, mu=2.0, sigma=0.7, mean_weight=1.3)


class TinyModel(torch.nn.Module):
    """Tied embedding, a layer used twice, a bias, a frozen and an unused parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCAB, WIDTH)
        self.layer = torch.nn.Linear(WIDTH, WIDTH)
        self.frozen = torch.nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, ids):
        hidden = self.embedding(ids) * self.frozen
        return self.layer(torch.tanh(self.layer(hidden))) @ self.embedding.weight.T


def make_micro(seed, masked):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (2, 6), generator=rng)
    labels = ids.clone()
    labels.view(-1)[:masked] = -100
    return ids, labels


def mean_loss_gradient(model, micro, setting):
    """Flat fp64 gradient of the (weighted) mean loss over the micro-batch's own tokens, and its token count."""
    ids, labels = micro
    logits = model(ids)[:, :-1].reshape(-1, VOCAB)
    s = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="none", ignore_index=-100)
    mask = labels[:, 1:].reshape(-1) != -100
    weight = torch.ones_like(s)
    if setting is not None:
        weight = torch.exp(-setting.gain * ((s.detach() - setting.mu) / setting.sigma).clamp(-3, 3)) / setting.mean_weight
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((weight * s)[mask].mean(), parameters, allow_unused=True)
    return torch.cat([g.reshape(-1).double() for g in gradients if g is not None]), int(mask.sum())


def run_step(micros, scales, items=None, chunked=False, world_size=1):
    """One optimizer step of micro-batches whose losses the caller multiplies by `scales`."""
    model = TinyModel()
    loss = StabilityLoss(model, ForCausalLMLoss, chunked, "cpu")
    loss.setting = SETTING
    meter = MicroGradientMeter(model, torch.device("cpu"), world_size)
    meter.listen(True)
    loss.on_backward = meter.start
    for (ids, labels), scale in zip(micros, scales, strict=True):
        (scale * loss(model(ids), labels, vocab_size=VOCAB, num_items_in_batch=items)).backward()
    meter.close()
    return model, meter


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(1e-3, 1e4)), min_size=1, max_size=4),
    st.sampled_from([None, 23]), st.booleans(), st.sampled_from([1, 4]),
)  # fmt: skip
def test_micro_norms_are_those_of_mean_losses_whatever_the_scale(plan, items, chunked, world_size):
    micros = [make_micro(seed, masked) for seed, (masked, _) in enumerate(plan)]
    scales = [scale for _, scale in plan]
    model, meter = run_step(micros, scales, items, chunked, world_size)
    wanted, coefficient = 0.0, 0.0
    for micro, scale in zip(micros, scales, strict=True):
        gradient, tokens = mean_loss_gradient(model, micro, SETTING if chunked else None)
        wanted += tokens * float(gradient.square().sum())
        coefficient += scale * tokens / (items or tokens) / world_size
    assert meter.sums.tolist() == pytest.approx([wanted, len(plan), coefficient], rel=1e-4)
    meter.close()
    assert float(meter.sums[1]) == len(plan)  # closing twice counts nothing twice
    meter.clear()
    assert meter.sums.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_micro_batch_without_tokens_does_not_count(chunked):
    micros = [make_micro(0, 12), make_micro(1, 0), make_micro(2, 12)]
    model, meter = run_step(micros, [2.0, 3.0, 5.0], chunked=chunked)
    gradient, tokens = mean_loss_gradient(model, micros[1], SETTING if chunked else None)
    assert meter.sums.tolist() == pytest.approx([tokens * float(gradient.square().sum()), 1.0, 3.0], rel=1e-4)


def test_backward_passes_that_are_not_the_losss_are_not_counted():
    model, meter = run_step([make_micro(0, 0)], [1.0])
    before = meter.sums.clone()
    model(make_micro(1, 0)[0]).square().mean().backward()  # somebody else's, after the step was closed
    meter.close()
    assert torch.equal(meter.sums, before) and meter.squares == []


def test_terms_agree_with_the_gradient_of_the_whole_batch():
    """Through noise_scale_terms: `grad_sq / coefficient^2` is the gradient of the mean loss over all tokens."""
    micros, items = [make_micro(seed, 0) for seed in range(4)], 40
    model, meter = run_step(micros, [0.25] * 4, items)
    pieces = [mean_loss_gradient(model, micro, None)[0] for micro in micros]
    vector = torch.zeros(VECTOR_SIZE, dtype=torch.float64).numpy()
    first = INDEX[STEP_FIELDS[0]]
    vector[INDEX["tokens"]] = items
    vector[first] = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    vector[INDEX["micro_grad_sq"] : INDEX["micro_grad_sq"] + 3] = meter.sums.numpy()
    small = sum(float(piece.square().sum()) for piece in pieces) / 4
    big = float((sum(pieces) / 4).square().sum())
    trace, gradient_sq = noise_scale_terms(StepSums(vector))
    assert trace == pytest.approx((small - big) / (1 / 10 - 1 / 40), rel=1e-4)
    assert gradient_sq == pytest.approx((40 * big - 10 * small) / 30, rel=1e-3, abs=1e-6)


def test_a_meter_that_does_not_listen_has_no_hooks():
    model = torch.nn.Linear(3, 2)
    meter = MicroGradientMeter(model, torch.device("cpu"), 1)
    for wanted in (False, True, True, False, True):
        meter.listen(wanted)
        meter.start(torch.tensor(1.0), 1, torch.tensor(1))
        model(torch.ones(1, 3)).sum().backward()
        assert len(meter.handles) == len(meter.squares) == 2 * wanted
        meter.close()


def test_a_parameter_frozen_during_training_is_left_out():
    model = torch.nn.Linear(3, 2)
    meter = MicroGradientMeter(model, torch.device("cpu"), 1)
    model.bias.requires_grad_(False)
    meter.listen(True)
    meter.start(torch.tensor(1.0), 1, torch.tensor(1))
    model(torch.ones(1, 3)).sum().backward()
    assert len(meter.handles) == len(meter.squares) == 1


def test_bfloat16_gradients_are_squared_in_fp32():
    model = torch.nn.Linear(4000, 1, bias=False).bfloat16()
    meter = MicroGradientMeter(model, torch.device("cpu"), 1)
    meter.listen(True)
    value = model(torch.full((1, 4000), 0.01, dtype=torch.bfloat16)).float().sum()
    meter.start(torch.tensor(1.0), 1, torch.tensor(1))
    value.backward()
    meter.close()
    assert float(meter.sums[0]) == pytest.approx(float(model.weight.grad.double().square().sum()), rel=1e-5)


class Engine:
    """What `install_loss` asks of an engine."""

    def __init__(self, module):
        self.module = module

    def zero_optimization_stage(self):
        return 2

    def _backward_prologue_per_tensor(self, grad):
        return grad


def test_another_engine_takes_away_what_a_dead_one_left_on_the_model(monkeypatch):
    """It died in the middle of a backward: its hooks are on the parameters, and its loss in the model."""
    monkeypatch.setattr(install_module.dist, "get_rank", lambda group=None: 0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    config = StabilityConfig.parse({"level": 0.5, "loss_path": "chunked"}).resolve(False)
    engines = [Engine(model), Engine(model)]
    first = install_module.install_loss(engines[0], model, config, torch.device("cpu"), None)
    meter = MicroGradientMeter(model, torch.device("cpu"), 1)
    first.parts.append(lambda: meter.listen(False))
    first.on_backward = meter.start
    meter.listen(True)
    handle = model.get_input_embeddings().weight.register_hook(interrupted)
    ids = torch.arange(8).view(1, 8)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=ids, labels=ids).loss.backward()
    handle.remove()
    assert any(p._backward_hooks for p in model.parameters()) and meter.squares
    second = install_module.install_loss(engines[1], model, config, torch.device("cpu"), None)
    assert not any(p._backward_hooks for p in model.parameters())
    assert model.loss_function is second and second.stock is ForCausalLMLoss
    second.release()
    assert model.loss_function is ForCausalLMLoss


def interrupted(grad):
    raise KeyboardInterrupt
