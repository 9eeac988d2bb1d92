"""A long run, watched from outside: does anything grow that should not?

    python benchmarks/soak.py [--steps 10000] [--output runs/soak]

launchers/train.py under the `deepspeed` launcher, every stabilizer on, statistics in every step, with probes, evaluations,
checkpoints and TensorBoard, over several passes through its data. Once a second the ranks' memory, processor time,
descriptors, threads and children and the files of the run are read from outside; nothing in the run knows of it. After the
warm-up each quantity's growth over 1,000 steps is a Theil-Sen slope over blocks of steps, with its 95 % interval. 10,000
steps, because the interval of the processor time's slope over 5,000 is as wide as its limit. Memory and
processor time pass if the *upper* end is below the limit; wall time, which other programs disturb, fails if its whole interval
is above. Memory is anonymous and shared memory; PSS and RSS, which hold pages of libraries, are recorded beside it.
Writes OUTPUT/soak.json and OUTPUT/soak.png; exit code 1 if a criterion fails.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import numpy as np
import soak_watch
import training

from ds_stability.recorder import tensorboard_interval
from ds_stability.run_dir import RunDir, write_json_atomic

BLOCKS = 16  # of steps after the warm-up, each one point of a slope
PROBE, EVALUATE, SAVE, KEPT = 125, 250, 250, 2  # steps between, as many of each in every block of a full run; checkpoints kept
MEMORY_LIMIT, TIME_LIMIT = 0.01, 0.02  # of the median, per 1,000 steps
METRICS_LIMIT, LOG_LIMIT = 2500.0, 500.0  # bytes a step
POINT_LIMIT = 3000.0  # bytes of TensorBoard events for each step that it gets
RUN = "run"  # the run's folder inside OUTPUT


def main() -> int:
    arguments = parse_arguments()
    output, started = common.output_folder(arguments.output), time.monotonic()
    result = output / "soak.json"
    training.end_children_on_sigterm()
    samples = watched_run(arguments, output)
    run = RunDir(output / RUN)
    rows, warmup = common.read_run(run.path), warmup_steps(arguments.steps)
    measured = {"samples": thinned(samples), "blocks": blocks(samples, rows, warmup, arguments.steps),
                "files": files_at_end(run, samples) | {"log_bytes": soak_watch.size_of(output / "train.log")}}  # fmt: skip
    settings = {"steps": arguments.steps, "warmup_steps": warmup, "ranks": arguments.num_gpus, "probe": PROBE, "evaluate": EVALUATE,
                "save": SAVE, "save_total_limit": KEPT}  # fmt: skip
    body = common.describe_measurement("soak", {"seed": 0}, settings)
    body |= {"seconds": round(time.monotonic() - started, 1), "steps_done": len(rows), **measured}
    body["criteria"] = criteria(body)
    write_json_atomic(result, body)
    draw(body, output / "soak.png")
    print(f"\n{common.text_table(*verdict_table(body))}\n\n{result}")
    return int(not all(row["met"] for row in body["criteria"]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/soak", help="a run that is in there already is replaced")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks at the ranks")
    parser.add_argument("--num_gpus", type=int, default=None, help="processes; default 2, or 1 on a machine with one GPU")
    arguments = parser.parse_args()
    if arguments.steps < 400:
        parser.error(f"--steps {arguments.steps}: allowed are numbers from 400 (a slope needs steps after the warm-up)")
    arguments.num_gpus = arguments.num_gpus or training.default_processes()
    return arguments


def warmup_steps(steps: int) -> int:
    """Steps that do not count: allocators, caches and the first probe, evaluation and checkpoints settle in them."""
    return max(200, steps // 5)


# ---- the run --------------------------------------------------------------------------------------------------------


def watched_run(arguments: argparse.Namespace, output: Path) -> list[dict[str, Any]]:
    """Train, and look at the ranks every `interval` seconds.

    Raises:
        FailedRun: the run ended without DONE.
    """
    run, log, config = RunDir(output / RUN), output / "train.log", output / "ds_config.json"
    training._remove_run(run)
    write_json_atomic(config, ds_config())
    samples: list[dict[str, Any]] = []
    look = soak_watch.Watcher(run, log, arguments.interval, samples.append)
    words = training.flag_words(flags(arguments.steps, config, run))
    code = training.run_script(common.TRAIN_SCRIPT, words, arguments.num_gpus, log, look)
    if not run.done.exists():
        raise training.FailedRun(f"{run.path}: training ended without DONE (exit code {code}); {training.log_tail(log)}")
    return samples


def ds_config() -> dict[str, Any]:
    """ds_configs/zero3_cpu.json with every stabilizer and every statistic on."""
    config = json.loads((common.REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text(encoding="utf-8"))
    families = {"feedback": {}, "clipping": {"level": 0.2}, "averaging": {"level": 0.3}, "regularization": {"level": 0.3}}
    return config | {"stability": {
        "level": 0.5, "stabilizers": families, "controller": {"warmup_steps": 50},
        "probe": {"interval": PROBE, "num_prompts": 4, "max_new_tokens": 8},
    }}  # fmt: skip


def flags(steps: int, config: Path, run: RunDir) -> dict[str, Any]:
    """A model so small that the framework's own work is most of a step: that is what is to be tested."""
    return {
        "config_name": common.REPOSITORY / "ds_configs" / "models" / "llama_tiny.json",
        "config_overrides": "hidden_size=64,intermediate_size=128,num_hidden_layers=2",
        "dataset_name": "builtin:prose", "vocab_size": 512, "block_size": 64, "max_eval_samples": 16,
        "deepspeed": config, "output_dir": run.path, "max_steps": steps, "learning_rate": 5e-4,
        "per_device_train_batch_size": 2, "logging_steps": 10, "disable_tqdm": "true", "seed": 0,
        "eval_strategy": "steps", "eval_steps": EVALUATE, "save_strategy": "steps", "save_steps": SAVE, "save_total_limit": KEPT,
    }  # fmt: skip


