"""Memory of one model in several processes of one host, as the ranks of an evaluation load it.

    python benchmarks/load_once.py --model models/SmolLM2-135M-Instruct [--ranks 2] [--dtype auto] [--output runs/load_once]

Every process loads the model, runs it once over a few tokens, and, when all have, reads its own memory: what it holds (RSS), and
its share when a page that k processes map counts 1 / k (PSS). Weights on the CPU in the dtype they are stored in are pages of the
file, which all processes share. Linux only. Writes OUTPUT/load_once.json.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import common

from ds_stability.run_dir import write_json_atomic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", default="runs/load_once")
    arguments = parser.parse_args()
    if arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: allowed are numbers from 1")
    started = time.monotonic()
    result = common.describe_measurement("load_once", {}, {"ranks": arguments.ranks, "dtype": arguments.dtype})
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(arguments.ranks)
    with spawn.Pool(arguments.ranks, initializer=_share, initargs=(barrier,)) as pool:
        ranks = pool.starmap(measure, [(arguments.model, arguments.dtype)] * arguments.ranks, chunksize=1)
    result |= {"seconds": round(time.monotonic() - started, 1), "model": Path(arguments.model).name, "ranks": ranks}
    output = Path(arguments.output).resolve()
    write_json_atomic(output / "load_once.json", result)
    print(f"{common.text_table(*load_table(result))}\n\n{output / 'load_once.json'}")
    return 0


def _share(barrier: Any) -> None:
    global _barrier  # a barrier reaches a process only when it starts
    _barrier = barrier


def measure(model: str, dtype: str) -> dict[str, float]:
    """MiB: of the weights, and of this process before the model and with it."""
    import torch

    from ds_stability.eval.loading import load

    torch.set_num_threads(1)
    before = memory()
    loaded = load(model, "cpu", dtype)
    with torch.no_grad():
        loaded.model(torch.arange(8).unsqueeze(0))
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in loaded.model.parameters()}
    _barrier.wait()
    after = memory()
    _barrier.wait()
    return {"weights": sum(weights.values()) / 2**20, **{f"{name}_before": value for name, value in before.items()}, **after}


def memory() -> dict[str, float]:
    """rss, pss and private pages of this process, MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(value.split()[0]) for name, value in lines.items()}
    return {"rss": kib["Rss"] / 2**10, "pss": kib["Pss"] / 2**10, "private": (kib["Private_Clean"] + kib["Private_Dirty"]) / 2**10}


def load_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), one row per process."""
    columns = ("weights", "rss_before", "rss", "pss", "private")
    rows = [[str(rank), *(f"{one[name]:.0f}" for name in columns)] for rank, one in enumerate(result["ranks"])]
    return ["rank", "weights, MiB", "RSS before", "RSS with the model", "PSS", "private"], rows


if __name__ == "__main__":
    sys.exit(main())
