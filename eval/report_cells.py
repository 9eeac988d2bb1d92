"""Reads the cells of an evaluation folder, and says of each broken or unfinished one what is wrong with it.

    evals/NAME/cells/ID/{cell.json, scores.json, items.parquet, samples.jsonl, DONE}

Nothing is dropped in silence: a cell without DONE, whose results cannot be read, or that is there twice is `Incomplete`; what a
whole cell lacks beside its scores (samples cut off, no training metrics) is a problem that the report prints.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet

from ds_stability.errors import UserError

from .records import Measured

NUMBERS = ("value", "n", "units", "stderr", "ci_low", "ci_high")  # of a row of scores.json
ITEM_COLUMNS = ("metric", "decoding", "split", "unit_id", "total", "count")
ITEM_ROWS = 2**15  # read at once
OWN_AXES = ("level", "stability.level", "architecture", "seed", "arm")  # what the report already distinguishes
UNTOUCHED = "untouched"


class Key(NamedTuple):
    """Which figure: its metric, and the decoding or the split of text it was taken on."""

    metric: str
    decoding: str | None = None
    split: str | None = None

    @property
    def where(self) -> str:
        return self.decoding or self.split or ""

    def __str__(self) -> str:
        return f"{self.metric} ({self.where})" if self.where else self.metric


class Incomplete(NamedTuple):
    id: str
    reason: str


@dataclass
class Cell:
    """One evaluated model.

    Attributes:
        meta: cell.json. rows: scores.json's row of each key. measured: the units of each key, where there are any.
        architecture, arm, level, seed: the training run's; level and seed are None for a model that no run of ours made.
    """

    id: str
    folder: Path
    meta: dict[str, Any]
    rows: dict[Key, dict[str, Any]]
    measured: dict[Key, Measured]
    architecture: str
    arm: str
    level: float | None
    seed: int | None

    @property
    def samples(self) -> Path:
        return self.folder / "samples.jsonl"

    def value(self, key: Key) -> float | None:
        """The figure; None where the cell has none, or one that is no finite number."""
        return _number(self.rows[key].get("value")) if key in self.rows else None


@dataclass
class Evaluation:
    name: str
    folder: Path
    cells: list[Cell]
    incomplete: list[Incomplete] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_evaluation(folder: Path) -> Evaluation:
    """All cells under `folder`/cells.

    Raises:
        UserError: no such folder, or no complete cell.
    """
    if not (folder / "cells").is_dir():
        raise UserError(f"{folder}: no folder cells/ in it; give the --output_dir of ds-stability eval (evals/NAME)")
    found = Evaluation(folder.resolve().name, folder, [])
    for place in sorted(path for path in (folder / "cells").iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not (place / "DONE").exists():
            found.incomplete.append(Incomplete(place.name, "not finished: no DONE"))
            continue
        try:
            found.cells.append(_read_cell(place))
        except _Broken as error:
            found.incomplete.append(Incomplete(place.name, f"{error}; to make it again, remove cells/{place.name}/DONE and run the "
                                                           "same ds-stability eval once more"))  # fmt: skip
    if not found.cells:
        reasons = "; ".join(f"{cell.id}: {cell.reason}" for cell in found.incomplete[:3]) or "cells/ is empty"
        raise UserError(f"{folder}: no complete cell to report on ({reasons})")
    _name_variants(found.cells)
    _leave_out_twins(found)
    found.problems += _disagreements(found.cells)
    return found


class _Broken(Exception):
    pass


def _read_cell(folder: Path) -> Cell:
    meta, scores = _read_object(folder / "cell.json"), _read_object(folder / "scores.json")
    try:
        rows = {_key(row): row for row in scores["rows"]}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _Broken("scores.json: not a list of rows with a metric each") from None
    run = meta.get("run") if isinstance(meta.get("run"), dict) else {}
    identity = str(meta.get("id", folder.name))
    axes = run.get("axes") if isinstance(run.get("axes"), dict) else {}
    asked = axes.get("level", axes.get("stability.level", run.get("level")))
    arm = str(run.get("arm") or "feedback") if run else f"{UNTOUCHED}: {identity}"
    if run and asked is not None and _number(asked) is None:  # a schedule has no place on the axis: an arm of its own
        arm += f", level {json.dumps(asked)}"
    return Cell(
        id=identity,
        folder=folder,
        meta=meta,
        rows=rows,
        measured=_read_items(folder / "items.parquet", rows),
        architecture=str(run.get("architecture") or meta.get("architecture") or "unknown architecture"),
        arm=arm,
        level=_number(asked) if run else None,
        seed=run["seed"] if type(run.get("seed")) is int else None,
    )


def _key(row: dict[str, Any]) -> Key:
    """The key of a row of scores.json. TypeError, KeyError or ValueError for a row that is none."""
    key, numbers = Key(row["metric"], row.get("decoding"), row.get("split")), [row.get(name) for name in NUMBERS]
    texts = [*key[1:], row.get("unit"), row.get("note")]
    if not isinstance(key.metric, str) or not all(text is None or isinstance(text, str) for text in texts):
        raise TypeError("a name that is no text")
    if not all(number is None or isinstance(number, float) or (type(number) is int and abs(number) < 2**63) for number in numbers):
        raise TypeError("a figure that is no number")
    if not isinstance(row.get("settings"), dict | None) or (_chance(row) is not None and _number(_chance(row)) is None):
        raise TypeError("settings that are no object, or no number in them")
    return key


def _chance(row: dict[str, Any]) -> Any:
    return (row.get("settings") or {}).get("chance")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8", errors="replace").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}"))
    except FileNotFoundError:
        raise _Broken(f"no {path.name}") from None
    except RecursionError:
        raise _Broken(f"{path.name}: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _Broken(f"{path.name}: cut off or broken at line {error.lineno} ({error.msg})") from None
    except (OSError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise _Broken(f"{path.name}: cannot be read ({(isinstance(error, OSError) and error.strerror) or error})") from None
    if not isinstance(value, dict):
        raise _Broken(f"{path.name}: holds a {type(value).__name__}, not an object")
    return value


def _number(value: Any) -> float | None:
    known = (isinstance(value, float) and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)
    return float(value) if known else None


def _read_items(path: Path, rows: dict[Key, dict[str, Any]]) -> dict[Key, Measured]:
    """Units by key, in the order of their ids, so that equal sets of units are equal lists."""
    if not path.exists():
        return {}
    found: dict[Key, list[tuple]] = defaultdict(list)  # pieces of each figure: units as an arrow array, totals, counts
    try:
        for batch in parquet.ParquetFile(path).iter_batches(ITEM_ROWS, columns=list(ITEM_COLUMNS)):
            for key, piece in _figures(batch.to_pandas()):
                found[key].append(piece)
    except _Broken:
        raise
    except Exception as error:  # pyarrow has errors of its own for each way in which a file can be broken
        raise _Broken(f"items.parquet: cannot be read ({' '.join(str(error).split())[:120]})") from None
    measured: dict[Key, Measured] = {}
    units: list[str] = []  # most figures have the same ones: one list for all
    for key in list(found):
        pieces = found.pop(key)
        if _number(rows.get(key, {}).get("value")) is None:
            continue
        names = np.concatenate([piece[0].to_numpy(zero_copy_only=False) for piece in pieces])
        order = np.argsort(names.astype(str), kind="stable")
        names = names[order].tolist()
        units = units if names == units else names
        measured[key] = Measured(key.metric, units, *(np.concatenate(column)[order] for column in list(zip(*pieces, strict=True))[1:]),
                                 key.decoding, key.split)  # fmt: skip
    return measured


def _figures(frame: pd.DataFrame) -> Iterator[tuple[Key, tuple]]:
    """(key, (units, totals, counts)) of the figures in some rows. _Broken for columns of another kind."""
    try:
        texts = all(isinstance(value, str) or pd.isna(value) for name in ("metric", "decoding", "split") for value in frame[name].unique())
    except (TypeError, ValueError):  # lists and the like
        texts = False
    if not texts or not all(pd.api.types.is_numeric_dtype(frame[name]) for name in ("total", "count")):
        raise _Broken("items.parquet: cannot be read (columns of another kind)")
    names = [frame[name].astype(object).where(frame[name].notna(), None).to_numpy() for name in ("metric", "decoding", "split")]
    units, totals, counts = frame["unit_id"].astype(str).to_numpy(dtype=object), frame["total"].to_numpy(np.float64), frame["count"].to_numpy(np.float64)
    codes = frame.groupby(["metric", "decoding", "split"], dropna=False, sort=False).ngroup().to_numpy()
    order = np.argsort(codes, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else ():
        yield Key(*(column[places[0]] for column in names)), (pa.array(units[places], pa.string()), totals[places], counts[places])


def _name_variants(cells: Sequence[Cell]) -> None:
    """Axes of a sweep beyond level, architecture and seed make arms of their own, where they vary within an arm."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in cells:
        for axis, value in _extra_axes(cell).items():
            values[cell.arm, axis].add(value)
    for cell in cells:
        varied = [f"{axis}={value}" for axis, value in sorted(_extra_axes(cell).items()) if len(values[cell.arm, axis]) > 1]
        cell.meta["variant"] = varied
    for cell in cells:
        cell.arm = ", ".join([cell.arm, *cell.meta["variant"]])


