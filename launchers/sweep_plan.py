"""From a sweep's YAML to its cells. Pure: reads the YAML and the small JSON files it names, writes nothing.

    name: example                      # runs/example
    recipe: launchers/recipes/x.yaml   # optional: defaults for the flags
    num_gpus: 2                        # processes that train a cell; default 2, or 1 on a machine with one GPU
    flags:                             # any flag of launchers/train.py, and any dotted key of the stability block
      deepspeed: ds_configs/zero3_cpu.json
      stability.controller.warmup_steps: 100
    grid:                              # every combination is a cell
      stability.level: [0, 0.5, 1]
      architecture:                    # a named axis: each value sets several flags
        gpt2: {config_name: ds_configs/models/gpt2_tiny.json}
        llama: {config_name: ds_configs/models/llama_tiny.json}
      seed: [0, 1]
    arms:                              # optional: each arm has the grid, its own flags, and its own (more or other) axes
      feedback: {}
      no_feedback: {flags: {stability.stabilizers: {}}, grid: {stability.level: [0]}}
    exclude: [{arm: feedback, level: 0}]
    evaluate: {suite: quick, seeds: [0]}

The axis of `stability.level` is called `level`; other keys of the block go by their path without `stability.`. Paths are
looked for in the working directory, then in the repository (the installed package).

A value may name files of another cell, which is then trained first: "{cell:arm=feedback,level=0.5}/metrics.jsonl". The
cell is the one with these values on its axes; where several have them, the one that also has the referring cell's own
values on the other axes (its seed, its architecture). `seed=next` means another seed than the referring cell's: the one
after it in the file, after the last the first; so for any axis. A cell can be a branch of another one:
`branch_from: "{cell:arm=trunk}/checkpoint-200"`.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ds_stability.deepspeed_config import load_ds_config
from ds_stability.errors import UserError
from ds_stability.launchers.sweep_values import (
    BLOCK,
    BLOCK_FLAGS,
    axis_name,
    canonical,
    content,
    digest,
    existing,
    flatten,
    label,
    map_strings,
    override,
    put,
    resolve_paths,
    same,
)
from ds_stability.launchers.sweep_yaml import check_keys, load_document, mapping, read_yaml
from ds_stability.objectives.config import parse_objective_flag
from ds_stability.safe_read import parse_yaml
from ds_stability.schedule import parse_level_flag

MAIN_ARM = "main"
ARM_KEYS = ("flags", "grid")
EVALUATE_KEYS = ("suite", "seeds")
OWN_FLAGS = {"output_dir": "the sweep names each cell's folder", "resume_from_checkpoint": "the sweep resumes by itself",
             "config": "write recipe: FILE at the top"}  # fmt: skip
CONTENT_KEYS = ("deepspeed", "config_name")  # small files that are settings themselves
DEFAULT_SEED = 42  # transformers.TrainingArguments
HASH_DIGITS = 8
NEXT = "next"
_REFERENCE = re.compile(r"\{cell:([^{}]*)\}")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        id: readable label and hash of all settings; the name of its folder.
        axes: name -> value on each axis, and always level, architecture and seed.
        flags: flags of launchers/train.py, in which files of other cells stand as {cell:ID}.
        block: what replaces keys of the DeepSpeed config's stability block, by dotted key without "stability.".
        needs: ids of the cells whose files it reads.
        origins: flag -> where the file sets it, such as grid.learning_rate; for messages.
    """

    id: str
    arm: str
    axes: dict[str, Any]
    flags: dict[str, Any]
    block: dict[str, Any]
    needs: tuple[str, ...] = ()
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    def resolved(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """(flags, block) with references replaced by paths under the sweep's folder."""

        def fill(text: str) -> str:
            return _REFERENCE.sub(lambda match: str(folder / match[1]), text)

        return map_strings(self.flags, fill), map_strings(self.block, fill)

    def ds_config(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """The DeepSpeed config of this cell's flags with `block` (dotted keys) put into its stability block."""
        config = load_ds_config(self.flags["deepspeed"])
        for key, value in block.items():
            put(config, ["stability", *key.split(".")], value)
        return config


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep, in the order in which they are trained: a cell comes after those it needs."""

    name: str
    source: str
    num_gpus: int
    cells: tuple[Cell, ...]
    evaluate: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        return digest([sorted(cell.id for cell in self.cells), self.evaluate])


def load_plan(path: str | os.PathLike, settings: Sequence[str] = (), num_gpus: int | None = None,
              default_num_gpus: int = 2) -> Plan:  # fmt: skip
    """The plan of a YAML file (also by the name of one in launchers/sweeps).

    Args:
        settings: "key=value" changes: a flag, stability.KEY, or grid.AXIS, evaluate.KEY, num_gpus, name, recipe.
        num_gpus: processes that train a cell; replaces the file's. default_num_gpus: where neither says.

    Raises:
        UserError: one line that names the file and the key or cell at fault.
    """
    source, document = load_document(path, settings)
    if num_gpus is not None:
        document["num_gpus"] = num_gpus
    if document.get("num_gpus") is None:
        document["num_gpus"] = default_num_gpus
    return _Planner(document, str(source), [setting.partition("=")[0] for setting in settings]).plan()


class _Choice(NamedTuple):
    """One value of an axis: how it is called, what it sets, whether it is a name, and where each key that it sets stands."""

    value: Any
    sets: dict[str, Any]
    is_name: bool
    origins: dict[str, str]


@dataclass(eq=False)
class _Draft:
    """A cell before its references are looked up and it has an id."""

    arm: str
    point: dict[str, _Choice]
    values: dict[str, Any]  # flags and stability.* keys
    origins: dict[str, str]
    needs: list["_Draft"] = field(default_factory=list)
    settling: bool = False
    digest: str = ""
    id: str = ""

    @property
    def axes(self) -> dict[str, Any]:
        return {axis: choice.value for axis, choice in self.point.items()}

    def agrees(self, pattern: Mapping[str, Any]) -> bool:
        axes = {"arm": self.arm, **self.axes}
        return all(key in axes and same(axes[key], value) for key, value in pattern.items())


def _origins(values: Mapping[str, Any], where: str) -> dict[str, str]:
    return {key: f"{where}{key}" for key in values}


class _Planner:
    def __init__(self, document: dict[str, Any], source: str, changed: Sequence[str]):
        self.document, self.source = document, source
        self.strict_exclude = not changed  # a changed grid may lack what was to be left out of it
        self.num_gpus = document["num_gpus"]
        if type(self.num_gpus) is not int or self.num_gpus < 1:
            raise UserError(f"{source}: num_gpus {self.num_gpus!r}: allowed is a number of processes from 1")
        recipe, flags = self._recipe(), self._values(document.get("flags"), "flags")
        self.base = override(recipe, flags)
        self.origins = {**_origins(recipe, f"recipe {document.get('recipe')}: "), **_origins(flags, "flags."),
                        **{key: f"--set {key}" for key in changed if key in flags}}  # fmt: skip
        self.grid = self._axes(document.get("grid"), "grid")

    def plan(self) -> Plan:
        self.drafts = self._without_excluded([draft for name, arm in self._arms().items() for draft in self._expand(name, arm)])
        if not self.drafts:
            raise UserError(f"{self.source}: the sweep has no cell; give a grid, arms, or fewer excludes")
        self.ordered: list[_Draft] = []
        for draft in self.drafts:
            self._settle(draft)
        self._check_unique()
        return Plan(self._name(), self.source, self.num_gpus, tuple(map(self._cell, self.ordered)), self._evaluate())

    def _name(self) -> str:
        name = self.document.get("name", Path(self.source).stem)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"{self.source}: name {name!r}: allowed are letters, digits, dot, hyphen and underscore")
        return name

    def _recipe(self) -> dict[str, Any]:
        name = self.document.get("recipe")
        if name is None:
            return {}
        return self._values(read_yaml(existing(name) or Path(str(name))), f"recipe {name}")

    def _values(self, given: Any, where: str) -> dict[str, Any]:
        """Flags and stability keys of a mapping, each under its one name; a nested `stability:` as dotted keys."""
        values: dict[str, Any] = {}
        for key, value in mapping(given, f"{self.source}: {where}").items():
            key = str(key)
            if key in OWN_FLAGS:
                raise UserError(f"{self.source}: {where}: {key} cannot be set in a sweep ({OWN_FLAGS[key]})")
            if key == "stability_level" and isinstance(value, str):
                level = parse_level_flag(value)
                value = level if isinstance(level, float) else [list(point) for point in level]
            if BLOCK_FLAGS.get(key, key) == "stability.objective" and isinstance(value, str):
                value = parse_objective_flag(value)
            items = flatten("stability", value) if key == "stability" else {BLOCK_FLAGS.get(key, key): value}
            for name, item in items.items():
                if name in values:
                    raise UserError(f"{self.source}: {where}: {name} is given twice, the second time as {key}")
                values[name] = resolve_paths(name, item)
        return values

    def _axes(self, given: Any, where: str) -> dict[str, list[_Choice]]:
        axes: dict[str, list[_Choice]] = {}
        for key, choices in mapping(given, f"{self.source}: {where}").items():
            name = axis_name(str(key))
            if name in axes or name == "arm":
                raise UserError(f"{self.source}: {where}.{key}: an axis called {name} is there already; give it another name")
            if not isinstance(choices, dict | list) or not choices:
                raise UserError(f"{self.source}: {where}.{key}: {choices!r}; allowed is a list of values, or a mapping of "
                                "names to flags, with at least one")
            if isinstance(choices, dict):
                sets = {str(value): self._values(given, f"{where}.{key}.{value}") for value, given in choices.items()}
                axes[name] = [_Choice(value, part, True, _origins(part, f"{where}.{key}.{value}.")) for value, part in sets.items()]
            else:
                axes[name] = [_Choice(value, self._values({key: value}, f"{where}.{key}"), False, {key: f"{where}.{key}"}) for value in choices]
        return axes

    def _arms(self) -> dict[str, dict[str, Any]]:
        given = self.document.get("arms")
        if given is None:
            return {MAIN_ARM: {}}
        arms = {str(name): mapping(arm, f"{self.source}: arms.{name}") for name, arm in mapping(given, f"{self.source}: arms").items()}
        for name, arm in arms.items():
            check_keys(arm, ARM_KEYS, f"{self.source}: arms.{name}")
        return arms

    def _expand(self, name: str, arm: dict[str, Any]) -> list[_Draft]:
        """All cells of an arm."""
        own = self._values(arm.get("flags"), f"arms.{name}.flags")
        axes = self.grid | self._axes(arm.get("grid"), f"arms.{name}.grid")
        owner: dict[str, str] = dict.fromkeys(own, f"arms.{name}.flags")
        for axis, choices in axes.items():
            keys = {key for choice in choices for key in choice.sets}
            for key in sorted(keys & owner.keys()):
                raise UserError(f"{self.source}: arm {name}: {key} is set by {owner[key]} and by the axis {axis}; set it in one of them")
            owner |= dict.fromkeys(keys, f"the axis {axis}")
        drafts = []
        for combination in itertools.product(*axes.values()):
            values, origins = override(self.base, own), {**self.origins, **_origins(own, f"arms.{name}.flags.")}
            for choice in combination:
                values = override(values, choice.sets)
                origins |= choice.origins
            drafts.append(_Draft(name, dict(zip(axes, combination, strict=True)),
                                 {key: value for key, value in values.items() if value is not None}, origins))  # fmt: skip
        return drafts

    def _without_excluded(self, drafts: list[_Draft]) -> list[_Draft]:
        patterns = self.document.get("exclude") or []
        if not isinstance(patterns, list) or not all(isinstance(pattern, dict) and pattern for pattern in patterns):
            raise UserError(f"{self.source}: exclude: allowed is a list of mappings such as {{arm: NAME, level: 0.5}}")
        for pattern in patterns:
            named = {axis_name(str(key)): value for key, value in pattern.items()}
            kept = [draft for draft in drafts if not draft.agrees(named)]
            if len(kept) == len(drafts) and self.strict_exclude:
                raise UserError(f"{self.source}: exclude {pattern} matches no cell; its keys are axes, or arm")
            drafts = kept
        return drafts

    def _settle(self, draft: _Draft) -> None:
        """Give a draft its id, after the cells that it refers to, and append it to `ordered`."""
        if draft.id:
            return
        if draft.settling:
            raise UserError(f"{self.source}: the cells of arm {draft.arm} refer to each other in a circle")
        draft.settling = True
        draft.values = map_strings(draft.values, lambda text: self._link(text, draft))
        settings = {key: content(value) if key in CONTENT_KEYS else value for key, value in draft.values.items()}
        draft.digest = digest({"settings": settings, "num_gpus": self.num_gpus})
        parts = [draft.arm] if self.document.get("arms") is not None else []
        parts += [label(axis, choice.value, choice.is_name) for axis, choice in draft.point.items()]
        draft.id = f"{'_'.join(parts) or 'cell'}-{draft.digest[:HASH_DIGITS]}"
        self.ordered.append(draft)

    def _link(self, text: str, draft: _Draft) -> str:
        """`text` with each reference by axes replaced by one by id."""

        def replace(match: re.Match) -> str:
            target = self._target(match, draft)
            self._settle(target)
            if target not in draft.needs:
                draft.needs.append(target)
            return f"{{cell:{target.id}}}"

        if "{cell:" in text and not _REFERENCE.search(text):
            raise UserError(f"{self.source}: {text!r}: allowed is a reference such as {{cell:level=0.5,seed=0}}/metrics.jsonl")
        return _REFERENCE.sub(replace, text)

    def _target(self, match: re.Match, draft: _Draft) -> _Draft:
        pattern: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in match[1].split(","))):
            key, separator, value = part.partition("=")
            if not separator:
                raise UserError(f"{self.source}: {match[0]}: allowed are AXIS=VALUE pairs after cell:")
            try:
                pattern[axis_name(key.strip())] = parse_yaml(value)
            except ValueError as error:
                raise UserError(f"{self.source}: {match[0]}: {value.strip()} is no YAML ({error})") from None
        for axis in [axis for axis, value in pattern.items() if value == NEXT]:
            pattern[axis] = self._next(axis, pattern, match, draft)
        found = [other for other in self.drafts if other is not draft and other.agrees(pattern)]
        if len(found) > 1:
            shared = {key: value for key, value in draft.axes.items() if key not in pattern}
            found = [other for other in found if all(same(other.axes[k], v) for k, v in shared.items() if k in other.axes)]
        if len(found) != 1:
            here = ", ".join(f"{key} {value}" for key, value in draft.axes.items())
            raise UserError(f"{self.source}: {match[0]} in arm {draft.arm} ({here}) matches {len(found)} cells; it must match one")
        return found[0]

    def _next(self, axis: str, pattern: Mapping[str, Any], match: re.Match, draft: _Draft) -> Any:
        """The value on `axis` after the draft's own, among the cells that the rest of the pattern matches; in a circle."""
        rest = {key: value for key, value in pattern.items() if value != NEXT}
        values = list({str(canonical(other.axes[axis])): other.axes[axis] for other in self.drafts
                       if axis in other.axes and other.agrees(rest)}.values())  # fmt: skip
        own = next((place for place, value in enumerate(values) if axis in draft.axes and same(value, draft.axes[axis])), None)
        if own is None or len(values) < 2:
            here = f"{axis} {draft.axes[axis]}" if axis in draft.axes else f"no axis {axis}"
            raise UserError(f"{self.source}: {match[0]} in arm {draft.arm} ({here}): next needs this cell's {axis} and another one "
                            f"among the cells it may mean; they have {', '.join(map(str, values)) or 'none'}")  # fmt: skip
        return values[(own + 1) % len(values)]

    def _check_unique(self) -> None:
        seen: dict[str, _Draft] = {}
        for draft in self.ordered:
            other = seen.setdefault(draft.digest, draft)
            if other is not draft:
                what = "have one id" if other.id == draft.id else "have the same settings"
                raise UserError(f"{self.source}: two cells {what}: {other.id} and {draft.id}; a cell may stand in a sweep once, so "
                                "change a value, or exclude one of them")  # fmt: skip

    def _cell(self, draft: _Draft) -> Cell:
        if not isinstance(draft.values.get("deepspeed"), str):
            raise UserError(f"{self.source}: flags.deepspeed is not given; give a DeepSpeed config such as ds_configs/zero3_cpu.json")
        flags = {key: value for key, value in draft.values.items() if not key.startswith(BLOCK)}
        block = {key.removeprefix(BLOCK): value for key, value in draft.values.items() if key.startswith(BLOCK)}
        cell = Cell(draft.id, draft.arm, draft.axes, flags, block, tuple(other.id for other in draft.needs), draft.origins)
        model = flags.get("config_name") or flags.get("model_name_or_path") or ""
        cell.axes.setdefault("level", cell.ds_config(block).get("stability", {}).get("level", 0.0))
        cell.axes.setdefault("architecture", Path(str(model)).stem)
        cell.axes.setdefault("seed", flags.get("seed", DEFAULT_SEED))
        return cell

    def _evaluate(self) -> dict[str, Any] | None:
        if self.document.get("evaluate") is None:
            return None
        given = mapping(self.document["evaluate"], f"{self.source}: evaluate")
        check_keys(given, EVALUATE_KEYS, f"{self.source}: evaluate")
        suite, seeds = given.get("suite"), given.get("seeds", [0])
        if not isinstance(suite, str) or not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise UserError(f"{self.source}: evaluate: {given}; allowed is {{suite: NAME or FILE, seeds: [0, 1]}}")
        found = existing(suite) if suite.endswith((".yaml", ".yml")) else None
        return {"suite": suite if found is None else str(found), "seeds": seeds}
