"""Page's test against enumeration and scipy; slopes, shapes and families of trends on curves that are known."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ds_stability.eval import aggregate, trend, trend_test
from ds_stability.eval.records import Measured
from ds_stability.eval.report_cells import Cell, Key
from ds_stability.eval.report_tables import metric_family

KEY = Key("m", None, "held_out")


def brute_force_p(values) -> float:
    """Share of all ways to order each seed's values whose L is at least as far from the middle, with loops."""
    ranks = [stats.rankdata(row) for row in values]
    places = np.arange(1, len(ranks[0]) + 1)
    middle = sum(row.sum() for row in ranks) * places.mean()
    observed = sum(row @ places for row in ranks)
    orders = [[row[list(order)] @ places for order in itertools.permutations(range(len(row)))] for row in ranks]
    return float(np.mean([abs(sum(chosen) - middle) >= abs(observed - middle) - 1e-9 for chosen in itertools.product(*orders)]))


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (2, 4), (3, 3), (5, 2)])
@pytest.mark.parametrize("digits", [0, 6], ids=["ties", "no ties"])
def test_page_counts_all_orders(shape, digits):
    random = np.random.default_rng(sum(shape))
    for shift in (0.0, 0.7, -3.0):
        values = np.round(random.normal(size=shape) + shift * np.arange(shape[1]), digits)
        p, method = trend_test.page_test(values)
        assert p == pytest.approx(brute_force_p(values), abs=1e-12) and "exact" in method


@pytest.mark.parametrize("shape", [(3, 5), (4, 6), (12, 3)])
def test_page_agrees_with_scipy(shape):
    values = np.random.default_rng(1).normal(size=shape) + 0.2 * np.arange(shape[1])
    sides = [stats.page_trend_test(side, method="exact").pvalue for side in (values, -values)]
    assert trend_test.page_test(values)[0] == pytest.approx(min(1.0, 2 * min(sides)), abs=1e-9)


def test_page_of_many_levels_is_normal():
    values = np.random.default_rng(2).normal(size=(4, 12)) + 0.1 * np.arange(12)
    p, method = trend_test.page_test(values)
    assert p == pytest.approx(2 * stats.page_trend_test(values, method="asymptotic").pvalue, rel=1e-9) and "normal" in method
    assert trend_test.page_test(np.ones((3, 12)))[0] == 1.0


def test_rounding_is_a_tie_and_seeds_in_common_do_not_count():
    values = np.array([[1.0, 1.0, 2.0], [3.0, 3.0, 9.0]])
    assert trend_test.page_test(values * [1, 1 + 1e-15, 1]) == trend_test.page_test(values)
    assert trend_test.page_test(np.ones((3, 5)))[0] == 1.0
    assert trend_test.page_test(values + [[100.0], [0.0]])[0] == trend_test.page_test(values)[0]


# curves


def make_groups(curve, seeds=(0, 1, 2), noise=0.01, units=8, key=KEY, architecture="a", arm="feedback", random=None, step=0.0):
    """Groups of cells: {level: value, a list of one per seed, or None for a figure that is null}; `step`: sd of a single run."""
    random = random or np.random.default_rng(0)
    groups = {}
    for level, value in curve.items():
        cells = []
        for place, seed in enumerate(seeds):
            own = value[place] if isinstance(value, list) else value
            name = f"{architecture}-{arm}-{level}-{seed}"
            cell = Cell(name, Path(name), {}, {}, {}, architecture, arm, level, seed)
            if own is None:
                cell.rows[key] = {"value": None, "n": 0, "unit": "nats", "note": "not taken"}
            else:
                totals = own + step * random.normal() + noise * random.normal(size=units)
                cell.measured[key] = Measured(key.metric, [str(u) for u in range(units)], totals, np.ones(units))
                cell.rows[key] = {"value": cell.measured[key].value, "n": units, "unit": "nats", "note": None}
            cells.append(cell)
        groups[aggregate.Group(architecture, arm, level)] = cells
    return groups


def trend_of(curve, **kwargs):
    return trend.trend("a", "feedback", KEY, make_groups(curve, **kwargs))


FALLING = {0.0: 4.0, 0.25: 3.0, 0.5: 2.0, 0.75: 1.0, 1.0: 0.3}


