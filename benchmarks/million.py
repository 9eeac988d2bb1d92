"""Memory and time to score and aggregate a cell of many short samples, through the harness' own code.

    python benchmarks/million.py [--output runs/million] [--samples 10000 100000 1000000] [--tokens 16]

For each size: a journal as ranks write it, with texts drawn from a Zipf law. One process merges it, writes samples.jsonl, and
takes every metric, interval and unit (scores.json, items.parquet); another one reads the cell and aggregates it as the report
does. Each reports the peak of its resident memory after every stage. Writes OUTPUT/million.json.
"""

import os

# One core: numerical libraries read these when they load.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import common  # noqa: E402
import numpy as np  # noqa: E402

from ds_stability.eval.aggregate import group_rows, groups_of, keys_of, results_frame  # noqa: E402
from ds_stability.eval.cell import CellDir  # noqa: E402
from ds_stability.eval.decoding import DEFAULT_DECODINGS  # noqa: E402
from ds_stability.eval.generation_task import GenerationTask  # noqa: E402
from ds_stability.eval.records import Prompt, Sample, ScoringContext  # noqa: E402
from ds_stability.eval.report_cells import read_evaluation  # noqa: E402
from ds_stability.eval.report_samples import collect  # noqa: E402
from ds_stability.eval.results import scores  # noqa: E402
from ds_stability.eval.work import merged  # noqa: E402
from ds_stability.run_dir import write_json_atomic  # noqa: E402

VOCABULARY, PER_PROMPT, BATCH, REFERENCES, SEED = 8000, 8, 64, 500, 0
DECODING = DEFAULT_DECODINGS["sample"]


def main() -> int:
    arguments = parse_arguments()
    if arguments.stage:
        print(json.dumps(STAGES[arguments.stage](Path(arguments.output), arguments.samples[0], arguments.tokens)))
        return 0
    started, output, sizes = time.monotonic(), Path(arguments.output).resolve(), []
    for samples in arguments.samples:
        folder = output / f"samples-{samples}"
        shutil.rmtree(folder, ignore_errors=True)
        write_journal(folder, samples, arguments.tokens)
        stages = {name: run_stage(name, folder, samples, arguments.tokens) for name in STAGES}
        sizes.append({"samples": samples, "jsonl_mib": (folder / "cells/cell/samples.jsonl").stat().st_size / 2**20, **stages})
        shutil.rmtree(folder)
        print(common.text_table(*million_table({"sizes": sizes})) + f"\n{growth({'sizes': sizes})}\n", flush=True)
    result = common.describe_measurement("million", {"seed": SEED}, {
        "tokens": arguments.tokens, "samples_per_prompt": PER_PROMPT, "vocabulary": VOCABULARY, "references": REFERENCES, "threads": 1})  # fmt: skip
    write_json_atomic(output / "million.json", result | {"seconds": round(time.monotonic() - started, 1), "sizes": sizes})
    print(output / "million.json")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/million")
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the longest text; the shortest has half of them")
    parser.add_argument("--stage", choices=("score", "report"), help="what a process of its own does; not for you")
    arguments = parser.parse_args()
    if min(arguments.samples) < 100 or arguments.tokens < 2:
        parser.error(f"--samples {arguments.samples} --tokens {arguments.tokens}: allowed are samples from 100 and tokens from 2")
    return arguments


