"""Standard errors and intervals: against formulas, by simulated coverage, and on degenerate input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ds_stability.eval.intervals import (
    MAX_UNITS,
    confidence_level,
    hierarchical,
    hierarchical_difference,
    paired_difference,
    row,
    t_interval,
)
from ds_stability.eval.records import Measured


def measured(totals, counts=None, units=None, **fields):
    totals = np.asarray(totals, dtype=float)
    counts = np.ones(len(totals)) if counts is None else counts
    return Measured("m", list(range(len(totals))) if units is None else units, totals, counts, **{"unit": "nats", **fields})


def test_a_row_says_everything():
    result = row(measured([1.0, 2.0, 4.0, 5.0, 6.0, 9.0, 3.0], decoding="sample", settings={"k": 3}, note="as is"))
    assert result["metric"] == "m" and result["decoding"] == "sample" and result["split"] is None
    assert result["value"] == pytest.approx(30 / 7) and (result["n"], result["units"]) == (7, 7)
    assert result["ci_low"] < result["value"] < result["ci_high"]
    assert result["settings"] == {"k": 3} and result["unit"] == "nats" and result["note"] == "as is"


def test_standard_error_of_a_mean():
    values = np.random.default_rng(0).exponential(size=40)
    assert row(measured(values), resamples=20_000)["stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(40), rel=0.03)


def test_standard_error_of_a_ratio():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 30, 200).astype(float)
    totals = counts * 0.4 + rng.normal(size=200)
    residual = totals - counts * totals.sum() / counts.sum()
    expected = residual.std(ddof=1) * math.sqrt(200) / counts.sum()  # linearization
    assert row(measured(totals, counts), resamples=8000)["stderr"] == pytest.approx(expected, rel=0.05)


def test_same_seed_same_row_and_another_seed_another():
    one = measured(np.random.default_rng(0).normal(size=30))
    assert row(one) == row(one) and row(one, seed=1)["ci_low"] != row(one)["ci_low"]


def test_many_units_are_summed_in_runs_without_changing_the_error():
    values = np.random.default_rng(0).normal(size=4321)
    result = row(measured(values), resamples=4000)
    assert result["units"] == 4321 > MAX_UNITS and result["value"] == pytest.approx(values.mean())
    assert result["stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(4321), rel=0.1)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-300])
def test_a_constant_has_width_zero(value):
    counts = np.array([3.0, 7.0, 1.0, 9.0])
    result = row(measured(value * counts, counts))
    assert result["ci_low"] == result["ci_high"] == result["value"] and result["stderr"] == 0.0
    assert "equal" in result["note"]


def test_one_unit_has_no_interval():
    result = row(measured([2.0, 0.0], [4.0, 0.0]))  # the second unit holds nothing
    assert result["value"] == 0.5 and result["stderr"] is None and result["ci_low"] is None and result["ci_high"] is None
    assert "one unit" in result["note"] and result["units"] == 1


@pytest.mark.parametrize("nothing", [Measured.null("m", "why"), measured([0.0, 0.0], [0.0, 0.0], note="why"),
                                     measured([math.nan, 1.0], note="why")])  # fmt: skip
def test_no_value_no_interval(nothing):
    result = row(nothing)
    assert result["value"] is None and result["stderr"] is None and result["ci_low"] is None and result["note"] == "why"


def test_few_units_say_that_they_are_few():
    assert "3 units" in row(measured([1.0, 2.0, 3.0]))["note"]
    assert row(measured([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))["note"] is None


def test_a_share_stays_in_its_range():
    totals = [1.0, 1.0, 1.0, 1.0, 1.0, 1.3, 0.6]
    assert row(measured(totals, unit="share"))["ci_high"] == 1.0 < row(measured(totals))["ci_high"]


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 20)), max_size=12))
@settings(deadline=None, max_examples=40)
def test_always_ordered_or_null(pairs):
    totals, counts = ([p[i] for p in pairs] for i in (0, 1))
    result = row(measured(totals, counts), resamples=200)
    assert (result["value"] is None) == (sum(counts) == 0)
    if result["ci_low"] is not None:
        assert result["ci_low"] <= result["ci_high"] and result["stderr"] >= 0
    assert (result["ci_low"] is None) <= bool(result["note"] or result["value"] is None)


def coverage(method, units, noise, draws=400, resamples=400):
    """Share of 95 % intervals that hold the true ratio 2, with counts that vary."""
    rng = np.random.default_rng(units)
    hits = 0
    for _ in range(draws):
        counts = rng.integers(1, 6, units).astype(float)
        totals = counts * (2.0 + noise(rng, units))
        if method == "ours":
            result = row(measured(totals, counts), resamples=resamples)
            low, high = result["ci_low"], result["ci_high"]
        else:
            low, high = stats.bootstrap((totals, counts), lambda t, c, axis: t.sum(axis) / c.sum(axis), paired=True,
                                        n_resamples=resamples, method=method, random_state=rng).confidence_interval  # fmt: skip
        hits += low <= 2.0 <= high
    return hits / draws


def normal(rng, size):
    return rng.normal(size=size)


def skewed(rng, size):
    return rng.exponential(2.0, size) - 2.0


@pytest.mark.parametrize("noise, at_least", [(normal, 0.91), (skewed, 0.86)])
def test_coverage_is_why_the_percentile_interval_is_expanded(noise, at_least):
    ours, percentile, bca = (coverage(method, 8, noise) for method in ("ours", "percentile", "BCa"))
    assert ours >= at_least and ours > percentile + 0.03 and ours > bca + 0.03, (ours, percentile, bca)


def test_coverage_with_many_units():
    assert 0.92 <= coverage("ours", 60, skewed, draws=300) <= 0.98


def test_level_of_the_expanded_interval():
    assert confidence_level(10) == pytest.approx(1 - 2 * stats.norm.sf(stats.t.ppf(0.975, 9) * math.sqrt(10 / 9)))
    assert confidence_level(5) > confidence_level(50) > 0.95 and confidence_level(10**6) == pytest.approx(0.95, abs=1e-5)


# ---- differences ----------------------------------------------------------------------------------------------------


def test_pairing_removes_what_is_common():
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=50) * 10
    a, b = measured(prompt + 1 + rng.normal(size=50) * 0.1), measured(prompt)
    result = paired_difference(a, b)
    assert result["value"] == pytest.approx(a.value - b.value) and result["ci_low"] > 0.9 and result["ci_high"] < 1.1
    assert row(a)["stderr"] > 50 * result["stderr"]


def test_pairs_are_matched_by_unit_whatever_their_order():
    a = measured([1.0, 2.0, 3.0, 9.0], units=["p", "q", "r", "only a"])
    b = measured([3.0, 1.0, 0.0, 0.5], [1.0, 1.0, 0.0, 1.0], units=["q", "p", "r", "only b"])
    result = paired_difference(a, b)
    assert result["value"] == pytest.approx(1.5 - 2.0) and (result["n"], result["units"]) == (2, 2)  # p and q; r is empty in b
    assert paired_difference(b, a)["value"] == -result["value"]


def test_equal_models_differ_by_nothing():
    one = measured(np.random.default_rng(0).normal(size=9))
    result = paired_difference(one, one)
    assert result["value"] == result["ci_low"] == result["ci_high"] == 0.0


@pytest.mark.parametrize("b", [measured([1.0], units=["x"]), Measured.null("m", "gone"), measured([math.nan])])
def test_nothing_in_common(b):
    result = paired_difference(measured([1.0]), b)
    assert result["value"] is None and result["ci_low"] is None and result["note"]


def test_one_common_unit():
    result = paired_difference(measured([3.0]), measured([1.0]))
    assert result["value"] == 2.0 and result["ci_low"] is None and "one unit" in result["note"]


def test_different_settings_are_noted_and_different_outcomes_are_not():
    a, b = (measured(np.arange(8.0), settings=settings) for settings in ({"tokens": 64, "groups": 3}, {"tokens": 64, "groups": 4}))
    assert paired_difference(a, b)["note"] in (None, "all units are equal")
    assert "settings" in paired_difference(a, measured(np.arange(8.0), settings={"tokens": 32}))["note"]


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_seeds_add_their_spread_to_that_of_units():
    rng = np.random.default_rng(0)
    seeds = [measured(rng.normal(size=200) + shift) for shift in (-2.0, 0.0, 2.0)]
    result, values = hierarchical(seeds), [one.value for one in seeds]
    assert result["value"] == pytest.approx(np.mean(values)) and (result["n"], result["units"]) == (3, 600)
    between, within = np.var(values), np.mean([one.totals.var() / 200 for one in seeds])
    assert result["stderr"] == pytest.approx(math.sqrt((between + within) / 3), rel=0.05)
    assert result["ci_low"] < -1 and result["ci_high"] > 1


def test_units_add_their_spread_where_seeds_agree():
    seeds = [measured(np.random.default_rng(0).normal(size=50))] * 3
    expected = seeds[0].totals.std() / math.sqrt(50) / math.sqrt(3)
    assert hierarchical(seeds, resamples=6000)["stderr"] == pytest.approx(expected, rel=0.05)


def test_seeds_that_have_no_value_are_left_out_and_said():
    result = hierarchical([measured([1.0, 2.0]), Measured.null("m", "x"), measured([3.0, 4.0])])
    assert result["value"] == 2.5 and result["n"] == 2 and "1 seeds have no value" in result["note"]
    assert hierarchical([Measured.null("m", "x")])["value"] is None
    single = hierarchical([measured([1.0, 2.0])])
    assert single["value"] == 1.5 and single["ci_low"] is None and "one seed" in single["note"]
    with pytest.raises(ValueError):
        hierarchical([])


def test_constant_over_seeds_has_width_zero():
    result = hierarchical([measured([0.1 * 3, 0.1 * 7], [3.0, 7.0])] * 3)
    assert result["ci_low"] == result["ci_high"] == result["value"] and result["stderr"] == 0.0


def test_difference_over_seeds_is_paired_within_each():
    rng = np.random.default_rng(0)
    pairs = []
    for seed in range(3):
        prompts = rng.normal(size=40) * 10 + seed * 50
        pairs.append((measured(prompts + 1 + rng.normal(size=40) * 0.1), measured(prompts)))
    result = hierarchical_difference(pairs)
    assert result["value"] == pytest.approx(np.mean([a.value - b.value for a, b in pairs]))
    assert 0.9 < result["ci_low"] < 1 < result["ci_high"] < 1.1 and result == hierarchical_difference(pairs)


def test_t_interval():
    values = [1.0, 2.0, 4.0]
    result, theirs = t_interval([*values, None]), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (result["ci_low"], result["ci_high"]) == pytest.approx((theirs.low, theirs.high)) and result["n"] == 3
    assert result["stderr"] == pytest.approx(stats.sem(values))
    same = t_interval([0.1, 0.1, 0.1])
    assert same["ci_low"] == same["ci_high"] == same["value"] and same["stderr"] == 0.0
    assert t_interval([2.0])["ci_low"] is None and t_interval([None])["value"] is None
