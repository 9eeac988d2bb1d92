"""Levels over time: a number, or [step, level] pairs joined by straight lines and held after the last one.

Steps are applied optimizer steps, counted from 0; skipped steps do not count.
"""

import math
import re
from bisect import bisect_right

from ds_stability.config_errors import InvalidValue, show_value
from ds_stability.errors import StabilityConfigError

#: A level in [0, 1], or ((step, level), ...) with strictly increasing steps.
Schedule = float | tuple[tuple[int, float], ...]

MAX_STEP = 10**9
LEVEL_ALLOWED = (
    "a number from 0 to 1, or a list of [step, level] pairs with increasing steps such as [[0, 0.0], [200, 0.5]]"
)
FLAG_ALLOWED = 'a number from 0 to 1 such as 0.5, or step:level pairs with increasing steps such as "0:0,200:0.5"'
_NUMBER = re.compile(r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,3})?", re.ASCII)
_STEP = re.compile(r"[+-]?\d{1,18}", re.ASCII)


def parse_schedule(value: object) -> Schedule:
    """The schedule that a JSON value stands for. Raises InvalidValue."""
    if isinstance(value, (list, tuple)):
        return _parse_pairs(value)
    return _parse_level(value, "", LEVEL_ALLOWED)


def _parse_level(value: object, where: str, allowed: str) -> float:
    # NaN fails the comparison, too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InvalidValue(where, value, allowed)
    return float(value) + 0.0  # + 0.0 turns -0.0 into 0.0, so that equal schedules have equal fingerprints


def _parse_pairs(value: list | tuple) -> tuple[tuple[int, float], ...]:
    if not value:
        raise InvalidValue("", value, LEVEL_ALLOWED)
    pairs: list[tuple[int, float]] = []
    for i, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InvalidValue(f"[{i}]", pair, "a pair [step, level] such as [200, 0.5]")
        step, level = pair
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
            raise InvalidValue(f"[{i}][0]", step, f"a step: an integer from 0 to {MAX_STEP}")
        if pairs and step <= pairs[-1][0]:
            allowed = f"a step after the one before it ({pairs[-1][0]}): steps must increase"
            raise InvalidValue(f"[{i}][0]", step, allowed)
        pairs.append((int(step), _parse_level(level, f"[{i}][1]", "a level: a number from 0 to 1")))
    return tuple(pairs)


def parse_level_flag(text: str, flag: str = "--stability_level") -> Schedule:
    """"0.5" or "0:0,200:0.5", as the `--stability_level` flag takes it. Raises StabilityConfigError."""
    parts = [part.strip() for part in str(text).split(",")]
    try:
        if len(parts) == 1 and ":" not in parts[0]:
            return parse_schedule(_flag_number(parts[0]))
        pairs = [part.split(":") for part in parts]
        if any(len(pair) != 2 or not _STEP.fullmatch(pair[0].strip()) for pair in pairs):
            raise InvalidValue("", text, FLAG_ALLOWED)
        return parse_schedule([[int(step), _flag_number(level.strip())] for step, level in pairs])
    except InvalidValue as error:
        raise StabilityConfigError(f"{flag}: {show_value(text)} is not allowed; must be {FLAG_ALLOWED}") from error


def _flag_number(text: str) -> float:
    return float(text) if _NUMBER.fullmatch(text) else math.nan


def format_level(schedule: Schedule) -> str:
    """The schedule as `parse_level_flag` reads it: "0.5" or "0:0,200:0.5"."""
    if isinstance(schedule, float):
        return repr(schedule)
    return ",".join(f"{step}:{level!r}" for step, level in schedule)


def level_at(schedule: Schedule, step: int) -> float:
    """Level in force at applied step `step`: piecewise linear, held before the first and after the last point."""
    if isinstance(schedule, (int, float)):
        return float(schedule)
    i = bisect_right(schedule, step, key=lambda point: point[0])
    if i == 0 or i == len(schedule):
        return schedule[min(i, len(schedule) - 1)][1]
    (step0, level0), (step1, level1) = schedule[i - 1], schedule[i]
    level = level0 + (level1 - level0) * (step - step0) / (step1 - step0)
    return min(max(level, min(level0, level1)), max(level0, level1))


def max_level(schedule: Schedule) -> float:
    """The highest level that the schedule ever reaches."""
    return float(schedule) if isinstance(schedule, (int, float)) else max(level for _, level in schedule)
