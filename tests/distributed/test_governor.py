"""The governor under real ZeRO-3 on two ranks: targets from both sides, one collective a step, resume, and its errors."""

import math

import pytest
import torch

from ds_stability.stabilizers.governance import BONUS

COMMS = {"comms_logger": {"enabled": True, "prof_all": True, "verbose": False, "debug": False}}
VOCAB = 97
STEPS, WARMUP, SETTLED = 90, 20, 60
FAST = {"warmup_steps": WARMUP, "setpoint_ramp_steps": 5, "probe_interval": 4, "probe_size": 8, "kp": 0.2, "ki": 0.05, "slew_rate": 0.1}
LEARNER = {"steps": STEPS, "gas": 1, "micro": 8, "lr": 3e-3, "held_out": 8}


def governed(name, target, actuator="token_weight", control=None, **run):
    control = {"mode": "governor", "target": target, "actuator": actuator, **FAST, **(control or {})}
    return {"name": name, "stability": {"controller": control}, **LEARNER, **run}


SHORT = {"warmup_steps": 1, "probe_interval": 2, "setpoint_ramp_steps": 0}
SIDES = [
    governed("weight_up", 3.9, "token_weight"),
    governed("weight_down", 3.2, "token_weight"),
    governed("bonus_up", 3.9, "entropy_bonus"),
    governed("bonus_down", 3.2, "entropy_bonus"),
]
RUNS = [
    SIDES[0], SIDES[3],
    {"name": "plain", "engine": "plain", "steps": 6, "ds": COMMS},
    governed("counted", "initial", control=SHORT, steps=6, gas=2, micro=2, ds=COMMS),
    governed("whole", "data", "entropy_bonus", SHORT, steps=9, gas=2, micro=2, history=True),
    governed("saved", "data", "entropy_bonus", SHORT, steps=4, gas=2, micro=2, save_at=4),
    governed("training_step", 4.0, control={**SHORT, "probe_interval": 0}, steps=5, held_out=0),
    governed("saturated", 0.05, control={**SHORT, "output_limit": 0.01}, steps=14),
    governed("mass", 0.9, control={**SHORT, "statistic": "high_frequency_mass"}, steps=4, high_frequency=[0, 1, 2]),
    governed("too_high", 4.7, steps=1),
    governed("nothing_held_out", "initial", steps=1, held_out=0),
    governed("other_sequences", "initial", steps=1, held_out_odd=True),
    governed("no_set", 0.5, control={"statistic": "high_frequency_mass"}, steps=1),
    governed("own_loss", 3.0, arch="own_loss", steps=1),
]


@pytest.fixture(scope="module")
def results(trainings):
    first = trainings(RUNS)
    resumed = {**next(run for run in RUNS if run["name"] == "whole"), "name": "resumed",
               "load": str(first["folder"] / "saved_checkpoint")}  # fmt: skip
    return {**first, **trainings([resumed])}


def series(result, key):
    return [row[key] for row in result["metrics"]]


@pytest.fixture(scope="module")
def other_sides(trainings):
    return trainings(SIDES[1:3])


@pytest.mark.slow
@pytest.mark.parametrize("run", SIDES[1:3], ids=lambda run: run["name"])
def test_the_other_sides(other_sides, run):
    check_side(other_sides[run["name"]], run)


@pytest.mark.parametrize("run", [SIDES[0], SIDES[3]], ids=lambda run: run["name"])
def test_reaches_a_target_from_either_side(results, run):
    check_side(results[run["name"]], run)


def check_side(result, run):
    rows, control = result["metrics"], run["stability"]["controller"]
    target, values = control["target"], series(result, "stability/governor_statistic")
    assert sum(values[SETTLED:]) / (STEPS - SETTLED) == pytest.approx(target, rel=0.04)
    last = rows[-1]
    acts, rests = ("gain", "entropy_bonus") if control["actuator"] == "token_weight" else ("entropy_bonus", "gain")
    assert last[f"stability/{rests}"] == 0.0 and last["stability/governor_output"] * (target - 3.5) > 0
    assert last[f"stability/{acts}"] == (-1 if acts == "gain" else BONUS) * last["stability/governor_output"]
    assert all(row[f"stability/{acts}"] == 0.0 for row in rows[:WARMUP])


