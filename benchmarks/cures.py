"""Which cure keeps a fine-tuned model diverse, and what does it cost? The table and the figure of docs/governor.md.

    python benchmarks/cures.py [--output runs/cures] [--pretrain_file a.txt ...] [--train_file b.txt ...] [--seeds 0 1 2]

Trains the sweep launchers/sweeps/cures.yaml in two goes: every arm at every learning rate with the first seed, then every arm
with the other seeds at its best learning rate, the one with the lowest cross-entropy on held-out text at the end of training.
All models are then evaluated by the harness. Without text files the built-in prose serves for both. Writes OUTPUT/cures.json;
started again, it goes on where it was broken off.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import headline
import training
import yaml

from ds_stability.errors import UserError
from ds_stability.eval.aggregate import group_rows, groups_of
from ds_stability.eval.report_cells import Cell, Key, read_evaluation
from ds_stability.launchers.sweep_plan import Plan, load_plan
from ds_stability.run_dir import RunDir, write_json_atomic
from ds_stability.safe_read import parse_yaml

SWEEP = common.REPOSITORY / "launchers" / "sweeps" / "cures.yaml"
BASE, UNTOUCHED, PLAIN = "base", "untouched", "plain"
RATE = "learning_rate"
COLUMNS = {
    "bits per byte": Key("bits_per_byte", None, "held_out"),
    "entropy": Key("predictive_entropy", None, "held_out"),
    "calibration gap": Key("calibration_gap", None, "held_out"),
    "generation entropy": Key("generation_entropy", "sample"),
    "distinct-2": Key("distinct_2", "sample"),
    "self-BLEU-4": Key("self_bleu_4", "sample"),
    "high-freq. share": Key("high_frequency_share", "sample"),
    "seq-rep-4": Key("seq_rep_4", "sample"),
    "minimal pairs": Key("minimal_pairs"),
    "pass@1": Key("exact_match_pass_1", "sample"),
    "pass@8": Key("exact_match_pass_8", "sample"),
    "facts": Key("ds_facts_acc"),
    "cloze": Key("ds_cloze_acc"),
    "cross-entropy": Key("cross_entropy", None, "held_out"),
    "train cross-entropy": Key("cross_entropy", None, "train"),
}

DIVERSITY = ("bits per byte", "entropy", "calibration gap", "generation entropy", "distinct-2", "self-BLEU-4", "high-freq. share", "seq-rep-4")
TASKS = ("train cross-entropy", "minimal pairs", "pass@1", "pass@8", "facts", "cloze")
QUALITY = "bits per byte"  # lower is better
AXES = {"entropy": 1, "generation entropy": 1, "distinct-2": 1, "self-BLEU-4": -1}  # measures of diversity, and which way is more
GOVERNORS = ("governor_initial", "governor_data")
TITLE = "Fine-tuning on few blocks: what each cure keeps, and what it costs"


def main() -> int:
    arguments = parse_arguments()
    output = common.output_folder(arguments.output)
    document = sweep_document(arguments)
    folder = output / "runs" / document["name"]
    first, others = arguments.seeds[0], arguments.seeds[1:]
    search = train({**document, "grid": {**document["grid"], "seed": [first]}}, output / "search.yaml", folder, ["--no_evaluate"])
    chosen = choose(search, folder, first)
    rest = [{"arm": arm, RATE: rate, "seed": seed} for arm, best in chosen.items() for rate in document["grid"][RATE] if rate != best
            for seed in others]  # fmt: skip
    train({**document, "grid": {**document["grid"], "seed": arguments.seeds}, "exclude": rest}, output / "cures.yaml", folder, [])
    result = measurement(output / "evals" / document["name"], folder, chosen, arguments)
    write_json_atomic(output / "cures.json", result)
    print(f"\n{common.text_table(*cures_table(result))}\n\n{output / 'cures.json'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/cures", help="folder of the runs, their evaluations and the results")
    parser.add_argument("--pretrain_file", nargs="+", help="texts that the small model is pretrained on; hard-wrapped lines are joined")
    parser.add_argument("--train_file", nargs="+", help="texts that it is fine-tuned on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one searches learning rates")
    parser.add_argument("--arms", nargs="+", help="these alone, with base, untouched and plain")
    arguments = parser.parse_args()
    if (arguments.pretrain_file is None) != (arguments.train_file is None):
        parser.error("--pretrain_file and --train_file: give both, or none for the built-in prose")
    if len(set(arguments.seeds)) != len(arguments.seeds):
        parser.error(f"--seeds {arguments.seeds}: each may be there once")
    return arguments


def sweep_document(arguments: argparse.Namespace) -> dict[str, Any]:
    """The shipped sweep with the texts and arms that were asked for."""
    document = parse_yaml(SWEEP.read_text(encoding="utf-8"))
    arms = document["arms"]
    if arguments.arms is not None:
        unknown = sorted(set(arguments.arms) - arms.keys())
        if unknown:
            raise UserError(f"--arms {unknown[0]}: allowed are {', '.join(arms)}")
        document["arms"] = arms = {name: arm for name, arm in arms.items() if name in (BASE, UNTOUCHED, PLAIN, *arguments.arms)}
    if arguments.train_file is not None:
        text = {"dataset_name": None, "unwrap": True}
        document["flags"] |= {**text, "train_file": [str(Path(name).resolve()) for name in arguments.train_file]}
        arms[BASE]["flags"] |= {**text, "train_file": [str(Path(name).resolve()) for name in arguments.pretrain_file]}
    return document


def train(document: Mapping[str, Any], file: Path, folder: Path, options: Sequence[str]) -> Plan:
    """Write a sweep's file and run it; its plan.

    Raises:
        UserError: the sweep did not end well; its own message says why.
    """
    file.write_text(yaml.safe_dump(dict(document), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "ds_stability.cli", "sweep", str(file), "--output_dir", str(folder), *options]
    if subprocess.run(command, cwd=common.REPOSITORY).returncode != 0:
        raise UserError(f"the sweep {file} failed (see above); the same command goes on with what is complete")
    return load_plan(file)


def choose(plan: Plan, folder: Path, seed: int) -> dict[str, float]:
    """Arm -> the learning rate with the lowest cross-entropy on held-out text at the end."""
    found: dict[str, dict[float, float]] = {}
    for cell in plan.cells:
        if cell.arm not in (BASE, UNTOUCHED) and cell.axes["seed"] == seed:
            last = common.read_run(RunDir(folder / cell.id).path)[-1]
            if last["eval/cross_entropy"] is not None:  # null: not finite
                found.setdefault(cell.arm, {})[cell.axes[RATE]] = last["eval/cross_entropy"]
    return {arm: min(losses, key=losses.get) for arm, losses in found.items()}


def measurement(evaluation: Path, folder: Path, chosen: Mapping[str, float], arguments: argparse.Namespace) -> dict[str, Any]:
    """What docs/results/cures.json holds: each arm at its learning rate, and each cell of the search."""
    cells = [cell for cell in read_evaluation(evaluation).cells if plain_arm(cell) != BASE]
    for cell in cells:
        cell.arm = plain_arm(cell)
    best = [cell for cell in cells if cell.arm == UNTOUCHED or rate_of(cell) == chosen.get(cell.arm)]
    suites = sorted({cell.meta["suite"]["name"] for cell in cells})
    flags = parse_yaml(SWEEP.read_text(encoding="utf-8"))["flags"]
    names = {"pretrained_on": arguments.pretrain_file, "fine_tuned_on": arguments.train_file}
    settings = {"cells": len(cells), "suite": ", ".join(suites), "steps": flags["max_steps"], "blocks": flags["max_train_samples"],
                "block_size": flags["block_size"], **{key: [Path(name).name for name in files] if files else "builtin:prose"
                                                     for key, files in names.items()}}  # fmt: skip
    result = common.describe_measurement("cures", {"seeds": ", ".join(map(str, arguments.seeds))}, settings)
    times = headline.training_times(folder)
    result |= {"seconds": times["seconds"] + sum(sum(cell.meta["seconds"].values()) for cell in cells), "times": times}
    result |= {"rows": rows_of(best, chosen), "search": [search_row(cell) for cell in cells if cell.arm != UNTOUCHED],
               "human": human_text(cells), "chance": chance(cells)}  # fmt: skip
    return result


def plain_arm(cell: Cell) -> str:
    return str(cell.meta["run"]["arm"])


def rate_of(cell: Cell) -> float:
    return float(cell.meta["run"]["axes"][RATE])


def rows_of(cells: Sequence[Cell], chosen: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row an arm: COLUMNS over its seeds, with intervals, and differences to plain training, paired by seed and unit."""
    groups, rows = groups_of(cells), {}
    for label, key in COLUMNS.items():
        for row in group_rows(groups, key):
            line = rows.setdefault(row["arm"], {"arm": row["arm"], RATE: chosen.get(row["arm"]), "figures": {}})
            line["figures"][label] = {name: row[name] for name in headline.FIGURES}
    return [rows[arm] for arm in dict.fromkeys((UNTOUCHED, PLAIN, *chosen)) if arm in rows]


