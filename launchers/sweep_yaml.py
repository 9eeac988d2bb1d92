"""Reading a sweep's YAML, and the changes of --set to it."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_stability import safe_read
from ds_stability.config_errors import did_you_mean
from ds_stability.errors import UserError
from ds_stability.launchers.sweep_values import BLOCK_FLAGS, PACKAGE, axis_name

TOP_KEYS = ("name", "recipe", "num_gpus", "flags", "grid", "arms", "exclude", "evaluate")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
LIST_FLAGS = ("train_file", "validation_file", "lora_target_modules")
#: One source of text replaces the other.
SOURCES = {"train_file": "dataset_name", "dataset_name": "train_file"}


def load_document(path: str | os.PathLike, settings: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """(file, its mapping with the settings applied). UserError for anything else."""
    path = find_file(path)
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}; allowed is a mapping with {', '.join(TOP_KEYS)}")
    check_keys(document, TOP_KEYS, str(path))
    for setting in settings:
        _apply(document, setting)
    _check_names(document, str(path))
    return path, document


def _check_names(document: dict[str, Any], where: str) -> None:
    """Arms begin the names of cells' folders, and axes stand in them: neither may lead out of the sweep's folder."""
    arms = mapping(document.get("arms"), f"{where}: arms")
    grids = {"grid": document.get("grid"), **{f"arms.{name}.grid": arm.get("grid") for name, arm in arms.items() if isinstance(arm, dict)}}
    axes = [(place, key) for place, grid in grids.items() for key in mapping(grid, f"{where}: {place}")]
    for place, name in [("arms", name) for name in arms] + axes:
        if not _NAME.fullmatch(str(name)):
            raise UserError(f"{where}: {place}: the name {str(name)!r}; allowed are up to 100 letters, digits and . _ + -, with a letter or "
                            "digit first")  # fmt: skip


def find_file(path: str | os.PathLike) -> Path:
    """A sweep's file: a path, or the name of one that ships."""
    shipped = PACKAGE / "launchers" / "sweeps"
    for candidate in (Path(path), PACKAGE / path, shipped / path, shipped / f"{path}.yaml"):
        if os.path.isfile(candidate):  # unlike Path.is_file, False for a name that no file can have
            return candidate
    names = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
    raise UserError(f"{path}: no such sweep file; give a YAML file, or one of those that ship: {names}")


def read_yaml(path: Path) -> Any:
    """The YAML in a file, in which no key may stand twice: an arm would be gone unseen."""
    return safe_read.read_yaml(path, str(path))


def mapping(value: Any, where: str) -> dict[Any, Any]:
    """`value`, {} for None; UserError if it is no mapping."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r}; allowed is a mapping")
    return value


def check_keys(given: Mapping[Any, Any], allowed: Sequence[str], where: str) -> None:
    """UserError for the first key that is not allowed."""
    for key in given:
        if key not in allowed:
            near = did_you_mean(str(key), list(allowed))
            raise UserError(f"{where}: unknown key {key!r}; {f'did you mean {near!r}?' if near else 'allowed are ' + ', '.join(allowed)}")


def _apply(document: dict[str, Any], setting: str) -> None:
    """Put one --set key=value into the document."""
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise UserError(f"--set {setting}: allowed is key=value, such as max_steps=50, stability.level=0.5 or grid.seed=[3,4]")
    try:
        value = safe_read.parse_yaml(text)
    except ValueError as error:
        raise UserError(f"--set {setting}: the value is no YAML ({error})") from None
    if key in LIST_FLAGS and isinstance(value, str):
        value = text.split(",")
    head, dot, rest = key.partition(".")
    if key in ("name", "recipe", "num_gpus"):
        document[key] = value
    elif dot and head == "grid":
        _set_axis(document, rest, value, setting)
    elif dot and head == "evaluate":
        document["evaluate"] = {**mapping(document.get("evaluate"), "evaluate"), rest: value}
    else:
        _set_flag(document, key, value, setting)


def _set_axis(document: dict[str, Any], key: str, value: Any, setting: str) -> None:
    """New values of an axis; of a named one, a choice among its names. Axes of arms keep theirs."""
    grid = document["grid"] = dict(mapping(document.get("grid"), "grid"))
    old = next((axis for axis in grid if axis_name(str(axis)) == axis_name(key)), key)
    choices = grid.get(old)
    values = value if isinstance(value, list) else [value]
    if isinstance(choices, dict):
        known = {str(name): name for name in choices}
        for name in values:
            if str(name) not in known:
                raise UserError(f"--set {setting}: the axis has no value {name!r}; allowed are {', '.join(known)}")
        grid[old] = {known[str(name)]: choices[known[str(name)]] for name in values}
    else:
        grid[old] = values


def _set_flag(document: dict[str, Any], key: str, value: Any, setting: str) -> None:
    """A flag for all cells. One that an axis sets is refused: the axis would overrule it without a word."""
    for axis, choices in mapping(document.get("grid"), "grid").items():
        sets = [str(axis)] if not isinstance(choices, dict) else [str(k) for part in choices.values() for k in mapping(part, "grid")]
        if axis_name(key) in map(axis_name, sets):
            raise UserError(f"--set {setting}: the axis {axis} sets {key}; choose its values with --set grid.{axis}=[...]")
    flags = document["flags"] = dict(mapping(document.get("flags"), "flags"))
    for old in [old for old in flags if BLOCK_FLAGS.get(old, old) == BLOCK_FLAGS.get(key, key)]:
        del flags[old]
    flags[key] = value
    if value is not None and key in SOURCES:
        flags[SOURCES[key]] = None
