"""From cells to groups: architecture x arm x level over training seeds, with intervals, and differences to the baseline.

Seeds are the unit of replication. A resample draws seeds with replacement, and units (prompts, documents, groups of texts)
with replacement, once for all seeds: the seeds of a sweep share their prompts and held-out text, so that seeds and units are
crossed, and drawing units anew for each seed would take the texts' own effects for noise that averages out (Owen 2007, the
pigeonhole bootstrap). The same draws serve every cell: a difference between two cells is paired by seed and unit, and the
draws of all levels together give the intervals of a trend.

With S seeds, resampling seeds makes an interval too narrow by about sqrt((S - 1) / S); the t-interval over seeds beside it
has no such flaw, but knows nothing of the prompts.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .contrasts import difference_estimate, group_estimate
from .records import Measured
from .report_cells import Cell, Key

RESAMPLES = 1000
MAX_UNITS = 500  # more are summed in runs of neighbors first: the same variance, a bounded cost
RESULT_COLUMNS = ("run", "level", "arch", "seed", "arm", "decoding", "split", "metric", "value", "stderr", "ci_low", "ci_high", "n", "note")  # fmt: skip
REFERENCE = "reference"  # the decoding whose "samples" are the human continuations
PLAIN_ARMS = ("feedback", "none", "no_feedback", "plain", "unweighted")  # where the baseline is looked for first


class Group(NamedTuple):
    architecture: str
    arm: str
    level: float | None


@dataclass
class Draws:
    """One figure of one group.

    Attributes:
        cells: that have the figure, by seed. values: theirs, [seeds]. draws: of the group's value, [resamples].
        inner: of each seed, [seeds, resamples]; what `draws` averages over.
    """

    cells: list[Cell]
    values: np.ndarray
    draws: np.ndarray
    inner: np.ndarray

    @property
    def value(self) -> float:
        return float(self.values.mean())


def results_frame(cells: Iterable[Cell]) -> pd.DataFrame:
    """results.parquet: one line per cell and figure, RESULT_COLUMNS."""
    lines = [
        {
            "run": cell.id, "level": cell.level, "arch": cell.architecture, "seed": cell.seed, "arm": cell.arm,
            "decoding": key.decoding, "split": key.split, "metric": key.metric,
            **{name: row.get(name) for name in ("value", "stderr", "ci_low", "ci_high", "n", "note")},
        }
        for cell in cells for key, row in cell.rows.items()
    ]  # fmt: skip
    frame = pd.DataFrame(lines, columns=list(RESULT_COLUMNS))
    numbers = ["level", "value", "stderr", "ci_low", "ci_high", "n"]
    texts = ["run", "arch", "arm", "decoding", "split", "metric", "note"]
    # Stated types: a column that is all null would otherwise change its type from sweep to sweep.
    return frame.astype({**dict.fromkeys(numbers, "float64"), **dict.fromkeys(texts, "object"), "seed": "Int64"})


def keys_of(cells: Iterable[Cell]) -> list[Key]:
    """Every figure of any cell, in the order of the first cell that has it."""
    return list(dict.fromkeys(key for cell in cells for key in cell.rows))


def groups_of(cells: Iterable[Cell]) -> dict[Group, list[Cell]]:
    """Cells by group, each list by seed; groups by architecture, arm and level."""
    groups: dict[Group, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[Group(cell.architecture, cell.arm, cell.level)].append(cell)
    for members in groups.values():
        members.sort(key=lambda cell: (cell.seed is None, cell.seed or 0))
    return dict(sorted(groups.items(), key=lambda item: group_order(item[0])))


def group_order(group: Group) -> tuple:
    return group.architecture, group.arm, group.level is None, group.level or 0.0


def main_arm(groups: Iterable[Group]) -> str | None:
    """The arm of the dose-response: feedback where it has a level, else the one with most levels; None without a level."""
    levels: dict[str, set[float]] = defaultdict(set)
    for group in groups:
        if group.level is not None:
            levels[group.arm].add(group.level)
    return min(levels, key=lambda arm: (arm != PLAIN_ARMS[0], -len(levels[arm]), arm)) if levels else None


def baseline_of(group: Group, groups: Sequence[Group], level: float) -> Group | None:
    """The group at the baseline level that `group` is compared to: of its own arm, else the dose-response's, else a plain arm."""
    arms = (group.arm, main_arm(groups), *PLAIN_ARMS)
    candidates = [Group(group.architecture, arm, level) for arm in arms if arm is not None]
    return next((other for other in candidates if other in groups and other != group), None)


