"""The benchmark of docs/performance.md from end to end, with real engines, in its quick form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ARMS = ("plain DeepSpeed", "level 0", "level 0.5", "level 0.5, all four stabilizers")


@pytest.mark.slow
def test_quick_benchmark(tmp_path, torch_extensions):
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": torch_extensions,
    }
    command = [sys.executable, REPOSITORY / "benchmarks" / "performance.py", "--quick", "--output", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    body = json.loads((tmp_path / "performance.json").read_text())
    case = body["cases"]["quick"]
    for name in ARMS:
        assert len(case["arms"][name]["seconds"]) == case["rounds"] and min(case["arms"][name]["seconds"]) > 0, name
    for name in ARMS[1:]:  # the step's one collective of ours; above level 0 it spares DeepSpeed that of its norm
        few = [(operation, calls) for operation, size, calls in case["arms"][name]["messages"]["extra"] if size <= 4096]
        assert few == [*([("all_reduce", -1)] if name != "level 0" else []), ("all_reduce", 1)], name
    plain, ours = (case["arms"][name]["memory"] for name in (ARMS[0], ARMS[2]))
    logits = 4 * case["batch_size"] * case["block_size"] * case["model"]["vocab_size"]  # fp32
    assert logits < plain["activation"] < 40 * logits and ours["activation"] > 0 and plain["held"] < plain["peak"]
    for name in ("Liger, fused loss", "level 0.5, loss_kernel triton"):
        assert case["arms"][name]["not_run"] == "no CUDA"
    assert body["growth"]["vocabulary"]["slopes"]
    assert "Not measured" not in (tmp_path / "performance.md").read_text().split("## On one GPU")[0]
    assert "[1 of 5]" in done.stdout and "left in all" in done.stdout
