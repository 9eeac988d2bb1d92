"""Estimates over training seeds and units: of a group of cells, of the difference between two, of the slope over levels.

All three are one thing: in each seed a weighted sum of cells, and of each of the units that those cells share. spread.py gives
the interval of its mean over seeds. Cells that do not share seeds or units are taken as independent, and the note says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf, log, sqrt
from typing import NamedTuple

import numpy as np
from scipy import optimize

from .records import Measured
from .report_cells import Cell, Key
from .spread import (
    ALPHA,
    CLOPPER_PEARSON,
    ROUNDING,
    TOO_LARGE,
    Spread,
    half_width,
    in_runs,
    interval_error,
    recovered,
    share_bounds,
    spread_of,
    standard_error,
    too_large,
    weighted,
)

AT_ZERO = 1e-9  # of the value: an end of an interval so close to 0 is at 0
SMALLEST_P, LARGEST_P = 1e-12, 0.999  # smaller ones are stated as the first, larger ones as 1
ALONE = "one seed and one unit: no interval"
Bounds = Callable[[float], tuple[float, float]]  # of an interval, by its alpha
Term = tuple[float, Cell]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: None without one. stderr: standard error. low, high: the interval; never of width 0, None with the reason in
            `note`.
        p: two-sided, of the hypothesis that the value is 0: the level at which the interval just touches 0. None for a group.
        seeds, units: that it is taken over; units are those that all its cells share (1 where none are known).
        note: what is missing, left out, or to know about the interval; "" for nothing.
        by_seed: the value of each seed.
    """

    value: float | None
    stderr: float | None
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    units: int
    note: str
    by_seed: Mapping[int | None, float] = field(default_factory=dict)


def group_estimate(cells: Sequence[Cell], key: Key) -> Estimate:
    """The mean over cells (one per seed) of a figure. A figure without a value anywhere has none, and no interval."""
    lines = [[(1.0, cell)] for cell in cells if cell.value(key) is not None]
    absent = [cell.seed for cell in cells if cell.value(key) is None]
    if not lines:
        return _nothing("no value")
    return replace(_estimate(lines, key, [_named("no value in", absent)]), p=None)


def group_p(cells: Sequence[Cell], key: Key, bound: float) -> float | None:
    """Two-sided p of the hypothesis that the mean over cells is `bound`: the level at which its interval just touches it.

    None where there is no interval.
    """
    lines = [[(1.0, cell)] for cell in cells if cell.value(key) is not None]
    part = _part(lines, key) if lines else None
    if part is None or part.alone or not part.squarable or (part.half == 0.0 and not part.share):
        return None
    bounds = part.inside if part.share else part.straight
    return _touching(part.value - bound, lambda alpha: tuple(end - bound for end in bounds(alpha)))


def difference_estimate(cells: Sequence[Cell], base: Sequence[Cell], key: Key, paired: bool = True) -> Estimate:
    """`cells` minus `base`, paired by seed and, within it, by unit.

    Args:
        cells, base: one per seed each.
        paired: False where units of one name are not the same thing on both sides (other prompts): then independent, as where
            no seed or no unit is on both sides.
    """
    sides = [[cell for cell in side if cell.value(key) is not None] for side in (cells, base)]
    if not all(sides):
        return _nothing("no value on one side")
    lines, dropped = _by_seed([(1.0, sides[0]), (-1.0, sides[1])])
    if paired and lines and shared_units([cell for terms in lines for _, cell in terms], key)[0] != []:
        return _estimate(lines, key, [_named("not on both sides:", dropped)])
    why = "not the same units" if not paired else "no unit in common" if lines else "no seed in common"
    return _independent([(1.0, sides[0]), (-1.0, sides[1])], key, f"{why}: taken as independent")


