"""Every cell's command line is checked before anything expensive, so that a mistake costs seconds."""

import re
import tempfile
from pathlib import Path
from typing import Any

from ds_stability.config_errors import did_you_mean
from ds_stability.errors import UserError
from ds_stability.launchers.arguments import Command, flag_names, parse_command
from ds_stability.launchers.prepare import check_comparable
from ds_stability.launchers.setup_model import load_config
from ds_stability.launchers.starting_point import require_steps_left
from ds_stability.launchers.sweep_plan import Cell, Plan
from ds_stability.launchers.sweep_values import BLOCK, flag_words
from ds_stability.run_dir import write_json_atomic

_TRUNK = re.compile(r"\{cell:([^{}]*)\}/checkpoint-(\d+)")
STAND_IN = '{"step": 1, "stability/gain": 0.0}\n'  # passes the checks of files that are read, such as a replayed metrics.jsonl


def check_cells(plan: Plan, folder: Path) -> dict[str, Command]:
    """Parse every cell's command line as train.py would; the commands by cell id.

    Raises:
        UserError: names the first cell with a mistake.
    """
    _check_flags(plan)
    commands: dict[str, Command] = {}
    models: set[tuple] = set()
    with tempfile.TemporaryDirectory() as scratch:
        for cell in plan.cells:
            try:
                command = commands[cell.id] = _parse(cell, Path(scratch), folder)
                _check_trunk(cell, commands)
                model = (command.model.config_name, command.model.config_overrides, command.data.block_size)
                if command.model.config_name is not None and model not in models:
                    load_config(command)
                    models.add(model)
            except UserError as error:
                raise UserError(f"{plan.source}: cell {cell.id}: {_as_in_the_file(str(error), cell)}") from None
    try:
        check_comparable([(cell.id, commands[cell.id]) for cell in plan.cells if not takes_tokenizer_of_a_cell(cell)])
    except UserError as error:
        raise UserError(f"{plan.source}: {error}") from None
    return commands


def takes_tokenizer_of_a_cell(cell: Cell) -> bool:
    """Whether a cell fine-tunes what another cell of the sweep trains, whose tokenizer comes with it."""
    return "tokenizer_name" not in cell.flags and "{cell:" in str(cell.flags.get("model_name_or_path"))


def _check_flags(plan: Plan) -> None:
    known = flag_names()
    for cell in plan.cells:
        for name in cell.flags:
            if name not in known:
                near = did_you_mean(name, known)
                raise UserError(f"{plan.source}: {cell.origins[name]}: launchers/train.py has no flag of this name"
                                f"{f'; did you mean {near}?' if near else f'; keys of the stability block are written {BLOCK}KEY'}")


def _as_in_the_file(text: str, cell: Cell) -> str:
    """A message of train.py's with its flags called as the sweep's file does: grid.seed for --seed."""
    def name(match: re.Match) -> str:
        return cell.origins.get(match[2], match[0])

    return re.sub(r"(argument )?--(\w+)(/--[\w-]+)?", name, text).removesuffix(" (see --help)")


def _parse(cell: Cell, scratch: Path, folder: Path) -> Command:
    base = folder if all((folder / need / "DONE").exists() for need in cell.needs) else scratch / "cells"
    flags, block = cell.resolved(base)
    if base != folder:
        _stand_in(flags, base)
        _stand_in(block, base)
        if "{cell:" in str(cell.flags.get("branch_from")):
            flags["branch_from"] = None  # no stand-in for a checkpoint: `_check_trunk`
    config = scratch / "ds_config.json"
    write_json_atomic(config, cell.ds_config(block))
    words = flag_words({**flags, "deepspeed": str(config), "output_dir": str(scratch / "run")})
    try:
        return parse_command(words)
    except UserError as error:
        raise UserError(str(error).replace(str(config), str(flags["deepspeed"])).replace(f"{base}/", "")) from None


def _check_trunk(cell: Cell, commands: dict[str, Command]) -> None:
    """Refuse a branch of another cell from a checkpoint that this will not have, or with another seed or block size."""
    given = str(cell.flags.get("branch_from"))
    if "{cell:" not in given:
        return
    found = _TRUNK.fullmatch(given)
    if found is None:
        raise UserError(f"--branch_from {given}: allowed is a checkpoint of the cell, such as {{cell:arm=trunk}}/checkpoint-200")
    step, trunk, training = int(found[2]), commands[found[1]].training, commands[cell.id].training
    every, limit = trunk["save_steps"], trunk["save_total_limit"]
    if str(getattr(trunk["save_strategy"], "value", trunk["save_strategy"])) == "steps" and every >= 1 and (
            step > trunk["max_steps"] > 0 or (step % every and step != trunk["max_steps"])):  # fmt: skip
        raise UserError(f"--branch_from {given}: {found[1]} saves every {every:g} steps up to step {trunk['max_steps']}, so never {step}; give "
                        "another checkpoint, or change save_steps")  # fmt: skip
    if limit and step + (limit - 1) * every < trunk["max_steps"]:
        raise UserError(f"--branch_from {given}: {found[1]} keeps its last {limit} checkpoints only (save_total_limit); leave that out")
    require_steps_left(training, step)
    if training["seed"] != trunk["seed"]:
        raise UserError(f"--branch_from {given}: the trunk has seed {trunk['seed']}, this cell {training['seed']}; a branch goes on with the "
                        "trunk's, so give both one seed, or let both vary on the axis seed")  # fmt: skip


def _stand_in(value: Any, base: Path) -> None:
    """For files of cells that are yet to be trained: something at the place, of the form that checks look for."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _stand_in(item, base)
    elif isinstance(value, str) and value.startswith(f"{base}/"):
        path = Path(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text(STAND_IN, encoding="utf-8")
        else:
            path.mkdir(exist_ok=True)