def test_a_clear_fall():
    found = trend_of(FALLING)
    assert found.direction == "falls" and found.shape == "monotone, complete separation" and found.seeds == 3
    assert found.rho == pytest.approx(-0.982, abs=1e-3) and not hasattr(found, "rho_low")  # a constant of 5 x 3 points, no estimate
    assert found.p == pytest.approx(2 / 120**3) and "exact" in found.method
    slope = np.polyfit(list(FALLING), list(FALLING.values()), 1)[0]
    assert found.slope.low < slope < found.slope.high < -3.7 and found.slope.p < 1e-3
    assert list(found.slopes) == ["0", "1", "2"] and np.mean(list(found.slopes.values())) == pytest.approx(found.slope.value)


def test_slopes_are_those_of_each_seed():
    found = trend_of({0.0: [1.0, 5.0], 1.0: [3.0, 4.0]}, seeds=(7, 8), noise=0.0001)
    assert found.slopes == pytest.approx({"7": 2.0, "8": -1.0}, abs=1e-3)
    assert found.slope.value == pytest.approx(0.5, abs=1e-3) and found.slope.low < -10 and found.slope.high > 10


def test_two_levels_are_never_monotone():
    assert trend_of({0.0: 4.0, 1.0: 3.0}).shape == "falls between two levels"
    assert trend_of({0.0: 3.0, 1.0: 4.0}).shape == "rises between two levels"
    assert trend_of({0.0: [3.0, 4.0, 3.5], 1.0: [3.9, 3.1, 3.9]}).shape == "rises between two levels, within noise"


def test_too_few_seeds_and_levels_for_the_trend_test_are_said_to_be():
    found = trend_of({0.0: 4.0, 0.5: 3.0, 1.0: 2.0}, seeds=(0, 1))
    assert found.p == pytest.approx(2 / 36) and "2 seeds and 3 levels allow no p below 0.056" in found.note and found.slope.p < 0.05
    assert trend_of({0.0: 4.0, 0.5: 3.0, 1.0: 2.0}).note == ""


def test_a_curve_that_turns_back():
    found = trend_of({0.0: 4.0, 0.25: 3.0, 0.5: 3.5, 0.75: 1.0, 1.0: 0.3})
    (turn,) = found.reversals
    assert found.shape == "not monotone" and found.direction == "falls" and not found.separated and turn.beyond_noise
    assert (turn.low_level, turn.high_level) == (0.25, 0.5) and turn.difference == pytest.approx(0.5, abs=0.02)
    assert str(turn).startswith("0.25 to 0.5: +0.5")
    found = trend_of({0.0: 4.0, 0.25: 3.0, 0.5: [3.1, 2.8, 3.2], 0.75: 1.0})
    assert found.shape == "not monotone, within noise" and not found.reversals[0].beyond_noise


def test_steps_that_turn_back_are_adjusted_for_their_number():
    """No effect at all: with four steps, some interval leaves out 0 in the wrong direction in about one of ten curves."""
    random, alone, together = np.random.default_rng(4), 0, 0
    for _ in range(100):
        found = trend_of({level: [1.0] * 5 for level in FALLING}, seeds=range(5), units=3, random=random, step=0.1)
        alone += any(turn.ci_low > 0 or turn.ci_high < 0 for turn in found.reversals)
        together += found.shape == "not monotone"
    assert alone >= 6 and together <= 3, (alone, together)


def test_monotone_means_are_no_slope_that_was_shown():
    found = trend_of({0.0: [1.0, 2.0, 3.0], 0.5: [1.5, 1.8, 2.8], 1.0: [3.0, 1.0, 2.2]})
    assert found.shape == "monotone, slope within noise" and found.p > 0.5
    found = trend_of({0.0: [1.0, 1.9], 0.5: [2.0, 2.9], 1.0: [3.0, 80.0]}, seeds=(0, 1))
    assert found.separated and found.shape == "monotone, complete separation, slope within noise"


def test_curves_without_an_interval_say_so():
    apart = {0.0: [1.0, 1.1, None, None], 0.5: [None, None, 2.0, 2.1], 1.0: [None, None, 3.0, 3.1]}
    assert trend_of(apart, seeds=range(4)).shape == "monotone, complete separation, no interval"
    del apart[0.5]
    assert trend_of(apart, seeds=range(4)).shape == "rises between two levels, no interval"


