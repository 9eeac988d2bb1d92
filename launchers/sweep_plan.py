"""From a sweep's YAML to its cells. Pure: reads the YAML and the small JSON files it names, writes nothing.

    name: example                      # runs/example
    recipe: launchers/recipes/x.yaml   # optional: defaults for the flags
    num_gpus: 2                        # processes a cell is trained by; null: 2, or the GPUs of a machine with fewer
    flags:                             # any flag of launchers/train.py, and any dotted key of the stability block
      deepspeed: ds_configs/zero3_cpu.json
      stability.controller.warmup_steps: 100
    grid:                              # every combination is a cell
      stability.level: [0, 0.5, 1]
      architecture:                    # a named axis: each value sets several flags
        gpt2: {config_name: ds_configs/models/gpt2_tiny.json}
        llama: {config_name: ds_configs/models/llama_tiny.json}
      seed: [0, 1]
    arms:                              # optional; each arm has the grid, its own flags, and its own (more or other) axes
      feedback: {}
      no_feedback: {flags: {"stability.stabilizers": {}}, grid: {stability.level: [0]}}
    exclude: [{arm: feedback, level: 0}]
    evaluate: {suite: quick, seeds: [0]}

The axis of `stability.level` is called `level`; other keys of the block go by their path without `stability.`.

A value may name files of another cell, which is then trained first: "{cell:arm=feedback,level=0.5}/metrics.jsonl". The
cell is the one with these values on its axes and, where several have them, with the referring cell's own values on the
other axes (its seed, its architecture).
"""

import copy
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ds_stability.config_errors import did_you_mean
from ds_stability.deepspeed_config import load_ds_config
from ds_stability.errors import UserError
from ds_stability.schedule import parse_level_flag

PACKAGE = Path(__file__).resolve().parent.parent  # the repository, or the installed package: both hold ds_configs/
MAIN_ARM = "main"
TOP_KEYS = ("name", "recipe", "num_gpus", "flags", "grid", "arms", "exclude", "evaluate")
ARM_KEYS = ("flags", "grid")
EVALUATE_KEYS = ("suite", "seeds")
BLOCK = "stability."
#: Flags that mean a key of the block; under one name they cannot overrule each other unseen.
BLOCK_FLAGS = {"stability_level": "stability.level", "stability_loss_path": "stability.loss_path",
               "high_frequency_file": "stability.statistics.high_frequency_file"}  # fmt: skip
OWN_FLAGS = {"output_dir": "the sweep names each cell's folder", "resume_from_checkpoint": "the sweep resumes by itself",
             "config": "write recipe: FILE at the top"}  # fmt: skip
LIST_FLAGS = ("train_file", "validation_file", "lora_target_modules")
PATH_KEYS = frozenset("""config_name model_name_or_path tokenizer_name deepspeed train_file validation_file data_cache_dir
    stability.statistics.high_frequency_file stability.probe.prompts_file stability.stabilizers.feedback.replay""".split())
