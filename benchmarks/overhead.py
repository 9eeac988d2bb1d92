"""What ds_stability costs: step time and peak memory of level 0 and level .5 as ratios to plain DeepSpeed.

    python benchmarks/overhead.py [--output runs/overhead] [--pretrained models/SmolLM2-135M-Instruct] [--num_gpus 2]

Time: the three engines live in one process per rank and take turns, a few steps each, so that a drift of the machine meets
all alike; each round gives one ratio, of medians. Memory: each engine alone, in processes of its own, in turns. A tiny
LLaMA with 2,048 words of vocabulary; with --pretrained a real model too, whose engines do not fit into one CPU machine
together: there the processes take turns for the time as well. Writes OUTPUT/overhead.json.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import training

from ds_stability.run_dir import write_json_atomic

WORKER = Path(__file__).resolve().parent / "overhead_worker.py"
BASELINE, ARMS = "plain", ("plain", "level 0", "level 0.5")
BOOTSTRAP = 2000


def main() -> int:
    arguments = parse_arguments()
    output, started = Path(arguments.output).resolve(), time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    training.end_children_on_sigterm()
    groups = [measure(spec, arguments, output) for spec in model_specs(arguments)]
    settings = {key: getattr(arguments, key) for key in ("rounds", "steps", "memory_rounds", "process_rounds", "num_gpus")}
    result = common.describe_measurement("overhead", {"seed": 0}, settings)
    result |= {"seconds": round(time.monotonic() - started, 1), "groups": groups}
    write_json_atomic(output / "overhead.json", result)
    for group in groups:
        print(f"\n{group_title(group)}\n{common.text_table(*overhead_table(group))}")
    print(f"\n{output / 'overhead.json'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/overhead")
    parser.add_argument("--pretrained", help="folder of a pretrained model to measure as well, in bf16")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each engine")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn (the pretrained model: half of them)")
    parser.add_argument("--memory_rounds", type=int, default=2, help="processes per engine for the memory")
    parser.add_argument("--process_rounds", type=int, default=4, help="processes per engine of the pretrained model on CPUs")
    parser.add_argument("--num_gpus", type=int, default=None, help="processes; default 2, or 1 on a machine with one GPU")
    arguments = parser.parse_args()
    for name in ("rounds", "steps", "memory_rounds", "process_rounds"):
        if vars(arguments)[name] < 1:
            parser.error(f"--{name} {vars(arguments)[name]}: allowed are numbers from 1")
    if arguments.pretrained and not Path(arguments.pretrained).is_dir():
        parser.error(f"--pretrained {arguments.pretrained}: no such folder")
    arguments.num_gpus = arguments.num_gpus or training.default_processes()
    return arguments


def model_specs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What overhead_worker.py needs to know of each model; `together`: its three engines fit into one machine's memory."""
    configs = common.REPOSITORY / "ds_configs"
    shared = {"ds_config": str(configs / "loop_zero3.json"), "config_overrides": {}}
    specs = [shared | {"name": "tiny LLaMA, vocabulary 2,048", "model": str(configs / "models" / "llama_tiny.json"),
                       "config_overrides": {"vocab_size": 2048}, "bf16": training.on_gpu(), "batch_size": 4,
                       "block_size": 128, "steps": arguments.steps, "warmup_steps": 5, "together": True}]  # fmt: skip
    if arguments.pretrained:
        path = Path(arguments.pretrained).resolve()
        specs.append(shared | {"name": path.name, "model": str(path), "bf16": True, "batch_size": 2, "block_size": 256,
                               "steps": max(3, arguments.steps // 2), "warmup_steps": 2,
                               "together": training.on_gpu()})  # fmt: skip
    return specs


def measure(spec: dict[str, Any], arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Every arm alone in processes of its own, in turns: its memory, and its times if the engines do not fit together."""
    memory: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    turns = arguments.memory_rounds if spec["together"] else arguments.process_rounds
    for number in range(turns):
        shift = number % len(ARMS)
        for arm in ARMS[shift:] + ARMS[:shift]:
            print(f"{spec['name']}: {arm} alone, {number + 1} of {turns}", flush=True)
            result = launch(spec | {"arms": [arm], "rounds": 1}, arguments.num_gpus, output)
            memory[arm].append(result["memory"])
            seconds[arm] += result["seconds"][arm]
    if spec["together"]:
        print(f"{spec['name']}: all in turns, {arguments.rounds} rounds", flush=True)
        result = launch(spec | {"arms": ARMS, "rounds": arguments.rounds}, arguments.num_gpus, output)
        seconds = result["seconds"]
    shown = {key: spec[key] for key in ("bf16", "batch_size", "block_size", "steps", "together", "config_overrides")}
    return {"name": spec["name"], **shown, "world_size": result["world_size"], "arms": summarize(seconds, memory)}


def launch(spec: dict[str, Any], num_gpus: int, output: Path) -> dict[str, Any]:
    """Run the worker on `num_gpus` processes and read what it wrote.

    Raises:
        FailedRun: it wrote nothing; the message ends with its log.
    """
    result, spec_file, log = output / "worker.json", output / "spec.json", output / "worker.log"
    result.unlink(missing_ok=True)
    write_json_atomic(spec_file, spec | {"output": str(result)})
    code = training.run_script(WORKER, [str(spec_file)], num_gpus, log)
    if not result.exists():
        raise training.FailedRun(f"the worker ended without a result (exit code {code}); {training.log_tail(log)}")
    return json.loads(result.read_text(encoding="utf-8"))


def summarize(seconds: dict[str, list[list[float]]], memory: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Per arm: median step time (s), its ratio to plain in each round, their median with a 95 % bootstrap interval over
    rounds, median peak memory (GiB) and its ratio."""
    arms = {}
    for arm, rounds in seconds.items():
        ratios = [statistics.median(mine) / statistics.median(plain)
                  for mine, plain in zip(rounds, seconds[BASELINE], strict=True)]  # fmt: skip
        peaks = {key: statistics.median(one[key] for one in memory[arm]) for key in memory[arm][0]}
        plain = {key: statistics.median(one[key] for one in memory[BASELINE]) for key in peaks}
        arms[arm] = {
            "median_seconds": statistics.median(second for one in rounds for second in one),
            "time_ratios": ratios,
            "time_ratio": statistics.median(ratios),
            "time_ratio_interval": bootstrap_median(ratios),
            "memory": peaks,
            "memory_ratio": {key: peaks[key] / plain[key] for key in peaks if plain[key] > 0},
        }
    return arms


def bootstrap_median(values: Sequence[float]) -> list[float]:
    """95 % percentile bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(np.asarray(values), size=(BOOTSTRAP, len(values)))
    return [float(bound) for bound in np.percentile(np.median(draws, axis=1), [2.5, 97.5])]


def group_title(group: dict[str, Any]) -> str:
    tokens = group["batch_size"] * group["block_size"]
    turns = "in the same processes" if group["together"] else "each in processes of its own"
    return (f"{group['name']}, {'bf16' if group['bf16'] else 'fp32'}, {group['world_size']} ranks of {tokens} tokens, ZeRO-3, "
            f"engines in turns, {turns}")  # fmt: skip


def overhead_table(group: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), one row per arm."""
    on_gpu = any(arm["memory"]["accelerator_gib"] > 0 for arm in group["arms"].values())
    key = "accelerator_gib" if on_gpu else "resident_gib"
    kind = "peak GPU memory" if on_gpu else "peak RSS"
    header = ["engine", "median step (ms)", "time ratio [95 %]", f"{kind} (GiB)", "ratio", "growth over imports (GiB)", "ratio"]
    body = []
    for name, arm in group["arms"].items():
        low, high = arm["time_ratio_interval"]
        body.append([name, common.number(1000 * arm["median_seconds"], 1), f"{arm['time_ratio']:.3f} [{low:.3f}, {high:.3f}]",
                     common.number(arm["memory"][key], 2), common.number(arm["memory_ratio"].get(key)),
                     common.number(arm["memory"]["resident_growth_gib"], 2),
                     common.number(arm["memory_ratio"].get("resident_growth_gib"))])  # fmt: skip
    return header, body


if __name__ == "__main__":
    sys.exit(training.run_main(main))
