"""The benchmark of docs/performance.md on one GPU, in its quick form. Skipped where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
REPOSITORY = Path(__file__).resolve().parents[2]


def test_quick_benchmark(tmp_path):
    command = [
        sys.executable,
        REPOSITORY / "benchmarks" / "performance.py",
        "--quick",
        "--num_gpus",
        "1",
        "--output",
        tmp_path,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    body = json.loads((tmp_path / "performance_cuda.json").read_text())
    arms = body["cases"]["quick"]["arms"]
    assert body["machine"]["accelerators"] and body["cases"]["quick"]["world_size"] == 1
    assert arms["level 0.5"]["ratio"] > 0 and arms["level 0.5"]["memory"]["activation"] > 0
    assert arms["level 0.5"]["memory"]["resident_activation"] == 0
