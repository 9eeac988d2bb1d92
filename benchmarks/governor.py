"""Does the governor hold the entropy of a model on held-out text, and what does that cost in cross-entropy?

    python benchmarks/governor.py [--output runs/governor] [--steps 600] [--seeds 0] [--num_gpus 2]

A tiny LLaMA on the built-in prose, from scratch: plain training first, whose entropy on held-out text is the natural one;
then the governor at that entropy, 10 % above it, and at "data" (entropy = cross-entropy), with both actuators. Seed, data,
loss path and learning rate are the same. Ends with a table and OUTPUT/governor.json. Started again, it goes on where it
was broken off.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import common
import training

from ds_stability.data.frequency import FILE_NAME
from ds_stability.run_dir import RunDir, write_json_atomic

BLOCK_SIZE, PER_DEVICE, WARMUP = 128, 4, 250
ACTUATORS = ("token_weight", "entropy_bonus")
RATIOS = (1.0, 1.1)  # set points, as multiples of the natural entropy
#: What is asked for: largest miss of the set point, and largest cost in cross-entropy by set point, as shares.
MISS, COST = 0.01, {1.0: 0.005, 1.1: 0.02}
#: The prototype (plain torch, another model and text): target over natural entropy, entropy over target, CE over plain CE.
PROTOTYPE = ((3.5 / 4.10, 3.48 / 3.5, 4.13 / 3.98), (4.1 / 4.10, 4.08 / 4.1, 3.99 / 3.98), (4.5 / 4.10, 4.47 / 4.5, 3.99 / 3.98))


def main() -> int:
    arguments = parse_arguments()
    output = common.output_folder(arguments.output)
    rows, cells, scored = [], [], 0.0
    for seed in arguments.seeds:
        plain = make_cell("plain", seed, {"loss_path": "linear"}, arguments, output)
        run, began = training.train_cells([plain], output, arguments.num_gpus)[plain.name], time.monotonic()
        natural = score(run, seed, None, None, None)
        scored += time.monotonic() - began
        governed = governed_cells(seed, natural["entropy"], arguments, output)
        runs = training.train_cells([cell for cell, _, _ in governed], output, arguments.num_gpus)
        rows += [natural, *(score(runs[cell.name], seed, actuator, target, natural) for cell, actuator, target in governed)]
        cells += [plain, *(cell for cell, _, _ in governed)]
    settings = {"steps": arguments.steps, "warmup_steps": WARMUP, "num_gpus": arguments.num_gpus,
                "tokens_per_step": BLOCK_SIZE * PER_DEVICE * arguments.num_gpus, "learning_rate": arguments.learning_rate,
                "schedule": arguments.schedule,
                "model": "llama_tiny", "data": "builtin:prose"}  # fmt: skip
    result = common.describe_measurement("governor", {"seeds": ", ".join(map(str, arguments.seeds))}, settings)
    result |= {"seconds": round(training.training_seconds(cells, output) + scored, 1), "rows": rows}
    write_json_atomic(output / "governor.json", result)
    print(f"\n{common.text_table(*governor_table(rows))}\n\n{verdict(rows)}\n{output / 'governor.json'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/governor", help="folder of the runs and of the results")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps, warm-up included")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--schedule", default="linear", help="lr_scheduler_type; at a constant rate single measurements jitter by percents")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_gpus", type=int, default=None, help="processes; default 2, or 1 on a machine with one GPU")
    arguments = parser.parse_args()
    if arguments.steps <= WARMUP + 100:
        parser.error(f"--steps {arguments.steps}: allowed is more than {WARMUP + 100}, warm-up and the way to the set point")
    arguments.num_gpus = arguments.num_gpus or training.default_processes()
    return arguments


def governed_cells(seed: int, natural: float, arguments: argparse.Namespace, output: Path) -> list[tuple[training.Cell, str, Any]]:
    """(cell, actuator, target) of every governed run of a seed."""
    cells = []
    for actuator in ACTUATORS:
        for name, target in (*((f"{ratio:g}", round(ratio * natural, 4)) for ratio in RATIOS), ("data", "data")):
            control = {"mode": "governor", "actuator": actuator, "target": target, "warmup_steps": WARMUP}
            cells.append((make_cell(f"{actuator}-{name}", seed, {"controller": control}, arguments, output), actuator, target))
    return cells


def make_cell(name: str, seed: int, block: dict[str, Any], arguments: argparse.Namespace, output: Path) -> training.Cell:
    name = f"{name}-seed-{seed}"
    config = json.loads((common.REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text(encoding="utf-8"))
    write_json_atomic(output / f"{name}-ds.json", {**config, "stability": block})
    plain = output / f"plain-seed-{seed}"
    flags = {
        "config_name": str(common.REPOSITORY / "ds_configs" / "models" / "llama_tiny.json"),
        "dataset_name": "builtin:prose", "vocab_size": 1024, "deepspeed": str(output / f"{name}-ds.json"), "block_size": BLOCK_SIZE,
        "per_device_train_batch_size": PER_DEVICE, "max_steps": arguments.steps, "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": arguments.schedule, "warmup_steps": 10, "seed": seed,
        "high_frequency_file": None if name.startswith("plain") else str(plain / FILE_NAME),
        "save_strategy": "no", "disable_tqdm": "true", "logging_steps": 50,
    }  # fmt: skip
    return training.Cell(name, flags, arguments.steps)


def score(run: RunDir, seed: int, actuator: str | None, target: Any, plain: dict[str, Any] | None) -> dict[str, Any]:
    """One row: held-out figures at the last step, over all held-out text; `plain` is the row of plain training."""
    rows = common.read_run(run.path)
    last = rows[-1]
    entropy, cross_entropy = last["eval/entropy"], last["eval/cross_entropy"]
    wanted = cross_entropy if target == "data" else target
    tail = common.series_of(rows, "stability/governor_statistic", last["step"] - 100)
    return {
        "seed": seed, "actuator": actuator, "target": target, "run": run.path.name, "steps": last["step"],
        "entropy": entropy, "cross_entropy": cross_entropy, "top1_mass": last["eval/top1_mass"],
        "high_frequency_mass": last["eval/high_frequency_mass"],
        "over_natural": wanted / plain["entropy"] if plain and target != "data" else None,
        "miss": entropy / wanted - 1.0 if plain else None,
        "cost": cross_entropy / plain["cross_entropy"] - 1.0 if plain else None,
        "probe_miss": sum(tail) / len(tail) / wanted - 1.0 if tail and target != "data" else None,  # mean of the last 100 steps
        "output": last.get("stability/governor_output"),
        "saturated_steps": sum(common.series_of(rows, "stability/saturated", 1)) if plain else None,
        "step_seconds": common.median_step_seconds(rows),
        "seconds_mean": sum(common.series_of(rows, "step_seconds", WARMUP + 1)) / max(last["step"] - WARMUP, 1),
        "revision": (run.read_manifest()["git"] or {}).get("revision"),
    }  # fmt: skip


def governor_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): every run of ours, then the prototype."""
    header = ["run", "set point (x natural)", "entropy", "miss", "miss of the probe, last 100 steps", "CE", "CE over plain", "top-1 mass", "output"]
    body = []
    for row in rows:
        target = row["target"] if row["target"] in (None, "data") else f"{row['target']:.3f} ({row['over_natural']:.2f})"
        body.append([f"{row['actuator'] or 'plain'}, seed {row['seed']}", target or "-", common.number(row["entropy"]), percent(row["miss"]), percent(row.get("probe_miss")),
                     common.number(row["cross_entropy"]), percent(row["cost"]), common.number(row["top1_mass"]),
                     common.number(row["output"])])  # fmt: skip
    for over, reached, cost in PROTOTYPE:
        body.append(["prototype", f"({over:.2f})", "-", percent(reached - 1), "-", "-", percent(cost - 1), "-", "-"])
    return header, body


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f} %"


def verdict(rows: list[dict[str, Any]]) -> str:
    """Which runs met what is asked for."""
    lines = []
    for row in rows:
        bound = next((COST[ratio] for ratio in RATIOS if row["over_natural"] is not None and abs(row["over_natural"] - ratio) < 1e-3), None)
        if bound is None:
            continue
        met = abs(row["miss"]) <= MISS and row["cost"] <= bound
        lines.append(f"{row['actuator']} at {row['over_natural']:.2f} x natural, seed {row['seed']}: {'met' if met else 'not met'} (miss "
                     f"{percent(row['miss'])} of at most {MISS:.0%}, cost {percent(row['cost'])} of at most {100 * bound:g} %).")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(training.run_main(main))
