"""The fault driver: a short set by default, all 30 trials by `make faults` (which is this driver from the command line).

The short set is one run that loses a rank while it trains, is started again, loses one while it writes a checkpoint, is
started again, loses one while it probes, is started again, and must come to the bytes of the undisturbed run.
"""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import driver
import fault_runs


@pytest.fixture(scope="module")
def records(fault_driver):
    chain, = driver.plan(3, 1, (("training", 3),))
    return fault_driver.chain(chain)


def test_the_short_set_covers_three_phases(records):
    assert sorted(record["phase"] for record in records) == ["checkpoint", "probing", "training"]


def test_every_process_ends_and_the_lost_rank_is_named(records):
    for record in records:
        assert record["struck"] and record["seconds"] is not None and record["seconds"] < driver.END_SECONDS, record
        assert record["named"], record
        assert record["exit_code"] != 0, record


def test_the_restarted_run_is_the_undisturbed_one_to_the_bit(records):
    assert all(record["kept"] for record in records), records
    assert records[-1]["differences"] == [], records[-1]["differences"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), [("evaluation", 1), ("sweep", 1)])
def test_evaluation_and_sweep(fault_driver, kind, seed):
    chain, = driver.plan(2, seed, ((kind, 2),))
    for record in fault_driver.chain(chain):
        assert record["passed"], record


# ---- the driver itself ----------------------------------------------------------------------------------------------


def test_the_plan_is_seeded_and_covers_all_phases():
    chains = driver.plan(30, 0)
    assert chains == driver.plan(30, 0) != driver.plan(30, 1)
    trials = [trial for chain in chains for trial in chain.trials]
    assert [trial.number for trial in trials] == list(range(30))
    for phase in driver.PHASES:
        assert sum(trial.phase == phase for trial in trials) == 6
        assert {trial.rank for trial in trials if trial.phase == phase} == {0, 1}
    assert len([trial for chain in driver.plan(4, 0) for trial in chain.trials]) == 4


def test_moments_of_a_chain_come_one_after_the_other(tmp_path):
    """What an earlier attempt has written must not look like the next moment."""
    training = fault_runs.Training(tmp_path)
    run = fault_runs.RunDir(tmp_path / "run")
    run.path.mkdir()
    run.manifest.write_text("{}")
    for seed in range(50):
        for phase in training.phases:
            for later in training.phases:
                first, then = (training.moment(run.path, which, position, random.Random(seed)) for position, which in enumerate((phase, later)))
                run.metrics.write_text("")
                step = 0
                while not first.come() and step < 8:
                    step += 1
                    run.metrics.write_text(json.dumps({"step": step}) + "\n")
                assert not then.come(), (phase, later, step)


def test_the_line_that_names_the_rank():
    text = "\n".join([
        "error: rank 0: rank 1 of this host has ended; so does this one",
        "[launch.py] ['python', 'train.py', '--local_rank=1', '--seed', '0'] exits with return code = -9",
    ])  # fmt: skip
    assert driver.naming_line(text, 1).startswith("error: rank 0")
    assert driver.naming_line(text, 0) is None  # it spoke, it was not lost
    assert driver.naming_line("error: rank 1: lost contact with rank 0 on here (Connection closed)", 0)
    assert driver.naming_line(text.splitlines()[1], 1) and not driver.naming_line(text.splitlines()[1], 0)


def test_what_counts_as_passed():
    good = {"struck": True, "seconds": 1.0, "named": "x", "kept": True, "differences": []}
    assert driver.passed(good)
    for bad in ({"struck": False}, {"seconds": None}, {"named": None}, {"kept": False}, {"differences": ["final/model.safetensors"]}):
        assert not driver.passed({**good, **bad})
    assert driver.differences({"a": b"1", "b": b"2"}, {"a": b"1", "b": b"3", "c": b""}) == ["b", "c"]


def test_the_summary_counts_by_phase():
    record = {"struck": True, "named": "x", "kept": True, "differences": [], "moment": "step 3", "passed": True, "trial_seconds": 20.0,
              "revision": "a" * 40, "dirty": True}  # fmt: skip
    records = [
        {**record, "trial": 0, "phase": "training", "rank": 0, "inside": True, "seconds": 1.0},
        {**record, "trial": 1, "phase": "training", "rank": 1, "inside": False, "seconds": 3.0},
        {**record, "trial": 2, "phase": "sweep", "rank": 1, "inside": True, "seconds": None, "named": None, "passed": False},
    ]
    result = driver.summary(records, 0)
    assert result["phases"][0] == {"phase": "training", "trials": 2, "rank_0": 1, "inside": 1, "ended": 2, "median_seconds": 2.0,
                                   "longest_seconds": 3.0, "named": 2, "same": 2}  # fmt: skip
    assert result["phases"][1]["ended"] == 0 and result["phases"][1]["longest_seconds"] is None
    assert result["failed"] == [{"trial": 2, "phase": "sweep", "rank": 1, "moment": "step 3"}] and result["seconds"] == 60.0
    assert result["rows"] == [{"revision": "a" * 40}] and result["git"]["dirty"]

    import render

    text = render.faults_section(result)
    assert "| training | 2 (1) | 1 | 2 | 2.0, 3.0 | 2 | 2 |" in text and "| sweep | 1 (0) | 1 | 0 | -, - | 0 | 1 |" in text
    assert text.endswith("Trial 2 failed: sweep, rank 1 at step 3.")
