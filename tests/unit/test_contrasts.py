"""Estimates over seeds and units: against a two-way analysis of variance by hand, brute force, and simulated coverage."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ds_stability.eval.contrasts import difference_estimate, group_estimate, group_p, holm, slope_estimate
from ds_stability.eval.records import Measured
from ds_stability.eval.report_cells import Cell, Key
from ds_stability.eval.spread import half_width, pseudo_values, share_bounds, spread_of, standard_error

KEY = Key("m", None, "held_out")


def cell(seed, totals, counts=None, units=None, unit="nats", value=None) -> Cell:
    totals = np.asarray(totals, dtype=float)
    counts = np.ones(len(totals)) if counts is None else np.asarray(counts, dtype=float)
    measured = Measured("m", [str(u) for u in (range(len(totals)) if units is None else units)], totals, counts, split="held_out")
    row = {"metric": "m", "split": "held_out", "value": measured.value if value is None else value, "unit": unit, "note": None}
    return Cell(f"c{seed}", Path(f"c{seed}"), {"run": {}}, {KEY: row}, {KEY: measured}, "a", "feedback", 0.0, seed)


def without_units(seed, value) -> Cell:
    bare = cell(seed, [value])
    bare.measured.clear()
    return bare


def by_loops(table):
    """(by_seed, by_unit, rest) of the mean of a table [S][U]: sums of squares of a two-way analysis of variance."""
    seeds, units = len(table), len(table[0])
    mean = sum(map(sum, table)) / seeds / units
    rows = [sum(row) / units for row in table]
    columns = [sum(row[u] for row in table) / seeds for u in range(units)]
    between_seeds = units * sum((row - mean) ** 2 for row in rows) / (seeds - 1)
    between_units = seeds * sum((column - mean) ** 2 for column in columns) / (units - 1)
    left = sum((table[s][u] - rows[s] - columns[u] + mean) ** 2 for s in range(seeds) for u in range(units))
    return [part / seeds / units for part in (between_seeds, between_units, left / (seeds - 1) / (units - 1))]


def crossed(rng, seeds, units, seed_sd=0.08, unit_sd=0.05, rest=0.05):
    return seed_sd * rng.normal(size=(seeds, 1)) + unit_sd * rng.normal(size=(1, units)) + rest * rng.normal(size=(seeds, units))


def test_parts_of_the_variance_are_those_of_a_two_way_analysis():
    table = crossed(np.random.default_rng(0), 3, 7)
    found = spread_of(table.mean(axis=1), table)
    by_seed, by_unit, rest = by_loops(table.tolist())
    assert list(found[:3]) == pytest.approx([by_seed, by_unit, rest])
    group = group_estimate([cell(seed, row) for seed, row in enumerate(table)], KEY)
    assert group.stderr == pytest.approx(math.sqrt(by_seed + by_unit - rest))
    over_seeds, over_units = stats.t.ppf(0.975, 2) ** 2, stats.t.ppf(0.975, 6) ** 2
    assert (group.high - group.low) / 2 == pytest.approx(math.sqrt(over_seeds * by_seed + over_units * (by_unit - rest)))
    assert (group.seeds, group.units, group.note, group.p) == (3, 7, "", None)


def test_one_seed_is_a_t_interval_over_units_and_says_so():
    values = np.random.default_rng(1).normal(size=12)
    found = group_estimate([cell(0, values)], KEY)
    low, high = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high)) and "one seed" in found.note


def test_pseudo_values_are_the_jackknifes_and_agree_with_simulation():
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 30, size=(4000, 60)).astype(float)
    totals = counts * (2.0 + 0.3 * rng.normal(size=counts.shape)) + rng.normal(size=counts.shape)
    y = pseudo_values(totals, counts)
    ratios = totals.sum(axis=1) / counts.sum(axis=1)
    assert y.mean(axis=1) == pytest.approx(ratios)
    errors = standard_error(spread_of(ratios[:, None], y[:, None, :]))
    assert math.sqrt((errors**2).mean()) == pytest.approx(ratios.std(ddof=1), rel=0.04)
    left = (totals[0].sum() - totals[0]) / (counts[0].sum() - counts[0])
    assert errors[0] == pytest.approx(math.sqrt(59 / 60 * ((left - left.mean()) ** 2).sum()))


def test_many_units_are_summed_in_runs_without_changing_the_error():
    values = np.random.default_rng(3).normal(size=200_000)
    found = group_estimate([cell(0, values)], KEY)
    assert found.units == 200_000 and found.value == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), rel=0.1)


def test_difference_is_paired_by_seed_and_unit():
    rng = np.random.default_rng(4)
    tables = [10 * rng.normal(size=20) + 5 * rng.normal() for _ in range(3)]
    base = [cell(seed, table) for seed, table in enumerate(tables)]
    moved = [cell(seed, table + 1 + 0.01 * rng.normal(size=20)) for seed, table in enumerate(tables)]
    found = difference_estimate(moved, base, KEY)
    assert found.value == pytest.approx(1.0, abs=0.02) and found.high - found.low < 0.05 and found.p < 1e-4
    apart = difference_estimate(moved, base, KEY, paired=False)
    assert apart.value == pytest.approx(found.value) and apart.high - apart.low > 1.0 and "independent" in apart.note
    assert set(found.by_seed) == {0, 1, 2}


def test_p_is_the_level_at_which_the_interval_touches_zero():
    rng = np.random.default_rng(5)
    for shift in (0.0, 0.05, 0.2, 3.0):
        table = crossed(rng, 4, 20) + shift
        found = difference_estimate([cell(s, row) for s, row in enumerate(table)], [cell(s, 0 * row) for s, row in enumerate(table)], KEY)
        assert float(half_width(spread_of(table.mean(axis=1), table), found.p)) == pytest.approx(abs(table.mean()), rel=1e-4)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    one = difference_estimate([cell(0, values := rng.normal(size=9))], [cell(0, np.zeros(9))], KEY)
    assert one.p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, rel=1e-4)


def test_slope_is_the_mean_of_the_seeds_own():
    rng = np.random.default_rng(6)
    levels = [0.0, 0.5, 1.0]
    tables = {level: 2.0 * level + crossed(rng, 3, 16) for level in levels}
    curve = {level: [cell(seed, row) for seed, row in enumerate(table)] for level, table in tables.items()}
    found = slope_estimate(curve, KEY)
    own = [np.polyfit(levels, [tables[level][seed].mean() for level in levels], 1)[0] for seed in range(3)]
    assert list(found.by_seed.values()) == pytest.approx(own) and found.value == pytest.approx(np.mean(own))
    assert found.low < found.value < found.high and found.p is not None
    curve[0.5] = curve[0.5][:2]
    fewer = slope_estimate(curve, KEY)
    assert fewer.seeds == 2 and "without every level: seed 2" in fewer.note
    curve[0.5] = [cell(9, tables[0.5][0])]
    assert slope_estimate(curve, KEY).value is None and "no seed has every level" in slope_estimate(curve, KEY).note
    with pytest.raises(ValueError):
        slope_estimate({0.0: curve[0.0]}, KEY)


def test_holm():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]


# bad input


def test_units_and_seeds_that_are_not_shared_are_told():
    base = [cell(0, [1.0, 2.0, 3.0]), cell(1, [2.0, 2.5, 4.0]), cell(5, [9.0, 9.0, 9.0])]
    other = [cell(0, [5.0, 7.0], units=[1, 2]), cell(1, [5.5, 8.0], units=[1, 2]), cell(7, [0.0, 1.0], units=[1, 2])]
    found = difference_estimate(other, base, KEY)
    assert found.value == pytest.approx((6.0 - 2.5 + 6.75 - 3.25) / 2) and (found.seeds, found.units) == (2, 2)
    assert "1 of 3 units are not in every cell" in found.note and "not on both sides: seed 7, 5" in found.note
    assert "no seed in common" in difference_estimate(other[2:], base, KEY).note
    assert "no unit in common" in difference_estimate([cell(0, [1.0, 2.0], units=[8, 9])], base, KEY).note


def test_groups_whose_seeds_share_no_unit_count_by_seed():
    found = group_estimate([cell(0, [1.0, 2.0], units=[0, 1]), cell(1, [3.0, 5.0], units=[2, 3])], KEY)
    low, high = stats.t.interval(0.95, 1, 2.75, stats.sem([1.5, 4.0]))
    assert (found.low, found.high) == pytest.approx((low, high)) and "2 of 2 units" in found.note


def test_null_seeds_are_named():
    null = cell(1, [math.nan, 1.0])
    found = group_estimate([cell(0, [1.0, 2.0]), null, cell(2, [1.0, 3.0])], KEY)
    assert found.seeds == 2 and "no value in seed 1" in found.note
    assert group_estimate([null], KEY).value is None and group_estimate([null], KEY).note == "no value"
    assert difference_estimate([null], [cell(0, [1.0])], KEY).value is None


def test_units_that_are_not_finite_are_left_out_and_counted():
    broken = cell(1, [math.inf, 2.0, 4.0], value=3.0)
    found = group_estimate([cell(0, [5.0, 1.0, 2.0]), broken], KEY)
    assert found.value == pytest.approx((8 / 3 + 3) / 2) and found.units == 2 and "1 of 3 units are not finite" in found.note
    assert difference_estimate([broken], [cell(1, [5.0, 1.0, 3.0])], KEY).value == pytest.approx(1.0)


@pytest.mark.parametrize("seeds", [1, 3])
def test_what_does_not_vary_has_no_interval_and_says_why(seeds):
    cells = [cell(seed, np.full(8, 0.3)) for seed in range(seeds)]
    found = group_estimate(cells, KEY)
    assert found.value == 0.3 and found.low is None and found.stderr is None and "8 units are equal: no interval" in found.note
    apart = difference_estimate(cells, [cell(seed, np.full(8, 0.2)) for seed in range(seeds)], KEY)
    assert apart.value == pytest.approx(0.1) and apart.low is None and apart.p is None and "equal" in apart.note


def test_a_share_that_does_not_vary_has_the_exact_interval():
    zero, one = ([cell(seed, np.full(8, value), unit="share") for seed in range(3)] for value in (0.0, 1.0))
    found = group_estimate(zero, KEY)
    assert (found.low, found.high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 8))) and found.stderr > 0 and "Clopper-Pearson" in found.note
    low = group_estimate(one, KEY)
    assert (low.low, low.high) == pytest.approx((0.025 ** (1 / 8), 1.0))
    same = difference_estimate(zero, zero, KEY)
    assert same.value == 0.0 and (same.low, same.high) == pytest.approx((-found.high, found.high)) and same.p == 1.0
    apart = difference_estimate(one, zero, KEY)
    assert apart.value == 1.0 and 0 < apart.low < apart.high == 1.0 and apart.p < 0.05


def test_korn_and_graubard_are_clopper_and_pearson_of_independent_answers():
    hits, number = 3, 40
    share = hits / number
    half = stats.norm.ppf(0.975) * math.sqrt(share * (1 - share) / number)
    exact = stats.binomtest(hits, number).proportion_ci(method="exact")
    assert share_bounds(np.array(share), np.array(half), 40) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_one_seed_and_one_unit_has_no_interval_and_bare_values_count_by_seed():
    assert "one seed and one unit" in group_estimate([cell(0, [2.0])], KEY).note
    assert "one seed and one unit" in group_estimate([without_units(0, 2.0)], KEY).note
    one = group_estimate([cell(seed, [value]) for seed, value in enumerate([1.0, 2.0, 4.0])], KEY)
    assert one.low < one.value < one.high and one.note == "one unit: over seeds only"
    found = group_estimate([without_units(seed, value) for seed, value in enumerate([1.0, 2.0, 4.0])], KEY)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 2, 7 / 3, stats.sem([1.0, 2.0, 4.0])))
    assert "over seeds only" in found.note


NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.floats(-1e300, 1e300), st.sampled_from([0.0, 1.0, math.nan, math.inf, 0.25]))
CELLS = st.lists(st.lists(st.tuples(st.integers(0, 5), NUMBERS, st.integers(0, 3)), max_size=5, unique_by=lambda unit: unit[0]), max_size=3)


@given(CELLS, CELLS, st.sampled_from(["share", "nats"]), st.booleans())
@settings(deadline=None, max_examples=300)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_whatever_comes_no_crash_no_width_zero_and_a_reason(first, second, unit, paired):
    def total(t, c):
        return c * min(1.2, max(-0.2, t)) if unit == "share" and math.isfinite(t) else t  # pseudo-values leave 0..1 a little

    sides = [[cell(seed, [total(t, c) for _, t, c in units], [c for _, _, c in units], [u for u, _, _ in units], unit)
              for seed, units in enumerate(side)] for side in (first, second)]  # fmt: skip
    if unit == "share":
        for side in sides:
            for one in side:
                value = one.rows[KEY]["value"]
                one.rows[KEY]["value"] = None if value is None else min(1.0, max(0.0, value))
    for found in (group_estimate(sides[0], KEY), difference_estimate(*sides, KEY, paired), slope_estimate({0.0: sides[0], 1.0: sides[1]}, KEY)):
        if found.low is None:
            assert found.note and found.stderr is None and found.p is None
        else:
            assert found.low <= found.value <= found.high and found.high > found.low and found.stderr > 0
            assert found.p is None or 0 < found.p <= 1
            assert found.p is None or abs(found.p - 0.05) < 1e-4 or (found.p < 0.05) == (found.low > 0 or found.high < 0)


# coverage: wanted is 0.92 or more of intervals called 95 %


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_where_seeds_differ_as_real_runs_do(seeds):
    rng = np.random.default_rng(seeds)
    shape = (4000, seeds, 32)
    y = 0.08 * rng.normal(size=(4000, seeds, 1)) + 0.05 * rng.normal(size=(4000, 1, 32)) + 0.05 * rng.normal(size=shape)
    other = 0.08 * rng.normal(size=(4000, seeds, 1)) + 0.05 * rng.normal(size=shape)
    for figures in (y, other - 0.05 * rng.normal(size=shape)):
        spread = spread_of(figures.mean(axis=-1), figures)
        assert (np.abs(figures.mean(axis=(-1, -2))) <= half_width(spread)).mean() >= 0.94


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.95, 0.99])
@pytest.mark.parametrize("seeds", [1, 3])
def test_coverage_of_rare_and_of_common_answers(share, seeds):
    rng = np.random.default_rng(round(100 * share))
    answers = (rng.random((4000, seeds, 40)) < share).astype(float)
    values = answers.mean(axis=-1)
    low, high = share_bounds(values.mean(axis=-1), half_width(spread_of(values, answers)), 40)
    assert ((low <= share) & (share <= high)).mean() >= 0.94 and (high > low).all()


@pytest.mark.parametrize("unit", ["nats", "share"])
def test_p_of_a_bound_is_below_five_hundredths_where_the_interval_leaves_it_out(unit):
    cells = [cell(seed, row, unit=unit) for seed, row in enumerate(0.9 + 0.2 * crossed(np.random.default_rng(4), 3, 20))]
    found = group_estimate(cells, KEY)
    assert group_p(cells, KEY, found.low) == pytest.approx(0.05, abs=1e-4) == group_p(cells, KEY, found.high)
    assert group_p(cells, KEY, found.low - 0.01) < 0.05 < group_p(cells, KEY, found.low + 0.01)
    assert group_p(cells, KEY, found.value) == 1.0


def test_p_of_a_bound_where_nothing_varies():
    assert group_p([cell(seed, [2.0] * 5) for seed in range(3)], KEY, 1.0) is None and group_p([], KEY, 1.0) is None
    ones = [cell(seed, [1.0] * 200, unit="share") for seed in range(3)]
    assert group_p(ones, KEY, 0.95) == pytest.approx(2 * 0.95**200, rel=1e-3) and group_p(ones, KEY, 0.999) > 0.05
