"""Steps of few or of unequal numbers of tokens: every token counts the same, and the level means what it means for many."""

import math

import numpy as np
import pytest
from controller_steps import controller, step_sums
from scipy import stats

from ds_stability.config_controller import ControllerConfig
from ds_stability.controller import WINDOW_TOKENS, remembered
from ds_stability.errors import StabilityConfigError
from ds_stability.histogram import token_weight, variance_ratio
from ds_stability.measures import StabilityMeasures
from ds_stability.stabilizers.feedback import read_gains
from ds_stability.stabilizers.governance import Governance
from ds_stability.statistics import INDEX, VECTOR_SIZE, StepSums

#: Skewed to the right, as text is: a gamma distribution by 4,000 quantiles, and a mixture with many near-certain tokens.
QUANTILES = (np.arange(4000) + 0.5) / 4000
DISTRIBUTIONS = {
    "gamma": stats.gamma(1.2, scale=2.0).ppf(QUANTILES),
    "mixture": np.concatenate([stats.loguniform(1e-5, 0.1).ppf(QUANTILES), stats.gamma(1.5, scale=2.5).ppf(QUANTILES)]),
}


def true_ratio(population, setting):
    """Var_w / Var of the distribution itself under the weights of a setting: what a step of endless tokens would measure."""
    return variance_ratio(population, np.ones_like(population), setting.gain, setting.mu, setting.sigma)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("level", [0.5, 0.75])
@pytest.mark.parametrize("tokens", [8, 32, 256])
def test_the_level_is_right_however_few_tokens_a_step_has(kind, level, tokens):
    """Steered by each step's own ratio it was .34 for .5 at 8 tokens and .45 at 32: of few tokens that ratio comes out too high."""
    population, rng, control, ratios = DISTRIBUTIONS[kind], np.random.default_rng(tokens), controller(level), []
    for step in range(500):
        if step >= 200 and step % 5 == 0:
            ratios.append(true_ratio(population, control.setting))
        control.update(step_sums(rng.choice(population, tokens), control.setting))
    assert abs(np.mean(ratios) - (1.0 - level)) < 0.02


@pytest.mark.parametrize("few", [1, 2, 20])
def test_a_step_of_few_tokens_moves_little(few):
    """Two surprising tokens moved mu from 2.31 to 3.43 nats and the gain from .464 to .558."""
    rng, control = np.random.default_rng(0), controller(0.5)
    for _ in range(40):
        control.update(step_sums(rng.exponential(2.3, 4096), control.setting))
    before, integral = control.setting, control.state.integral
    control.update(step_sums(np.full(few, 14.0) + rng.random(few), control.setting))
    after = control.setting
    assert abs(after.mu - before.mu) < 2e-3 * few and abs(after.gain - before.gain) < 4e-3 * few
    assert abs(control.state.integral - integral) < 2e-5 * few


def test_tokens_count_the_same_in_one_step_or_in_several():
    """Cut into steps of a token each, a step leaves nearly what it leaves whole."""
    rng = np.random.default_rng(1)
    first, step = rng.gamma(1.2, 2.0, 2048), rng.gamma(1.2, 3.0, 64)
    whole, cut = controller(0.0), controller(0.0)
    for control, parts in ((whole, [step]), (cut, np.split(step, 64))):
        for part in [first, *parts]:
            control.update(step_sums(part, control.setting))
    assert cut.setting.mu == pytest.approx(whole.setting.mu, rel=2e-3) and cut.setting.sigma == pytest.approx(whole.setting.sigma, rel=2e-3)


