"""A cell: one model under one suite with given seeds. Its id, what is known of its run, its folder and its results.

    evals/NAME/cells/ID/  cell.json  samples.jsonl  records/TASK.jsonl  scores.json  items.parquet  DONE
                          journal/, scratch/ (while it is worked on)  lock

Success is the file DONE, written last. scores.json holds no time: the same model, suite and seeds on the same kind of
device give the same bytes, whoever did the work.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_stability.atomic import write_atomic_parts
from ds_stability.data.frequency import FILE_NAME
from ds_stability.errors import UserError
from ds_stability.run_dir import RunDir, sync_directory, utc_now, write_atomic, write_json_atomic
from ds_stability.safe_read import parse_json, read_json

from .records import Measured, Prompt
from .work import SAMPLES, Journal, dump_line

CELL_VERSION = 1
GROUP_ROWS = 2**16  # of items.parquet


@dataclass(frozen=True)
class ModelPath:
    """`load`: what from_pretrained gets. `run`: the directory of the run that made it, or None."""

    given: str
    load: str
    run: Path | None


def resolve_model(given: str) -> ModelPath:
    """A run directory means its final/; a folder or hub name means itself.

    Raises:
        UserError: no such path, or a run that has no final/ yet.
    """
    path = Path(given)
    if not os.path.exists(path):  # unlike Path.exists, False for a name that no file can have
        # A hub name has the form name or owner/name; anything else can only be a path.
        if given.startswith((".", "/", "~")) or given.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given):
            raise UserError(f"--model {given}: no such folder")
        return ModelPath(given, given, None)
    if not path.is_dir():
        raise UserError(f"--model {given}: is a file; give the folder of a model, or of a run")
    run = RunDir(path)
    if run.manifest.is_file():
        if not run.final.is_dir():
            raise UserError(f"--model {given}: this run has no final/ (it has not ended); give a finished run, or a model folder")
        return ModelPath(given, str(run.final), path)
    parent = path.resolve().parent
    return ModelPath(given, given, parent if path.resolve().name == "final" and RunDir(parent).manifest.is_file() else None)


def cell_ids(models: Sequence[ModelPath], names: Sequence[str] | None = None) -> list[str]:
    """The id of each model's cell: the run's name, else the model's name with a hash of its place; or `names`.

    Raises:
        UserError: two models would share an id, or a name that is no file name.
    """
    if names is not None and len(names) != len(models):
        raise UserError(f"--cell_names: {len(names)} names for {len(models)} models; give one for each, in the same order")
    ids = list(names) if names is not None else [_default_id(model) for model in models]
    for cell_id, model in zip(ids, models, strict=True):
        if not re.fullmatch(r"[A-Za-z0-9._+=-]{1,200}", cell_id) or cell_id.startswith("."):
            raise UserError(f"--cell_names {cell_id!r}: a name may hold letters, digits and . _ - + =, and not begin with a dot")
        # Case is ignored: on some file systems two such names are one folder.
        first = models[[other.lower() for other in ids].index(cell_id.lower())]
        if first is not model:
            raise UserError(f"--model {first.given} and {model.given} would both be cell {cell_id}; give each a name with "
                            "--cell_names, or name each model once")  # fmt: skip
    return ids


def _default_id(model: ModelPath) -> str:
    if model.run is not None:
        return _file_name(model.run.resolve().name)
    place = os.path.realpath(model.load) if os.path.isdir(model.load) else model.load
    return f"{_file_name(place.rstrip('/').rsplit('/', 1)[-1])}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=-]", "_", text).lstrip(".")[:150] or "model"


def describe_run(model: str | ModelPath) -> dict[str, Any] | None:
    """What is known of the run that made a model, for tables and figures; None for a model that is no run of ours.

    Returns:
        name, path, level (a number, or [[step, level], ...]), arm, seed, architecture, axes, stability (the resolved
        block), branch (checkpoint and step of its trunk, or None), final (the last line of metrics.jsonl), held_out (how it
        was split off), data (the DataSpec), git.
    """
    found = resolve_model(model) if isinstance(model, str) else model
    if found.run is None:
        return None
    run = RunDir(found.run)
    manifest, planned = run.read_manifest(), _planned(found.run)
    config, data, seeds, axes = (_object(known.get(key)) for known, key in (
        (manifest, "config"), (manifest, "data"), (manifest, "seeds"), (planned, "axes")))  # fmt: skip
    stability = _object(config.get("stability"))
    return {
        "name": run.path.resolve().name,
        "path": str(run.path.resolve()),
        "level": stability.get("level"),
        "arm": planned.get("arm"),
        "seed": seeds.get("seed"),
        "architecture": axes.get("architecture") or model_type(run.final),
        "axes": axes,
        "stability": stability,
        "branch": {key: branch.get(key) for key in ("checkpoint", "step")} if (branch := _object(manifest.get("branch"))) else None,
        "final": _last_metrics(run.metrics),
        "done": run.done.exists(),
        "corpus_fingerprint": data.get("corpus_fingerprint"),
        "held_out": data.get("held_out"),
        "data": data.get("spec"),
        "git": manifest.get("git"),
    }


def _object(value: Any) -> dict[str, Any]:
    """Of a file that anybody may have written: {} for what is no object."""
    return value if isinstance(value, dict) else {}


def _planned(run: Path) -> dict[str, Any]:
    """The run's entry in the sweep.json of the folder above it; {} where there is none."""
    path = run.resolve().parent / "sweep.json"
    if not path.is_file():
        return {}
    try:
        cells = read_json(path)["cells"]
        return next((dict(cell) for cell in cells if cell["id"] == run.resolve().name), {})
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: cannot be read as the plan of a sweep; mend it, or move the run elsewhere") from None


