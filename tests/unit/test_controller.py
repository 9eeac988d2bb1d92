"""The controller against a simulated training step: surprisal is sampled, answers to the gain, and drifts."""

import json
import math

import numpy as np
import pytest
from controller_steps import controller, step_sums
from scipy import stats

from ds_stability.controller import Setting
from ds_stability.histogram import histogram, mean_weight, quadrature, solve_gain
from ds_stability.statistics import INDEX, VECTOR_SIZE, StepSums, variance_ratio

TOKENS = 1024


def sample(rng, kind, step, lag, tokens=TOKENS):
    """Surprisal of a model that learns (falls with the steps) and whose rare tokens get worse the more they are damped."""
    early = math.exp(-step / 80)
    if kind == "from scratch":
        return rng.gamma(1.2 + 1.5 * early + 0.3 * lag, 1.6 * (1.0 + 0.1 * lag), tokens)
    easy = rng.random(tokens) < 0.2 + 0.3 * (1.0 - early)
    return np.where(easy, 10 ** rng.uniform(-5, -1, tokens), rng.gamma(1.5 + 0.2 * lag, 2.5 + early, tokens))


def simulate(control, steps, seed=0, kind="pretrained"):
    """Closed loop; returns per step (gain in force, measured ratio, saturated)."""
    rng, lag, rows = np.random.default_rng(seed), 0.0, []
    for step in range(steps):
        lag = 0.9 * lag + 0.1 * control.setting.gain  # the weights of the model follow the gain slowly
        sums = step_sums(sample(rng, kind, step, lag), control.setting)
        rows.append((control.setting.gain, variance_ratio(sums), control.state.saturated))
        control.update(sums)
    return np.array(rows)


@pytest.mark.parametrize("kind", ["from scratch", "pretrained"])
@pytest.mark.parametrize("level", [0.25, 0.5, 0.75])
def test_mean_ratio_is_one_minus_level(level, kind):
    """Invariant 7, on steps 31..130 after a warm-up of 10."""
    rows = simulate(controller(level), 141, kind=kind)
    ratios = rows[41:, 1]
    assert len(ratios) == 100 and abs(ratios.mean() - (1.0 - level)) < 0.02
    assert not rows[:, 2].any() and rows[41:, 0].min() > 0.0


def test_trim_removes_what_the_solve_gets_wrong():
    """The bins promise more than the weights do: only the PI term can know, and it closes most of the gap."""
    errors = []
    for ki in (0.0, 0.02):
        control, rng, ratios = controller(0.5, trim_kp=0.1 if ki else 0.0, trim_ki=ki), np.random.default_rng(0), []
        for _ in range(110):
            s, setting = rng.exponential(3.0, TOKENS), control.setting
            # The weights act as if the gain was a third smaller.
            sums = step_sums(s, Setting(setting.gain / 1.5, setting.mu, setting.sigma))
            ratios.append(variance_ratio(sums))
            control.update(sums)
        errors.append(np.mean(ratios[80:]) - 0.5)
    assert errors[0] > 0.08 and abs(errors[1]) < 0.4 * errors[0]


@pytest.mark.parametrize("warmup, ramp", [(1, 5), (7, 5), (3, 1), (4, 0), (2, 12)])
def test_gain_is_exactly_zero_in_warmup_and_then_ramps(warmup, ramp):
    rng, control = np.random.default_rng(0), controller(1.0, warmup, ramp_steps=ramp)  # level 1: always gain_max
    for step in range(warmup + ramp + 3):
        share = 0.0 if step < warmup else min((step - warmup + 1) / ramp, 1.0) if ramp else 1.0
        assert control.setting.gain == share * 8.0, step
        assert control.setting.mean_weight == 1.0 or step >= warmup
        control.update(step_sums(rng.exponential(3.0, 200), control.setting))


def kept(history, decay):
    """What is left of each token of `history`, steps' surprisal: a step decays what was before it, a small one by less."""
    left = np.array([])
    for s in history:
        left = np.concatenate([left * max(decay, 1.0 - len(s) / 512), np.ones(len(s))])
    return left


