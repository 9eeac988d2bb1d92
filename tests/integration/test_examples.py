"""The plain loop of the README, and the exit code of a run whose numbers break."""

import json
import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_loop_in_the_readme_trains_a_pretrained_model(run_ranks, tmp_path, monkeypatch):
    """It is in eval mode, as `from_pretrained` returns it, and nobody calls train()."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "models" / "base")
    (tmp_path / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    monkeypatch.chdir(tmp_path)
    process = run_ranks(REPOSITORY / "tests" / "integration" / "readme_worker.py", REPOSITORY / "README.md")
    assert (tmp_path / "DONE").exists(), process.stdout[-2000:] + process.stderr[-3000:]
    assert float((tmp_path / "DONE").read_text()) == 8 * 15  # every token of both ranks, once
    ratios = [float(line) for line in process.stdout.splitlines() if re.fullmatch(r"[\d.]+", line)]
    assert len(ratios) == 40 and abs(ratios[0] - 1.0) < 1e-6 and ratios[-1] < 0.8
    assert "feedback: held variance ratio 0." in process.stdout and "of 40 steps; saturated in" in process.stdout


def test_plain_loop(run_distributed, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    process = run_distributed(REPOSITORY / "launchers" / "plain_loop.py", timeout=240)
    assert re.search(r"^feedback: held variance ratio 0\.\d+ \(target 0\.5\) over \d+ of \d+ steps; saturated in \d+$", process.stdout, re.M)
    lines = re.findall(r"^(\d+) \{'level': 0.5, 'variance_ratio': ([\d.]+), 'entropy': ([\d.]+)\}$", process.stdout, re.M)
    assert len(lines) >= 5, process.stdout[-2000:] + process.stderr[-3000:]
    assert float(lines[-1][2]) < float(lines[0][2])  # the entropy of a fresh model falls as it learns


def test_too_many_skipped_steps_exit_with_code_3_and_one_line(run_distributed, tmp_path):
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text())
    config["stability"] = {"level": 0.5, "max_skipped_steps": 2}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    process = run_distributed(
        REPOSITORY / "launchers" / "train.py", "--config_name", str(REPOSITORY / "ds_configs" / "models" / "llama_tiny.json"),
        "--dataset_name", "builtin:synthetic", "--synthetic_tokens", "20000", "--deepspeed", str(tmp_path / "ds.json"),
        "--block_size", "64", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "run"), "--max_steps", "20",
        "--learning_rate", "1e30", "--validation_split_percentage", "0", timeout=240,
    )  # fmt: skip
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 3, process.stderr[-4000:]
    assert len(lines) == 1 and "2 optimizer steps in a row were skipped" in lines[0]
    assert not (tmp_path / "run" / "DONE").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped"] is True and rows[-1]["stability/skipped_steps"] == 2  # the last step is not lost
