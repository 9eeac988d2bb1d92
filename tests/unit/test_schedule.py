from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability.config_errors import InvalidValue
from ds_stability.errors import StabilityConfigError
from ds_stability.schedule import MAX_STEP, format_level, level_at, max_level, parse_level_flag, parse_schedule

levels = st.floats(0, 1, allow_nan=False)
schedules = st.dictionaries(st.integers(0, 500), levels, min_size=1, max_size=6).map(
    lambda points: tuple(sorted(points.items()))
)


def exact_level(pairs, step):
    """Oracle: piecewise linear in rational arithmetic, scanning every segment."""
    if step <= pairs[0][0]:
        return Fraction(pairs[0][1])
    for (step0, level0), (step1, level1) in zip(pairs, pairs[1:]):
        if step0 <= step <= step1:
            share = Fraction(step - step0, step1 - step0)
            return (1 - share) * Fraction(level0) + share * Fraction(level1)
    return Fraction(pairs[-1][1])


@given(schedules, st.integers(-10, 600))
def test_level_at_is_piecewise_linear_and_held_at_both_ends(pairs, step):
    assert level_at(pairs, step) == pytest.approx(float(exact_level(pairs, step)), abs=1e-15)


@given(schedules)
def test_level_at_hits_every_point_exactly_and_max_level_bounds_it(pairs):
    for step, level in pairs:
        assert level_at(pairs, step) == level
    assert max(level_at(pairs, step) for step in range(0, 520)) == max_level(pairs)


@pytest.mark.parametrize("step", [0, 1, 10**9, 10**30])
def test_a_number_holds_for_ever(step):
    assert level_at(0.3, step) == 0.3
    assert max_level(0.3) == 0.3


def test_huge_steps_do_not_overflow():
    assert level_at(((0, 0.0), (MAX_STEP, 1.0)), MAX_STEP // 2) == pytest.approx(0.5)
    assert level_at(((0, 0.0), (10, 1.0)), 10**400) == 1.0


def test_parse_schedule_normalizes():
    assert parse_schedule(1) == 1.0 and isinstance(parse_schedule(1), float)
    assert str(parse_schedule(-0.0)) == "0.0"
    assert parse_schedule([[0, 0], [200, 0.5]]) == ((0, 0.0), (200, 0.5))
    assert parse_schedule([(5, 1)]) == ((5, 1.0),)


@pytest.mark.parametrize(
    "value, where",
    [
        (True, ""), ("0.5", ""), (None, ""), (-0.001, ""), (1.001, ""), (float("nan"), ""), ([], ""), ({}, ""),
        ([0, 0.5], "[0]"), ([[0]], "[0]"), ([[0, 0.1, 0.2]], "[0]"), (["00"], "[0]"),
        ([[0, 0.1], [0, 0.2]], "[1][0]"), ([[5, 0.1], [4, 0.2]], "[1][0]"), ([[-1, 0.1]], "[0][0]"),
        ([[1.0, 0.1]], "[0][0]"), ([[True, 0.1]], "[0][0]"), ([[10**10, 0.1]], "[0][0]"),
        ([[0, 1.5]], "[0][1]"), ([[0, True]], "[0][1]"), ([[0, None]], "[0][1]"), ([[0, float("inf")]], "[0][1]"),
    ],
)  # fmt: skip
def test_parse_schedule_says_where_a_value_is_wrong(value, where):
    with pytest.raises(InvalidValue) as error:
        parse_schedule(value)
    assert error.value.where == where


@pytest.mark.parametrize(
    "text, schedule",
    [
        ("0.5", 0.5), ("1", 1.0), (" 0 ", 0.0), (".25", 0.25), ("1e-1", 0.1),
        ("0:0,200:0.5", ((0, 0.0), (200, 0.5))), ("0:0, 200:0.5", ((0, 0.0), (200, 0.5))), ("7:1", ((7, 1.0),)),
    ],
)  # fmt: skip
def test_level_flag(text, schedule):
    assert parse_level_flag(text) == schedule


@pytest.mark.parametrize(
    "text",
    ["", "x", "nan", "inf", "1.5", "-0.1", "1_0", "0:0,", ",", ":", "0:", ":0.5", "0:0:0", "5:0,4:1", "5:0,5:1",
     "1.5:0.5", "0:nan", "0:2", "٠.٥", "0.5 0.6", "1e999", "9" * 10_000, "0:0\n1:1", "auto", "0x1", "9999999999:0"],
)  # fmt: skip
def test_wrong_level_flags_give_one_line_with_the_flag_and_what_is_allowed(text):
    with pytest.raises(StabilityConfigError) as error:
        parse_level_flag(text)
    message = str(error.value)
    assert message.isprintable() and len(message) < 400
    assert message.startswith("--stability_level: ") and "from 0 to 1" in message


@given(st.one_of(levels.map(lambda x: x + 0.0), schedules))
def test_format_level_is_read_back_by_the_flag(schedule):
    schedule = parse_schedule(schedule)
    assert parse_level_flag(format_level(schedule)) == schedule
