"""Does a figure move with the level? A slope per training seed, Page's test within seeds, and where the curve turns back."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from .aggregate import Group
from .contrasts import Estimate, difference_estimate, holm, slope_estimate
from .report_cells import Cell, Key
from .spread import too_large
from .trend_test import page_test

FALLS, RISES, FLAT = "falls", "rises", "flat"
SIGNIFICANT = 0.05
MINUS = "\N{MINUS SIGN}"
ROUNDING = 1e-12  # of the largest value: equal means differ by an ulp when seeds are added in another order
NO_ESTIMATE = Estimate(None, None, None, None, None, 0, 0, "")
Curve = Mapping[float, Sequence[Cell]]


@dataclass
class Reversal:
    """Neighboring levels between which the mean moves against the trend; interval, p and seeds are of the paired difference.

    steps: of the whole curve; each could have turned back, so that p counts so many times (Bonferroni).
    """

    low_level: float
    high_level: float
    difference: float
    ci_low: float | None
    ci_high: float | None
    p: float | None = None
    seeds: int = 0
    steps: int = 1

    @property
    def beyond_noise(self) -> bool:
        return self.seeds > 1 and self.p is not None and self.steps * self.p < SIGNIFICANT

    def __str__(self) -> str:
        bounds = f" [{self.ci_low:+.2g}, {self.ci_high:+.2g}]" if self.ci_low is not None else " (no interval)"
        return f"{self.low_level:g} to {self.high_level:g}: {self.difference:+.2g}{bounds}".replace("-", MINUS)


@dataclass
class Trend:
    """Dose-response of one figure in one architecture.

    Attributes:
        levels: that have the figure. seeds: that have it at all of them; the slope and the test are theirs.
        rho: Spearman's of (level, value) over all cells. It describes, it decides nothing.
        separated: whether every cell of a level lies beyond every cell of the level below; None with one seed.
        slope: least-squares slope of the value on the level, mean over seeds; `slopes`: each seed's.
        p, method: two-sided test of a trend within seeds. p_adjusted, slope_p_adjusted: by Holm, within
            the `comparisons` of `family`.
        direction: of the means, by their slope: "falls", "rises" or "flat".
        monotone: whether the means never turn back; `reversals` are the places where they do.
    """

    architecture: str
    arm: str
    key: Key
    levels: list[float]
    seeds: int = 0
    rho: float | None = None
    separated: bool | None = None
    slope: Estimate = NO_ESTIMATE
    slopes: dict[str, float] = field(default_factory=dict)
    p: float | None = None
    method: str = ""
    p_adjusted: float | None = None
    slope_p_adjusted: float | None = None
    family: str = ""
    comparisons: int = 0
    direction: str = FLAT
    monotone: bool | None = None
    reversals: list[Reversal] = field(default_factory=list)
    note: str = ""

    @property
    def slope_p(self) -> float | None:
        """None with one seed: an interval over prompts says nothing about another training run."""
        return self.slope.p if self.seeds > 1 else None

    @property
    def shape(self) -> str:
        """Of the means, in words."""
        if self.monotone is None:
            return "not decidable"
        if self.monotone and self.direction == FLAT:
            return "constant"
        noise = self.slope.low is None or bool(self.slope.low <= 0 <= self.slope.high)
        doubt = ", one seed" if self.seeds == 1 else "" if not noise else ", no interval" if self.slope.low is None else ", within noise"
        if len(self.levels) == 2:
            return f"{self.direction} between two levels{doubt}"
        if self.monotone:
            return f"monotone{', complete separation' if self.separated else ''}{doubt.replace('within', 'slope within')}"
        if any(turn.beyond_noise for turn in self.reversals):
            return "not monotone"
        return "not monotone, one seed" if any(turn.seeds < 2 for turn in self.reversals) else "not monotone, within noise"

    def to_dict(self) -> dict[str, Any]:
        """A line of a table: no nested values."""
        return {
            "architecture": self.architecture, "arm": self.arm, **self.key._asdict(), "levels": " ".join(f"{level:g}" for level in self.levels),
            "seeds": self.seeds, "slope": self.slope.value, "slope_low": self.slope.low, "slope_high": self.slope.high,
            "slope_p": self.slope_p, "slope_p_adjusted": self.slope_p_adjusted,
            "slopes": "; ".join(f"seed {seed}: {value:.4g}" for seed, value in self.slopes.items()),
            "p": self.p, "p_adjusted": self.p_adjusted, "family": self.family, "comparisons": self.comparisons, "method": self.method, "rho": self.rho,
            "separated": self.separated, "direction": self.direction, "monotone": self.monotone, "shape": self.shape,
            "reversals": "; ".join(map(str, self.reversals)), "note": self.note,
        }  # fmt: skip


def trend(architecture: str, arm: str, key: Key, groups: Mapping[Group, Sequence[Cell]]) -> Trend | None:
    """The trend over the levels of one arm in one architecture; None where fewer than two levels list the figure at all."""
    cells = {group.level: [cell for cell in members if key in cell.rows] for group, members in groups.items()
             if group.architecture == architecture and group.arm == arm and group.level is not None}  # fmt: skip
    listed = {level: members for level, members in sorted(cells.items()) if members}
    if len(listed) < 2:
        return None
    curve = {level: known for level, members in listed.items() if (known := [cell for cell in members if cell.value(key) is not None])}
    found, notes = Trend(architecture, arm, key, list(curve)), []
    notes += [f"no value at level {level:g}" for level in listed if level not in curve]
    if len(curve) < 2:
        found.note = "; ".join(["not measured at two levels", *notes])
        return found
    if too_large(*[cell.value(key) for members in curve.values() for cell in members]):
        found.note = "; ".join(["too large to square: no trend", *notes])
        return found
    _describe(found, curve)
    complete, left_out = _complete(curve)
    notes += left_out
    notes += _test(found, complete)
    found.note = "; ".join(dict.fromkeys(filter(None, notes)))
    return found


def _describe(found: Trend, curve: Curve) -> None:
    """What the means do: rho, direction, and where they turn back."""
    key, levels = found.key, found.levels
    values = [np.array([cell.value(key) for cell in curve[level]]) for level in levels]
    means = np.array([x.mean() for x in values])
    if _constant(np.concatenate(values)):
        found.monotone = True
        return
    found.rho = spearman(np.repeat(levels, [len(x) for x in values]), np.concatenate(values))
    rise = float(_weights(levels) @ means) if not _constant(means) else 0.0
    found.direction = FALLS if rise < 0 else RISES if rise > 0 else FLAT
    sign = -1.0 if found.direction == FALLS else 1.0
    turns = [_reversal(below, above, curve, key, sign) for below, above in itertools.pairwise(levels)]
    found.reversals = [turn for turn in turns if turn is not None]
    found.monotone = not found.reversals
    if min(map(len, values)) > 1:
        found.separated = all(bool((sign * below).max() < (sign * above).min()) for below, above in itertools.pairwise(values))


def _test(found: Trend, complete: Curve) -> list[str]:
    """The slope of the seeds that have every level, and the test within them; what there is to say about either."""
    key, seeds = found.key, [cell.seed for cell in next(iter(complete.values()))]
    found.seeds = len(seeds)
    if not seeds:
        return ["no seed has every level: no slope and no test"]
    values = np.array([[cell.value(key) for cell in members] for members in complete.values()]).T
    found.slope = slope_estimate(complete, key)
    found.slopes = {str(seed): slope for seed, slope in found.slope.by_seed.items()}
    if found.seeds < 2:
        return [found.slope.note, "one seed: no test of a trend"]
    found.p, found.method = page_test(values)
    smallest = 2 / math.factorial(len(complete)) ** found.seeds
    few = f"{found.seeds} seeds and {len(complete)} levels allow no p below {smallest:.2g}" if smallest >= SIGNIFICANT else ""
    return [found.slope.note, few]


def _complete(curve: Curve) -> tuple[Curve, list[str]]:
    """The curve of the seeds that have every level, in one order at each; and which were left out."""
    by_seed: dict[Hashable, set[float]] = defaultdict(set)
    for level, members in curve.items():
        for cell in members:
            by_seed[cell.seed].add(level)
    whole = [seed for seed, levels in by_seed.items() if len(levels) == len(curve)]
    notes = [f"seed {seed} left out of the test: no value at level {', '.join(f'{level:g}' for level in curve if level not in levels)}"
             for seed, levels in by_seed.items() if seed not in whole]  # fmt: skip
    return {level: [next(cell for cell in members if cell.seed == seed) for seed in whole] for level, members in curve.items()}, notes


def _weights(levels: Sequence[float]) -> np.ndarray:
    """Of the values at `levels` in their least-squares slope."""
    centered = np.asarray(levels, dtype=np.float64) - np.mean(levels)
    return centered / (centered @ centered)


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def _reversal(below: float, above: float, curve: Curve, key: Key, sign: float) -> Reversal | None:
    first, second = (float(np.mean([cell.value(key) for cell in curve[level]])) for level in (below, above))
    if (second - first) * sign >= -ROUNDING * max(abs(first), abs(second)):
        return None
    apart = difference_estimate(curve[above], curve[below], key)
    if apart.value is None or apart.value * sign >= 0:  # of the seeds that both levels have, the mean does not turn
        return Reversal(below, above, second - first, None, None)
    return Reversal(below, above, apart.value, apart.low, apart.high, apart.p, apart.seeds, len(curve) - 1)


def spearman(levels: np.ndarray, values: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties by mean rank; None where one side is constant."""
    levels, values = np.asarray(levels, dtype=np.float64), np.asarray(values, dtype=np.float64)
    return None if np.ptp(levels) == 0 or np.ptp(values) == 0 else float(stats.spearmanr(levels, values).statistic)


def adjust(trends: Sequence[Trend], family_of: Callable[[Key], str]) -> None:
    """Holm's p (Holm 1979) of each trend, over the measures and architectures of its family; sets the fields of `trends`."""
    families: dict[str, list[Trend]] = defaultdict(list)
    for item in trends:
        families[family_of(item.key)].append(item)
    for name, members in families.items():
        tested, slopes = holm([item.p for item in members]), holm([item.slope_p for item in members])
        count = sum(p is not None for p in tested)
        for item, p, slope_p in zip(members, tested, slopes, strict=True):
            item.p_adjusted, item.slope_p_adjusted, item.family, item.comparisons = p, slope_p, name, count
