import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.measures import MIN_WINDOW, NOISE_SCALE_DECAY, WINDOW, StabilityMeasures, Window
from ds_stability.statistics import INDEX, VECTOR_SIZE, StepSums


def sums_of(**fields):
    vector = np.zeros(VECTOR_SIZE)
    for name, value in fields.items():
        vector[INDEX[name]] = value
    return StepSums(vector)


def step(loss=2.0, norm=1.0, tokens=16.0, **fields):
    return sums_of(**{"tokens": tokens, "surprisal": loss * tokens, "grad_sq": norm**2, **fields})


def deviation(values):
    return np.std(values[-WINDOW:], ddof=1) if len(values) >= MIN_WINDOW else None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-20, 20), max_size=130))
def test_window_keeps_the_deviation_of_the_last_values_and_counts_spikes(values):
    window, spikes = Window(), 0
    for count, value in enumerate(values):
        seen = values[max(0, count - WINDOW) : count]
        mean, sd = window.mean_deviation()
        if len(seen) < MIN_WINDOW:
            assert (mean, sd) == (None, None)
        else:
            assert (mean, sd) == pytest.approx((np.mean(seen), np.std(seen, ddof=1)), rel=1e-9, abs=1e-9)
            spikes += value > mean + 5 * sd
        window.push(value)
        assert window.spikes == spikes and len(window.values) == min(count + 1, WINDOW)


def test_deviations_of_loss_and_log_gradient_norm():
    rng = np.random.default_rng(0)
    measures, losses, norms = StabilityMeasures(), rng.normal(3.0, 0.2, 80), rng.lognormal(0.0, 0.5, 80)
    for count, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        measures.update(step(loss, norm))
        metrics = measures.metrics()
        for key, values in (("loss", losses), ("log_grad_norm", np.log(norms))):
            expected = deviation(values[:count])
            got = metrics[f"stability/{key}_deviation"]
            assert got is None if expected is None else got == pytest.approx(expected, rel=1e-9), count


def test_spikes_are_counted_against_the_window_before_them():
    rng = np.random.default_rng(1)
    measures = StabilityMeasures()
    for count in range(60):
        # The first spike comes before there is a window, and has left it when the second one comes.
        loss = 4.0 if count in (4, 57) else rng.normal(2.0, 0.01)
        measures.update(step(loss, norm=50.0 if count == 52 else rng.lognormal(0, 0.1)))
        metrics = measures.metrics()
        assert metrics["stability/loss_spikes"] == (count >= 57)
        assert metrics["stability/grad_norm_spikes"] == (count >= 52)


@pytest.mark.parametrize("size, expected", [(4.9, 0), (5.1, 1)])
def test_a_spike_is_above_mean_plus_five_deviations(size, expected):
    window = Window()
    for value in [-1.0, 1.0] * 20:
        window.push(value)
    mean, sd = window.mean_deviation()
    window.push(mean + size * sd)
    window.push(mean - 20 * sd)  # a fall is no spike
    assert window.spikes == expected


def test_a_step_without_tokens_or_gradient_leaves_its_series_alone():
    measures = StabilityMeasures()
    for _ in range(12):
        measures.update(step())
    measures.update(sums_of(grad_sq=4.0))
    assert (len(measures.loss.values), len(measures.log_grad_norm.values)) == (12, 13)
    measures.update(step(norm=0.0))
    assert (len(measures.loss.values), len(measures.log_grad_norm.values)) == (13, 13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["surprisal", "grad_sq", "micro_grad_sq"])
def test_non_finite_numbers_never_enter(bad, name):
    """As the controller, the measures may refuse such sums or ignore them, but not take them in."""
    measures = StabilityMeasures()
    fields = {"micro_batches": 2.0, "micro_grad_sq": 9.0, "coefficient": 1.0}
    for loss in np.linspace(1.0, 2.0, 15):
        measures.update(step(loss, **fields))
    vector = step(**fields).vector.copy()
    vector[INDEX[name]] = bad
    try:
        measures.update(StepSums(vector))
    except ValueError:
        pass
    state = measures.state_dict()
    numbers = [*state["loss"]["values"], *state["log_grad_norm"]["values"], state["noise_trace"], state["noise_gradient_sq"]]
    assert all(math.isfinite(number) for number in numbers)


def test_noise_scale_averages_both_terms_before_dividing():
    measures, trace, gradient_sq = StabilityMeasures(), 0.0, 0.0
    assert measures.metrics()["stability/gradient_noise_scale"] is None
    rng = np.random.default_rng(2)
    for _ in range(30):
        small, big = rng.uniform(5, 9), rng.uniform(1, 3)
        measures.update(step(tokens=32.0, micro_batches=4.0, micro_grad_sq=32 * small, grad_sq=0.25 * big, coefficient=0.5))
        trace = NOISE_SCALE_DECAY * trace + (small - big) / (1 / 8 - 1 / 32)
        gradient_sq = NOISE_SCALE_DECAY * gradient_sq + (32 * big - 8 * small) / 24
        measured = measures.metrics()["stability/gradient_noise_scale"]
        assert measured is None if gradient_sq <= 0 else measured == pytest.approx(trace / gradient_sq)


def test_noise_scale_is_none_while_the_gradient_term_is_negative_and_held_without_terms():
    measures = StabilityMeasures()
    measures.update(step(tokens=32.0, micro_batches=4.0, micro_grad_sq=3200.0, grad_sq=1.0, coefficient=1.0))
    assert measures.noise_gradient_sq < 0 and measures.noise_scale is None
    for _ in range(40):
        measures.update(step(tokens=32.0, micro_batches=4.0, micro_grad_sq=40.0, grad_sq=1.0, coefficient=1.0))
    before = measures.noise_scale
    assert before is not None
    measures.update(step(micro_batches=1.0, micro_grad_sq=5.0, coefficient=1.0))
    assert measures.noise_scale == before


def test_state_round_trip_through_json_continues_to_the_bit():
    rng = np.random.default_rng(3)
    whole = StabilityMeasures()
    for count in range(90):
        sums = step(rng.normal(3, 1), rng.lognormal(), micro_batches=2.0, micro_grad_sq=rng.uniform(2, 9), coefficient=1.0)
        if count == 30:
            resumed = StabilityMeasures.from_state_dict(json.loads(json.dumps(whole.state_dict())))
        whole.update(sums)
        if count >= 30:
            resumed.update(sums)
    assert resumed == whole and resumed.metrics() == whole.metrics()
