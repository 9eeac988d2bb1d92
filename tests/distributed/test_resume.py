"""Invariant 4: launchers/train.py killed in the middle and resumed gives the run that was never interrupted, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_stability.checkpoint_files import size_fault
from ds_stability.run_dir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, TIMEOUT = 14, 300
TINY = "attention_dropout=0.1,hidden_size=32,intermediate_size=56,num_attention_heads=2,num_key_value_heads=2,num_hidden_layers="


def flags(folder, name, *more, layers=2):
    return ("--config_name", REPOSITORY / "ds_configs" / "models" / "llama_tiny.json", "--config_overrides",
            f"{TINY}{layers}", "--vocab_size", 300, "--dataset_name", "builtin:prose", "--block_size", 32, "--deepspeed",
            folder / "ds.json", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", STEPS,
            "--learning_rate", 0.01, "--save_steps", 4, "--eval_strategy", "steps", "--eval_steps", 5,
            "--max_eval_samples", 8, "--output_dir", folder / name, *more)  # fmt: skip


def train(run_ranks, folder, name, *more, layers=2, ranks=2):
    return run_ranks(REPOSITORY / "launchers" / "train.py", *flags(folder, name, *more, layers=layers), ranks=ranks, timeout=TIMEOUT)


def last_step(run):
    """The step of the last whole line of metrics.jsonl."""
    lines = run.metrics.read_text().split("\n")[:-1] if run.metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def kill_after_a_checkpoint(start_distributed, folder, name):
    """Start a run, and kill the launcher and its ranks one step or more after checkpoint-4."""
    run = RunDir(folder / name)
    process = start_distributed(REPOSITORY / "launchers" / "train.py", *flags(folder, name), output=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (size_fault(run.checkpoint(4)) is None and last_step(run) >= 5):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return run


@pytest.fixture(scope="module")
def killed(start_distributed, tmp_path_factory):
    """(folder, a run that was killed, with the newest of its checkpoints cut off while it was written)."""
    folder = tmp_path_factory.mktemp("resume")
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text())
    config["stability"] = {
        "level": 0.5,
        "stabilizers": {"feedback": {}, "clipping": {}, "averaging": {"level": 0.3}},
        "controller": {"warmup_steps": 2, "ramp_steps": 2},
        "probe": {"interval": 3, "num_prompts": 4, "max_new_tokens": 8},
        "ema": {"decay": 0.5, "start_step": 2},
    }
    (folder / "ds.json").write_text(json.dumps(config))
    run = kill_after_a_checkpoint(start_distributed, folder, "killed")
    assert not run.done.exists() and last_step(run) < STEPS
    torn = run.checkpoint(STEPS - 1)
    shutil.copytree(run.checkpoint(4), torn)
    (torn / "trainer_state.json").unlink()
    with run.metrics.open("a") as file:
        file.write('{"step": 13, "loss": 1.')
    yield folder, run
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def pair(killed, run_ranks):
    """(the run that was never interrupted, the resumed one)."""
    folder, resumed = killed
    whole = RunDir(folder / "whole")
    for run, more in ((whole, ()), (resumed, ("--resume_from_checkpoint", "true"))):
        done = train(run_ranks, folder, run.path.name, *more)
        assert run.done.exists(), done.stdout[-2000:] + done.stderr[-5000:]
    return whole, resumed


def lines(run):
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith(("_seconds", "_per_second"))} for row in rows]


# The refusals come first: they must leave the run as it is, for the resumed one below.
@pytest.mark.parametrize(
    ("words", "more", "layers", "ranks"),
    [
        ("stability.level = 0.5, this command has 0.4", ("--stability_level", "0.4"), 2, 2),
        pytest.param("model_config = ", (), 3, 1, marks=pytest.mark.slow),
        pytest.param("takes 8 blocks a step, this command 4", (), 2, 1, marks=pytest.mark.slow),
    ],
)
def test_another_run_is_not_continued(killed, run_ranks, words, more, layers, ranks):
    folder, run = killed
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    done = train(run_ranks, folder, "killed", *more, "--resume_from_checkpoint", "true", layers=layers, ranks=ranks)
    assert done.returncode == 2, done.stderr[-3000:]
    errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and str(run.path) in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_cut_off_checkpoint_is_passed_over(killed):
    _, run = killed
    assert run.checkpoints()[-1][0] == STEPS - 1
    assert [step for step, _ in run.complete_checkpoints()] in ([4], [4, 8], [4, 8, 12])


def test_final_weights_are_the_same_to_the_bit(pair):
    whole, resumed = pair
    files = sorted(path.name for path in whole.final.iterdir())
    assert files == sorted(path.name for path in resumed.final.iterdir())
    assert any(name.endswith(".safetensors") for name in files)
    for name in files:
        if name.endswith((".safetensors", ".json")):
            assert (whole.final / name).read_bytes() == (resumed.final / name).read_bytes(), name


def test_what_is_exported_and_evaluated_is_the_average(pair):
    """The average as the last checkpoint has it, put together from the ranks' slices (fp32)."""
    whole, _ = pair
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(2):
        stored = load_file(whole.checkpoint(STEPS) / f"global_step{STEPS}" / f"ds_stability_rank_{rank:05d}.safetensors")
        for key, part in stored.items():
            parts.setdefault(key, []).append(part)
    final = load_file(whole.final / "model.safetensors")
    assert len(final) > 10
    for name, weight in final.items():
        assert torch.equal(torch.cat(parts[f"average/{name}"]).view(weight.shape), weight), name
    assert [row["eval/averaged"] for row in lines(whole) if "eval/cross_entropy" in row] == [1, 1, 1]  # steps 5, 10 and the last
    assert "ema.averaged\\_steps | 12" in (whole.final / "README.md").read_text()


