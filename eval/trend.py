"""Does a figure move with the level? Spearman's rho with an interval, a trend test, and where the curve turns back."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from .aggregate import Draws, Group, difference, interval, seed_picks
from .report_cells import Key

PERMUTATIONS = 9999
FALLS, RISES, FLAT = "falls", "rises", "flat"


@dataclass
class Reversal:
    """Neighboring levels between which the mean moves against the trend."""

    low_level: float
    high_level: float
    difference: float
    ci_low: float | None
    ci_high: float | None

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval of the paired difference leaves out 0."""
        return self.ci_low is not None and (self.ci_low > 0 or self.ci_high < 0)

    def __str__(self) -> str:
        bounds = f" [{self.ci_low:+.2g}, {self.ci_high:+.2g}]" if self.ci_low is not None else ""
        return f"{self.low_level:g} to {self.high_level:g}: {self.difference:+.2g}{bounds}".replace("-", "\N{MINUS SIGN}")


@dataclass
class Trend:
    """Dose-response of one figure in one architecture.

    Attributes:
        rho, rho_low, rho_high: Spearman's rho of (level, value) over the cells, 95 % interval over seeds and units.
        p: two-sided Jonckheere-Terpstra test of a trend over the ordered levels; `method` says how it was computed.
        direction: of the mean from the lowest to the highest level, by rho: "falls", "rises" or "flat".
        monotone: whether the means never turn back; `reversals` are the places where they do.
    """

    architecture: str
    arm: str
    key: Key
    levels: list[float]
    seeds: int
    rho: float | None = None
    rho_low: float | None = None
    rho_high: float | None = None
    p: float | None = None
    method: str = ""
    direction: str = FLAT
    monotone: bool | None = None
    reversals: list[Reversal] = field(default_factory=list)
    note: str = ""

    @property
    def shape(self) -> str:
        """In words, said plainly."""
        if self.monotone is None:
            return "not decidable"
        if self.monotone:
            return "constant" if self.direction == FLAT else "monotone"
        noise = "" if any(turn.beyond_noise for turn in self.reversals) else ", within noise"
        return f"not monotone{noise}"

    def to_dict(self) -> dict[str, Any]:
        row = asdict(self) | self.key._asdict() | {"shape": self.shape}
        row["reversals"] = "; ".join(map(str, self.reversals))
        row["levels"] = " ".join(f"{level:g}" for level in self.levels)
        del row["key"]
        return row


def trend(architecture: str, arm: str, key: Key, drawn: dict[Group, Draws]) -> Trend | None:
    """The trend over the levels of one arm in one architecture; None where fewer than two levels have the figure."""
    curve = {group.level: draws for group, draws in drawn.items()
             if group.architecture == architecture and group.arm == arm and group.level is not None}  # fmt: skip
    levels = sorted(curve)
    if len(levels) < 2:
        return None
    found = Trend(architecture, arm, key, levels, min(len(curve[level].values) for level in levels))
    values = [curve[level].values for level in levels]
    found.rho = spearman(np.repeat(levels, [len(x) for x in values]), np.concatenate(values))
    if found.rho is None:
        found.note, found.monotone, found.p, found.method = "constant: no rho", True, 1.0, "constant"
        return found
    found.p, found.method = jonckheere(values)
    found.rho_low, found.rho_high, found.note = _rho_interval(levels, [curve[level] for level in levels], key)
    found.direction = FALLS if found.rho < 0 else RISES if found.rho > 0 else FLAT
    sign = np.sign(found.rho)
    for below, above in itertools.pairwise(levels):
        turn = _reversal(below, above, curve, key, sign)
        if turn is not None:
            found.reversals.append(turn)
    found.monotone = not found.reversals
    return found


def _reversal(below: float, above: float, curve: dict[float, Draws], key: Key, sign: float) -> Reversal | None:
    step = curve[above].value - curve[below].value
    # Rounding is no reversal: equal means differ by an ulp when seeds are added in another order.
    if step * sign > 0 or abs(step) <= 1e-12 * max(1.0, abs(curve[below].value)):
        return None
    apart = difference(curve[above], curve[below], key)
    if apart is None:
        return Reversal(below, above, step, None, None)
    return Reversal(below, above, apart.value, *interval(apart, key)[:2])


