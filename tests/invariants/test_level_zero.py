"""Invariant 1: level 0 is plain DeepSpeed to the bit, with every statistic switched on."""

import re
from pathlib import Path

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
    "hpz": {"ds": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}},
    "leaf_module": {"ds": {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["LlamaMLP"]}}}},
    "sub_groups": {"ds": {"zero_optimization": {"stage": 3, "sub_group_size": 2000}}},
    "no_reduce_scatter": {"ds": {"zero_optimization": {"stage": 3, "reduce_scatter": False}}},
    "round_robin": {"ds": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}},
    "sum_of_gradients": {"ds": {"zero_optimization": {"stage": 2}, "gradient_allreduce_op": "sum"}},
    "communication_bf16": {"ds": {"communication_data_type": "bf16"}},
    "own_accumulation": {"ds": {"managed_gradient_accumulation": False}},
    "masters_bf16": {"ds": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}},
    "autocast_bf16": {"ds": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}},
    "stage0": {"ds": {"zero_optimization": {"stage": 0}}},
    "stage0_sparse": {"ds": {"zero_optimization": {"stage": 0}}, "sparse": True, "clip": 0.0, "optimizer": "sgd"},
    "stage0_bf16": {"ds": {"zero_optimization": {"stage": 0}, **BF16}},
}


NAN = {"steps": 3, "poison": {"step": 1, "rank": 1, "value": "nan"}}
MANY = {"steps": 3, "poison": {"step": "all", "rank": 1, "value": "nan"}, "ds": {"zero_optimization": {"stage": 0}}}
MASKED = {"steps": 1, "gas": 1, "masked": {"step": 0, "micro": 0, "rank": "all"}, "ds": {"zero_optimization": {"stage": 0}}}
DIFFERENT = {f"nan{stage}{name}": {**NAN, "ds": {"zero_optimization": {"stage": stage}, **precision}}
             for stage in (0, 2) for name, precision in (("", {}), ("_bf16", BF16))}  # fmt: skip
DIFFERENT |= {"nan3": NAN, "many": MANY, "masked": MASKED}


@pytest.fixture(scope="module")
def results(trainings):
    runs = []
    for name, case in DIFFERENT.items():
        runs.append({"name": f"{name}_plain", "engine": "plain", **case})
        runs.append({"name": f"{name}_ours", "stability": {"max_skipped_steps": 2}, **case})
    runs.append({"name": "auto", "ds": {"train_batch_size": "auto"}})
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


# ---- docs/footguns.md, "Where level 0 differs from plain DeepSpeed" ------------------------------------------------------------


def finite(result):
    return all(torch.isfinite(weight).all() for weight in result["weights"].values())


def not_finite(results):
    taken = [name for name in DIFFERENT if name.startswith("nan") and not finite(results[f"{name}_plain"])]
    assert taken == ["nan0"]
    for name in [name for name in DIFFERENT if name.startswith("nan")]:
        assert finite(results[f"{name}_ours"]) and results[f"{name}_ours"]["skipped"] == 1


def many(results):
    assert not finite(results["many_plain"]) and len(results["many_plain"]["losses"]) == 3
    assert all("2 optimizer steps in a row" in text for text in results["many_ours"]["errors"].values())


def no_token(results):
    plain, ours = results["masked_plain"]["losses"], results["masked_ours"]["losses"]
    assert plain[0][0] != plain[0][0] and ours == [[0.0]]


def mistake(results):
    assert all('is "auto"' in text for text in results["auto"]["errors"].values())


DIFFERENCES = {"A number that is not finite": not_finite, "Many of them": many, "A micro-batch without a supervised token": no_token,
               "A config with a mistake": mistake}  # fmt: skip


@pytest.mark.parametrize("title", DIFFERENCES)
def test_the_list_of_differences_is_whole_and_true(results, title):
    text = (Path(__file__).parents[2] / "docs" / "footguns.md").read_text()
    listed = text.partition("### Where level 0 differs from plain DeepSpeed")[2].partition("\n### ")[0]
    assert re.findall(r"^- \*\*(.*?)\*\*", listed, re.MULTILINE) == list(DIFFERENCES)
    DIFFERENCES[title](results)


def test_the_noise_scale_does_not_ask_how_gradients_are_reduced(results):
    """Added up over ranks instead of averaged, the reduced gradient is as many times larger; it came out negative."""
    rows = [results[f"{name}_ours"]["metrics"][0] for name in ("sum_of_gradients", "round_robin")]
    assert rows[0]["grad_norm"] == pytest.approx(2 * rows[1]["grad_norm"], rel=1e-4)
    assert rows[0]["stability/gradient_noise_scale"] == pytest.approx(rows[1]["stability/gradient_noise_scale"], rel=1e-3)
