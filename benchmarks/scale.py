"""How memory, traffic and files grow with parameters, ranks and nodes: formulas, held against what was counted.

    python benchmarks/scale.py [--output runs/scale]    measure, write docs/results/scale.json, fill in docs/scale.md
    python benchmarks/scale.py --render                 fill in docs/scale.md from the results files only
    python benchmarks/scale.py --check                  change nothing; exit code 1 if the page is out of date

Models of 0.9 to 28 million parameters train a few steps on 1, 2 and 4 CPU ranks; what their engines hold, send and store is
counted (scale_worker.py). As root on Linux the ranks get a network of their own, whose loopback device counts the bytes.
The formulas are in scale_formulas.py, the tables in scale_page.py. Measuring took eleven minutes on two busy cores with AMX (most models are in bf16).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import scale_page
import training
from scale_formulas import Run, Shape

from ds_stability.run_dir import write_atomic, write_json_atomic
from ds_stability.statistics import VECTOR_SIZE

WORKER = Path(__file__).resolve().parent / "scale_worker.py"
PAGE = common.REPOSITORY / "docs" / "scale.md"
RESULTS = common.REPOSITORY / "docs" / "results"
WORLD_SIZES = (1, 2, 4)
INSIDE = "DS_STABILITY_SCALE_NETWORK"  # set for the process that runs in a network of its own

TINY = Shape(layers=3, hidden=128, intermediate=384, heads=4, kv_heads=2, vocabulary=1024)
MEDIUM = Shape(layers=6, hidden=384, intermediate=1024, heads=6, kv_heads=3, vocabulary=4096)
LARGE = Shape(layers=8, hidden=512, intermediate=1408, heads=8, kv_heads=4, vocabulary=4096)
_COMMON = Run(ranks=1, tokens=128, checkpointing=False, reduce_bucket=1_000_000, persistence_threshold=1000, max_reuse_distance=0,
              vector_bytes=8 * VECTOR_SIZE)  # fmt: skip


def cases() -> dict[str, tuple[Shape, Run, tuple[int, ...]]]:
    """Name -> (model, how it is trained, on how many ranks). Distances as a large model has them: far below its size."""

    def run(**changes: Any) -> Run:
        return Run(**{**vars(_COMMON), **changes})

    layer = sum(MEDIUM.layer())
    return {
        "0.9M bf16": (TINY, run(), WORLD_SIZES),
        "13M bf16": (MEDIUM, run(), WORLD_SIZES),
        "13M fp32": (MEDIUM, run(weight_bytes=4), WORLD_SIZES),
        "28M bf16, sub-groups of 5M": (LARGE, run(sub_group_size=5_000_000), WORLD_SIZES),
        "13M bf16, default reuse distance": (MEDIUM, run(max_reuse_distance=10**9), (2, 4)),
        "13M bf16, checkpointing": (MEDIUM, run(checkpointing=True), WORLD_SIZES),
        "13M bf16, checkpointing, reuse over half a layer": (MEDIUM, run(checkpointing=True, max_reuse_distance=layer // 2), (2, 4)),
        "13M bf16, checkpointing, reuse over two layers": (MEDIUM, run(checkpointing=True, max_reuse_distance=2 * layer), (2, 4)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="fill in the page from the results files only")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page is out of date")
    parser.add_argument("--output", default="runs/scale", help="for logs and passing files")
    arguments = parser.parse_args()
    if not (arguments.render or arguments.check):
        if can_have_own_network() and INSIDE not in os.environ:
            return in_own_network()
        write_json_atomic(RESULTS / "scale.json", measure(Path(arguments.output).resolve()))
    before = PAGE.read_text(encoding="utf-8")
    after = scale_page.filled(before, RESULTS)
    if arguments.check:
        if after != before:
            print(f"error: {PAGE.name} is out of date; run python benchmarks/scale.py --render", file=sys.stderr)
        return int(after != before)
    write_atomic(PAGE, after)
    scale_page.draw(RESULTS, PAGE.parent / "figures")
    return 0


def can_have_own_network() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("unshare") is not None and shutil.which("ip") is not None


def in_own_network() -> int:
    """Run this script again where nobody else uses the loopback device."""
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', sys.executable, *sys.argv]
    return subprocess.run(command, env={**os.environ, INSIDE: "1"}).returncode


def measure(output: Path) -> dict[str, Any]:
    """Every case on every number of ranks."""
    started, rows = time.monotonic(), []
    output.mkdir(parents=True, exist_ok=True)
    training.end_children_on_sigterm()
    known = cases()
    for world_size in WORLD_SIZES:
        chosen = {name: one for name, one in known.items() if world_size in one[2]}
        specs = [{"name": name} | worker_case(shape, run) for name, (shape, run, _) in chosen.items()]
        for row in launch(specs, world_size, output):
            shape, run, _ = chosen[row["name"]]
            rows.append({"shape": vars(shape), "run": {**vars(run), "ranks": world_size, "ranks_per_node": world_size}, **row})
    settings = {"world_sizes": list(WORLD_SIZES), "own_network": INSIDE in os.environ, "vector_bytes": 8 * VECTOR_SIZE}
    head = common.describe_measurement("scale", {"seed": 0}, settings)
    return head | {"seconds": round(time.monotonic() - started, 1), "rows": rows, "estimator": estimates(known)}


def worker_case(shape: Shape, run: Run) -> dict[str, Any]:
    model = {"vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
             "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
             "tie_word_embeddings": False}  # fmt: skip
    return {"model": model, "bf16": run.weight_bytes == 2, "checkpointing": run.checkpointing, "batch_size": 2,
            "block_size": run.tokens // 2, "reduce_bucket_size": run.reduce_bucket, "persistence_threshold": run.persistence_threshold,
            "max_reuse_distance": run.max_reuse_distance, "sub_group_size": run.sub_group_size}  # fmt: skip


def launch(specs: list[dict[str, Any]], world_size: int, output: Path) -> list[dict[str, Any]]:
    """Raises FailedRun where the worker wrote no result; the message ends with its log."""
    result, spec_file, log = output / "worker.json", output / "spec.json", output / f"worker-{world_size}.log"
    result.unlink(missing_ok=True)
    write_json_atomic(spec_file, {"cases": specs, "folder": str(output / "stored"), "output": str(result), "own_network": INSIDE in os.environ})
    print(f"{len(specs)} cases on {world_size} ranks", flush=True)
    code = training.run_script(WORKER, [str(spec_file)], world_size, log)
    if not result.exists():
        raise training.FailedRun(f"the worker ended without a result (exit code {code}); {training.log_tail(log)}")
    return json.loads(result.read_text(encoding="utf-8"))


def estimates(known: dict[str, tuple[Shape, Run, tuple[int, ...]]]) -> list[dict[str, Any]]:
    """DeepSpeed's own estimate of the model's state, without offload, bytes of one accelerator."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    asked = [(name, shape, ranks, 1) for name, (shape, run, sizes) in known.items() for ranks in sizes if run == _COMMON]
    asked += [(name, shape, run.ranks_per_node, run.nodes) for name, (shape, run) in scale_page.EXAMPLES.items()]
    rows = []
    for name, shape, per_node, nodes in asked:
        largest = max(shape.weights())
        _, accelerator, layer = estimate_zero3_model_states_mem_needs(shape.parameters, largest, per_node, nodes, cpu_offload=False,
                                                                      cpu_offload_params=False)  # fmt: skip
        rows.append({"name": name, "ranks": per_node * nodes, "bytes": accelerator, "largest_layer": layer})
    return rows


if __name__ == "__main__":
    sys.exit(training.run_main(main))
