"""launchers/train.py continued on another number of processes goes the way of the undisturbed run."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ds_stability.checkpoint_files import remove_checkpoint
from ds_stability.run_dir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]
GLOBAL, SAVED, STEPS = 8, 8, 18  # ten steps after the checkpoint, which lies in the middle of the second epoch
BLOCKS = 45  # six steps an epoch, the last one not full
BATCH = 2
STABILITY = {
    "level": 0.5,
    "stabilizers": {"feedback": {}, "clipping": {}, "averaging": {"level": 0.3},
                    "regularization": {"level": 0.8, "kind": "init_decay"}},
    "controller": {"warmup_steps": 2, "ramp_steps": 2},
    "ema": {"decay": 0.5},
    "statistics": {"update_ratio_interval": 1},  # norms over whole partitions: padding would show
}  # fmt: skip


def flags(folder, name, ranks, *more):
    overrides = "hidden_size=32,intermediate_size=56,num_attention_heads=2,num_key_value_heads=2,num_hidden_layers=2"
    return ("--config_name", REPOSITORY / "ds_configs" / "models" / "llama_tiny.json", "--config_overrides", overrides,
            "--vocab_size", 301, "--dataset_name", "builtin:prose", "--block_size", 33, "--deepspeed", folder / "ds.json",
            "--max_train_samples", BLOCKS, "--max_eval_samples", 7, "--per_device_train_batch_size", BATCH,
            "--gradient_accumulation_steps", GLOBAL // BATCH // ranks, "--max_steps", STEPS, "--learning_rate", 0.01,
            "--weight_decay", 0.1, "--lr_scheduler_type", "linear", "--save_steps", SAVED, "--optim", "adamw_torch",
            "--output_dir", folder / name, *more)  # fmt: skip


def write_config(folder, stage):
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text())
    config["zero_optimization"] |= {"stage": stage, "reduce_bucket_size": 5000}
    config["stability"] = STABILITY
    (folder / "ds.json").write_text(json.dumps(config))


def train(run_distributed, folder, name, ranks, *more):
    done = run_distributed(REPOSITORY / "launchers" / "train.py", *flags(folder, name, ranks, *more), ranks=ranks, timeout=300)
    return RunDir(folder / name), done


def as_if_stopped(run, name):
    """A copy of a finished run that looks as if it had been stopped after its first checkpoint."""
    copy = RunDir(run.path.parent / name)
    shutil.copytree(run.path, copy.path)
    copy.done.unlink()
    shutil.rmtree(copy.final)
    for step, path in copy.checkpoints():
        if step > SAVED:
            remove_checkpoint(path)
    return copy


def change(run_distributed, folder, old, new, stage):
    """(undisturbed run on `old` ranks, the run continued on `new` ranks, what the continuing command said)."""
    write_config(folder, stage)
    whole, done = train(run_distributed, folder, "whole", old)
    assert whole.done.exists(), done.stdout[-2000:] + done.stderr[-5000:]
    resumed = as_if_stopped(whole, "resumed")
    _, done = train(run_distributed, folder, "resumed", new, "--resume_from_checkpoint", "true")
    assert resumed.done.exists(), done.stdout[-2000:] + done.stderr[-5000:]
    return whole, resumed, done.stdout + done.stderr


def lines(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def check_metrics(whole, resumed):
    before, after = lines(whole), lines(resumed)
    assert [row["step"] for row in after] == list(range(1, STEPS + 1))
    assert after[:SAVED] == before[:SAVED]
    for old, new in zip(before[SAVED:], after[SAVED:], strict=True):
        assert new["stability/tokens"] == old["stability/tokens"]  # blocks differ in it, so the same blocks were read
        assert new["learning_rate"] == old["learning_rate"]
        for key in ("loss", "cross_entropy", "stability/gain", "stability/clip_threshold", "stability/averaging_beta"):
            assert new[key] == pytest.approx(old[key], abs=1e-4), (key, new["step"])
        for key in ("stability/update_ratio", "stability/gradient_cosine"):
            assert new[key] == pytest.approx(old[key], rel=5e-3), (key, new["step"])
    assert after[-1]["eval/cross_entropy"] == pytest.approx(before[-1]["eval/cross_entropy"], abs=1e-4)
    assert len({row["stability/tokens"] for row in before}) > 2


def flat(state, path=""):
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: value for name, item in items for key, value in flat(item, f"{path}.{name}").items()}
    return {path: state}


def check_controller(whole, resumed):
    tag = f"global_step{STEPS}"
    states = [flat(json.loads((run.checkpoint(STEPS) / tag / "stability_state.json").read_text())) for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    numbers = [key for key, value in states[0].items() if isinstance(value, float) and "noise" not in key]
    assert len(numbers) > 10
    for key in numbers:  # the noise scale has the number of micro-batches in its formula
        if "measures" not in key:
            assert states[1][key] == pytest.approx(states[0][key], rel=2e-3, abs=1e-4), key
    assert states[1][".applied_steps"] == STEPS


def check_weights(whole, resumed):
    first, second = load_file(whole.final / "model.safetensors"), load_file(resumed.final / "model.safetensors")
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert (weight - second[name]).norm() < 1e-3 * weight.norm(), name


def check_all(whole, resumed, said):
    check_metrics(whole, resumed)
    check_controller(whole, resumed)
    check_weights(whole, resumed)
    assert "is converted for" in said and "Traceback" not in said
    assert not [path.name for path in resumed.path.iterdir() if path.name.startswith(".universal")]


@pytest.mark.slow
def test_two_to_one(run_distributed, tmp_path):
    whole, resumed, said = change(run_distributed, tmp_path, 2, 1, stage=3)
    check_all(whole, resumed, said)
    changes = json.loads(resumed.manifest.read_text())["world_size_changes"]
    assert [(entry["after_step"], entry["world_size"]) for entry in changes] == [(SAVED, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "stage"), [(1, 2, 3), (2, 4, 3), (4, 2, 3), (2, 1, 2), (1, 2, 1)])
def test_other_changes(run_distributed, tmp_path, old, new, stage):
    check_all(*change(run_distributed, tmp_path, old, new, stage))
