"""From cells to groups: architecture x arm x level over training seeds, with intervals, and differences to the baseline.

Seeds are the unit of replication; the seeds of a sweep share their prompts and held-out text, so that seeds and units are
crossed. The intervals are those of contrasts.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .contrasts import difference_estimate, group_estimate
from .report_cells import Cell, Key

RESULT_COLUMNS = ("run", "level", "arch", "seed", "arm", "decoding", "split", "metric", "value", "stderr", "ci_low", "ci_high", "n", "note")  # fmt: skip
PLAIN_ARMS = ("feedback", "none", "no_feedback", "plain", "unweighted")  # where the baseline is looked for first


class Group(NamedTuple):
    architecture: str
    arm: str
    level: float | None


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


def baseline_of(group: Group, groups: Sequence[Group], level: float, arm: str | None) -> Group | None:
    """The group at the baseline level that `group` is compared to: of its own arm, else of the dose-response's, else a plain one."""
    arms = (group.arm, arm, *PLAIN_ARMS)
    candidates = [Group(group.architecture, name, level) for name in arms if name is not None]
    return next((other for other in candidates if other in groups and other != group), None)


def group_rows(groups: dict[Group, list[Cell]], key: Key, baseline_level: float = 0.0) -> list[dict[str, Any]]:
    """One row per group of one figure: value over seeds with its interval, and the difference to the baseline with its own.

    `units`: that the seeds share, over which the interval is taken; `n`: what was counted, in all cells together.

    `note` says why there is no interval, what was left out, and after "difference:" the same of the difference.
    """
    # The dose-response's arm is that of the sweep, also for a figure that it lacks.
    arm, having = main_arm(groups), [group for group, cells in groups.items() if any(cell.value(key) is not None for cell in cells)]
    rows = []
    for group, cells in groups.items():
        if not any(key in cell.rows for cell in cells):
            continue
        found = group_estimate(cells, key)
        row: dict[str, Any] = {**group._asdict(), **key._asdict(), "seeds": found.seeds, "value": found.value}
        row |= {"ci_low": found.low, "ci_high": found.high, "stderr": found.stderr, **_counts(cells, key), "units": found.units or None}
        row |= {"values": {str(cell.seed): cell.value(key) for cell in cells},
                "unit": next((cell.rows[key].get("unit") for cell in cells if key in cell.rows), None)}  # fmt: skip
        notes = [found.note, *(str(cell.rows[key]["note"]) for cell in cells if cell.rows.get(key, {}).get("note"))]
        base = baseline_of(group, having, baseline_level, arm) if group in having and group.level is not None else None
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
    }


def _difference_columns(cells: Sequence[Cell], base: Group | None, groups: dict[Group, list[Cell]], key: Key, notes: list[str]) -> dict[str, Any]:
    """The difference to the baseline; what its note says beyond the group's is added to `notes`."""
    if base is None:
        return dict.fromkeys(("difference", "difference_low", "difference_high", "difference_p", "difference_seeds", "baseline"))
    apart = difference_estimate(cells, groups[base], key)
    said = set("; ".join(notes).split("; "))
    own = [note for note in apart.note.split("; ") if note and note not in said]
    notes += [f"difference: {'; '.join(own)}"] if own else []
    return {"difference": apart.value, "difference_low": apart.low, "difference_high": apart.high, "difference_p": apart.p,
            "difference_seeds": apart.seeds, "baseline": f"{base.arm}, level {base.level:g}"}  # fmt: skip