FILE_CONTENT_KEYS = ("deepspeed", "config_name")  # small files that are settings themselves
HASH_DIGITS = 8
_REFERENCE = re.compile(r"\{cell:([^{}]*)\}")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        id: readable label and hash of all settings; the name of its folder.
        axes: name -> value on each axis, and always level, architecture and seed.
        flags: flags of launchers/train.py; `references` in them still stand as {cell:ID}.
        block: what replaces keys of the DeepSpeed config's stability block, by dotted key without "stability.".
        needs: ids of cells whose files it reads.
    """

    id: str
    arm: str
    axes: dict[str, Any]
    flags: dict[str, Any]
    block: dict[str, Any]
    needs: tuple[str, ...] = ()

    def resolved(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """(flags, block) with references replaced by paths under the sweep's folder."""
        return _map_strings(self.flags, lambda text: _fill(text, folder)), _map_strings(self.block, lambda text: _fill(text, folder))

    def ds_config(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """The DeepSpeed config of this cell's flags with `block` (dotted keys) put into its stability block."""
        config = load_ds_config(self.flags["deepspeed"])
        for key, value in block.items():
            _put(config.setdefault("stability", {}), key.split("."), value)
        return config


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep, in the order in which they are trained: a cell comes after those it needs."""

    name: str
    source: str
    num_gpus: int | None
    cells: tuple[Cell, ...]
    evaluate: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        return _digest([sorted(cell.id for cell in self.cells), self.evaluate])


@dataclass(eq=False)
class _Draft:
    """A cell before references are looked up and it gets its id."""

    arm: str
    axes: dict[str, Any]
    named: frozenset[str]  # axes whose values are names
    values: dict[str, Any]  # flags and stability.* keys
    needs: list["_Draft"] = field(default_factory=list)
    digest: str = ""
    id: str = ""
    settling: bool = False


def load_plan(path: str | os.PathLike, settings: Sequence[str] = (), num_gpus: int | None = None) -> Plan:
    """The plan of a YAML file (also by the name of one in launchers/sweeps).

    Args:
        settings: "key=value" changes: a flag, stability.KEY, or grid.AXIS, evaluate.KEY, num_gpus, name, recipe.
        num_gpus: processes per cell; replaces the file's.

    Raises:
        UserError: one line that names the file and the key or cell at fault.
    """
    path = find_file(path)
    document = _read_yaml(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}; allowed is a mapping with {', '.join(TOP_KEYS)}")
    _check_keys(document, TOP_KEYS, str(path))
    for setting in settings:
        _apply_setting(document, setting)
    plan = _Planner(document, str(path), num_gpus, bool(settings)).plan()
    if not plan.cells:
        raise UserError(f"{path}: the sweep has no cell; give a grid, arms, or fewer excludes")
    return plan


def find_file(path: str | os.PathLike) -> Path:
    """A sweep's file: a path, or the name of one that ships."""
    shipped = PACKAGE / "launchers" / "sweeps"
    for candidate in (Path(path), PACKAGE / path, shipped / path, shipped / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
    raise UserError(f"{path}: no such sweep file; give a YAML file, or one of those that ship: {names}")


class _Planner:
    def __init__(self, document: dict[str, Any], source: str, num_gpus: int | None, changed: bool):
        self.document, self.source, self.changed = document, source, changed
        self.num_gpus = num_gpus if num_gpus is not None else document.get("num_gpus")
        if self.num_gpus is not None and (type(self.num_gpus) is not int or self.num_gpus < 1):
            raise UserError(f"{source}: num_gpus {self.num_gpus!r}: allowed is a number of processes from 1")
        self.base = self._recipe() | self._values(document.get("flags"), "flags")
        self.grid = self._axes(document.get("grid"), "grid")

    def plan(self) -> Plan:
        drafts = [draft for name, arm in self._arms().items() for draft in self._expand(name, arm)]
        drafts = self._without_excluded(drafts)
        ordered: list[_Draft] = []
        for draft in drafts:
            self._settle(draft, drafts, ordered)
        self._check_unique(ordered)
        cells = tuple(self._cell(draft) for draft in ordered)
        return Plan(self._name(), self.source, self.num_gpus, cells, self._evaluate())

    def _name(self) -> str:
        name = self.document.get("name", Path(self.source).stem)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"{self.source}: name {name!r}: allowed are letters, digits, dot, hyphen and underscore")
        return name

    def _recipe(self) -> dict[str, Any]:
        name = self.document.get("recipe")
        if name is None:
            return {}
        recipe = _read_yaml(_existing(name) or Path(str(name)))
        return self._values(recipe, f"recipe {name}")

    def _values(self, given: Any, where: str) -> dict[str, Any]:
        """Flags and stability keys of a mapping under their one name, nested `stability:` mappings as dotted keys."""
        if given is None:
            return {}
        if not isinstance(given, dict):
            raise UserError(f"{self.source}: {where}: {given!r}; allowed is a mapping of flags to values")
        values: dict[str, Any] = {}
        for key, value in given.items():
            key = str(key)
            if key in OWN_FLAGS:
                raise UserError(f"{self.source}: {where}: {key} cannot be set in a sweep ({OWN_FLAGS[key]})")
            items = _flatten("stability", value) if key == "stability" else {BLOCK_FLAGS.get(key, key): value}
            if key == "stability_level" and isinstance(value, str):
                items = {"stability.level": _plain(parse_level_flag(value))}
            for name, item in items.items():
                if name in values:
                    raise UserError(f"{self.source}: {where}: {name} is given twice, also as {key}")
                values[name] = _resolve_paths(name, item)
        return values

    def _axes(self, given: Any, where: str) -> dict[str, list[tuple[Any, dict[str, Any], bool]]]:
        """axis name -> [(label value, what it sets, whether the value is a name)]."""
        axes: dict[str, list] = {}
        for key, choices in _mapping(given, f"{self.source}: {where}").items():
            name = axis_name(str(key))
            if name in axes:
                raise UserError(f"{self.source}: {where}: two axes are called {name}")
            if isinstance(choices, dict):
                axes[name] = [(str(label), self._values(sets, f"{where}.{key}.{label}"), True) for label, sets in choices.items()]
            elif isinstance(choices, list) and choices:
                axes[name] = [(_label_value(value), self._values({key: value}, f"{where}.{key}"), False) for value in choices]
            if not axes.get(name):
                raise UserError(f"{self.source}: {where}.{key}: {choices!r}; allowed is a list of values, or a mapping of "
                                "names to flags, with at least one")
        return axes

    def _arms(self) -> dict[str, dict[str, Any]]:
        arms = self.document.get("arms")
        if arms is None:
            return {MAIN_ARM: {}}
        arms = {str(name): _mapping(arm, f"{self.source}: arms.{name}") for name, arm in
                _mapping(arms, f"{self.source}: arms").items()}  # fmt: skip
        for name, arm in arms.items():
            _check_keys(arm, ARM_KEYS, f"{self.source}: arms.{name}")
        return arms

    def _expand(self, name: str, arm: dict[str, Any]) -> list[_Draft]:
        own = self._values(arm.get("flags"), f"arms.{name}.flags")
        axes = self.grid | self._axes(arm.get("grid"), f"arms.{name}.grid")
        for axis, choices in axes.items():
            clash = [key for _, sets, _ in choices for key in sets if key in own]
            if clash:
                raise UserError(f"{self.source}: arms.{name}.flags sets {clash[0]}, which is set by the axis {axis}; give the "
                                f"arm an axis {axis} of its own with one value")
        drafts = []
        for combination in itertools.product(*axes.values()):
            values = copy.deepcopy(_override(self.base, own))
            for _, sets, _ in combination:
                values = _override(values, copy.deepcopy(sets))
            point = {axis: label for axis, (label, _, _) in zip(axes, combination, strict=True)}
            named = frozenset(axis for axis, (_, _, is_name) in zip(axes, combination, strict=True) if is_name)
            drafts.append(_Draft(name, point, named, {k: v for k, v in values.items() if v is not None}))
        return drafts

    def _without_excluded(self, drafts: list[_Draft]) -> list[_Draft]:
        patterns = self.document.get("exclude") or []
        if not isinstance(patterns, list) or not all(isinstance(pattern, dict) and pattern for pattern in patterns):
            raise UserError(f"{self.source}: exclude: allowed is a list of mappings such as {{arm: NAME, level: 0.5}}")
        for pattern in patterns:
            pattern = {axis_name(str(key)): value for key, value in pattern.items()}
            kept = [draft for draft in drafts if not _agrees(draft, pattern)]
            if len(kept) == len(drafts) and not self.changed:  # a changed grid may lack what was to be left out
                raise UserError(f"{self.source}: exclude {json.dumps(pattern, default=str)} matches no cell")
            drafts = kept
        return drafts

    def _settle(self, draft: _Draft, drafts: list[_Draft], ordered: list[_Draft]) -> None:
        """Give a draft its id, after the cells that it refers to, and append it to `ordered`."""
        if draft.id:
            return
        if draft.settling:
            raise UserError(f"{self.source}: the cells of arm {draft.arm} refer to each other in a circle")
        draft.settling = True

        def replace(match: re.Match) -> str:
            target = self._target(match, draft, drafts)
            self._settle(target, drafts, ordered)
            if target not in draft.needs:
                draft.needs.append(target)
            return f"{{cell:{target.id}}}"

        def link(text: str) -> str:
            if "{cell:" in text and not _REFERENCE.search(text):
                raise UserError(f"{self.source}: {text!r}: allowed is a reference such as {{cell:level=0.5,seed=0}}/metrics.jsonl")
            return _REFERENCE.sub(replace, text)

        draft.values = _map_strings(draft.values, link)
        settings = {key: _content(value) if key in FILE_CONTENT_KEYS else value for key, value in draft.values.items()}
        draft.digest = _digest({"settings": settings, "num_gpus": self.num_gpus})
        parts = [draft.arm] if self.document.get("arms") is not None else []
        parts += [_label(axis, value, axis in draft.named) for axis, value in draft.axes.items()]
        draft.id = f"{'_'.join(parts) or 'cell'}-{draft.digest[:HASH_DIGITS]}"
        ordered.append(draft)

    def _target(self, match: re.Match, draft: _Draft, drafts: list[_Draft]) -> _Draft:
        pattern = {}
        for part in filter(None, (part.strip() for part in match[1].split(","))):
            key, separator, value = part.partition("=")
            if not separator:
                raise UserError(f"{self.source}: {match[0]}: allowed are AXIS=VALUE pairs after cell:")
            pattern[axis_name(key.strip())] = yaml.safe_load(value)
        found = [other for other in drafts if other is not draft and _agrees(other, pattern)]
        if len(found) > 1:
            others = {key: value for key, value in draft.axes.items() if key not in pattern}
            found = [other for other in found if all(_same(other.axes[k], v) for k, v in others.items() if k in other.axes)]
        if len(found) != 1:
            raise UserError(f"{self.source}: {match[0]} in arm {draft.arm} ({_describe(draft.axes)}) matches {len(found)} cells; "
                            "it must match one")  # fmt: skip
        return found[0]

    def _check_unique(self, drafts: list[_Draft]) -> None:
        seen: dict[str, _Draft] = {}
        for draft in drafts:
            other = seen.setdefault(draft.digest, draft)
            if other is not draft:
                same = "have one id" if other.id == draft.id else "have the same settings"
                raise UserError(f"{self.source}: the cells {other.id} and {draft.id} {same}; a cell may stand in a sweep once, so "
                                "change an axis, or exclude one of them")  # fmt: skip

    def _cell(self, draft: _Draft) -> Cell:
        if not isinstance(draft.values.get("deepspeed"), str):
            raise UserError(f"{self.source}: flags.deepspeed is not given; give a DeepSpeed config such as ds_configs/zero3_cpu.json")
        flags = {key: value for key, value in draft.values.items() if not key.startswith(BLOCK)}
        block = {key.removeprefix(BLOCK): value for key, value in draft.values.items() if key.startswith(BLOCK)}
        cell = Cell(draft.id, draft.arm, draft.axes, flags, block, tuple(other.id for other in draft.needs))
        level = cell.ds_config(block).get("stability", {}).get("level", 0.0)
        model = flags.get("config_name") or flags.get("model_name_or_path") or ""
        cell.axes.setdefault("level", level)
        cell.axes.setdefault("architecture", Path(str(model)).stem)
        cell.axes.setdefault("seed", flags.get("seed", 42))
        return cell

    def _evaluate(self) -> dict[str, Any] | None:
        given = self.document.get("evaluate")
        if given is None:
            return None
        given = _mapping(given, f"{self.source}: evaluate")
        _check_keys(given, EVALUATE_KEYS, f"{self.source}: evaluate")
        seeds = given.get("seeds", [0])
        if not isinstance(given.get("suite"), str) or not isinstance(seeds, list) or not all(type(s) is int for s in seeds):
            raise UserError(f"{self.source}: evaluate: allowed is {{suite: NAME or FILE, seeds: [0, 1]}}")
        return {"suite": given["suite"], "seeds": seeds}


def axis_name(key: str) -> str:
    """What an axis is called: the key of the stability block without its beginning, else the flag."""
    return BLOCK_FLAGS.get(key, key).removeprefix(BLOCK)


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """{"block_size": 128, "train_file": [a, b]} as command-line words; a flag of None is left out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is not None:
            words.append(f"--{name}")
            words += [json.dumps(item) if isinstance(item, bool | dict) else str(item) for item in
                      (value if isinstance(value, list | tuple) else [value])]  # fmt: skip
    return words


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror if isinstance(error, OSError) else 'not UTF-8 text'})") from None
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        raise UserError(f"{path}: is no YAML (line {mark.line + 1 if mark else '?'})") from None


def _apply_setting(document: dict[str, Any], setting: str) -> None:
    """Put one --set key=value into the document."""
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise UserError(f"--set {setting}: allowed is key=value, such as max_steps=50, stability.level=0.5 or grid.seed=[3,4]")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {setting}: the value is no YAML") from None
    if key in LIST_FLAGS and isinstance(value, str):
        value = text.split(",")
    head, dot, rest = key.partition(".")
    if key in ("name", "recipe", "num_gpus"):
        document[key] = value
    elif dot and head in ("grid", "evaluate"):
        _set_existing(document, head, rest, value, setting)
    else:
        _set_flag(document, key, value, setting)


def _set_existing(document: dict[str, Any], head: str, rest: str, value: Any, setting: str) -> None:
    part = document[head] = dict(_mapping(document.get(head), head))
    same = [key for key in part if head == "grid" and axis_name(str(key)) == axis_name(rest)]
    if head == "grid" and not isinstance(value, list) and same and isinstance(part[same[0]], dict):
        value = [value]
    if same and isinstance(part[same[0]], dict):  # a named axis: choose among its values
        missing = [label for label in value if str(label) not in map(str, part[same[0]])]
        if missing:
            raise UserError(f"--set {setting}: the axis has no value {missing[0]!r}; allowed are {', '.join(map(str, part[same[0]]))}")
        value = {label: part[same[0]][label] for label in value}
    part[same[0] if same else rest] = value


def _set_flag(document: dict[str, Any], key: str, value: Any, setting: str) -> None:
    if axis_name(key) in {axis_name(str(axis)) for axis in _mapping(document.get("grid"), "grid")}:
        raise UserError(f"--set {setting}: {key} is an axis of the grid; give --set grid.{key}=[...]")
    flags = document["flags"] = dict(_mapping(document.get("flags"), "flags"))
    for old in [old for old in flags if BLOCK_FLAGS.get(old, old) == BLOCK_FLAGS.get(key, key)]:
        del flags[old]
    flags[key] = value
    if value is not None and key in ("train_file", "dataset_name"):  # one source of text replaces the other
        flags["dataset_name" if key == "train_file" else "train_file"] = None


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r}; allowed is a mapping")
    return value


def _check_keys(given: Mapping[Any, Any], allowed: Sequence[str], where: str) -> None:
    for key in given:
        if key not in allowed:
            near = did_you_mean(str(key), list(allowed))
            raise UserError(f"{where}: unknown key {key!r}; {f'did you mean {near!r}?' if near else 'allowed are ' + ', '.join(allowed)}")


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    """Nested mappings as dotted keys; an empty mapping is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {name: item for key, part in value.items() for name, item in _flatten(f"{prefix}.{key}", part).items()}


def _override(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`: a changed key of the block also drops the keys beneath it."""
    kept = {key: value for key, value in values.items() if not any(key.startswith(f"{change}.") for change in changes)}
    return kept | dict(changes)


def _put(block: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(block.get(key), dict):
            block[key] = {}
        block = block[key]
    block[path[-1]] = copy.deepcopy(value)


def _existing(name: Any) -> Path | None:
    """`name` as an absolute path if it exists from the working directory or from the package."""
    for candidate in (Path(str(name)), PACKAGE / str(name)):
        if candidate.exists():
            return candidate.absolute()
    return None


def _resolve_paths(key: str, value: Any) -> Any:
    if key not in PATH_KEYS:
        return value
    if isinstance(value, list):
        return [_resolve_paths(key, item) for item in value]
    # A bare word is the name of a hub model, whatever folder of that name may lie about.
    if not isinstance(value, str) or ("/" not in value and not Path(value).suffix):
        return value
    found = _existing(value)
    return value if found is None else str(found)


def _content(path: Any) -> Any:
    """The JSON in a settings file, in whose place another file of the same content means the same cell."""
    try:
        return json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path


def _map_strings(value: Any, function) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, function) for item in value]
    return value


def _fill(text: str, folder: Path) -> str:
    return _REFERENCE.sub(lambda match: str(folder / match[1]), text)


def _agrees(draft: _Draft, pattern: Mapping[str, Any]) -> bool:
    point = {"arm": draft.arm, **draft.axes}
    return all(key in point and _same(point[key], value) for key, value in pattern.items())


def _same(one: Any, other: Any) -> bool:
    return _canonical(one) == _canonical(other) or str(one) == str(other)


def _canonical(value: Any) -> Any:
    """So that 0, 0.0 and [0] as (0,) are one setting, and true is not 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value


def _digest(value: Any) -> str:
    text = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(schedule: Any) -> Any:
    return schedule if isinstance(schedule, float) else [list(point) for point in schedule]


def _label_value(value: Any) -> Any:
    return [list(item) if isinstance(item, tuple) else item for item in value] if isinstance(value, list | tuple) else value


def _label(axis: str, value: Any, is_name: bool) -> str:
    text = f"{value:g}" if isinstance(value, float) else Path(value).name if isinstance(value, str) else json.dumps(value, default=str)
    text = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")[:40]
    return text if is_name else f"{axis.removeprefix('stabilizers.')}-{text}"


def _describe(axes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in axes.items())
