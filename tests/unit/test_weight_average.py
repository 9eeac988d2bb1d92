"""The average of the weights on made-up partitions: the recursion against sums written out, the exchange, what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability import weight_average
from ds_stability.config import StabilityConfig, unsupported
from ds_stability.errors import StabilityConfigError
from ds_stability.masters import require_masters
from ds_stability.same_block import require_same_block, training_part
from ds_stability.stability import Stability
from ds_stability.weight_average import WeightAverage


def make(partitions, **block):
    return WeightAverage(StabilityConfig.parse({"ema": block}).ema, lambda: partitions)


def weighted_sum(history, start, decay, warmup):
    """The average written out: every theta with the product of the decays after it."""
    counted = history[start:]
    decays = [min(decay, (1 + t) / (10 + t)) if warmup else decay for t in range(1, len(counted))]
    total = torch.zeros_like(counted[0])
    for k, theta in enumerate(counted):
        share = 1.0 if k == 0 else 1.0 - decays[k - 1]
        for later in decays[k:]:
            share *= later
        total += share * theta
    return total


@settings(max_examples=60, deadline=None)
@given(
    decay=st.floats(0.01, 0.9999), warmup=st.booleans(), start=st.integers(0, 4), steps=st.integers(1, 30),
    skipped=st.sets(st.integers(0, 30)), seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_recursion_is_the_weighted_sum_of_the_weights(decay, warmup, start, steps, skipped, seed):
    generator = torch.Generator().manual_seed(seed)
    partitions = [torch.randn(n, generator=generator).requires_grad_() for n in (5, 3)]
    average = make(partitions, decay=decay, warmup=warmup, start_step=start)
    history = [torch.cat([p.detach().double() for p in partitions])]
    for step in range(steps):
        average.begin(len(history) - 1)
        if step in skipped:
            continue
        for part in partitions:
            part.data += torch.randn(part.shape, generator=generator)
        average.update()
        history.append(torch.cat([p.detach().double() for p in partitions]))
    applied = len(history) - 1
    assert average.updates == max(0, applied - start)
    if average.updates == 0:
        assert average.metrics() == {"stability/weight_average_decay": 0.0}
        return
    expected = weighted_sum(history, start, decay, warmup)
    found = torch.cat(list(average.tensors.values()))
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_warm_up_forgets_the_weights_that_it_began_with():
    """After T steps of warm-up the first weights have the product of (1 + t)/(10 + t): (T + 1)! 10! / (T + 10)!."""
    part = torch.ones(1)
    average = make([part], decay=0.9999)
    average.begin(0)
    part.zero_()
    for _ in range(40):
        average.update()
    share = math.factorial(41) * math.factorial(10) / math.factorial(50)
    assert average.tensors[0].item() == pytest.approx(share, rel=1e-4) and share < 1e-8
    constant = make([torch.zeros(1)], decay=0.9999, warmup=False)
    constant.tensors = {0: torch.ones(1)}
    for _ in range(40):
        constant.update()
    assert constant.tensors[0].item() == pytest.approx(0.9999**40, rel=1e-5)


def engine_of_copies(partitions, copies):
    """As stages 1 and 2: bf16 copies that are made from the partitions."""
    def update_lp_params():
        for part, copy in zip(partitions, copies, strict=True):
            copy.copy_(part.data)

    return SimpleNamespace(optimizer=SimpleNamespace(update_lp_params=update_lp_params))


def test_the_exchange_is_exact_and_ends_with_an_error_too(monkeypatch):
    monkeypatch.setattr(weight_average, "PIECE", 3)
    partitions = [torch.randn(n).requires_grad_() for n in (7, 3, 2)]
    partitions[0].data[0] = torch.nan  # no arithmetic may touch what is exchanged
    copies = [part.detach().bfloat16() for part in partitions]
    average = make(partitions, decay=0.5)
    average.tensors, average.updates = {i: torch.randn(p.numel()) for i, p in enumerate(partitions)}, 1
    kept = [t.detach().clone().view(torch.int32) for t in [*partitions, *average.tensors.values()]]
    averages = [t.clone() for t in average.tensors.values()]
    with pytest.raises(KeyError), average.in_place_of_weights(engine_of_copies(partitions, copies)) as _:
        assert average.swapped
        assert all(torch.equal(part, mean) for part, mean in zip(partitions, averages, strict=True))
        assert all(torch.equal(copy, mean.bfloat16()) for copy, mean in zip(copies, averages, strict=True))
        with average.in_place_of_weights(None):  # nested: nothing to do
            pass
        assert average.swapped
        raise KeyError
    assert not average.swapped
    now = [t.detach().view(torch.int32) for t in [*partitions, *average.tensors.values()]]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    assert average.stale and torch.equal(copies[1], averages[1].bfloat16())  # nobody was waited for
    average.mend(engine_of_copies(partitions, copies))
    assert not average.stale
    assert torch.equal(copies[0].view(torch.int16), partitions[0].detach().bfloat16().view(torch.int16))
    with average.in_place_of_weights(engine_of_copies(partitions, copies)):
        assert torch.equal(copies[1], averages[1].bfloat16())
    assert torch.equal(copies[1], partitions[1].detach().bfloat16()) and not average.stale


def test_before_it_begins_the_weights_stand_for_themselves():
    average = make([torch.ones(2)], start_step=3)
    for applied in range(3):
        average.begin(applied)
        average.update()
        with average.in_place_of_weights(None):
            assert not average.swapped
    assert average.tensors == {} and average.updates == 0


@pytest.mark.parametrize("what", ["a training step", "save_checkpoint"])
def test_a_step_or_a_checkpoint_inside_is_refused(what):
    def average(swapped):
        ema = object.__new__(WeightAverage)
        ema.__dict__.update(swapped=swapped, mend=lambda engine: None)
        return ema

    with pytest.raises(RuntimeError, match=f"^{what} is not possible inside averaged_weights"):
        Stability.require_own_weights(SimpleNamespace(ema=average(True), engine=None), what)
    for ema in (None, average(False)):
        Stability.require_own_weights(SimpleNamespace(ema=ema, engine=None), what)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"decay": 1.0}, "stability.ema.decay: 1.0 is not allowed; must be a number above 0 and below 1"),
        ({"decay": 0}, "stability.ema.decay: 0 is not allowed"),
        ({"decay": "0.9"}, "stability.ema.decay"),
        ({"start_step": -1}, "stability.ema.start_step: -1 is not allowed; must be an integer from 0"),
        ({"dacay": 0.9}, 'did you mean "decay"'),
        (0.99, "stability.ema: 0.99 is not allowed; must be an object with any of the keys decay, start_step, warmup, or null"),
    ],
)
def test_wrong_keys_are_one_line(block, words):
    with pytest.raises(StabilityConfigError) as caught:
        StabilityConfig.parse({"ema": block})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_average_that_would_never_begin_is_refused():
    config = StabilityConfig.parse({"ema": {"start_step": 100}})
    config.require_average(101)
    StabilityConfig().require_average(1)
    with pytest.raises(StabilityConfigError, match=r"^stability.ema.start_step: 100 is not allowed in a run of 100 steps; must be below"):
        config.require_average(100)


def test_settings_without_masters_are_refused():
    config = StabilityConfig.parse({"ema": {}})
    problems = {name: unsupported(ds, config) for name, ds in {
        "stage 0": {"zero_optimization": {"stage": 0}}, "none": {}, "fine": {"zero_optimization": {"stage": 1}},
        "nvme": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        "nvme_optimizer": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}}.items()}  # fmt: skip
    assert "stability.ema" in problems["stage 0"][0] and problems["stage 0"] == problems["none"] and problems["fine"] == []
    assert "offload_param.device" in problems["nvme"][0] and "offload_optimizer.device" in problems["nvme_optimizer"][0]
    with pytest.raises(StabilityConfigError, match=r"^stability.ema needs zero_optimization.stage 1, 2 or 3"):
        require_masters(config, [])
    with pytest.raises(StabilityConfigError, match=r"^stability.ema needs fp32 master weights; these are torch.bfloat16"):
        require_masters(config, [torch.zeros(1, dtype=torch.bfloat16)])
    require_masters(config, [torch.zeros(1)])
    require_masters(StabilityConfig(), [])


def test_another_average_is_another_run_and_an_older_checkpoint_is_the_same():
    off, on = StabilityConfig().to_dict(), StabilityConfig.parse({"ema": {"decay": 0.9}}).to_dict()
    older = {key: value for key, value in off.items() if key != "ema"}
    require_same_block(training_part(older), training_part(off))
    for other in (off, StabilityConfig.parse({"ema": {"decay": 0.99}}).to_dict()):
        with pytest.raises(StabilityConfigError, match=r"stability\.ema"):
            require_same_block(training_part(other), training_part(on))