def test_setting_is_the_solve_on_smoothed_sums():
    """Without trim the setting has a closed form: over all earlier tokens, each by the age of its step, not by how many it had beside it."""
    schedule = [0.6, 0.6, 0.6, 0.6, 0.2, 0.3, 0.4, 0.5, 0.7, 0.0, 0.9, 0.8]
    rng, control = np.random.default_rng(3), controller(lambda t: schedule[min(t, 11)], 2, ramp_steps=4, trim_kp=0.0,
                                                        trim_ki=0.0)  # fmt: skip
    history = []
    for step in range(12):
        if step:
            old, older = kept(history, 0.9), kept(history, 0.75)
            moments = [np.average(np.concatenate(history) ** k, weights=old) for k in (1, 2)]
            bins = sum(share * histogram(np.array([s])) for share, s in zip(older, np.concatenate(history), strict=True))
            mu, sigma = moments[0], math.sqrt(moments[1] - moments[0] ** 2)
            gain, _ = solve_gain(*quadrature(bins), 1.0 - schedule[step], 8.0, mu, sigma)
            gain *= min(max(step - 1, 0) / 4, 1.0)
            setting = control.setting
            assert (setting.mu, setting.sigma) == pytest.approx((mu, sigma), rel=1e-9)
            assert setting.gain == pytest.approx(gain, rel=1e-6, abs=1e-12)
            assert setting.mean_weight == pytest.approx(mean_weight(*quadrature(bins), gain, mu, sigma), rel=1e-6)
        assert control.level == schedule[step]
        history.append(rng.gamma(1.5, 2.0 + 0.1 * step, int(rng.integers(20, 400))))
        control.update(step_sums(history[-1], control.setting))


def test_schedule_is_followed_in_applied_steps():
    rows = simulate(controller(lambda step: 0.0 if step < 60 else 0.6), 141)
    assert (rows[:60, 0] == 0.0).all() and (rows[:60, 1] == 1.0).all()
    assert abs(rows[70:, 1].mean() - 0.4) < 0.02 and rows[60, 0] > 0.0


def test_level_zero_never_weights():
    control = controller(0.0)
    rows = simulate(control, 40)
    assert (rows[:, 0] == 0.0).all() and control.setting.mean_weight == 1.0 and not control.state.saturated


@pytest.mark.parametrize("gain_max", [8.0, 2.5])
def test_level_one_saturates_at_gain_max(gain_max):
    control = controller(1.0, gain_max=gain_max)
    rows = simulate(control, 40)
    assert (rows[15:, 0] == gain_max).all() and (rows[15:, 2] == 1).all()
    assert not rows[:10, 2].any() and control.state.integral == control.state.trim == 0.0


def test_leaving_saturation_is_quick():
    """Level 1 for 60 steps must not have wound anything up: a few steps later the ratio is right again."""
    rows = simulate(controller(lambda step: 1.0 if step < 60 else 0.5), 100)
    assert rows[40:60, 2].all() and not rows[61:, 2].any()
    assert abs(rows[65:, 1].mean() - 0.5) < 0.02


def drive(control, steps, error):
    """Steps whose measured ratio is off the target by `error` whatever the gain; the histogram stays the same.

    Rows of (integral, trim, gain) in force, and integral and trim afterwards.
    """
    surprisal = stats.gamma(4.0).ppf((np.arange(TOKENS) + 0.5) / TOKENS)
    rows = []
    for _ in range(steps):
        sums = step_sums(surprisal, control.setting)
        ratio = 1.0 - control.level + error
        mean = sums["weighted_surprisal"] / sums["weight"]
        vector = sums.vector.copy()
        variance = surprisal.var() * ratio
        vector[INDEX["weighted_surprisal_sq"]] = sums["weight"] * (variance + mean**2)
        before = (control.state.integral, control.state.trim, control.setting.gain)
        control.update(StepSums(vector))
        rows.append((*before, control.state.integral, control.state.trim))
    return rows


@pytest.mark.parametrize("error", [0.4, -0.4])
def test_integral_stands_still_while_the_trim_is_at_its_bound(error):
    control, sign = controller(0.5, 2), math.copysign(1.0, error)
    rows = drive(control, 90, error)
    assert all(0.0 < row[2] < 8.0 for row in rows[3:]), "the gain's own bounds must stay out of this test"
    at_bound = [row for row in rows if abs(row[1]) >= 0.5]
    assert len(at_bound) > 20
    assert all(row[0] == row[3] for row in at_bound)
    assert all(abs(row[4]) <= 0.5 for row in rows) and control.state.trim == sign * 0.5
    moved = [row for row in rows if row[0] != row[3]]
    assert len(moved) > 10 and all((row[3] - row[0]) == pytest.approx(0.02 * error) for row in moved)
    # Back: the integral leaves its bound in the very next step, and the trim is through zero within 70 steps.
    turned = drive(control, 1, -error)[0]
    assert (turned[3] - turned[0]) == pytest.approx(-0.02 * error)
    assert any(row[4] * sign < 0 for row in drive(control, 70, -error))


