"""What a sweep of N cells costs beside N single runs of the same training.

    python benchmarks/sweep_cost.py [--output runs/sweep_cost] [--cells 3] [--rounds 2] [--steps 20]

In turns: one training started by hand (`deepspeed launchers/train.py`) with a cell's own flags, and `ds-stability sweep` of N such
cells. The cells are tiny, so that the figures are those of starting processes; the overhead in seconds a cell is what longer cells
pay as well. Time between cells: the sweep's wall time less the time of its attempts. Writes OUTPUT/sweep_cost.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

from ds_stability.run_dir import write_json_atomic

FLAGS = {
    "config_name": "ds_configs/models/gpt2_tiny.json", "dataset_name": "builtin:synthetic", "synthetic_tokens": 5000,
    "deepspeed": "ds_configs/zero3_cpu.json", "block_size": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
    "save_strategy": "no",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/sweep_cost")
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if min(arguments.cells, arguments.rounds, arguments.steps) < 1:
        parser.error("--cells, --rounds and --steps are numbers from 1")
    started, output = time.monotonic(), Path(arguments.output).resolve()
    rounds = [one_round(output / f"round-{number}", arguments.cells, arguments.steps) for number in range(arguments.rounds)]
    result = common.describe_measurement("sweep_cost", {"seed": 0}, {name: vars(arguments)[name] for name in ("cells", "rounds", "steps")})
    result |= {"seconds": round(time.monotonic() - started, 1), "rounds": rounds, **summarize(rounds, arguments.cells)}
    write_json_atomic(output / "sweep_cost.json", result)
    print(f"{common.text_table(*sweep_table(result))}\n\n{output / 'sweep_cost.json'}")
    return 0


def one_round(folder: Path, cells: int, steps: int) -> dict[str, Any]:
    """Seconds of one sweep, of its attempts, and of a single run with the files that the sweep made."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = {"name": "cost", "num_gpus": 1, "flags": {**FLAGS, "max_steps": steps}, "grid": {"seed": list(range(cells))}}
    (folder / "cost.yaml").write_text(json.dumps(plan), encoding="utf-8")  # JSON is YAML
    runs = folder / "runs" / "cost"
    sweep = seconds_of([sys.executable, "-m", "ds_stability.cli", "sweep", str(folder / "cost.yaml"), "--output_dir", str(runs)], folder / "sweep.log")
    rows = [json.loads(line) for line in (runs / "attempts.jsonl").read_text(encoding="utf-8").splitlines()]
    attempts = [row["seconds"] for row in rows if row["event"] == "end" and row["outcome"] == "done"]
    if len(attempts) != cells:
        raise RuntimeError(f"{len(attempts)} of {cells} cells were trained; see {folder / 'sweep.log'}")
    flags = {**FLAGS, "max_steps": steps, "seed": 0, "disable_tqdm": True, "output_dir": folder / "single"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    single = seconds_of([sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "launchers/train.py", *words], folder / "single.log")
    return {"sweep": sweep, "attempts": attempts, "single": single}


def seconds_of(command: list[str], log: Path) -> float:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with open(log, "wb") as stream:
        subprocess.run(command, check=True, cwd=common.REPOSITORY, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    return time.monotonic() - started


def summarize(rounds: list[dict[str, Any]], cells: int) -> dict[str, Any]:
    """Medians over rounds: seconds of a single run, of a sweep, of a sweep outside of its attempts by cell, and the overhead, the
    sweep's time over that of as many single runs, less 1."""
    return {
        "single_seconds": statistics.median(one["single"] for one in rounds),
        "sweep_seconds": statistics.median(one["sweep"] for one in rounds),
        "outside_seconds_a_cell": statistics.median((one["sweep"] - sum(one["attempts"])) / cells for one in rounds),
        "overhead": statistics.median(one["sweep"] / (cells * one["single"]) - 1 for one in rounds),
    }


def sweep_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows)"""
    cells = result["settings"]["cells"]
    return ["", "seconds"], [
        ["a single run", f"{result['single_seconds']:.1f}"],
        [f"{cells} single runs", f"{cells * result['single_seconds']:.1f}"],
        [f"a sweep of {cells} cells", f"{result['sweep_seconds']:.1f} ({result['overhead']:+.1%})"],
        ["of it outside of the trainings, a cell", f"{result['outside_seconds_a_cell']:.2f}"],
    ]


if __name__ == "__main__":
    sys.exit(main())
