"""Objectives under ZeRO-3 on two ranks, with feedback in force, against plain torch on the concatenated batch.

Two of the plain functions of a token (all go one way through the loss), and all that prepare their micro-batches.
"""

import random
import sys
from pathlib import Path

import pytest
import torch
from tiny import plain_torch

HERE = Path(__file__).parent
STEPS, WARMUP = 4, 1
DEFAULTS = {"vocab": 97, "gas": 2, "micro": 2, "seq": 16, "masked": None, "zipf_seed": 1000, "warmup": WARMUP}
OBJECTIVES = {
    "tofu": {"name": "tofu", "gamma": 3.0, "beta": 0.8},
    "gem": {"name": "gem", "beta": 0.7, "h": "linear"},
    "unlikelihood_token": {"name": "unlikelihood_token", "alpha": 1.0},
    "unlikelihood_sequence": {"name": "unlikelihood_sequence", "max_new_tokens": 12, "prefix_tokens": 5, "n": 2, "probability": 0.6},
    "reverse_kl": {"name": "reverse_kl", "coefficient": 0.5, "cross_entropy": 0.7},
}  # fmt: skip


def make_run(name, reference, stage=3, **more):
    objective = {**OBJECTIVES[name], **({"reference": reference} if name == "reverse_kl" else {})}
    block = {"level": 0.5, "objective": objective, "controller": {"warmup_steps": WARMUP, "ramp_steps": 1},
             "statistics": {"chunk_size": 11}}  # fmt: skip
    return {"name": f"{name}_{stage}", "arch": "llama", "steps": STEPS, "num_items": True, "lr": 3e-3, "clip": 2.0,
            "stability": block, "ds": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 3000}}, **more}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run per objective; the reference model is another random model of the same shape."""
    sys.path.insert(0, str(HERE))
    from train_data import build_model

    folder = tmp_path_factory.mktemp("reference")
    model = build_model({"arch": "llama", "vocab": 97})
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    model.save_pretrained(folder)
    runs = [make_run(name, str(folder)) for name in OBJECTIVES]
    # Stage 2 keeps whole weights. Without num_items each micro-batch has a mean of its own, and all generate equally much.
    own_text = make_run("unlikelihood_sequence", str(folder), stage=2, num_items=False)
    own_text["stability"]["objective"] = {**OBJECTIVES["unlikelihood_sequence"], "probability": 1.0}
    own_text["stability"]["level"] = 0.0  # feedback would never see a token, and is refused
    runs += [make_run("reverse_kl", str(folder), stage=2), own_text]
    missing = make_run("reverse_kl", str(folder / "nowhere"))
    small = make_run("unlikelihood_sequence", str(folder))
    small["stability"]["objective"]["max_new_tokens"] = 60
    runs += [{**missing, "name": "missing"}, {**small, "name": "too_long"}]
    return runs


@pytest.fixture(scope="module")
def results(runs, trainings):
    return trainings(runs)


def own_text_steps(objective):
    return [step for step in range(STEPS) if objective["name"] == "unlikelihood_sequence"
            and random.Random(f"unlikelihood {step}").random() < objective["probability"]]  # fmt: skip


@pytest.fixture(scope="module")
def references(runs, results, tmp_path_factory):
    """The same runs in plain torch, in a process without deepspeed."""
    folder = tmp_path_factory.mktemp("replay")
    specs = {}
    for run in runs:
        if "errors" not in results[run["name"]]:
            objective = run["stability"]["objective"]
            specs[run["name"]] = {"run": {**DEFAULTS, **run, "objective": objective, "own_text_steps": own_text_steps(objective)},
                                  "world": 2, "levels": {"clipping": 0.0, "averaging": 0.0},
                                  "metrics": results[run["name"]]["metrics"]}  # fmt: skip
    return plain_torch(folder, specs)


@pytest.mark.parametrize("name", [*(f"{name}_3" for name in OBJECTIVES), "reverse_kl_2", "unlikelihood_sequence_2"])
def test_weights_equal_plain_torch(results, references, name):
    ours, reference = results[name], references[name]
    for row, (norm, _) in zip(ours["metrics"], reference["rows"], strict=True):
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for key, weight in reference["weights"].items():
        error, moved = (ours["weights"][key] - weight).norm(), (weight - reference["initial"][key]).norm()
        assert moved > 0 and error < 3e-3 * moved, (key, float(error / moved))


def test_each_objective_trains_other_weights_under_the_same_feedback(results):
    weights = {name: torch.cat([w.flatten() for w in results[f"{name}_3"]["weights"].values()]) for name in OBJECTIVES}
    for i, (name, mine) in enumerate(weights.items()):
        assert results[f"{name}_3"]["metrics"][-1]["stability/gain"] > 0.05
        for other in list(weights)[i + 1 :]:
            assert not torch.allclose(mine, weights[other], atol=1e-6), (name, other)


def test_generated_text_enters_no_statistic(results):
    rows = results["unlikelihood_sequence_3"]["metrics"]
    steps = own_text_steps(OBJECTIVES["unlikelihood_sequence"])
    assert 0 < len(steps) < STEPS
    for step, row in enumerate(rows):
        assert (row["cross_entropy"] is None) == (step in steps) and (row["stability/tokens"] is None) == (step in steps)
    tokens = 0.0
    for count in (row["stability/tokens"] for row in rows if row["stability/tokens"]):
        tokens = max(0.9, 1.0 - count / 512) * tokens + count
    assert results["unlikelihood_sequence_3"]["state"]["stabilizers"]["feedback"]["tokens"] == pytest.approx(tokens)


def test_what_cannot_be_is_one_line(results):
    assert "stability.objective.reference" in results["missing"]["errors"][0] and "cannot be loaded" in results["missing"]["errors"][0]
    assert "stability.objective.max_new_tokens: 60 is not allowed; must be at most 59" in results["too_long"]["errors"][0]
    assert all("\n" not in text for name in ("missing", "too_long") for text in results[name]["errors"].values())