@lru_cache(maxsize=4)
def _weights(units: int, resamples: int, seed: int) -> np.ndarray:
    """How often each unit is drawn, [resamples, units]; the same for every cell with as many units."""
    generator = np.random.default_rng([seed, units])
    return generator.multinomial(units, np.full(units, 1.0 / units), size=resamples).astype(np.float64)


@lru_cache(maxsize=16)
def seed_picks(seeds: int, resamples: int, seed: int) -> np.ndarray:
    """Which seeds a resample draws, [resamples, seeds]."""
    return np.random.default_rng([seed, seeds]).integers(seeds, size=(resamples, seeds))


def _inner(measured: Sequence[Measured], resamples: int, seed: int) -> np.ndarray:
    """Values of each Measured over resampled units, [measured, resamples]; all have equally many units.

    nan for a resample without a value: of empty units, or with one that is not a finite number.
    """
    totals, counts = (np.stack([getattr(item, name) for item in measured], axis=1) for name in ("totals", "counts"))
    if len(totals) > MAX_UNITS:
        first = np.arange(MAX_UNITS) * len(totals) // MAX_UNITS
        totals, counts = (np.add.reduceat(array, first, axis=0) for array in (totals, counts))
    weights = _weights(len(totals), resamples, seed)
    broken = ~(np.isfinite(totals) & np.isfinite(counts))
    totals, counts = (weights @ np.where(broken, 0.0, array) for array in (totals, counts))
    known = counts > 0
    if broken.any():
        known &= weights @ broken == 0
    return np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=known).T


def _units(cell: Cell, key: Key) -> Measured:
    """The cell's units, or its bare value as one unit where it has none (its prompts then add no spread)."""
    found = cell.measured.get(key)
    return found if found is not None else Measured(key.metric, ["all"], [cell.rows[key]["value"]], [1.0])


def average(inner: np.ndarray, seed: int) -> np.ndarray:
    """Draws of the mean over seeds, [resamples]: seeds drawn with replacement, all with the units of the resample."""
    picks = seed_picks(*inner.shape, seed)
    return np.stack([inner[picks[:, j], np.arange(inner.shape[1])] for j in range(len(inner))]).mean(axis=0)


def draw(groups: dict[Group, list[Cell]], key: Key, resamples: int = RESAMPLES, seed: int = 0) -> dict[Group, Draws]:
    """Resampled values of one figure, of each group that has it."""
    having = {group: [cell for cell in cells if cell.value(key) is not None] for group, cells in groups.items()}
    by_size: dict[int, list[Cell]] = defaultdict(list)
    for cells in having.values():
        for cell in cells:
            by_size[len(_units(cell, key).units)].append(cell)
    inner: dict[str, np.ndarray] = {}
    for cells in by_size.values():  # one matrix product for all cells with as many units
        drawn = _inner([_units(cell, key) for cell in cells], resamples, seed)
        inner |= {cell.id: values for cell, values in zip(cells, drawn, strict=True)}
    result = {}
    for group, cells in having.items():
        if cells:
            stacked = np.stack([inner[cell.id] for cell in cells])
            result[group] = Draws(cells, np.array([cell.value(key) for cell in cells]), average(stacked, seed), stacked)
    return result


def difference(group: Draws, base: Draws, key: Key, seed: int = 0) -> Draws | None:
    """`group` minus `base`, paired by seed and, within it, by unit; None without a common seed (or one cell on each side)."""
    pairs = [(i, j) for i, cell in enumerate(group.cells) for j, other in enumerate(base.cells) if cell.seed == other.seed]
    if not pairs:
        return None
    kept = [(i, *_pair(group, i, base, j, key, seed)) for i, j in pairs]
    kept = [pair for pair in kept if pair[1] is not None]  # no unit in common
    if not kept:
        return None
    cells, values, inner = zip(*kept, strict=True)
    stacked = np.stack(inner)
    return Draws([group.cells[i] for i in cells], np.array(values), average(stacked, seed), stacked)