def run_stage(name: str, folder: Path, samples: int, tokens: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, __file__, "--stage", name, "--output", str(folder), "--samples", str(samples), "--tokens", str(tokens)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def draw_texts(count: int, tokens: int, seed: int) -> list[list[int]]:
    """Ids below VOCABULARY by Zipf's law, tokens / 2 to `tokens` of them."""
    rng = np.random.default_rng(seed)
    share = np.cumsum(1.0 / np.arange(1, VOCABULARY + 1))
    ids = np.searchsorted(share, rng.random((count, tokens)) * share[-1]).clip(max=VOCABULARY - 1)
    return [row[:length].tolist() for row, length in zip(ids, rng.integers(-(-tokens // 2), tokens + 1, count), strict=True)]


def written(ids: list[int]) -> str:
    return " ".join(f"{chr(97 + i % 26)}w{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in ids) + "."


def make_task(samples: int, tokens: int) -> GenerationTask:
    """The task whose units the journal holds; it generates nothing."""
    references = draw_texts(REFERENCES, tokens, SEED + 1)
    context = ScoringContext(VOCABULARY, (), tuple(range(100)), tuple(written([i])[:-1] for i in range(100)), tuple(map(tuple, references)),
                             tuple(map(written, references)), np.maximum(1, 1e6 / np.arange(1, VOCABULARY + 1)).astype(np.int64))  # fmt: skip
    prompts = [Prompt(index, "", (1,)) for index in range(samples // PER_PROMPT)]
    return GenerationTask(None, None, prompts, [DECODING], [0], PER_PROMPT, tokens, BATCH, context)


def write_journal(folder: Path, samples: int, tokens: int) -> None:
    task, cell = make_task(samples, tokens), CellDir(folder, "cell")
    with cell.journal.open(0, 1) as journal:
        for number, unit in enumerate(task.units()):
            rows = task.rows(unit)
            texts = draw_texts(len(rows), tokens, SEED + 2 + number)
            journal.append(task.name, unit, [
                Sample(row.prompt.index, DECODING.name, row.sample, 0, ids, written(ids), "length" if len(ids) == tokens else "eos",
                       4.0 * len(ids), -4.1 * len(ids), len(ids)).to_dict()
                for row, ids in zip(rows, texts, strict=True)])  # fmt: skip


class Meter:
    """Seconds, and peak of resident memory so far, at the end of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.lap("start")

    def lap(self, name: str) -> None:
        now, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        self.stages[name] = {"seconds": round(now - self.last, 2) if self.stages else 0.0, "peak_mib": round(peak, 1)}
        self.last = now


def score(folder: Path, samples: int, tokens: int) -> dict[str, Any]:
    """From the journal to scores.json and items.parquet, as eval/run.py does at the end of a cell."""
    meter, cell, task = Meter(), CellDir(folder, "cell"), make_task(samples, tokens)
    meter.lap("plan")
    records = merged([task], cell.journal)
    meter.lap("merge")
    cell.write_records(records, [DECODING.name])
    meter.lap("samples.jsonl")
    measured = task.measure(records[task.name], cell.scratch)
    meter.lap("metrics")
    cell.finish({"version": 1, "id": "cell"}, scores("cell", measured), measured)
    meter.lap("intervals and files")
    return meter.stages


def report(folder: Path, samples: int, tokens: int) -> dict[str, Any]:
    """What the report does with a cell, but for its figures."""
    meter = Meter()
    evaluation = read_evaluation(folder)
    meter.lap("read")
    groups = groups_of(evaluation.cells)
    for key in keys_of(evaluation.cells):
        group_rows(groups, key)
    results_frame(evaluation.cells)
    meter.lap("aggregate")
    collect(evaluation)
    meter.lap("texts")
    return meter.stages


STAGES = {"score": score, "report": report}


def million_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), one row per size and stage."""
    rows = []
    for size in result["sizes"]:
        for process in STAGES:
            for name, stage in size[process].items():
                rows.append([f"{size['samples']:,} {process}: {name}", f"{stage['seconds']:.1f}", f"{stage['peak_mib']:.0f}"])
    return ["samples, process: stage", "seconds", "peak so far, MiB"], rows


def growth(result: dict[str, Any]) -> str:
    """Bytes of peak memory that each sample beyond those of the smallest size adds, of both processes."""
    first, last = result["sizes"][0], result["sizes"][-1]
    if first is last:
        return ""
    peaks = [{process: list(size[process].values())[-1]["peak_mib"] for process in STAGES} for size in (first, last)]
    each = {process: (peaks[1][process] - peaks[0][process]) * 2**20 / (last["samples"] - first["samples"]) for process in STAGES}
    return (f"From {first['samples']:,} to {last['samples']:,} samples the peak grows by "
            + " and ".join(f"{each[process]:.0f} bytes a sample ({process})" for process in STAGES) + ".")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
