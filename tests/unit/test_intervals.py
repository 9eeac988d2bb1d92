"""Standard errors and intervals of one model's figures: against formulas, by simulated coverage, and on degenerate input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ds_stability.eval.intervals import row
from ds_stability.eval.records import Measured
from ds_stability.eval.spread import MAX_UNITS


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
    result = row(measured(values))
    assert result["stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    assert (result["ci_low"], result["ci_high"]) == pytest.approx(stats.t.interval(0.95, 39, values.mean(), stats.sem(values)))


def test_standard_error_of_a_ratio_is_the_jackknifes():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 30, 200).astype(float)
    totals = counts * 0.4 + rng.normal(size=200)
    left = (totals.sum() - totals) / (counts.sum() - counts)
    assert row(measured(totals, counts))["stderr"] == pytest.approx(math.sqrt(199 / 200 * ((left - left.mean()) ** 2).sum()))


def test_many_units_are_summed_in_runs_without_changing_the_error():
    values = np.random.default_rng(0).normal(size=4321)
    result = row(measured(values))
    assert result["units"] == 4321 > MAX_UNITS and result["value"] == pytest.approx(values.mean())
    assert result["stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(4321), rel=0.1)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-300])
def test_units_that_are_all_equal_have_no_interval_and_say_so(value):
    counts = np.array([3.0, 7.0, 1.0, 9.0])
    result = row(measured(value * counts, counts))
    assert result["value"] == pytest.approx(value) and result["stderr"] is None and result["ci_low"] is None
    assert result["note"] == "all 4 units are equal: no interval"


@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
def test_a_share_that_is_equal_in_all_units_has_clopper_and_pearsons_interval(value):
    result = row(measured([value] * 8, unit="share"))
    exact = stats.binomtest(round(8 * value), 8).proportion_ci(method="exact")
    assert (result["ci_low"], result["ci_high"]) == pytest.approx((exact.low, exact.high)) and result["stderr"] > 0
    assert "all 8 units are equal: Clopper-Pearson" in result["note"]


def test_one_unit_has_no_interval():
    result = row(measured([2.0, 0.0], [4.0, 0.0]))  # the second unit holds nothing
    assert result["value"] == 0.5 and result["stderr"] is None and result["ci_low"] is None and result["ci_high"] is None
    assert "one unit" in result["note"] and result["units"] == 1


@pytest.mark.parametrize("nothing", [Measured.null("m", "why"), measured([0.0, 0.0], [0.0, 0.0], note="why"),
                                     measured([math.nan, 1.0], note="why")])  # fmt: skip
def test_no_value_no_interval(nothing):
    result = row(nothing)
    assert result["value"] is None and result["stderr"] is None and result["ci_low"] is None and result["note"] == "why"


def test_a_missing_value_has_a_reason_of_its_own():
    assert row(measured([math.nan, 1.0]))["note"] == "a unit is not finite"
    assert row(measured([0.0], [0.0]))["note"] == "nothing was counted"


def test_a_share_stays_in_its_range():
    totals = [1.0, 1.0, 1.0, 1.0, 1.0, 1.3, 0.6]
    result = row(measured(totals, unit="share"))
    assert 0 < result["ci_low"] < result["value"] < result["ci_high"] <= 1.0 < row(measured(totals))["ci_high"]
    assert row(measured([1.5, 0.8, 1.0], unit="share"))["value"] == 1.0


@given(st.lists(st.tuples(st.floats(-1e3, 1e3) | st.floats(-1e300, 1e300), st.integers(0, 20)), max_size=12), st.sampled_from(["share", "nats"]))
@settings(deadline=None, max_examples=100)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_always_ordered_or_null_with_a_reason(pairs, unit):
    totals, counts = ([p[i] for p in pairs] for i in (0, 1))
    result = row(measured(totals, counts, unit=unit))
    assert (result["value"] is None) <= (sum(counts) == 0 or max(map(abs, totals)) > 1e200)
    if result["ci_low"] is not None:
        assert result["ci_low"] <= result["value"] <= result["ci_high"] > result["ci_low"] and result["stderr"] > 0
    else:
        assert result["note"] and result["stderr"] is None


def coverage(units, noise, draws=1000):
    """Share of 95 % intervals that hold the true ratio 2, with counts that vary."""
    rng = np.random.default_rng(units)
    hits = 0
    for _ in range(draws):
        counts = rng.integers(1, 6, units).astype(float)
        result = row(measured(counts * (2.0 + noise(rng, units)), counts))
        hits += result["ci_low"] <= 2.0 <= result["ci_high"]
    return hits / draws


def normal(rng, size):
    return rng.normal(size=size)


def skewed(rng, size):
    return rng.exponential(2.0, size) - 2.0


@pytest.mark.parametrize("units, noise, at_least", [(8, normal, 0.92), (8, skewed, 0.84), (60, skewed, 0.92), (200, skewed, 0.93)])
def test_coverage(units, noise, at_least):
    """Skewed units need more than a few; docs/evaluation.md says so."""
    assert at_least <= coverage(units, noise) <= 0.97