# ---- what is made of the samples ------------------------------------------------------------------------------------

RANK_KEYS = ("own", "pss", "rss", "fds", "threads", "children")


def blocks(samples: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], warmup: int, steps: int) -> dict[str, list]:
    """Medians of BLOCKS equal stretches of steps after the warm-up.

    `step`: middle of the block. `rank N KEY`: of the samples in it. `rank N cpu_per_step`: seconds of processor time from its
    first sample to its last. `step_seconds` and `fast_step_seconds`: median and lower decile of the steps in it; the decile
    is what the steps take while nothing else wants the machine.
    """
    edges = np.linspace(warmup, steps, BLOCKS + 1)
    by_block: list[list[Mapping[str, Any]]] = [[s for s in samples if low < s["step"] <= high] for low, high in pairwise(edges)]
    seconds = [common.series_of(rows, "step_seconds", int(low) + 1, int(high)) for low, high in pairwise(edges)]
    kept = [i for i in range(BLOCKS) if by_block[i] and seconds[i]]
    table: dict[str, list] = {"step": [float(edges[i] + edges[i + 1]) / 2 for i in kept]}
    for rank in sorted({rank for sample in samples for rank in sample["ranks"]}):
        for key in RANK_KEYS:
            values = [[s["ranks"][rank][key] for s in by_block[i] if rank in s["ranks"]] for i in kept]
            table[f"rank {rank} {key}"] = [float(np.median(v)) if v else None for v in values]
        table[f"rank {rank} cpu_per_step"] = [cpu_per_step([s for s in by_block[i] if rank in s["ranks"]], rank) for i in kept]
    table["step_seconds"] = [float(np.median(seconds[i])) for i in kept]
    table["fast_step_seconds"] = [float(np.quantile(seconds[i], 0.1)) for i in kept]
    return table


def cpu_per_step(samples: Sequence[Mapping[str, Any]], rank: str) -> float | None:
    """Seconds; None where the samples span no step."""
    steps = samples[-1]["step"] - samples[0]["step"] if samples else 0
    return (samples[-1]["ranks"][rank]["cpu"] - samples[0]["ranks"][rank]["cpu"]) / steps if steps else None