def search_row(cell: Cell) -> dict[str, Any]:
    return {"arm": cell.arm, RATE: rate_of(cell), "seed": cell.seed, **{label: cell.value(key) for label, key in COLUMNS.items()}}


def human_text(cells: Sequence[Cell]) -> dict[str, float | None]:
    """The same measures of the human continuations of the prompts."""
    first = cells[0]
    return {label: first.value(Key(key.metric, "reference")) for label, key in COLUMNS.items() if key.decoding}


def chance(cells: Sequence[Cell]) -> dict[str, float]:
    """Scores that guessing gets."""
    first = cells[0]
    found = {label: (first.rows[key].get("settings") or {}).get("chance") for label, key in COLUMNS.items() if key in first.rows}
    return {label: value for label, value in found.items() if value is not None}


def cures_table(result: Mapping[str, Any], columns: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """(header, rows): every arm at its learning rate; then human text and chance."""
    shown = [name for name in columns or COLUMNS if any(has_value(row, name) for row in result["rows"])]
    rows = []
    for row in result["rows"]:
        rate = "-" if row[RATE] is None else f"{row[RATE]:g}"
        rows.append([row["arm"].replace("_", " "), rate, *(headline.interval(row["figures"].get(name)) for name in shown)])
        if QUALITY in shown:
            rows[-1].append(headline.difference(row["figures"].get(QUALITY)))
    for name, figures in (("human text", result["human"]), ("chance", result["chance"])):
        if any(figures.get(column) is not None for column in shown):
            rows.append([name, "-", *(common.number(figures.get(column)) for column in shown), *["-"] * (QUALITY in shown)])
    return ["arm", "learning rate", *shown, *["bits per byte beyond plain"] * (QUALITY in shown)], rows


def sentences(result: Mapping[str, Any]) -> str:
    """Which arms nothing beats on both, for each measure of diversity, and which arms beat a governor; by the means over seeds."""
    lines = []
    for name, sign in AXES.items():
        points = {row["arm"]: (row["figures"][QUALITY]["value"], sign * row["figures"][name]["value"]) for row in result["rows"]
                  if row["arm"] != UNTOUCHED and has_value(row, QUALITY) and has_value(row, name)}  # fmt: skip
        front = [arm for arm in points if not beaten_by(arm, points)]
        line = f"**{name}** against bits per byte: not beaten on both by any other arm: {_names(front)}."
        for arm in GOVERNORS:
            if arm in points:
                better = beaten_by(arm, points)
                line += f" {arm.replace('_', ' ')} is beaten on both by {_names(better) if better else 'none'}."
        lines.append(line)
    return "By the means over seeds:\n\n" + "\n".join(f"- {line}" for line in lines)


def beaten_by(arm: str, points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Arms with fewer bits per byte and more diversity."""
    quality, diversity = points[arm]
    return [other for other, (bits, spread) in points.items() if bits < quality and spread > diversity]


def _names(arms: Sequence[str]) -> str:
    return ", ".join(arm.replace("_", " ") for arm in arms)


def has_value(row: Mapping[str, Any], name: str) -> bool:
    return (row["figures"].get(name) or {}).get("value") is not None


if __name__ == "__main__":
    sys.exit(training.run_main(main))
