"""Open-loop replay and permuted weights under real ZeRO-3 on two ranks."""

import json

import pytest
import torch

STEPS = 10
CONTROLLER = {"warmup_steps": 3, "ramp_steps": 2}


def make_run(name, steps=STEPS, **feedback):
    return {"name": name, "steps": steps, "stability": {"level": 0.5, "stabilizers": {"feedback": feedback}, "controller": CONTROLLER}}


pytestmark = pytest.mark.slow  # the arithmetic of both arms has unit tests


@pytest.fixture(scope="module")
def runs(trainings, tmp_path_factory):
    first = trainings([make_run("closed"), make_run("permuted", permute=True), make_run("permuted_again", permute=True)])
    path = tmp_path_factory.mktemp("gains") / "metrics.jsonl"
    path.write_text("".join(json.dumps(metrics) + "\n" for metrics in first["closed"]["metrics"]))
    return {**first, **trainings([make_run("replayed", replay=str(path)), make_run("held", STEPS + 2, replay=str(path))])}


def gains(result):
    return [metrics["stability/gain"] for metrics in result["metrics"]]


def test_replaying_a_run_on_its_own_data_gives_its_weights(runs):
    assert gains(runs["replayed"]) == gains(runs["closed"])
    for name, weight in runs["closed"]["weights"].items():
        assert torch.equal(weight, runs["replayed"]["weights"][name]), name


def test_replay_holds_the_last_gain(runs):
    assert gains(runs["held"])[STEPS:] == [gains(runs["closed"])[-1]] * 2


def test_permuted_weights_train_another_model_and_are_repeatable(runs):
    closed, permuted, again = (runs[name]["weights"] for name in ("closed", "permuted", "permuted_again"))
    assert any(not torch.equal(closed[name], permuted[name]) for name in closed)
    assert all(torch.equal(permuted[name], again[name]) for name in permuted)
    assert gains(runs["permuted"])[-1] > 0.1
