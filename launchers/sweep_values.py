"""Settings of a sweep as flat mappings: flags by name, keys of the stability block as "stability.a.b"."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_stability.safe_read import MAX_YAML_BYTES, read_json

PACKAGE = Path(__file__).resolve().parent.parent  # the repository, or the installed package: both hold ds_configs/
BLOCK = "stability."
#: Flags that mean a key of the block; under one name they cannot overrule each other unseen.
BLOCK_FLAGS = {"stability_level": "stability.level", "stability_loss_path": "stability.loss_path",
               "stability_objective": "stability.objective",
               "high_frequency_file": "stability.statistics.high_frequency_file"}  # fmt: skip
PATH_KEYS = frozenset("""branch_from config_name model_name_or_path tokenizer_name deepspeed train_file validation_file data_cache_dir
    stability.statistics.high_frequency_file stability.probe.prompts_file stability.stabilizers.feedback.replay
    stability.alarm.reference_file stability.objective.reference""".split())
LABEL_LENGTH = 40


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


def flatten(prefix: str, value: Any) -> dict[str, Any]:
    """Nested mappings as dotted keys; an empty mapping is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {name: item for key, part in value.items() for name, item in flatten(f"{prefix}.{key}", part).items()}


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`: a changed key of the block also drops the keys beneath it."""
    kept = {key: value for key, value in values.items() if not any(key.startswith(f"{change}.") for change in changes)}
    return copy.deepcopy(kept | dict(changes))


def put(block: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set the value at a path of keys; what is no mapping on the way (a null) becomes one."""
    for key in path[:-1]:
        if not isinstance(block.get(key), dict):
            block[key] = {}
        block = block[key]
    block[path[-1]] = copy.deepcopy(value)


def existing(name: Any) -> Path | None:
    """`name` as an absolute path if it exists from the working directory or from the package."""
    for candidate in (Path(str(name)), PACKAGE / str(name)):
        if os.path.exists(candidate):  # unlike Path.exists, False for a name that no file can have
            return candidate.absolute()
    return None


def resolve_paths(key: str, value: Any) -> Any:
    """The value of `key` with paths that exist made absolute; as it is if the key holds no path."""
    if key not in PATH_KEYS:
        return value
    if isinstance(value, list):
        return [resolve_paths(key, item) for item in value]
    # A bare word is the name of a hub model, whatever folder of that name may lie about.
    if not isinstance(value, str) or ("/" not in value and not Path(value).suffix):
        return value
    found = existing(value)
    return value if found is None else str(found)


def content(path: Any) -> Any:
    """The JSON in a settings file, in whose place another file of the same content means the same cell."""
    try:
        return read_json(str(path), MAX_YAML_BYTES)
    except (OSError, ValueError):
        return path


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """`value` with every string in it, not keys, put through `function`."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, function) for item in value]
    return value


def canonical(value: Any) -> Any:
    """So that 0 and 0.0 are one setting, and the order of keys is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value


def digest(value: Any) -> str:
    """sha256 of a JSON value in its canonical form. Ids of cells begin with it: a change here makes all of them new."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def same(one: Any, other: Any) -> bool:
    """Whether two values of an axis are one: 0.5 and "0.5", 0 and 0.0."""
    return canonical(one) == canonical(other) or str(one) == str(other)


def label(axis: str, value: Any, is_name: bool) -> str:
    """The part of a cell's id for one axis."""
    text = f"{value:g}" if isinstance(value, float) else Path(value).name if isinstance(value, str) else json.dumps(value, default=str)
    text = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")[:LABEL_LENGTH]
    return text if is_name else f"{axis.removeprefix('stabilizers.')}-{text}"