def growth(steps: Sequence[float], values: Sequence[float | None]) -> dict[str, float]:
    """Theil-Sen slope per 1,000 steps with its 95 % interval (Sen 1968), absolute and as a share of the median."""
    from scipy.stats import theilslopes

    points = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    if len(points) < 5:
        raise training.FailedRun(f"only {len(points)} blocks of steps have samples; give more --steps")
    x, y = np.array(points, dtype=float).T
    slope, _, low, high = map(float, theilslopes(y, x, alpha=0.95))
    level = float(np.median(y))
    shares = {"share": slope, "share_low": low, "share_high": high}
    scaled = {key: (1000 * value / level if level else 0.0) for key, value in shares.items()}
    return {"median": level, "slope": 1000 * slope, "low": 1000 * low, "high": 1000 * high, **scaled}


def files_at_end(run: RunDir, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes and counts of what the run left, the most checkpoints that were ever seen, and the newest one's files."""
    end: dict[str, Any] = soak_watch.file_sizes(run)
    newest = run.checkpoints()[-1][1]
    end["newest_checkpoint"] = {path.name: path.stat().st_size for path in sorted(newest.rglob("*")) if path.is_file()}
    end["most_checkpoints"] = max(sample["files"]["checkpoint_count"] for sample in samples)
    end["points_per_tag"] = soak_watch.tensorboard_points(run)
    return end


def thinned(samples: Sequence[Mapping[str, Any]], most: int = 240) -> list[Mapping[str, Any]]:
    """At most about `most` of the samples, evenly spread, for the figure."""
    return list(samples[:: max(1, -(-len(samples) // most))])


def criteria(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per criterion: name, measured, limit, met, and the numbers behind it."""
    table, files, settings = result["blocks"], result["files"], result["settings"]
    steps, rows = table["step"], [_complete(result)]
    for key in table:
        if key.endswith(" own"):
            rows.append(_share_row(f"memory of {key.removesuffix(' own')}", growth(steps, table[key]), MEMORY_LIMIT))
    for key in table:
        if key.endswith(" cpu_per_step"):
            rows.append(_share_row(f"processor time a step of {key.removesuffix(' cpu_per_step')}", growth(steps, table[key]), TIME_LIMIT))
    rows.append(_share_row("wall time a step, lower decile", growth(steps, table["fast_step_seconds"]), TIME_LIMIT, end="low"))
    for key in table:
        if key.endswith((" fds", " threads", " children")):
            rows.append(_no_more(key, table[key]))
    done = result["steps_done"]
    rows.append(_bytes_row("metrics.jsonl", files["metrics_bytes"], done, METRICS_LIMIT))
    due = sum(step % tensorboard_interval(step) == 0 for step in range(1, done + 1))
    rows.append(_count_row("points of a tag in tensorboard/", files["points_per_tag"], due))
    rows.append(_bytes_row("tensorboard/", files["tensorboard_bytes"], done, POINT_LIMIT * due / done))
    rows.append(_bytes_row("launcher's log", files["log_bytes"], done, LOG_LIMIT))
    probes = done // settings["probe"]
    rows.append(_count_row("files in samples/ (one a probe)", files["sample_count"], probes))
    # One more while the newest is written and the oldest not yet removed.
    most, kept = files["most_checkpoints"], settings["save_total_limit"]
    rows.append({"name": "checkpoints seen at once", "measured": f"{most}", "limit": f"{kept} and the new one", "met": most <= kept + 1})
    rows.append(_count_row("checkpoints at the end", files["checkpoint_count"], min(kept, -(-done // settings["save"]))))
    rows.append(_count_row("unfinished files at the end", files["unfinished"], 0))
    return rows


def _complete(result: Mapping[str, Any]) -> dict[str, Any]:
    asked = result["settings"]["steps"]
    return {"name": "steps done", "measured": f"{result['steps_done']:,}", "limit": f"{asked:,}", "met": result["steps_done"] == asked}


def _share_row(name: str, slope: Mapping[str, float], limit: float, end: str = "high") -> dict[str, Any]:
    measured = f"{slope['share']:+.2%} [{slope['share_low']:+.2%}, {slope['share_high']:+.2%}] per 1,000 steps"
    asked = f"{'upper' if end == 'high' else 'lower'} end < {limit:.0%}"
    return {"name": name, "measured": measured, "limit": asked, "met": slope[f"share_{end}"] < limit, **slope}


def _no_more(key: str, values: Sequence[float | None]) -> dict[str, Any]:
    """The last quarter of the blocks holds no more than the first quarter."""
    known = [value for value in values if value is not None]
    quarter = max(1, len(known) // 4)
    first, last = float(np.median(known[:quarter])), float(np.median(known[-quarter:]))
    name = f"{key.rsplit(' ', 1)[1]} of {key.rsplit(' ', 1)[0]}"
    return {"name": name, "measured": f"{first:g}, then {last:g}", "limit": "no more", "met": last <= first}


def _bytes_row(name: str, size: int, steps: int, limit: float) -> dict[str, Any]:
    per_step = size / steps
    measured = f"{per_step:,.0f} bytes a step, {size / 1e6:.2f} MB"
    return {"name": name, "measured": measured, "limit": f"{limit:,.0f} a step", "met": per_step < limit, "bytes": size, "per_step": per_step}


def _count_row(name: str, count: int, expected: int) -> dict[str, Any]:
    return {"name": name, "measured": str(count), "limit": str(expected), "met": count == expected}


def verdict_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), for the terminal and the docs."""
    rows = [[row["name"], row["measured"], row["limit"], "met" if row["met"] else "FAILED"] for row in result["criteria"]]
    return ["criterion", "measured", "allowed", ""], rows


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: memory, step time, descriptors and files over the steps."""
    import figures

    samples, table = result["samples"], result["blocks"]
    figure, (memory, seconds, handles, files) = figures._grid(4, columns=4, size=(3.1, 2.5))
    for rank, color in zip(sorted({rank for sample in samples for rank in sample["ranks"]}), (figures.BLUE, figures.ORANGE, figures.GREEN), strict=False):
        seen = [s for s in samples if rank in s["ranks"] and s["step"] > 0]
        steps = [s["step"] for s in seen]
        memory.plot(steps, [s["ranks"][rank]["own"] / 2**20 for s in seen], color=color, linewidth=1, label=f"rank {rank}")
        handles.plot(steps, [s["ranks"][rank]["fds"] for s in seen], color=color, linewidth=1.2, label=f"rank {rank}")
    seconds.plot(table["step"], [1000 * v for v in table["step_seconds"]], color=figures.GRAY, marker="o", markersize=3, linewidth=1,
                 label="median")  # fmt: skip
    seconds.plot(table["step"], [1000 * v for v in table["fast_step_seconds"]], color=figures.BLUE, marker="o", markersize=3,
                 linewidth=1, label="lower decile")  # fmt: skip
    for key, color in (("metrics_bytes", figures.BLUE), ("tensorboard_bytes", figures.ORANGE), ("log_bytes", figures.GREEN),
                       ("checkpoint_bytes", figures.GRAY)):  # fmt: skip
        files.plot([s["step"] for s in samples], [s["files"][key] / 1e6 for s in samples], color=color, linewidth=1.2,
                   label=soak_watch.FILE_NAMES[key])  # fmt: skip
    for axis, title in ((memory, "own memory (MiB)"), (seconds, "step time (ms)"), (handles, "open descriptors"), (files, "files (MB)")):
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.set_ylim(bottom=0, top=1.35 * axis.get_ylim()[1])
        axis.axvline(result["settings"]["warmup_steps"], color=figures.GRAY, linewidth=0.8, linestyle=":")
        axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
    figures._finish(figure, path, f"A run of {result['settings']['steps']:,} steps on {result['settings']['ranks']} ranks, watched from outside "
                                  "(dotted: end of the warm-up)")  # fmt: skip


if __name__ == "__main__":
    sys.exit(training.run_main(main))
