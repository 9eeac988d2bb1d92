"""Fill the generated tables of docs/reference.md from the code.

    python docs/generate.py            rewrite them
    python docs/generate.py --check    change nothing; exit code 1 if one is out of date

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`. Everything outside of
these marks is written by hand.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REFERENCE = Path(__file__).resolve().parent / "reference.md"
LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    # A bar would end the cell, also inside code spans.
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def config_table() -> str:
    """Every key of the stability block."""
    from ds_stability.config import describe

    rows = []
    for key in describe():
        default = "" if key.section else f"`{json.dumps(key.default)}`"
        rows.append((f"`{key.path}`", default, key.allowed, key.meaning))
    return table(("key", "default", "allowed", "meaning"), rows)


def level_table() -> str:
    """What each family makes of a level, at the default coefficients."""
    header = ("level", "feedback: target ratio", "feedback: gain on exponential surprisal", "clipping: k",
              "averaging: beta", *(f"regularization: {kind}" for kind in _kinds()))  # fmt: skip
    return table(header, [_level_row(level) for level in LEVELS])


def _level_row(level: float) -> list[str]:
    from ds_stability.config import AveragingConfig
    from ds_stability.controller import FeedbackController
    from ds_stability.stabilizers.averaging import Averaging
    from ds_stability.stabilizers.clipping import threshold_deviations
    from ds_stability.stabilizers.feedback import Feedback
    from ds_stability.stabilizers.regularization import Regularization

    target = Feedback(FeedbackController(lambda step: level, warmup_steps=0)).metrics()["stability/target_ratio"]
    averaging = Averaging(lambda step: level, AveragingConfig().beta_max)
    averaging.prepare(0, None)
    coefficients = []
    for kind, maximum in _kinds().items():
        penalty = Regularization(lambda step: level, kind, maximum)
        penalty.prepare(0, SimpleNamespace(base_objective=None, objective=None))
        coefficients.append(f"{penalty.coefficient:.6g}")
    deviations = f"{threshold_deviations(level):.4g}".replace("inf", "no threshold")
    return [f"{level:g}", f"{target:.2f}", _exponential_gain(target), deviations, f"{averaging.beta:.4g}", *coefficients]


def _kinds() -> dict[str, float]:
    from ds_stability.config import REGULARIZATION_MAX

    return REGULARIZATION_MAX


def _exponential_gain(target: float) -> str:
    """The gain that the controller's solver finds for exponential surprisal of mean 1, from 20,000 quantiles."""
    import numpy as np

    from ds_stability.config import ControllerConfig
    from ds_stability.histogram import solve_gain

    count = 20_000
    surprisal = -np.log1p(-(np.arange(count) + 0.5) / count)
    gain, saturated = solve_gain(surprisal, np.full(count, 1.0 / count), target, ControllerConfig().gain_max, 1.0, 1.0)
    return f"{gain:.2f}" + (" (saturated)" if saturated else "")


def tag_table() -> str:
    from ds_stability.recorder import tag_table_markdown

    return tag_table_markdown()


def flag_table() -> str:
    """The flags of launchers/train.py that are not transformers' own, and the defaults that differ from its."""
    from ds_stability.launchers.arguments import DataArguments, ModelArguments, StabilityArguments, TrainArguments

    rows = [_flag_row(field) for kind in (ModelArguments, DataArguments, StabilityArguments) for field in dataclasses.fields(kind)]
    own = TrainArguments.__annotations__
    rows += [_flag_row(field) for field in dataclasses.fields(TrainArguments) if field.name in own]
    return table(("flag", "default", "meaning"), rows)


def _flag_row(field: dataclasses.Field) -> tuple[str, str, str]:
    default: Any = field.default
    shown = "" if default is None else f"`{json.dumps(default)}`"
    return f"`--{field.name}`", shown, field.metadata["help"]


def direction_table() -> str:
    """Which way each metric of an evaluation is better, and what models must share to be compared by it."""
    from ds_stability.eval.measures import MEASURES, NEEDS

    rows = [(f"`{name}...`" if name.endswith("_") else f"`{name}`", measure.best or "none", measure.reason,
             ", ".join(NEEDS[need] for need in measure.needs)) for name, measure in MEASURES.items()]  # fmt: skip
    return table(("metric", "best", "why", "only between models of one"), rows)


TABLES = {"config": config_table, "levels": level_table, "tags": tag_table, "flags": flag_table, "directions": direction_table}


def filled(text: str) -> str:
    """`text` with every generated part made anew.

    Raises:
        KeyError: a mark with a name that is not in TABLES.
    """
    return _MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is out of date")
    arguments = parser.parse_args()
    before = REFERENCE.read_text(encoding="utf-8")
    after = filled(before)
    if arguments.check and after != before:
        print(f"error: {REFERENCE.name} is out of date; run python docs/generate.py", file=sys.stderr)
        return 1
    if after != before:
        from ds_stability.run_dir import write_atomic

        write_atomic(REFERENCE, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
