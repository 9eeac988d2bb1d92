"""The average of the weights on two ranks: against brute force over gathered weights, exact to swap, exact to resume."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ema_worker.py")
sys.path.insert(0, str(WORKER.parent))

from train_data import DEFAULTS, build_model, micro_batches  # noqa: E402

BF16 = {"bf16": {"enabled": True}}
PERSISTENT = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 3000, "stage3_param_persistence_threshold": 1000}}
CPU = {"device": "cpu"}
RUNS = [
    # Sub-groups, so that there are several partitions; step 1 (of 0 to 4) is skipped for a NaN on rank 1.
    {"name": "zero3", "gas": 1, "poison": {"step": 1, "rank": 1, "value": "nan"}, "ds": {"zero_optimization": {"sub_group_size": 5000}}},
    {"name": "zero3_bf16", "gas": 1, "arch": "gpt2", "ds": {**PERSISTENT, **BF16}},
    {"name": "frozen", "gas": 1, "freeze": "mlp", "ds": PERSISTENT},
    {"name": "offload", "gas": 1, "ds": {**BF16, "zero_force_ds_cpu_optimizer": False, "zero_optimization": {
        "stage3_param_persistence_threshold": 1000, "offload_optimizer": CPU, "offload_param": CPU}}},
    {"name": "zero2", "gas": 1, "ds": {**BF16, "zero_optimization": {"stage": 2}}},
    {"name": "zero1", "gas": 1, "ds": {**BF16, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}},
]  # fmt: skip
SLOW = ("frozen", "offload", "zero1")
NAMES = [pytest.param(run["name"], marks=[pytest.mark.slow] * (run["name"] in SLOW)) for run in RUNS]


@pytest.fixture(scope="module")
def result_of(run_ranks, tmp_path_factory):
    """`result_of(name)`: what that run gave. The slow runs are one launch, the others another."""

    @functools.cache
    def launch(slow):
        folder = tmp_path_factory.mktemp("ema")
        runs = [run for run in RUNS if (run["name"] in SLOW) == slow]
        (folder / "spec.json").write_text(json.dumps({"runs": runs}))
        done = run_ranks(WORKER, folder / "spec.json", folder)
        assert (folder / "DONE").exists(), done.stdout[-2000:] + done.stderr[-6000:]
        return {run["name"]: torch.load(folder / f"{run['name']}.pt", weights_only=False) for run in runs}

    return lambda name: launch(name in SLOW)[name]


def is_frozen(name, key):
    return name == "frozen" and "mlp" in key


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_average_of_the_gathered_weights(result_of, name):
    for found in result_of(name)["inside"].values():
        for key, expected in found["expected"].items():
            assert not is_frozen(name, key) or expected.numel() == 0  # no optimizer holds it
            torch.testing.assert_close(found["masters"][key].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_made_of_the_averages_inside(result_of, name):
    """Every parameter is the average in the model's dtype; the logits are those of a plain model with these weights."""
    run = DEFAULTS | next(run for run in RUNS if run["name"] == name)
    for found in result_of(name)["inside"].values():
        model = build_model(run)
        for key, master in found["masters"].items():
            master = model.state_dict()[key] if is_frozen(name, key) else master
            assert torch.equal(found["state"][key], master.to(found["state"][key].dtype)), key
        for key, parameter in model.named_parameters():
            parameter.data = found["state"][key]
        ids = next(iter(micro_batches(run, 999, 0, 2)))[0]
        with torch.no_grad():
            expected = model.eval()(input_ids=ids).logits.float()
        torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(found["logits"], found["plain_logits"])
        assert found["metrics"]["eval/averaged"] == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", ["exact", "after_error", "same_trajectory", "resumed"])
def test_to_the_bit_on_every_rank(result_of, name, check):
    assert [checks[check] for checks in result_of(name)["checks"]] == [True, True]


def test_a_skipped_step_is_not_in_it(result_of):
    assert result_of("zero3")["updates"] == 4 and result_of("zero2")["updates"] == 5
    assert result_of("zero3")["decays"] == [pytest.approx(2 / 11), None, 0.25, 0.3, 0.3]


def test_each_rank_keeps_its_partition_only(result_of):
    total = sum(parameter.numel() for parameter in build_model(DEFAULTS).parameters())
    for checks in result_of("zero3")["checks"]:
        assert total / 2 <= checks["elements"] < total / 2 + 1000  # and padding


def test_inside_nothing_is_trained_or_saved(result_of):
    refused = result_of("zero2")["inside"][5]["refused"]
    assert [text.split(" is not possible inside averaged_weights()")[0] for text in refused] == [
        "a training step", "save_checkpoint", "load_checkpoint"]  # fmt: skip
