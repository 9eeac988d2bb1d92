"""The file of predictions: read, and refused in one line where it is wrong.

Predictions are written down before the runs, in a JSON or YAML file, a list of

    - id: P1
      statement: Held-out predictive entropy falls with the level in every architecture.
      metric: predictive_entropy
      split: held_out                 # or decoding: sample
      direction: decreasing           # or increasing; or minimum: 0.95 and/or maximum: ...
      levels: [0.25, 0.5, 0.75, 1]    # optional (or level: 1): all but the baseline; for a bound, the highest
      architectures: [gpt2, llama]    # optional: all that were run
      arm: feedback                   # optional: the arm of the dose-response

How they are judged: verdict.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_stability.config_errors import show_value
from ds_stability.errors import UserError
from ds_stability.safe_read import read_json, read_yaml

from .report_cells import Key
from .trend import FALLS, RISES

DIRECTIONS = {"decreasing": FALLS, "increasing": RISES}
FIELDS = {"id", "statement", "metric", "decoding", "split", "direction", "minimum", "maximum", "level", "levels",
          "architectures", "arm"}  # fmt: skip
REQUIRED = ("id", "statement", "metric")


@dataclass(frozen=True)
class Prediction:
    """One line of the predictions file; `direction` is FALLS or RISES; the bounds are None where open."""

    id: str
    statement: str
    key: Key
    direction: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    levels: tuple[float, ...] | None = None
    architectures: tuple[str, ...] | None = None
    arm: str | None = None


def load_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file.

    Raises:
        UserError: one line: it cannot be read, or which prediction lacks or misspells what.
    """
    content = _read(path)
    entries = content.get("predictions") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise UserError(f"--predictions {path}: give a list under the key predictions")
    predictions = [_prediction(entry, f"--predictions {path}: prediction {number}") for number, entry in enumerate(entries, 1)]
    if len({prediction.id for prediction in predictions}) < len(predictions):
        raise UserError(f"--predictions {path}: two predictions have one id; give each its own")
    return predictions


def _read(path: Path) -> Any:
    if path.suffix != ".json":
        return read_yaml(path, f"--predictions {path}")
    try:
        return read_json(path)
    except OSError as error:
        raise UserError(f"--predictions {path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"--predictions {path}: not JSON ({error})") from None


def _prediction(entry: Any, where: str) -> Prediction:
    if not isinstance(entry, dict) or any(not isinstance(entry.get(name), str) for name in REQUIRED):
        raise UserError(f"{where}: give {', '.join(REQUIRED)} as text")
    named = [entry.get(name) for name in ("decoding", "split", "arm")]
    if not all(name is None or isinstance(name, str) for name in named):
        raise UserError(f"{where}: decoding, split and arm are names, not {show_value(named)}")
    unknown = sorted(map(str, set(entry) - FIELDS))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(FIELDS))}")
    direction, bounds = entry.get("direction"), [entry.get("minimum"), entry.get("maximum")]
    given = [bound for bound in bounds if bound is not None]
    if (direction is None) == (not given) or not (direction is None or (isinstance(direction, str) and direction in DIRECTIONS)):
        raise UserError(f"{where}: give either direction ({' or '.join(DIRECTIONS)}), or minimum, maximum or both")
    if not _numbers(given):
        raise UserError(f"{where}: minimum and maximum are numbers, not {show_value(given)}")
    if len(given) == 2 and given[0] > given[1]:
        raise UserError(f"{where}: minimum {given[0]:g} lies above maximum {given[1]:g}")
    levels = entry.get("levels", entry.get("level"))
    levels = levels if isinstance(levels, list) or levels is None else [levels]
    if levels is not None and not (levels and _numbers(levels)):
        raise UserError(f"{where}: levels are numbers, not {show_value(levels)}")
    named = entry.get("architectures")
    if named is not None and not (isinstance(named, list) and named and all(isinstance(name, str) for name in named)):
        raise UserError(f"{where}: architectures is a list of names, not {show_value(named)}")
    return Prediction(
        entry["id"], entry["statement"], Key(entry["metric"], entry.get("decoding"), entry.get("split")),
        DIRECTIONS[direction] if direction else None, *bounds, None if levels is None else tuple(dict.fromkeys(map(float, levels))),
        None if named is None else tuple(dict.fromkeys(named)), entry.get("arm"),
    )  # fmt: skip


def _numbers(values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 for value in values)
