"""TRL's trainers under ZeRO-3 with `enable()`: SFT at a level, DPO refused above level 0, both untouched at level 0."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

WORKER = Path(__file__).with_name("trl_worker.py")
HALF = {"level": 0.5, "controller": {"warmup_steps": 2, "ramp_steps": 1}}
CHUNKED = {"level": 0, "loss_path": "chunked"}  # our loss at gain 0: TRL's objective, if ours is normalized as theirs
LINEAR = {"level": 0, "loss_path": "linear"}
SGD = {"optim": "sgd"}  # weights differ in proportion to gradients; AdamW would blow up rounding
PER_RANK = {**SGD, "average_tokens_across_devices": False}
PACKED = {**SGD, "packing": True, "per_device_train_batch_size": 1}
LORA = {"lora": True, "steps": 2}
EVALUATING = {"evaluate": True, "arguments": {"eval_strategy": "steps", "eval_steps": 2}}
RUNS = {
    "plain": {"enable": False, "arguments": SGD},
    "zero": {"block": {"level": 0}, "arguments": SGD},
    "chunked": {"block": CHUNKED, "arguments": SGD},
    "per_rank": {"enable": False, "arguments": PER_RANK, "steps": 2},
    "per_rank_linear": {"block": LINEAR, "arguments": PER_RANK, "steps": 2},
    "packed": {"enable": False, "arguments": PACKED, "steps": 2},
    "packed_linear": {"block": LINEAR, "arguments": PACKED, "steps": 2},
    "half": {"block": HALF, "steps": 6, **EVALUATING},
    "lora": {"block": {"level": 0.5, "controller": {"warmup_steps": 1, "ramp_steps": 1}}, **LORA},
    "dft": {"block": HALF, "arguments": {"loss_type": "dft"}},
    "dft_zero": {"block": {"level": 0}, "arguments": {"loss_type": "dft"}, "steps": 1},
    "dpo_plain": {"enable": False, "trainer": "dpo", "steps": 2},
    "dpo_zero": {"block": {"level": 0}, "trainer": "dpo", "steps": 2},
    "dpo_half": {"block": HALF, "trainer": "dpo"},
}


@pytest.fixture(scope="module")
def runs(run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("trl")
    (out / "spec.json").write_text(json.dumps({"runs": [{"name": name, **run} for name, run in RUNS.items()]}))
    environment = {"HF_HOME": str(out / "home")}  # data sets are cached there while they are tokenized
    done = run_ranks(WORKER, out / "spec.json", out, timeout=600, env=environment)
    assert (out / "DONE").exists(), done.stdout[-2000:] + done.stderr[-6000:]
    results = {name: torch.load(out / f"{name}.pt") for name in RUNS if (out / f"{name}.pt").exists()}
    yield out, results
    shutil.rmtree(out)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(result, *keys):
    return [[entry[key] for key in keys] for entry in result["log"] if keys[0] in entry]


@pytest.mark.parametrize(
    ("plain", "zero", "figures"),
    [
        ("plain", "zero", ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")),
        ("dpo_plain", "dpo_zero", ("loss", "grad_norm", "rewards/margins", "logps/chosen")),
    ],
)
def test_level_zero_is_plain_trl_to_the_bit(runs, plain, zero, figures):
    first, second = runs[1][plain], runs[1][zero]
    assert second["extended"] and not first["extended"]
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert logged(first, *figures) == logged(second, *figures) != []


@pytest.mark.parametrize("name", ["plain", "per_rank", "packed"])
def test_the_model_loss_is_the_objective_of_trl(runs, name):
    """Same divisor over ranks, micro-batches and padding: at gain 0 only the rounding differs."""
    plain = runs[1][name]
    ours = runs[1]["chunked" if name == "plain" else f"{name}_linear"]
    for key, weight in plain["weights"].items():
        torch.testing.assert_close(ours["weights"][key], weight, rtol=1e-5, atol=1e-7)
    for first, second in zip(logged(plain, "loss", "grad_norm"), logged(ours, "loss", "grad_norm"), strict=True):
        assert second == pytest.approx(first, rel=1e-4)


def test_sft_at_level_half(runs):
    rows = lines(runs[0] / "half")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["cross_entropy"] > 0 and row["stability/entropy"] > 0 and row["stability/tokens"] > 0
    assert all(row["stability/gain"] > 0 and row["stability/variance_ratio"] < 0.9 for row in rows[2:])
    assert [row["stability/gain"] for row in rows[:2]] == [0.0, 0.0]


def test_sft_evaluation_is_recorded_and_is_the_one_of_trl(runs):
    out, results = runs
    rows = [row for row in lines(out / "half") if "eval/cross_entropy" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["eval/entropy"] > 0 for row in rows)
    # Trainer averages batches of different lengths, we average tokens.
    assert [[row["eval/cross_entropy"]] for row in rows] == [
        pytest.approx(values, rel=0.05) for values in logged(results["half"], "eval_loss")
    ]


def test_sft_with_lora(runs):
    out, results = runs
    assert all("lora_" in name for name in results["lora"]["weights"])
    assert lines(out / "lora")[-1]["stability/variance_ratio"] < 0.95


def test_sft_without_token_statistics_at_level_zero_records_the_rest(runs):
    rows = lines(runs[0] / "zero")
    assert len(rows) == 3 and all(row["cross_entropy"] is None and row["grad_norm"] > 0 for row in rows)


def test_disable_gives_trl_its_loss_back(runs):
    assert all(result["undone"] for result in runs[1].values())


@pytest.mark.parametrize(
    ("name", "words"),
    [("dft", "SFTConfig.loss_type is 'dft'"), ("dpo_half", "(DPO, GRPO, Liger,")],
)
def test_losses_of_their_own_are_refused_above_level_zero(runs, name, words):
    out, results = runs
    assert name not in results
    for rank in (0, 1):
        text = (out / f"{name}.error.{rank}").read_text()
        assert text.startswith("StabilityConfigError: ") and words in text and "\n" not in text


def test_another_loss_type_trains_at_level_zero(runs):
    assert "dft_zero" in runs[1]