def slope_estimate(curve: Mapping[float, Sequence[Cell]], key: Key) -> Estimate:
    """The mean over seeds of the least-squares slope of the figure on the level; `by_seed` holds each seed's.

    Only seeds with every level count; the note names the others. ValueError for fewer than two levels.
    """
    if len(curve) < 2:
        raise ValueError(f"a slope over {len(curve)} level")
    levels = np.array(sorted(curve), dtype=np.float64)
    weights = (levels - levels.mean()) / ((levels - levels.mean()) ** 2).sum()
    sides = [(float(weight), [cell for cell in curve[level] if cell.value(key) is not None])
             for weight, level in zip(weights, sorted(curve), strict=True)]  # fmt: skip
    lines, dropped = _by_seed(sides)
    if not lines:
        return _nothing("no seed has every level: no slope")
    return _estimate(lines, key, [_named("without every level:", dropped)])


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p adjusted for their number (Holm 1979, Scandinavian Journal of Statistics 6, 65); None is no comparison and stays None."""
    known = sorted((value, place) for place, value in enumerate(p) if value is not None)
    adjusted, largest = list(p), 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        adjusted[place] = largest
    return adjusted


class _Part(NamedTuple):
    """A contrast over seeds, before its interval: values [S], their spread, units, whether it is a share, and notes."""

    values: np.ndarray
    spread: Spread
    units: int  # spread.units are sums of these, where they are many
    share: bool
    notes: list[str]

    @property
    def value(self) -> float:
        return float(self.values.mean())

    @property
    def center(self) -> float:
        return min(1.0, max(0.0, self.value)) if self.share else self.value

    @property
    def half(self) -> float:
        return float(half_width(self.spread))

    @property
    def squarable(self) -> bool:
        return bool(self.spread.by_seed < inf)

    @property
    def alone(self) -> bool:
        return self.spread.seeds < 2 and self.spread.units < 2

    def straight(self, alpha: float) -> tuple[float, float]:
        half = float(half_width(self.spread, alpha))
        return self.value - half, self.value + half

    def inside(self, alpha: float) -> tuple[float, float]:
        """Bounds of a share."""
        number = self.units if self.units > 1 else self.spread.seeds
        low, high = share_bounds(self.value, half_width(self.spread, alpha), number, alpha)
        return float(low), float(high)


def _estimate(lines: Sequence[Sequence[Term]], key: Key, notes: Sequence[str]) -> Estimate:
    """The mean over seeds of weighted sums of cells, a line of terms for each seed."""
    part = _part(lines, key)
    found = Estimate(part.value, None, None, None, None, len(lines), part.units, "",
                     {terms[0][1].seed: float(own) for terms, own in zip(lines, part.values, strict=True)})  # fmt: skip
    notes, single = [*part.notes, *notes], len(lines[0]) == 1
    if part.alone or not part.squarable:
        return replace(found, note=_joined(ALONE if part.alone else TOO_LARGE, *notes))
    equal = part.half == 0.0
    if equal:
        notes.insert(0, f"{_all(part)} equal: {CLOPPER_PEARSON if part.share else 'no interval'}")
    if part.spread.seeds < 2:
        notes.insert(0, "one seed: over prompts only, says nothing about training")
    if equal and not part.share:
        return replace(found, note=_joined(*notes))
    bounds = part.inside if single and part.share else part.straight
    if equal and not single:
        bounds = _recovered(part.value, [(terms[0][0], _part([[(1.0, cell)] for _, cell in terms], key)) for terms in zip(*lines, strict=True)])
    return _finished(found, bounds, float(standard_error(part.spread)), notes, tested=not single)


def _independent(sides: Sequence[tuple[float, Sequence[Cell]]], key: Key, why: str) -> Estimate:
    """A weighted sum of groups that have nothing in common."""
    parts = [(weight, _part([[(1.0, cell)] for cell in cells], key)) for weight, cells in sides]
    value = sum(weight * part.value for weight, part in parts)
    found = Estimate(value, None, None, None, None, min(len(cells) for _, cells in sides), min(part.units for _, part in parts), "")
    notes = [why, *(note for _, part in parts for note in part.notes)]
    if any(part.alone or not part.squarable for _, part in parts):
        return replace(found, note=_joined(ALONE if any(part.alone for _, part in parts) else TOO_LARGE, *notes))
    if any(part.spread.seeds < 2 for _, part in parts):
        notes.insert(0, "one seed: over prompts only, says nothing about training")
    if all(part.half == 0.0 and not part.share for _, part in parts):
        return replace(found, note=_joined("all units are equal: no interval", *notes))
    error = sqrt(sum(weight**2 * float(standard_error(part.spread)) ** 2 for weight, part in parts))
    return _finished(found, _recovered(value, parts), error, notes, tested=True)


def _finished(found: Estimate, bounds: Bounds, error: float, notes: Sequence[str], tested: bool) -> Estimate:
    low, high = (0.0 if abs(end) <= AT_ZERO * abs(found.value) else end for end in bounds(ALPHA))
    if not high - low > ROUNDING * abs(found.value):  # a side that is large and constant beside one that varies a little
        return replace(found, note=_joined("varies by less than rounding: no interval", *notes))
    return replace(found, stderr=error or interval_error(low, high), low=low, high=high, p=_touching(found.value, bounds) if tested else None, note=_joined(*notes))


def _recovered(value: float, parts: Sequence[tuple[float, _Part]]) -> Bounds:
    def bounds(alpha: float) -> tuple[float, float]:
        low, high = recovered(value, ((weight, part.center, *(part.inside(alpha) if part.share else part.straight(alpha))) for weight, part in parts))
        return float(low), float(high)

    return bounds


def _touching(value: float, bounds: Bounds) -> float:
    """The alpha at which the interval has an end at 0, at least SMALLEST_P."""

    def distance(log_alpha: float) -> float:
        low, high = bounds(exp(log_alpha))
        return (low if value > 0 else -high) - AT_ZERO * abs(value)  # bounds of a share can stay at 0 whatever alpha is

    if value == 0.0 or distance(log(LARGEST_P)) <= 0:
        return 1.0
    if distance(log(SMALLEST_P)) >= 0:
        return SMALLEST_P
    return exp(optimize.brentq(distance, log(SMALLEST_P), log(LARGEST_P), xtol=1e-6))


def _by_seed(sides: Sequence[tuple[float, Sequence[Cell]]]) -> tuple[list[list[Term]], list[int | None]]:
    """A line of terms for each seed that every side has, and the seeds that one lacks."""
    by_seed = [{cell.seed: cell for cell in cells} for _, cells in sides]
    seeds = list(dict.fromkeys(cell.seed for _, cells in sides for cell in cells))
    shared = [seed for seed in seeds if all(seed in side for side in by_seed)]
    lines = [[(weight, side[seed]) for (weight, _), side in zip(sides, by_seed, strict=True)] for seed in shared]
    return lines, [seed for seed in seeds if seed not in shared]


def _part(lines: Sequence[Sequence[Term]], key: Key) -> _Part:
    cells = [cell for terms in lines for _, cell in terms]
    units, notes = shared_units(cells, key)
    own = None if len(lines[0]) == 1 else units  # a group's value is the mean of its cells' own
    values = np.array([sum(weight * _value(cell, key, own) for weight, cell in terms) for terms in lines])
    scale = max(abs(weight * cell.value(key)) for terms in lines for weight, cell in terms)
    y, count = _matrix(lines, key, units) if units else (None, 1)
    if units and count == 1 and len(lines) > 1:
        notes.append("one unit: over seeds only")
    share = any(cell.rows[key].get("unit") == "share" for cell in cells)
    if too_large(scale, values, 0.0 if y is None else y):
        return _Part(values, Spread(*[np.array(inf)] * 3, len(lines), count), count, share, notes)
    return _Part(values, spread_of(values, y, scale), count, share, notes)


def shared_units(cells: Sequence[Cell], key: Key) -> tuple[Sequence | None, list[str]]:
    """Units that count, and are finite, in every cell, in the first cell's order; and notes on those that are left out.

    None where a cell keeps no units of the figure; [] where none is shared.
    """
    measured = [cell.measured.get(key) for cell in cells]
    if any(item is None for item in measured):
        return None, ["no units kept: over seeds only"] if len(cells) > 1 else ["no units kept"]
    units, most = measured[0].units, max(len(item.units) for item in measured)
    for item in measured[1:]:
        if item.units is not units and list(item.units) != list(units):
            known = set(item.units)
            units = [unit for unit in units if unit in known]
    notes = [f"{most - len(units)} of {most} units are not in every cell: left out"] if len(units) < most else []
    broken = {unit for item in measured for unit in _not_finite(item)}
    broken = broken & set(units) if broken else broken
    if broken:
        notes.append(f"{len(broken)} of {most} units are not finite: left out")
        units = [unit for unit in units if unit not in broken]
    if units and any(not _chosen(item, units)[1].sum() > 0 for item in measured):
        units = []
    return units, notes


def _not_finite(item: Measured) -> list:
    return [item.units[place] for place in np.flatnonzero(~(np.isfinite(item.totals) & np.isfinite(item.counts)))]


def _value(cell: Cell, key: Key, units: Sequence | None) -> float:
    """The cell's figure, or that of some of its units."""
    if not units or len(units) == len(cell.measured[key].units):
        return cell.value(key)
    totals, counts = _chosen(cell.measured[key], units)
    return float(totals.sum() / counts.sum())