def test_the_same_state_on_every_rank(results):
    for run in (SIDES[0], SIDES[3]):
        states = results[run["name"]]["states"]
        assert len(states) == 2 and states[0] == states[1]
        assert states[0]["governance"]["governor"]["applied_steps"] == STEPS


def per_step(counts, step):
    """{(op, bytes): calls} of a step; the counts are cumulative."""
    flat = [{(op, size): n for op, sizes in counts[i].items() for size, n in sizes.items()} for i in (step - 1, step)]
    return {key: n - flat[0].get(key, 0) for key, n in flat[1].items() if n != flat[0].get(key, 0)}


def test_one_more_collective_a_step_and_one_more_where_it_measures(results):
    plain, counts = per_step(results["plain"]["collectives"], 4), results["counted"]["collectives"]
    for step in (4, 5):  # measured before steps with applied_steps 1, 3 and 5
        ours = per_step(counts, step)
        reduces = {key: n - plain.get(key, 0) for key, n in ours.items() if key[0] == "all_reduce" and n != plain.get(key, 0)}
        assert list(reduces.values()) == [1 if step == 4 else 2] and next(iter(reduces))[1] <= 4096


def test_initial_is_the_untouched_models_value(results):
    state = results["counted"]["state"]["stabilizers"]["governance"]["governor"]
    assert state["initial"] == pytest.approx(math.log(VOCAB), abs=0.1) and state["target"] == state["initial"]


def test_resume_is_exact(results):
    whole, resumed = results["whole"], results["resumed"]
    assert resumed["state"] == whole["state"]
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name
    keep = [{k: v for k, v in row.items() if "second" not in k} for row in whole["metrics"][4:]]
    assert [{k: v for k, v in row.items() if "second" not in k} for row in resumed["metrics"]] == keep
    assert keep[-1]["stability/entropy_bonus"] != 0.0


def test_data_is_the_cross_entropy_of_the_held_out_sequences(results):
    last = results["whole"]["metrics"][-1]
    assert last["stability/governor_target"] == pytest.approx(last["cross_entropy"], rel=0.3)
    assert last["stability/governor_target"] != last["stability/governor_statistic"]


def test_training_step_as_the_source(results):
    """The mean over the last 512 tokens, of which a step here has about a hundred."""
    rows, tokens, entropy = results["training_step"]["metrics"], 0.0, 0.0
    for row, after in zip(rows[:-1], rows[1:], strict=True):
        count = row["stability/tokens"]
        keep = max(0.0, 1.0 - count / 512)
        tokens, entropy = keep * tokens + count, keep * entropy + count * row["stability/entropy"]
        if row is not rows[0]:
            assert after["stability/governor_statistic"] == pytest.approx(entropy / tokens, rel=1e-9)


def test_saturation_is_reported(results):
    rows, state = results["saturated"]["metrics"], results["saturated"]["state"]["stabilizers"]["governance"]
    assert rows[-1]["stability/saturated"] == 1 and rows[0]["stability/saturated"] == 0 and state["warned"]
    assert rows[-1]["stability/gain"] == 0.01  # concentrates, as far as it may


def test_a_mass_is_measured(results):
    value = results["mass"]["metrics"][-1]["stability/governor_statistic"]
    assert 0.0 < value < 0.9 and results["mass"]["metrics"][-1]["stability/governor_output"] < 0.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too_high", "stability.controller.target: 4.7 is not allowed; must be from 0 to 4.575 nats"),
        ("nothing_held_out", "measures on held-out text and has none; call engine.stability.set_held_out"),
        ("other_sequences", "the governor's held-out data differs between ranks"),
        ("no_set", "no high-frequency set is known"),
        ("own_loss", "OwnLossModel does not compute its loss"),
    ],
)
def test_mistakes_stop_every_rank_with_one_line(results, name, words):
    errors = results[name]["errors"]
    assert set(errors) == {0, 1}
    for text in errors.values():
        assert text.startswith("StabilityConfigError: ") and words in text and "\n" not in text