def _pair(group: Draws, i: int, base: Draws, j: int, key: Key, seed: int) -> tuple[float | None, np.ndarray]:
    one, two = _units(group.cells[i], key), _units(base.cells[j], key)
    if list(one.units) == list(two.units):  # the draws were made with the same weights
        return float(group.values[i] - base.values[j]), group.inner[i] - base.inner[j]
    common = sorted(set(one.units) & set(two.units))
    restricted = [_restrict(item, common) for item in (one, two)]
    if not common or restricted[0].value is None or restricted[1].value is None:
        return None, np.empty(0)
    drawn = _inner(restricted, group.inner.shape[1], seed)
    return restricted[0].value - restricted[1].value, drawn[0] - drawn[1]


def _restrict(measured: Measured, units: Sequence[int | str]) -> Measured:
    places = {unit: place for place, unit in enumerate(measured.units)}
    chosen = [places[unit] for unit in units]
    return Measured(measured.metric, units, measured.totals[chosen], measured.counts[chosen])


class Interval(NamedTuple):
    low: float | None
    high: float | None
    note: str | None = None


def interval(draws: Draws, key: Key) -> Interval:
    """95 % percentile interval over seeds and units; nothing where neither can vary."""
    units = min((len(cell.measured[key].units) if key in cell.measured else 1) for cell in draws.cells)
    if len(draws.values) < 2 and units < 2:
        return Interval(None, None, "one seed and one unit: no interval")
    finite = draws.draws[np.isfinite(draws.draws)]
    if len(finite) < 2:
        return Interval(None, None, "no resample had a value")
    single = len(draws.values) < 2
    low, high = (float(bound) for bound in np.quantile(finite, [0.025, 0.975]))
    return Interval(low, high, "one seed: interval over prompts only" if single else None)


def group_rows(groups: dict[Group, list[Cell]], key: Key, baseline_level: float = 0.0) -> list[dict[str, Any]]:
    """One row per group of one figure: value over seeds with its interval, and the difference to the baseline with its own.

    `note` says why there is no interval, what was left out, and after "difference:" the same of the difference.
    """
    having = [group for group, cells in groups.items() if any(cell.value(key) is not None for cell in cells)]
    rows = []
    for group, cells in groups.items():
        if not any(key in cell.rows for cell in cells):
            continue
        found = group_estimate(cells, key)
        row: dict[str, Any] = {**group._asdict(), **key._asdict(), "seeds": found.seeds, "value": found.value}
        row |= {"ci_low": found.low, "ci_high": found.high, "stderr": found.stderr, **_counts(cells, key)}
        row |= {"values": {str(cell.seed): cell.value(key) for cell in cells},
                "unit": next((cell.rows[key].get("unit") for cell in cells if key in cell.rows), None)}  # fmt: skip
        notes = [found.note, *(str(cell.rows[key]["note"]) for cell in cells if cell.rows.get(key, {}).get("note"))]
        base = baseline_of(group, having, baseline_level) if group in having and group.level is not None else None
        row |= _difference_columns(cells, base, groups, key, notes)
        rows.append(row | {"note": "; ".join(dict.fromkeys(filter(None, notes)))})
    return rows


def _counts(cells: Sequence[Cell], key: Key) -> dict[str, Any]:
    """sd over seeds, and what was counted in all cells that have the figure."""
    having = [cell for cell in cells if cell.value(key) is not None]
    values, counts = [cell.value(key) for cell in having], [cell.rows[key].get("n") for cell in having]
    return {
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "n": None if None in counts or not counts else float(sum(counts)),
        "units": sum(len(cell.measured[key].units) if key in cell.measured else 1 for cell in having) or None,
    }


def _difference_columns(cells: Sequence[Cell], base: Group | None, groups: dict[Group, list[Cell]], key: Key, notes: list[str]) -> dict[str, Any]:
    """The difference to the baseline; what its note says beyond the group's is added to `notes`."""
    if base is None:
        return dict.fromkeys(("difference", "difference_low", "difference_high", "difference_p", "baseline", "difference_t_low", "difference_t_high"))
    apart = difference_estimate(cells, groups[base], key)
    said = set("; ".join(notes).split("; "))
    own = [note for note in apart.note.split("; ") if note and note not in said]
    notes += [f"difference: {'; '.join(own)}"] if own else []
    return {"difference": apart.value, "difference_low": apart.low, "difference_high": apart.high, "difference_p": apart.p,
            "baseline": f"{base.arm}, level {base.level:g}",
            "difference_t_low": apart.low if apart.seeds > 1 else None, "difference_t_high": apart.high if apart.seeds > 1 else None}  # fmt: skip
