"""Invariant 6: no non-finite number enters the controller; one on any rank makes every rank skip and count the step."""


import pytest
import torch
from tiny import all_finite

CONTROL = {"level": 0.5, "controller": {"warmup_steps": 1}}
POISON = {"step": 3, "rank": 1, "value": "nan"}
STAGES = {
    "stage3": {},
    "stage3_inf": {"poison": {**POISON, "value": "inf"}},
    "stage3_bf16": {"ds": {"bf16": {"enabled": True}}},
    "stage3_offload": {
        "ds": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
    },
    "stage2": {"ds": {"zero_optimization": {"stage": 2}}},
    "stage2_bf16": {"ds": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True, "check_grad_overflow": False}}},
    "stage1_bf16": {
        "ds": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    },
    "stage0": {"ds": {"zero_optimization": {"stage": 0}}},
    "stage0_bf16": {"ds": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}},
}
RUNS = [{"name": name, "steps": 6, "poison": POISON, "stability": CONTROL, **case} for name, case in STAGES.items()]
RUNS += [
    {"name": "level0", "steps": 6, "poison": POISON, "stability": {"level": 0.0}},
    {"name": "level0_silent", "steps": 6, "poison": POISON, "stability": {"level": 0.0, "statistics": {"interval": 2}}, "hear_seconds": 1e9},
    {"name": "fp16", "steps": 16, "lr": 1e-4, "stability": CONTROL, "ds": {"fp16": {"enabled": True, "initial_scale_power": 24}}},
    {"name": "all_steps", "steps": 6, "poison": {**POISON, "step": "all"}, "stability": {**CONTROL, "max_skipped_steps": 2}},
    {"name": "masked_one", "steps": 4, "masked": {"step": 2, "micro": 0, "rank": 1}, "stability": CONTROL},
    {"name": "masked_one_level0", "steps": 4, "masked": {"step": 2, "micro": 0, "rank": 1}, "stability": {"level": 0}},
    {"name": "masked_all_num_items", "steps": 4, "gas": 1, "num_items": True, "stability": CONTROL,
     "masked": {"step": 2, "micro": 0, "rank": "all"}},
    {"name": "masked_all", "steps": 4, "gas": 1, "masked": {"step": 2, "micro": 0, "rank": "all"}, "stability": CONTROL},
]


@pytest.fixture(scope="module")
def results(trainings):
    return trainings(RUNS)


@pytest.mark.parametrize("name", [*STAGES, "level0"])
def test_one_bad_number_on_one_rank_skips_the_step_everywhere(results, name):
    result = results[name]
    flags = [bool(row.get("skipped")) for row in result["metrics"]]
    assert flags == [False, False, False, True, False, False]
    assert result["skipped"] == 1 and result["metrics"][-1]["stability/skipped_steps"] == 1
    assert result["state"]["applied_steps"] == 5 and all_finite(result["state"])
    assert result["states"][0] == result["states"][1]
    assert all(torch.isfinite(w).all() for w in result["weights"].values())
    assert result["metrics"][3]["cross_entropy"] is None and result["metrics"][4]["cross_entropy"] is not None


def test_a_step_without_our_collective_is_skipped_by_its_norm(results):
    result = results["level0_silent"]
    assert [bool(row.get("skipped")) for row in result["metrics"]] == [False, False, False, True, False, False]
    assert result["decisions"][0] == result["decisions"][1] and result["metrics"][3]["grad_norm"] is None
    assert result["state"]["applied_steps"] == 5 and all(torch.isfinite(w).all() for w in result["weights"].values())


def test_the_skipped_step_leaves_gain_and_moments_as_they_were(results):
    rows = results["stage3"]["metrics"]
    assert rows[4]["stability/mu"] is not None and rows[4]["stability/gain"] > 0


def test_fp16_overflow_is_skipped_and_does_not_end_the_run(results):
    rows = results["fp16"]["metrics"]
    assert results["fp16"]["skipped"] > 0 and rows[0]["skipped"] is True
    assert 0 < results["fp16"]["state"]["applied_steps"] == 16 - results["fp16"]["skipped"]
    assert rows[-1]["stability/loss_scale"] < 2**24


def test_too_many_in_a_row_end_the_run_on_every_rank(results):
    errors = results["all_steps"]["errors"]
    assert set(errors) == {0, 1}
    assert all(text.startswith("SkippedStepsError: 2 optimizer steps in a row") for text in errors.values())


@pytest.mark.parametrize("name", ["masked_one", "masked_one_level0", "masked_all", "masked_all_num_items"])
def test_a_micro_batch_without_supervised_tokens_adds_nothing(results, name):
    result = results[name]
    assert result["skipped"] == 0 and all_finite(result["state"])
    tokens = [row["stability/tokens"] for row in result["metrics"]]
    assert tokens[2] < tokens[1] and (tokens[2] == 0) == name.startswith("masked_all")
    assert all(torch.isfinite(w).all() for w in result["weights"].values())