def _extra_axes(cell: Cell) -> dict[str, str]:
    run = cell.meta.get("run")
    axes = run.get("axes") if isinstance(run, dict) else None
    return {str(name): str(value) for name, value in (axes or {}).items() if name not in OWN_AXES}


def _leave_out_twins(found: Evaluation) -> None:
    """Of two cells with one id, or one model with one place in the sweep, the later by folder name goes: they would count as two.

    Two models with one place (say, runs that differ in what a level does not say) are no twins: the later is an arm of its own.
    """
    seen: dict[Any, Cell] = {}
    kept = []
    for cell in found.cells:  # by folder name
        place = (cell.arm, cell.level, cell.architecture, cell.seed)
        what = f"place in the sweep (arm, level, architecture, seed), {place}"
        named = {("id", cell.id): f"id, {cell.id}"}
        if cell.meta.get("run"):
            named["model", place, str(cell.meta.get("model_fingerprint"))] = what
        twin = next((key for key in named if key in seen), None)
        if twin is not None:
            found.incomplete.append(Incomplete(cell.folder.name, f"it has the {named[twin]}, of cell {seen[twin].folder.name}; take one "
                                                                 f"of the two out of {cell.folder.parent}"))  # fmt: skip
            continue
        if len(named) > 1 and place in seen:
            found.problems.append(f"cells {seen[place].folder.name} and {cell.folder.name} have one {what}, but are two models: the second "
                                  "is an arm of its own")  # fmt: skip
            cell.arm += f", cell {cell.folder.name}"
        seen |= dict.fromkeys(named, cell)
        seen.setdefault(place, cell)
        kept.append(cell)
    found.cells = kept