def model_type(folder: str | Path) -> str | None:
    """What a model's config.json says it is; None for one that is not here."""
    try:
        return read_json(Path(folder) / "config.json")["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_metrics(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    for line in reversed(path.read_bytes().splitlines()[-3:]):  # the last line may be torn
        try:
            return parse_json(line)
        except ValueError:
            continue
    return None


def high_frequency_file(model: ModelPath, reference_file: str | None) -> Path | None:
    """The file of the high-frequency set that a cell uses: the one given, else the model's own, else none."""
    if reference_file is not None:
        return Path(reference_file)
    path = Path(model.load) / FILE_NAME
    return path if path.is_file() else None


def file_sha(path: Path | None) -> str | None:
    try:
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


class CellDir:
    """The folder of a cell."""

    def __init__(self, output_dir: str | Path, cell_id: str):
        self.id = cell_id
        self.path = Path(output_dir) / "cells" / cell_id
        self.cell = self.path / "cell.json"
        self.samples = self.path / "samples.jsonl"
        self.scores = self.path / "scores.json"
        self.items = self.path / "items.parquet"
        self.done = self.path / "DONE"
        self.journal = Journal(self.path / "journal")
        self.identity = self.path / "journal" / "identity.json"
        self.scratch = self.path / "scratch"
        self._lock: int | None = None

    def lock(self) -> None:
        """Keep this cell for this process until `unlock` or the process ends. UserError if another one has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{self.path}: another process is evaluating this cell; wait for it, or use another "
                            "--output_dir") from None  # fmt: skip
        self._lock = descriptor

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self, identity: Mapping[str, Any]) -> bool:
        """Whether the cell is done already.

        Raises:
            UserError: the folder holds results, or a part of them, of something else.
        """
        if self.done.exists():
            recorded = _object(_read_object(self.cell).get("identity"))
            # A finished cell stands whatever device it was made on; a half one must go on where it began.
            self._require(recorded, {**identity, "device": recorded.get("device")})
            return True
        if self.identity.exists():
            self._require(_read_object(self.identity), identity)
        elif self.journal.files():  # of what model and suite its units are cannot be told
            raise UserError(f"{self.identity}: is missing beside results of an earlier attempt; remove the folder "
                            f"{self.journal.folder} to evaluate the cell anew")
        return False

    def _require(self, recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        changed = [key for key in sorted({*recorded, *identity}) if recorded.get(key) != identity.get(key)]
        if changed:
            key = changed[0]
            raise UserError(f"{self.path}: was evaluated with another {key.replace('_', ' ')} ({_short(recorded.get(key))} then, "
                            f"{_short(identity.get(key))} now); use another --output_dir, or remove this folder")  # fmt: skip

    def take(self, identity: Mapping[str, Any]) -> bool:
        """`lock` the cell, and begin it unless it is done already: then let go of it and return True."""
        self.lock()
        if self.check(identity):
            self.unlock()
            return True
        self.begin(identity)
        return False

    def begin(self, identity: Mapping[str, Any]) -> None:
        if not self.identity.exists():
            write_json_atomic(self.identity, identity)

    def write_records(self, records: Mapping[str, Iterable[dict[str, Any]]], decodings: Sequence[str]) -> None:
        """samples.jsonl by (decoding in the suite's order, prompt, sample); records/TASK.jsonl in the order of units."""
        order = {name: position for position, name in enumerate(decodings)}
        for name, rows in records.items():
            if name == SAMPLES:
                write_sorted(self.samples, rows, lambda row: (order[row["decoding"]], row["prompt"], row["sample"]))
            else:
                write_atomic(self.path / "records" / f"{name}.jsonl", "".join(map(dump_line, rows)))

    def write_prompts(self, prompts: Iterable[Prompt]) -> None:
        """prompts.jsonl: what was continued, and how a human went on; samples refer to it by index."""
        lines = ({"index": prompt.index, "text": prompt.text, "reference_text": prompt.reference_text} for prompt in prompts)
        write_atomic(self.path / "prompts.jsonl", "".join(map(dump_line, lines)))

    def finish(self, cell: Mapping[str, Any], scores: Mapping[str, Any], measured: Iterable[Measured]) -> None:
        """All results, then DONE, then away with the journal."""
        write_json_atomic(self.scores, scores)
        write_items(self.items, measured)
        write_json_atomic(self.cell, cell)
        write_atomic(self.done, utc_now() + "\n")
        shutil.rmtree(self.journal.folder, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        sync_directory(self.path)


def write_sorted(path: Path, rows: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], tuple[int, int, int]]) -> None:
    """A line a row, by `key`: the lines are laid down as they come, then copied in order. Some fifty bytes of memory a row."""
    keys, starts = (array("i"), array("q"), array("i")), array("q", [0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as unsorted:
        for row in rows:
            line = dump_line(row).encode("utf-8")
            for column, value in zip(keys, key(row), strict=True):
                column.append(value)
            starts.append(starts[-1] + len(line))
            unsorted.write(line)

        def lines() -> Iterator[bytes]:
            for place in np.lexsort(keys[::-1]):
                unsorted.seek(starts[place])
                yield unsorted.read(starts[place + 1] - starts[place])

        write_atomic_parts(path, lines())


def write_items(path: Path, measured: Iterable[Measured]) -> None:
    """items.parquet: what every figure is made of, a row a unit: metric, decoding, split, unit_id, total, count.

    A row group holds GROUP_ROWS rows at most: memory does not grow with the number of figures, or of units.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    texts, numbers = ("metric", "decoding", "split", "unit_id"), ("total", "count")
    schema = pa.schema([(name, pa.string()) for name in texts] + [(name, pa.float64()) for name in numbers])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as file:
        with parquet.ParquetWriter(file, schema) as writer:
            for group in _groups(measured):
                columns: dict[str, list] = {name: [] for name in (*texts, *numbers)}
                for figure, rows in group:
                    units = figure.units[rows]
                    for name in texts[:3]:
                        columns[name] += [getattr(figure, name)] * len(units)
                    columns["unit_id"] += map(str, units)
                    columns["total"] += figure.totals[rows].tolist()
                    columns["count"] += figure.counts[rows].tolist()
                writer.write_table(pa.table(columns, schema=schema))
        file.seek(0)
        write_atomic_parts(path, iter(lambda: file.read(2**20), b""))


def _groups(measured: Iterable[Measured]) -> Iterator[list[tuple[Measured, slice]]]:
    """Figures, or parts of those with many units: GROUP_ROWS rows at most together."""
    group: list[tuple[Measured, slice]] = []
    rows = 0
    for figure in measured:
        for start in range(0, len(figure.units), GROUP_ROWS):
            size = min(GROUP_ROWS, len(figure.units) - start)
            if rows + size > GROUP_ROWS:
                yield group
                group, rows = [], 0
            group.append((figure, slice(start, start + size)))
            rows += size
    if group:
        yield group


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read; remove the folder {path.parent} to evaluate the cell anew") from None
    return _object(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text[:60]
