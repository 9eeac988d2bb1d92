"""Numbers gone wrong, in every place: NaN, Inf, no label, a spike; one rank or all; any micro-batch; fp32, bf16, fp16.

All ranks must come to the same decision, the controller's state must stay finite, and a skipped step must leave it as it
was. A covering choice of cases runs by default, all of them with `-m slow`.
"""

import itertools

import pytest
import torch
from tiny import all_finite

STEPS, BAD = 5, 2  # the step that goes wrong, from 0
FAULTS = {
    "nan": {"poison": {"value": "nan"}},
    "inf": {"poison": {"value": "inf"}},
    "masked": {"masked": {}},
    "spike_logits": {"poison": {"value": "1e4", "at": "logits"}},
    "spike_loss": {"poison": {"value": "1e4", "at": "loss"}},
}
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # 2^10: the steps before the bad one must not overflow by themselves.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1}},
}
MICROS = (0, 1, 2)  # the first, one in the middle, the last
ALL = list(itertools.product(FAULTS, (1, "all"), MICROS, PRECISIONS))
# Each pair of values of two properties occurs in one of them at least, of faults with every other property in more.
DEFAULT = [
    (fault, ranks, MICROS[(number + shift) % 3], list(PRECISIONS)[(number + 2 * shift) % 3])
    for number, fault in enumerate(FAULTS)
    for shift, ranks in ((0, 1), (1, "all"), (2, (1, "all")[number % 2]))
]


def name_of(case):
    return "-".join(map(str, case))


def run_of(case):
    fault, ranks, micro, precision = case
    where = {"step": BAD, "rank": ranks, "micro": micro}
    (kind, what), = FAULTS[fault].items()
    return {"name": name_of(case), "steps": STEPS, "gas": 3, "micro": 1, "history": True, kind: {**where, **what}, "ds": PRECISIONS[precision],
            "lr": 1e-3, "stability": {"level": 0.5, "controller": {"warmup_steps": 1}}}  # fmt: skip


def check(case, result):
    fault, _, _, precision = case
    assert "errors" not in result, result
    skipped = result["decisions"][0]
    assert result["decisions"] == [skipped] * 2 and result["states"][0] == result["states"][1]
    assert all_finite(result["history"]) and all_finite(result["metrics"])
    assert all(torch.isfinite(weight).all() for weight in result["weights"].values())
    assert [step for step in range(STEPS) if skipped[step] and step != BAD] == []
    before, after = result["history"][BAD - 1], result["history"][BAD]
    row, following = result["metrics"][BAD], result["metrics"][BAD + 1]
    if fault in ("nan", "inf"):
        assert skipped[BAD] and row["cross_entropy"] is None
    elif precision != "fp16":  # there a spike can leave the range of numbers, and the scale has to give way
        assert not skipped[BAD]
    assert row["stability/skipped_steps"] == following["stability/skipped_steps"] == skipped[BAD] == result["skipped"]
    if skipped[BAD]:
        assert after["stabilizers"] == before["stabilizers"] and after["applied_steps"] == before["applied_steps"]
        assert after["measures"] == before["measures"]
    else:
        assert after["applied_steps"] == before["applied_steps"] + 1
    assert following["cross_entropy"] is not None and following["stability/gain"] > 0
    if fault == "masked":
        assert row["stability/tokens"] < following["stability/tokens"]


@pytest.fixture(scope="module")
def chosen(trainings):
    return trainings([run_of(case) for case in DEFAULT])


@pytest.mark.parametrize("case", DEFAULT, ids=name_of)
def test_all_ranks_decide_alike_and_the_controller_stays_finite(chosen, case):
    check(case, chosen[name_of(case)])


def test_the_choice_covers_every_pair():
    for first, second in itertools.combinations(range(4), 2):
        assert {(case[first], case[second]) for case in DEFAULT} == {(case[first], case[second]) for case in ALL}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_combination(trainings, precision):
    cases = [case for case in ALL if case[3] == precision]
    results = trainings([run_of(case) for case in cases], timeout=500)
    for case in cases:
        check(case, results[name_of(case)])


@pytest.fixture(scope="module")
def whole_steps(trainings):
    """Every micro-batch of every rank without a label; fp16 that overflows at first; spikes in a row."""
    block = {"level": 0.5, "controller": {"warmup_steps": 1}}
    masked = {"name": "masked", "steps": STEPS, "history": True, "masked": {"step": BAD, "micro": "all", "rank": "all"}, "stability": block}
    return trainings([
        masked, {**masked, "name": "masked_bf16", "ds": PRECISIONS["bf16"]},
        {"name": "searching", "steps": 16, "lr": 1e-4, "history": True, "stability": {**block, "max_skipped_steps": 2},
         "ds": {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}},
        {"name": "static", "steps": 6, "lr": 1e-4, "stability": {**block, "max_skipped_steps": 3},
         "ds": {"fp16": {"enabled": True, "loss_scale": 2.0**24}}},
    ])  # fmt: skip


@pytest.mark.parametrize("name", ["masked", "masked_bf16"])
def test_a_step_without_any_token_changes_nothing_but_the_count(whole_steps, name):
    result = whole_steps[name]
    before, after = (result["history"][step]["stabilizers"]["feedback"] for step in (BAD - 1, BAD))
    assert result["metrics"][BAD]["stability/tokens"] == 0 and result["metrics"][BAD]["cross_entropy"] is None
    assert not any(result["decisions"][0]) and after["applied_steps"] == before["applied_steps"] + 1
    kept = ("tokens", "surprisal", "surprisal_sq", "histogram", "measured", "integral", "trim")
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert all_finite(result["history"]) and result["decisions"][0] == result["decisions"][1]


def test_fp16_overflows_leave_the_controller_as_it_was(whole_steps):
    """Also when they outnumber max_skipped_steps: a dynamic scale that looks for its range is no broken run."""
    result = whole_steps["searching"]
    skipped = result["decisions"][0]
    assert result["decisions"][1] == skipped and sum(skipped) > 2 and skipped[0] and not skipped[-1]
    for step in range(1, 16):
        if skipped[step]:
            before, after = result["history"][step - 1], result["history"][step]
            assert after["stabilizers"] == before["stabilizers"] and after["measures"] == before["measures"]
            assert after["skipped_in_a_row"] == 0 and result["metrics"][step]["cross_entropy"] is not None
    assert all_finite(result["history"])


def test_a_fixed_scale_that_overflows_ends_the_run_on_every_rank(whole_steps):
    errors = whole_steps["static"]["errors"]
    assert set(errors) == {0, 1} and all(text.startswith("SkippedStepsError: 3 optimizer steps in a row") for text in errors.values())