def _chosen(item: Measured, units: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """(totals, counts) of some units, in their order."""
    if item.units is units or list(item.units) == list(units):
        return item.totals, item.counts
    places = {unit: place for place, unit in enumerate(item.units)}
    chosen = [places[unit] for unit in units]
    return item.totals[chosen], item.counts[chosen]


def _matrix(lines: Sequence[Sequence[Term]], key: Key, units: Sequence) -> tuple[np.ndarray, int]:
    """Weighted sums by seed and unit, [S, U], at most MAX_UNITS of them; and how many units they are."""
    arrays = [_chosen(cell.measured[key], units) for terms in lines for _, cell in terms]
    totals, counts = (np.stack(side).reshape(len(lines), len(lines[0]), -1) for side in zip(*arrays, strict=True))
    used = counts.any(axis=(0, 1))
    totals, counts = (in_runs(array if used.all() else array[..., used]) for array in (totals, counts))
    weights = np.array([[weight for weight, _ in terms] for terms in lines])
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks
        return weighted(totals, counts, weights), int(used.sum())


def _nothing(why: str) -> Estimate:
    return Estimate(None, None, None, None, None, 0, 0, why)


def _all(part: _Part) -> str:
    """"all 3 seeds and 32 units are"."""
    counts = [f"{count} {name}" for count, name in ((part.spread.seeds, "seeds"), (part.units, "units")) if count > 1]
    return f"all {' and '.join(counts)} are"


def _named(what: str, seeds: Sequence[int | None]) -> str:
    return f"{what} seed {', '.join(map(str, seeds))}" if seeds else ""


def _joined(*notes: str) -> str:
    return "; ".join(dict.fromkeys(note for note in notes if note))