def spearman(levels: np.ndarray, values: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties by mean rank; None where one side is constant."""
    rho = _rank_correlation(np.asarray(levels, dtype=np.float64), np.asarray(values, dtype=np.float64)[None, :])[0]
    return float(rho) if np.isfinite(rho) else None


def _rank_correlation(levels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Spearman's rho of [points] against each line of [resamples, points]; nan where a line is constant or has a nan."""
    x = stats.rankdata(levels)
    y = stats.rankdata(values, axis=1)
    x, y = x - x.mean(), y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((x @ x) * (y * y).sum(axis=1))
    return np.clip(np.divide(y @ x, scale, out=np.full(len(y), np.nan), where=scale > 0), -1.0, 1.0)


def _rho_interval(levels: Sequence[float], curve: Sequence[Draws], key: Key) -> tuple[float | None, float | None, str]:
    """Whole seeds are drawn, the same ones at every level, and units within them; [low, high] and what it leaves out."""
    shared = set.intersection(*({cell.seed for cell in draws.cells} for draws in curve))
    if not shared:
        return None, None, "no seed has every level: no interval"
    # Cells are by seed: place j is the same seed at every level.
    paired = [draws.inner[[place for place, cell in enumerate(draws.cells) if cell.seed in shared]] for draws in curve]
    seeds = len(paired[0])
    units = min((len(cell.measured[key].units) if key in cell.measured else 1) for draws in curve for cell in draws.cells)
    if seeds < 2 and units < 2:
        return None, None, "one seed and one unit: no interval"
    resamples = curve[0].inner.shape[1]
    picks = seed_picks(seeds, resamples, 0)
    points = [inner[picks[:, j], np.arange(resamples)] for inner in paired for j in range(seeds)]
    rho = _rank_correlation(np.repeat(levels, seeds), np.stack(points, axis=1))
    rho = rho[np.isfinite(rho)]
    if len(rho) < 2:
        return None, None, "constant in every resample"
    low, high = (float(x) for x in np.quantile(rho, [0.025, 0.975]))
    return low, high, "one seed: interval over prompts only" if seeds < 2 else ""


def jonckheere(groups: Sequence[np.ndarray]) -> tuple[float, str]:
    """Two-sided p of the Jonckheere-Terpstra test (Jonckheere 1954) for a trend over ordered groups, and its method.

    The statistic is the number of pairs from two groups that lie in the groups' order, ties counted half. Without ties the
    null distribution is exact, from its generating function (a q-multinomial coefficient); with ties it is taken from
    PERMUTATIONS random permutations (Phipson and Smyth 2010: (hits + 1) / (n + 1)).
    """
    pooled = np.concatenate(groups)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    above, below = _ordered_pairs(pooled[None, :], labels)
    observed, middle = float(above[0]), float(above[0] + below[0]) / 2
    if len(np.unique(pooled)) == len(pooled):
        counts = _null_counts([len(group) for group in groups])
        far = sum(count for j, count in enumerate(counts) if abs(j - middle) >= abs(observed - middle))
        return min(1.0, far / sum(counts)), "Jonckheere-Terpstra, exact"
    generator = np.random.default_rng(0)
    shuffled = generator.permuted(np.tile(pooled, (PERMUTATIONS, 1)), axis=1)
    hits = np.sum(np.abs(_ordered_pairs(shuffled, labels)[0] - middle) >= abs(observed - middle) - 1e-9)
    return float((hits + 1) / (PERMUTATIONS + 1)), f"Jonckheere-Terpstra, {PERMUTATIONS} permutations (ties)"


def _ordered_pairs(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs from two groups in rising order, and in falling order, of each line of [lines, points]; ties half to both."""
    rising = np.zeros(len(values))
    pairs = 0
    for i in range(values.shape[1]):
        later = labels > labels[i]
        pairs += int(later.sum())
        rising += (values[:, later] > values[:, i : i + 1]).sum(axis=1) + 0.5 * (values[:, later] == values[:, i : i + 1]).sum(axis=1)
    return rising, pairs - rising


def _null_counts(sizes: Sequence[int]) -> list[int]:
    """How many arrangements give each value of the statistic: coefficients of the q-multinomial of `sizes`, exact integers."""
    counts, placed = [1], 0
    for size in sizes:
        for j in range(1, size + 1):  # times (1 - q^(placed + j)) / (1 - q^j)
            counts = _divide(_multiply(counts, placed + j), j)
        placed += size
    total = math.factorial(placed) // math.prod(math.factorial(size) for size in sizes)
    assert sum(counts) == total, "the q-multinomial does not count all arrangements"
    return counts


def _multiply(counts: list[int], power: int) -> list[int]:
    """Times 1 - q^power."""
    padded = counts + [0] * power
    return [a - b for a, b in zip(padded, [0] * power + counts, strict=True)]


def _divide(counts: list[int], power: int) -> list[int]:
    """By 1 - q^power, which divides it."""
    quotient: list[int] = []
    for place in range(len(counts) - power):
        quotient.append(counts[place] + (quotient[place - power] if place >= power else 0))
    return quotient
