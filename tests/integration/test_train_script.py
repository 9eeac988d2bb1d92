"""launchers/train.py under the real launcher, end to end: what a run leaves behind, and that it can be loaded."""

import json
import math
from pathlib import Path

import pytest
import torch
from ports import named_buffers

from ds_stability.recorder import read_metrics
from ds_stability.tags import TAGS

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def run(run_distributed, tmp_path_factory):
    """One short run with everything on: chunked loss, probe, checkpoint, held-out evaluation."""
    folder = tmp_path_factory.mktemp("train")
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text())
    config["stability"] = {
        "level": 0.5,
        "stabilizers": {"feedback": {}, "averaging": {"level": 0.3}},
        "controller": {"warmup_steps": 2},
        "probe": {"interval": 3, "num_prompts": 4, "max_new_tokens": 8},
    }
    (folder / "ds.json").write_text(json.dumps(config))
    recipe = "dataset_name: builtin:synthetic\nsynthetic_tokens: 20000\nblock_size: 64\nper_device_train_batch_size: 2\n"
    (folder / "recipe.yaml").write_text(recipe + "gradient_accumulation_steps: 2\nlearning_rate: 0.001\n")
    process = run_distributed(
        REPOSITORY / "launchers" / "train.py", "--config", str(folder / "recipe.yaml"), "--config_name",
        str(REPOSITORY / "ds_configs" / "models" / "gpt2_tiny.json"), "--deepspeed", str(folder / "ds.json"),
        "--max_steps", str(STEPS), "--save_steps", "4", "--output_dir", str(folder / "run"), "--eval_strategy", "steps",
        "--eval_steps", "4", "--gradient_checkpointing", "true", timeout=240,
    )  # fmt: skip
    assert (folder / "run" / "DONE").exists(), process.stdout[-3000:] + process.stderr[-5000:]
    assert named_buffers(process.args) == []
    return folder / "run"


def test_every_promised_file_is_there(run):
    for name in ("manifest.json", "metrics.jsonl", "high_frequency.json", "checkpoint-4", "checkpoint-6",
                 "final/model.safetensors", "final/config.json", "final/tokenizer.json", "final/high_frequency.json",
                 "final/README.md", "samples/step-00000003.jsonl", "samples/step-00000006.jsonl"):  # fmt: skip
        assert (run / name).exists(), name
    assert list(run.glob("checkpoint-4/*/stability_state.json")) and list((run / "tensorboard").iterdir())
    assert not list(run.rglob("*.tmp"))


def test_metrics_have_one_line_a_step(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    last = rows[-1]
    others = {"stability/clipping_level", "stability/clip_threshold", "stability/regularization_coefficient", "stability/entropy_bonus",
              "stability/weight_average_decay"}  # fmt: skip
    expected = {key for key in TAGS if key.startswith("stability/") and not key.startswith("stability/governor_")}
    assert expected <= set(last) | others  # those of parts that this run has not
    assert last["eval/cross_entropy"] > 0 and last["probe/sample/entropy"] > 0 and last["learning_rate"] >= 0
    assert "eval/cross_entropy" in rows[3] and "probe/greedy/distinct_2" in rows[2]
    assert last["stability/gradient_noise_scale"] is None or math.isfinite(last["stability/gradient_noise_scale"])


def test_tensorboard_has_the_same_tags(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    keys = {key for row in read_metrics(run / "metrics.jsonl") for key, value in row.items() if value is not None}
    assert set(events.Tags()["scalars"]) == keys - {"step"}


def test_manifest_says_how_it_was_trained(run):
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["seeds"]["seed"] == 42
    assert manifest["config"]["stability"]["controller"]["warmup_steps"] == 2
    assert {"torch", "deepspeed", "transformers"} <= set(manifest["versions"])


def test_final_is_the_model_that_was_evaluated(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ds_stability.data import DataSpec, load_blocks

    model = AutoModelForCausalLM.from_pretrained(run / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert model.dtype == torch.float32 and model.config.use_cache
    spec = DataSpec(dataset_name="builtin:synthetic", synthetic_tokens=20000)
    _, blocks, _ = load_blocks(spec, tokenizer, 64)
    total, count = 0.0, 0
    with torch.no_grad():
        for block in blocks:
            logits = model(block["input_ids"][None], position_ids=block["position_ids"][None], use_cache=False).logits[0, :-1]
            labels = block["labels"][1:]
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            total, count = total + float(loss), count + int((labels != -100).sum())
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert count == last["eval/tokens"]
    assert total / count == pytest.approx(last["eval/cross_entropy"], rel=1e-5)


def test_samples_are_readable(run):
    rows = [json.loads(line) for line in (run / "samples" / "step-00000006.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["decoding"] for row in rows} == {"sample", "greedy"}
    assert all(isinstance(row["completion"], str) for row in rows)


def test_export_makes_the_same_final_from_the_checkpoint(run, tmp_path):
    """`ds-stability export`: to the byte what the run exported, and DONE; also where the run's own file is gone."""
    import shutil

    from ds_stability.cli import main

    again = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(again / "final")
    (again / "DONE").unlink()
    assert main(["export", str(again)]) == 0 and (again / "DONE").exists()
    files = sorted(path.name for path in (run / "final").iterdir())
    assert sorted(path.name for path in (again / "final").iterdir()) == files
    assert all((again / "final" / name).read_bytes() == (run / "final" / name).read_bytes() for name in files)
    shutil.rmtree(again / "checkpoint-6")
    (again / "DONE").unlink()
    assert main(["export", str(again)]) == 0 and not (again / "DONE").exists()  # of step 4, which is not the last
    assert "| steps | 4 |" in (again / "final" / "README.md").read_text()


def test_what_is_exported_generates_with_a_cache(run):
    for name in ("config.json", "generation_config.json"):
        assert json.loads((run / "final" / name).read_text())["use_cache"] is True
