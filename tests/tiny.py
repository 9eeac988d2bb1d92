"""Runs of seconds, and checks, that several test files share."""

import json
import math
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SUITE = {
    "name": "tiny", "batch_size": 4, "max_new_tokens": 8, "samples_per_prompt": 2, "prompts": {"count": 8, "tokens": 6},
    "text": {"held_out_windows": 8, "train_windows": 8, "window": 32}, "minimal_pairs": {"enabled": False},
    "synthetic": False,
}  # fmt: skip


def training(place: Path, output: Path, *more, steps: int) -> list:
    """Flags of launchers/train.py; the DeepSpeed config is `place`/ds.json."""
    return [
        "--config_name", REPOSITORY / "ds_configs" / "models" / "gpt2_tiny.json", "--config_overrides", "n_embd=32,n_layer=1,n_head=2",
        "--dataset_name", "builtin:synthetic", "--synthetic_tokens", "20000", "--block_size", "32", "--per_device_train_batch_size", "2",
        "--learning_rate", "0.001", "--deepspeed", place / "ds.json", "--max_steps", steps, "--output_dir", output, *more,
    ]  # fmt: skip


def evaluation(place: Path, model: Path, output: Path) -> list:
    """Flags of eval/run.py; the suite is `place`/suite.yaml."""
    return ["--model", model, "--cell_names", "cell", "--suite", place / "suite.yaml", "--output_dir", output]


def all_finite(tree) -> bool:
    """Whether no float in a tree of dicts, lists and tuples is NaN or infinite."""
    if isinstance(tree, dict):
        return all(map(all_finite, tree.values()))
    if isinstance(tree, list | tuple):
        return all(map(all_finite, tree))
    return not isinstance(tree, float) or math.isfinite(tree)


def plain_torch(folder: Path, specs: dict) -> dict:
    """What distributed/reference_worker.py computes for `specs` in a process of its own."""
    import torch

    (folder / "specs.json").write_text(json.dumps(specs))
    worker = REPOSITORY / "tests" / "distributed" / "reference_worker.py"
    command = [sys.executable, str(worker), str(folder / "specs.json"), str(folder / "out.pt")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return torch.load(folder / "out.pt")