def test_equal_steps_of_a_window_follow_the_law_by_steps():
    """The averages per step, divided by 1 - decay^t, that the law has always had; the ratio that of the step alone."""
    rng, control, kept = np.random.default_rng(2), controller(0.6, 3), 0.0
    surprisal = square = 0.0
    for step in range(1, 30):
        s = rng.gamma(1.3, 2.0, int(WINDOW_TOKENS))
        sums = step_sums(s, control.setting)
        control.update(sums)
        surprisal, square, kept = 0.9 * surprisal + 0.1 * s.mean(), 0.9 * square + 0.1 * (s**2).mean(), 1.0 - 0.9**step
        assert control.setting.mu == pytest.approx(surprisal / kept, rel=1e-12)
        assert control.setting.sigma == pytest.approx(math.sqrt(square / kept - (surprisal / kept) ** 2), rel=1e-9)
        if control.windowed_ratio is not None:
            w, mean = sums["weight"], sums["weighted_surprisal"] / sums["weight"]
            assert control.windowed_ratio == pytest.approx((sums["weighted_surprisal_sq"] / w - mean**2) / s.var(), rel=1e-9)


def test_what_a_step_leaves():
    assert remembered(0.9, 4096) == remembered(0.9, 512) == 0.9 and remembered(0.0, 512) == 0.0
    assert remembered(0.9, 2) == 1 - 2 / 512 and remembered(0.0, 256) == 0.5


def test_the_trim_follows_a_moving_level_with_few_tokens():
    """The window's target is that of its own steps, or the trim would lag behind a schedule."""
    control, rng = controller(lambda step: 0.3 + 0.4 * min(step / 400, 1.0)), np.random.default_rng(3)
    for _ in range(400):
        control.update(step_sums(rng.choice(DISTRIBUTIONS["gamma"], 16), control.setting))
    assert abs(control.state.trim) < 0.02
    assert true_ratio(DISTRIBUTIONS["gamma"], control.setting) == pytest.approx(0.3, abs=0.04)


def test_a_governor_on_training_steps_weighs_tokens():
    governance = Governance(ControllerConfig(mode="governor", target=2.0, probe_interval=0, warmup_steps=2), 0.9)

    def step(tokens, entropy):
        vector = np.zeros(VECTOR_SIZE)
        for name, value in {"tokens": 1, "surprisal": 2.0, "surprisal_sq": 5.0, "entropy": entropy}.items():
            vector[INDEX[name]] = value * tokens
        return StepSums(vector)

    for _ in range(5):
        governance.update(step(4096, 3.0))
    governance.update(step(2, 9.0))
    assert governance.governor.state.value == pytest.approx(3.0 + 6.0 * 2 / (4096 * (1 - 2 / 512) + 2), rel=1e-9)
    restored = Governance(ControllerConfig(mode="governor", target=2.0, probe_interval=0, warmup_steps=2), 0.9)
    restored.load_state_dict(governance.state_dict())
    for part in (governance, restored):
        part.update(step(100, 4.0))
    assert restored.state_dict() == governance.state_dict()


def test_the_noise_scale_weighs_tokens():
    def step(tokens, small, big):
        vector = np.zeros(VECTOR_SIZE)
        fields = {"tokens": tokens, "micro_batches": 2, "coefficient": 1.0, "micro_grad_sq": small * tokens, "grad_sq": big}
        for name, value in fields.items():
            vector[INDEX[name]] = value
        return StepSums(vector)

    measures = StabilityMeasures()
    for _ in range(50):
        measures.update(step(4096, 3.0, 2.0))
    before = measures.noise_scale
    measures.update(step(2, 900.0, 800.0))
    assert measures.noise_scale == pytest.approx(before, rel=0.3)


def test_weights_of_the_largest_gain_are_finite_in_fp32():
    """exp(-3 gain) is the smallest mean weight, exp(3 gain) the largest weight; a loss has up to some 30 nats."""
    largest = ControllerConfig(gain_max=14).gain_max
    weight = token_weight(np.array([-1e9], dtype=np.float64), largest, 0.0, 1.0)[0]
    assert np.isfinite(np.float32(weight) / np.float32(1.0 / weight) * np.float32(30.0))


def test_replayed_gains_have_the_same_bound(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stability/gain": 14}\n{"stability/gain": 0}\n')
    assert read_gains(str(path)) == (14.0, 0.0)
    path.write_text('{"stability/gain": 29.6}\n')
    with pytest.raises(StabilityConfigError, match="holds a gain of 29.6; 14 is the largest"):
        read_gains(str(path))
