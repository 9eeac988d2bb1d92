"""Invariants 3 and 5: one extra all-reduce of at most 4 KB a step; the same state on every rank; unequal blocks stop.

Where only every third step measures, the others have that all-reduce only if a wish to stop has to be heard.
"""

import pytest

COMMS = {"comms_logger": {"enabled": True, "prof_all": True, "verbose": False, "debug": False}}
CLOCK = ("step_seconds", "tokens_per_second")
ALL_FAMILIES = {"feedback": {}, "clipping": {}, "averaging": {}, "regularization": {"kind": "init_decay"}}
RUNS = [
    {"name": "plain", "engine": "plain", "steps": 5, "ds": COMMS},
    {"name": "observed", "stability": {"level": 0.0, "statistics": {"update_ratio_interval": 2}}, "steps": 5, "ds": COMMS},
    {"name": "controlled", "steps": 5, "ds": COMMS,
     "stability": {"level": 0.5, "stabilizers": ALL_FAMILIES, "controller": {"warmup_steps": 2}, "ema": {}}},
    *({"name": name, "stability": {"level": 0.0, "statistics": {"interval": 3, "update_ratio_interval": 2}}, "steps": 8, "ds": COMMS,
       "hear_seconds": seconds} for name, seconds in {"seldom": 1e9, "hearing": 0.0}.items()),
    {"name": "unequal", "stability": {"level": 0.5}, "other_block": {"level": 0.4}},
]  # fmt: skip


@pytest.fixture(scope="module")
def results(trainings):
    return trainings(RUNS)


def per_step(counts, step=-1):
    """{op: {bytes: calls}} of a step, by default the last one: the counts are cumulative."""
    last, before = counts[step], counts[step - 1]
    return {op: {size: n - before.get(op, {}).get(size, 0) for size, n in sizes.items()
                 if n != before.get(op, {}).get(size, 0)} for op, sizes in last.items()}  # fmt: skip


@pytest.mark.parametrize("name", ["observed", "controlled"])
def test_exactly_one_more_collective(results, name):
    """Above level 0 DeepSpeed takes its gradient norm, one fp64 number, from that one."""
    plain, ours = per_step(results["plain"]["collectives"]), per_step(results[name]["collectives"])
    extra, saved = [], []
    for op in plain.keys() | ours.keys():
        for size in plain.get(op, {}).keys() | ours.get(op, {}).keys():
            more = ours.get(op, {}).get(size, 0) - plain.get(op, {}).get(size, 0)
            extra += [(op, size)] * more
            saved += [(op, size)] * -more
    assert len(extra) == 1, extra
    assert saved == ([] if name == "observed" else [("all_reduce", 8)])
    op, size = extra[0]
    assert op == "all_reduce" and size <= 4096


def test_a_step_that_measures_nothing_has_none_of_ours(results):
    plain = per_step(results["plain"]["collectives"])
    for name, silent in {"seldom": (1, 2, 4, 5, 7), "hearing": ()}.items():
        for step in range(1, 8):
            ours = per_step(results[name]["collectives"], step)
            assert (ours == plain) == (step in silent), (name, step, ours)


def test_silent_steps_record_what_the_others_do(results):
    for seldom, hearing in zip(results["seldom"]["metrics"], results["hearing"]["metrics"], strict=True):
        assert {key: value for key, value in seldom.items() if key not in CLOCK} == {
            key: value for key, value in hearing.items() if key not in CLOCK
        }
    rows, every = results["seldom"]["metrics"], results["observed"]["metrics"]
    assert [row["stability/entropy"] is not None for row in rows] == [step % 3 == 0 for step in range(8)]
    assert [row["stability/update_ratio"] is not None for row in rows] == [step in (3, 6) for step in range(8)]
    assert rows[3]["stability/update_ratio"] == every[3]["stability/update_ratio"]  # that of step 2: the one of step 0 was not sent
    assert [row["grad_norm"] for row in rows[:5]] == [row["grad_norm"] for row in every]
    assert results["seldom"]["states"][0] == results["seldom"]["states"][1]


def test_every_rank_holds_the_same_state(results):
    states = results["controlled"]["states"]
    assert len(states) == 2 and states[0] == states[1]
    assert states[0]["feedback"]["applied_steps"] == 5


def test_unequal_blocks_stop_every_rank(results):
    errors = results["unequal"]["errors"]
    assert set(errors) == {0, 1}
    for text in errors.values():
        assert text.startswith("StabilityConfigError: ") and "differs between ranks" in text and "\n" not in text