def test_metrics_are_the_same(pair):
    whole, resumed = pair
    assert [row["step"] for row in lines(whole)] == list(range(1, STEPS + 1))
    assert lines(resumed) == lines(whole)
    assert lines(whole)[-1]["stability/gain"] > 0 and "probe/sample/entropy" in lines(whole)[11]


def test_the_controller_ends_in_the_same_state(pair):
    states = [(run.checkpoint(STEPS) / f"global_step{STEPS}" / "stability_state.json").read_text() for run in pair]
    assert states[0] == states[1]


def test_samples_are_the_same(pair):
    whole, resumed = pair
    names = sorted(path.name for path in whole.samples.iterdir())
    assert names == sorted(path.name for path in resumed.samples.iterdir())
    for name in names:
        assert (whole.samples / name).read_text() == (resumed.samples / name).read_text()


def test_tensorboard_shows_every_step_once(pair):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    series = []
    for run in pair:
        events = EventAccumulator(str(run.tensorboard)).Reload()
        series.append([(event.step, event.value) for event in events.Scalars("cross_entropy")])
    assert [step for step, _ in series[0]] == list(range(1, STEPS + 1))
    assert series[0] == series[1]


@pytest.fixture(scope="module")
def branch(pair, run_ranks):
    """(trunk, a branch of its checkpoint-4 that changes nothing, the same branch stopped after step 8 and started again)."""
    trunk, folder = pair[0], pair[0].path.parent
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(trunk.path.rglob("*")) if path.is_file()}
    runs = RunDir(folder / "branch"), RunDir(folder / "stopped")
    command = ("--branch_from", trunk.checkpoint(4), "--resume_from_checkpoint", "auto")
    for run in runs:
        done = train(run_ranks, folder, run.path.name, *command)
        assert run.done.exists(), done.stdout[-2000:] + done.stderr[-5000:]
        if run is runs[0]:
            assert f"branch of {trunk.checkpoint(4)}: weights, optimizer, steps and data go on, and so does all" in done.stdout
            shutil.copytree(run.path, runs[1].path)
            for path in (runs[1].done, runs[1].final, runs[1].checkpoint(12), runs[1].checkpoint(STEPS)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(trunk.path.rglob("*")) if path.is_file()} == files
    return trunk, *runs


def test_a_branch_that_changes_nothing_is_the_trunk(branch):
    trunk, *runs = branch
    for run in runs:
        assert lines(run) == lines(trunk)[4:]  # from the branch point on
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (run.final / name).read_bytes() == (trunk.final / name).read_bytes(), name
        states = [(each.checkpoint(STEPS) / f"global_step{STEPS}" / "stability_state.json").read_text() for each in (trunk, run)]
        assert states[0] == states[1]


def test_a_branch_names_its_trunk(branch):
    trunk, *runs = branch
    for run in runs:
        entry = run.read_manifest()["branch"]
        assert entry["run"] == str(trunk.path) and entry["step"] == 4 and entry["identity"] == trunk.read_manifest()["identity"]
        assert [step for step, _ in run.complete_checkpoints()] == [8, 12, STEPS]