def test_all_values_equal():
    found = trend_of({0.0: 2.0, 0.5: 2.0, 1.0: 2.0}, noise=0.0)
    assert found.rho is None and found.shape == "constant" and found.p == 1.0 and found.slope.low is None
    assert "equal" in found.note


def test_one_seed_has_no_test():
    found = trend_of(FALLING, seeds=(4,))
    assert found.p is None and found.slope_p is None and found.separated is None and found.seeds == 1
    assert "one seed: no test of a trend" in found.note and found.slope.low is not None
    assert found.shape == "monotone, one seed" and trend_of({0.0: 4.0, 1.0: 3.0}, seeds=(4,)).shape == "falls between two levels, one seed"
    assert trend_of({**FALLING, 0.5: 3.5}, seeds=(4,)).shape == "not monotone, one seed"  # an interval over prompts decides nothing


def test_seeds_that_lack_a_level_are_named():
    found = trend_of({**FALLING, 0.5: [2.0, None, 2.0]})
    assert found.seeds == 2 and list(found.slopes) == ["0", "2"] and found.p == pytest.approx(2 / 120**2)
    assert "seed 1 left out of the test: no value at level 0.5" in found.note
    found = trend_of({0.0: [1.0, None], 1.0: [None, 2.0]}, seeds=(0, 1))
    assert found.seeds == 0 and found.p is None and "no seed has every level" in found.note and found.slope.value is None


def test_levels_without_a_value_are_named():
    found = trend_of({**FALLING, 0.75: None})
    assert found.levels == [0.0, 0.25, 0.5, 1.0] and found.seeds == 3 and "no value at level 0.75" in found.note
    found = trend_of({0.0: 1.0, 0.5: None, 1.0: None})
    assert found.shape == "not decidable" and "not measured at two levels" in found.note and found.to_dict()["rho"] is None
    assert trend.trend("a", "feedback", KEY, make_groups({0.0: 1.0})) is None


def test_a_value_that_is_no_number_is_none():
    groups = make_groups(FALLING)
    groups[aggregate.Group("a", "feedback", 0.5)][2].rows[KEY]["value"] = float("nan")
    found = trend.trend("a", "feedback", KEY, groups)
    assert found.seeds == 2 and "seed 2 left out" in found.note


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_figures_of_any_size():
    found = trend_of({0.0: 1.7e308, 0.5: -1.7e308, 1.0: 1e307}, noise=0.0, units=1)
    assert found.shape == "not decidable" and "too large" in found.note and found.to_dict()["slope"] is None
    found = trend_of({0.0: 1e-320, 0.5: 0.0, 1.0: -1e-320}, noise=0.0, units=1)
    assert found.direction in ("falls", "flat") and found.slope.low is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-5, 5)), min_size=3, max_size=20))
@settings(max_examples=60, deadline=None)
def test_spearman_agrees_with_scipy(points):
    x, y = np.array(points, dtype=float).T
    ours = trend.spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(stats.spearmanr(x, y).statistic)


def test_adjusted_within_families():
    """Two measures of held-out text in two architectures are one family, one measure of samples another."""
    found = []
    for place, (metric, decoding, architecture) in enumerate([("x", None, "a"), ("y", None, "a"), ("x", None, "b"), ("z", "sample", "a")]):
        key = Key(metric, decoding, None if decoding else "held_out")
        curve = {0.0: [1.0, 1.1, 1.3], 0.5: [1.2, 1.2, 1.2], 1.0: [1.4 + place, 1.5, 1.6]}
        found.append(trend.trend(architecture, "feedback", key, make_groups(curve, key=key, architecture=architecture)))
    trend.adjust(found, metric_family)
    held_out = [item.p for item in found[:3]]
    assert [item.p_adjusted for item in found[:3]] == pytest.approx([min(1.0, 3 * max(held_out))] * 3) and len(set(held_out)) == 1
    assert found[3].p_adjusted == pytest.approx(found[3].p)
    assert [item.comparisons for item in found] == [3, 3, 3, 1] and len({item.family for item in found}) == 2
