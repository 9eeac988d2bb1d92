"""The dose-response of a tiny LLaMA on built-in prose: ZeRO-3, 2 processes, no network, no GPU needed.

    python benchmarks/demo.py [--output runs/demo] [--levels 0 .25 .5 .75 .9] [--steps 310] [--num_gpus 2]

Every level is trained by the real `deepspeed` launcher from the same seed, on the same data, with the same loss path and
the same high-frequency set, so that the cells differ in their level only. Ends with a table, OUTPUT/demo.json and
OUTPUT/demo.png. Started again, it goes on where it was broken off: a cell with a DONE file is not trained again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import common
import figures
import training

from ds_stability.data.frequency import FILE_NAME
from ds_stability.run_dir import RunDir, write_json_atomic

BLOCK_SIZE, PER_DEVICE, WARMUP, RAMP = 128, 4, 100, 5
TITLE = "A tiny LLaMA trained from scratch on prose, one seed a level"
PROBE = {"num_prompts": 64, "max_new_tokens": 64}


def main() -> int:
    arguments = parse_arguments()
    output = common.output_folder(arguments.output)
    ds_config = output / "ds_config.json"
    write_json_atomic(ds_config, probing_config(arguments.steps, arguments.warmup_steps))
    cells = [demo_cell(level, arguments, ds_config, output) for level in arguments.levels]
    runs, trained = training.train_cells(cells, output, arguments.num_gpus), time.monotonic()
    rows = [score(runs[cell.name], level, arguments.warmup_steps) for cell, level in zip(cells, arguments.levels, strict=True)]
    settings = {"steps": arguments.steps, "warmup_steps": arguments.warmup_steps, "num_gpus": arguments.num_gpus,
                "tokens_per_step": BLOCK_SIZE * PER_DEVICE * arguments.num_gpus, "learning_rate": arguments.learning_rate,
                "model": "llama_tiny", "data": "builtin:prose", "probe": PROBE}  # fmt: skip
    result = common.describe_measurement("demo", {"seed": arguments.seed}, settings)
    result |= {"seconds": training.training_seconds(cells, output) + round(time.monotonic() - trained, 1), "rows": rows}
    write_json_atomic(output / "demo.json", result)
    figures.dose_response(rows, output / "demo.png", TITLE)
    print(f"\n{common.text_table(*outcome_table(rows))}\n\n{common.text_table(*stability_table(rows))}\n")
    print(f"{output / 'demo.json'}\n{output / 'demo.png'}\n{training.clock(result['seconds'])} min in all")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/demo", help="folder of the runs and of the results")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--steps", type=int, default=310, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup_steps", type=int, default=WARMUP, help="steps at gain 0 before the level acts")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_gpus", type=int, default=None, help="processes; default 2, or 1 on a machine with one GPU")
    arguments = parser.parse_args()
    wrong = [level for level in arguments.levels if not 0 <= level <= 1]
    if wrong:
        parser.error(f"--levels {wrong[0]}: allowed are numbers from 0 to 1")
    if arguments.steps <= arguments.warmup_steps + RAMP:
        parser.error(f"--steps {arguments.steps}: allowed is more than {arguments.warmup_steps + RAMP}, warm-up and ramp")
    arguments.levels = sorted(set(arguments.levels))
    arguments.num_gpus = arguments.num_gpus or training.default_processes()
    return arguments


def probing_config(steps: int, warmup_steps: int) -> dict[str, Any]:
    """ds_configs/zero3_cpu.json with a probe after the last step."""
    config = json.loads((common.REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text(encoding="utf-8"))
    config["stability"] = {"controller": {"warmup_steps": warmup_steps}, "probe": {"interval": steps, **PROBE}}
    return config


def demo_cell(level: float, arguments: argparse.Namespace, ds_config: Path, output: Path) -> training.Cell:
    first = f"level-{arguments.levels[0]:g}"
    frequent = None if level == arguments.levels[0] else str(output / first / FILE_NAME)
    flags = {
        "config_name": str(common.REPOSITORY / "ds_configs" / "models" / "llama_tiny.json"),
        "dataset_name": "builtin:prose", "deepspeed": str(ds_config), "block_size": BLOCK_SIZE,
        "per_device_train_batch_size": PER_DEVICE, "max_steps": arguments.steps, "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": min(10, arguments.steps // 4), "seed": arguments.seed,
        "stability_level": f"{level:g}", "stability_loss_path": "linear", "high_frequency_file": frequent,
        "save_strategy": "no", "disable_tqdm": "true", "logging_steps": 50,
    }  # fmt: skip
    return training.Cell(f"level-{level:g}", flags, arguments.steps)


def score(run: RunDir, level: float, warmup_steps: int) -> dict[str, Any]:
    """One row of the results, from the run's own metrics: all figures at the last step."""
    rows = common.read_run(run.path)
    last = rows[-1]
    outcome = {"cross_entropy": last["eval/cross_entropy"], "entropy": last["eval/entropy"],
               "top1_mass": last["eval/top1_mass"], "held_out_tokens": last["eval/tokens"]}  # fmt: skip
    for decoding in ("sample", "greedy"):
        for name in ("entropy", "distinct_2", "seq_rep_4", "high_frequency_share"):
            outcome[f"{decoding}/{name}"] = last[f"probe/{decoding}/{name}"]
    return {
        "level": level, "run": run.path.name, "steps": last["step"], **common.settled(rows, level, warmup_steps), **outcome,
        **common.stability_measures(rows), "step_seconds": common.median_step_seconds(rows),
        "revision": (run.read_manifest()["git"] or {}).get("revision"),
    }  # fmt: skip


def outcome_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of what the level did to the model."""
    header = ["level", "settled ratio", "held-out CE", "entropy", "top-1 mass", "distinct-2", "seq-rep-4", "high-freq. share"]
    body = [
        [f"{row['level']:g}", common.with_error(row["ratio"], row["ratio_error"]), common.number(row["cross_entropy"], 2),
         common.number(row["entropy"], 2), *(common.number(row[key]) for key in
         ("top1_mass", "sample/distinct_2", "sample/seq_rep_4", "sample/high_frequency_share"))]
        for row in rows
    ]  # fmt: skip
    return header, body


def stability_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of how closely the level was held (by 30-step means), and of how stable the training was."""
    header = ["level", "largest miss of the ratio", "sd of loss", "sd of ln grad norm", "loss spikes", "grad spikes",
              "update ratio", "train CE", "weighted loss"]  # fmt: skip
    digits = {"worst_moving_mean": 3, "loss_deviation": 3, "log_grad_norm_deviation": 3, "loss_spikes": 0,
              "grad_norm_spikes": 0, "update_ratio": 5, "train_cross_entropy": 2, "train_loss": 2}  # fmt: skip
    body = [[f"{row['level']:g}", *(common.number(row[key], n) for key, n in digits.items())] for row in rows]
    return header, body


if __name__ == "__main__":
    sys.exit(training.run_main(main))