def _disagreements(cells: Sequence[Cell]) -> list[str]:
    """What makes cells incomparable, in sentences."""
    problems = []
    suites = {str(cell.meta.get("suite_fingerprint")) for cell in cells}
    if len(suites) > 1:
        problems.append(f"the cells were evaluated under {len(suites)} different suites: their figures are not comparable")
    versions = sorted({str(found.get("scores_version")) for cell in cells if isinstance(found := cell.meta.get("identity"), dict)})
    if len(versions) > 1:
        problems.append(f"the cells were scored by different versions of the metrics (scores version {', '.join(versions)}): evaluate "
                        "those of the older one anew")  # fmt: skip
    sets = {json.dumps(found.get("sha") if isinstance(found := cell.meta.get("high_frequency"), dict) else None) for cell in cells}
    if len(sets) > 1:
        problems.append(f"the cells use {len(sets)} different high-frequency sets: their high-frequency shares are not comparable")
    # Cells of one architecture and seed are compared unit by unit, and a unit is a number.
    for fact, text in (("held_out_characters", "held-out text: what is paired by unit is not the same text"),
                       ("train_tokens_counted", "training text: top-K shares, the high-frequency word share, KL to the training "
                                                "unigrams and figures on training text are not comparable")):  # fmt: skip
        found: dict[tuple, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
        for cell in cells:
            texts = cell.meta.get("texts")
            if isinstance(texts, dict) and cell.seed is not None:
                found[cell.architecture, cell.seed][str(texts.get(fact))].append(cell.arm)
        odd = sorted({arm for sizes in found.values() if len(sizes) > 1 for arm in min(sizes.values(), key=len)})
        if odd:
            problems.append(f"cells of one architecture and seed have different {text} (arm {', '.join(odd)} against the others)")
    return problems
