"""The alarm in launchers/train.py: level 1 raises it and is stopped, level 0 is not (two trainings of tiny models)."""

import json
import re
from pathlib import Path

import pytest

from ds_stability.alarm import CAUSES
from ds_stability.errors import AlarmStoppedError
from ds_stability.recorder import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 100
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(run_distributed, tmp_path_factory):
    """{level: (folder, process)} of the same training at level 0 and 1, the latter to be stopped."""
    folder = tmp_path_factory.mktemp("alarm")
    results = {}
    for level in (0, 1):
        config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text())
        config["stability"] = {
            "level": level, "loss_path": "chunked", "controller": {"warmup_steps": 20}, "alarm": {"action": "stop"},
            "probe": {"interval": 20, "num_prompts": 16, "max_new_tokens": 32},
        }  # fmt: skip
        (folder / f"{level}.json").write_text(json.dumps(config))
        shape = "hidden_size=64,intermediate_size=128,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=2"
        results[level] = folder / f"run{level}", run_distributed(
            REPOSITORY / "launchers" / "train.py", "--config_name", REPOSITORY / "ds_configs" / "models" / "llama_tiny.json",
            "--config_overrides", shape, "--dataset_name", "builtin:prose", "--vocab_size", "512", "--block_size", "96",
            "--per_device_train_batch_size", "8", "--learning_rate", "0.003", "--deepspeed", folder / f"{level}.json",
            "--max_steps", STEPS, "--save_strategy", "no", "--output_dir", folder / f"run{level}", ranks=2 - level, timeout=300,
        )  # fmt: skip
    return results


def test_level_zero_trains_to_its_end_without_a_word(runs):
    folder, process = runs[0]
    assert (folder / "DONE").exists(), process.stdout[-2000:] + process.stderr[-4000:]
    assert "alarm at step" not in process.stdout + process.stderr
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "alarm/collapse" in row]
    assert [row["step"] for row in rows] == list(range(20, STEPS + 1, 20))
    assert all(row[f"alarm/{cause}"] == 0 for row in rows for cause in CAUSES)
    assert all(0 < row["alarm/reference_entropy"] < 7 and 0 < row["alarm/reference_cross_entropy"] < 7 for row in rows)


def test_level_one_is_stopped_with_a_sentence_and_a_checkpoint(runs):
    folder, process = runs[1]
    assert process.returncode == AlarmStoppedError.exit_code == 4, process.stderr[-4000:]
    said = re.findall(r"alarm at step (\d+): collapse: .*generation entropy [\d.]+ nats is below the band", process.stderr)
    assert len(said) >= 1 and not (folder / "DONE").exists()
    assert re.search(r"stopped: by the alarm at step \d+: collapse: .* is saved in .*checkpoint-\d+", process.stderr)
    assert (folder / f"checkpoint-{said[0]}" / "latest").exists()
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["step"] == int(said[0]) < STEPS and last["alarm/collapse"] == 1 and last["alarm/eos_masked"] == 0
