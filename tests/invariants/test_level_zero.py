"""Invariant 1: level 0 is plain DeepSpeed to the bit, with every statistic switched on."""

import pytest
import torch

OFFLOAD = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 3000, "offload_optimizer": {"device": "cpu"}},
           "zero_force_ds_cpu_optimizer": False}  # fmt: skip
OFFLOAD_PARAM = {"zero_optimization": {**OFFLOAD["zero_optimization"], "offload_param": {"device": "cpu"}},
                 "zero_force_ds_cpu_optimizer": False}  # fmt: skip
BF16 = {"bf16": {"enabled": True}}
CASES = {
    "stage3": {},
    "stage3_gpt2_tied": {"arch": "gpt2"},
    "stage3_bf16": {"ds": BF16},
    "stage3_fp16": {"ds": {"fp16": {"enabled": True, "initial_scale_power": 8}}},
    "stage3_offload": {"ds": OFFLOAD, "optimizer": "adamw"},
    "stage3_offload_param_bf16": {"ds": {**OFFLOAD_PARAM, **BF16}},
    "stage3_num_items": {"num_items": True},
    "stage3_frozen": {"freeze": "embed_tokens"},
    "stage2": {"ds": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 3000}}},
    "stage2_bf16": {"ds": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 3000}, **BF16}},
    "stage1": {"ds": {"zero_optimization": {"stage": 1}}},
    "stage1_bf16_fp32_accumulation": {
        "ds": {"zero_optimization": {"stage": 1}, **BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    },
    "stage0": {"ds": {"zero_optimization": {"stage": 0}}},
    "stage0_bf16": {"ds": {"zero_optimization": {"stage": 0}, **BF16}},
}


@pytest.fixture(scope="module")
def results(trainings):
    runs = []
    for name, case in CASES.items():
        runs.append({"name": f"{name}_plain", "engine": "plain", **case})
        block = {"level": 0.0, "statistics": {"update_ratio_interval": 1}}
        runs.append({"name": f"{name}_ours", "stability": block, "high_frequency": [1, 2, 3], **case})
    return trainings(runs)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_losses_are_those_of_plain_deepspeed(results, name):
    plain, ours = results[f"{name}_plain"], results[f"{name}_ours"]
    assert plain["losses"] == ours["losses"]
    assert plain["weights"].keys() == ours["weights"].keys()
    for key, weight in plain["weights"].items():
        assert torch.equal(weight, ours["weights"][key]), key


@pytest.mark.parametrize("name", CASES)
def test_statistics_were_measured_all_the_same(results, name):
    last = results[f"{name}_ours"]["metrics"][-1]
    norm = float(results[f"{name}_plain"]["grad_norm"]) if results[f"{name}_plain"]["grad_norm"] is not None else None
    assert last["stability/variance_ratio"] == pytest.approx(1.0)
    assert 0 < last["stability/entropy"] < 5 and 0 < last["stability/high_frequency_mass"] < 1
    assert last["stability/gain"] == 0.0
    if norm is not None:
        assert last["grad_norm"] == pytest.approx(norm, rel=5e-3 if "bf16" in name or "fp16" in name else 1e-5)