def test_integral_stands_still_while_the_gain_is_at_gain_max():
    """gain_max is just above the solved gain: a positive trim meets it long before its own bound."""
    probe = controller(0.6, 2)
    drive(probe, 20, 0.0)
    solved = probe.setting.gain
    control = controller(0.6, 2, gain_max=solved + 0.01)
    rows = drive(control, 60, 0.2)
    stuck = [row for row in rows[10:] if row[2] >= solved + 0.01]
    assert len(stuck) > 30 and not control.state.saturated
    assert all(row[0] == row[3] for row in stuck) and abs(control.state.trim) < 0.1
    below = drive(control, 5, -0.2)
    assert below[0][3] < below[0][0] and control.setting.gain < solved


def test_non_finite_sums_are_refused_and_change_nothing():
    control = controller(0.5, 2)
    simulate(control, 20)
    before = json.dumps(control.state_dict())
    for index in (INDEX["surprisal"], INDEX["grad_sq"], VECTOR_SIZE - 1):
        for bad in (math.nan, math.inf, -math.inf):
            vector = step_sums(np.ones(8), control.setting).vector.copy()
            vector[index] = bad
            with pytest.raises(ValueError, match="finite"):
                control.update(StepSums(vector))
    assert json.dumps(control.state_dict()) == before  # as in a skipped step: nothing advanced


def test_steps_without_tokens_hold():
    control = controller(0.5, 2)
    simulate(control, 30)
    before = control.state_dict()
    control.update(StepSums(np.zeros(VECTOR_SIZE)))
    after = control.state_dict()
    assert after.pop("applied_steps") == before.pop("applied_steps") + 1
    assert after == before and before["setting"]["gain"] > 0.0


def test_steps_without_tokens_before_any_other_leave_the_default():
    control = controller(0.5, 0)
    control.update(StepSums(np.zeros(VECTOR_SIZE)))
    assert control.setting == Setting() and control.state.applied_steps == 1
    control.update(step_sums(np.random.default_rng(0).exponential(2.0, 500), control.setting))
    assert control.setting.mu == pytest.approx(2.0, rel=0.1) and control.setting.gain > 0.0


@pytest.mark.parametrize("surprisal", [np.full(64, 2.5), np.array([0.7]), np.zeros(16)])
def test_surprisal_without_variance_gives_finite_settings(surprisal):
    control = controller(0.5, 1)
    for _ in range(10):
        control.update(step_sums(surprisal, control.setting))
        setting = control.setting
        assert all(math.isfinite(value) for value in vars(setting).values())
        assert 0.0 <= setting.gain <= 8.0 and setting.sigma > 0.0 and setting.mean_weight > 0.0


def test_state_round_trip_through_json_continues_to_the_bit():
    whole = controller(lambda step: min(step / 50, 0.7))
    rng = np.random.default_rng(5)
    batches = [rng.gamma(1.5, 2.0, 300) for _ in range(40)]
    text, resumed = None, None
    for step, batch in enumerate(batches):
        if step in (5, 12, 25):  # in warm-up, in the ramp, after it
            text = json.dumps(whole.state_dict())
            resumed = controller(lambda step: min(step / 50, 0.7))
            resumed.load_state_dict(json.loads(text))
        whole.update(step_sums(batch, whole.setting))
        if resumed is not None:
            resumed.update(step_sums(batch, resumed.setting))
            assert resumed.state == whole.state and json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())
    assert text is not None and whole.state.integral != 0.0


def test_state_dict_is_a_copy():
    control = controller(0.5, 2)
    simulate(control, 8)
    state = control.state_dict()
    text = json.dumps(state)
    simulate(control, 3)
    assert json.dumps(state) == text


def test_the_same_sums_give_the_same_state_on_every_rank():
    ranks = [controller(0.6, 3) for _ in range(2)]
    rng = np.random.default_rng(6)
    for _ in range(25):
        sums = step_sums(rng.gamma(1.3, 2.0, 200), ranks[0].setting)
        for rank in ranks:
            rank.update(StepSums(sums.vector.copy()))
        assert json.dumps(ranks[0].state_dict()) == json.dumps(ranks[1].state_dict())
