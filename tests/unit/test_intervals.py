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
    row,
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


