"""When a step goes without the all-reduce (collective.Pace), without ranks: the all-reduce of two is played here."""

import pytest
import torch

from ds_stability import collective
from ds_stability.collective import Pace
from ds_stability.statistics import INDEX, VECTOR_SIZE, StepSums

SEVEN = torch.tensor(7.0, dtype=torch.float64)


@pytest.fixture
def others(monkeypatch):
    """What the other of two ranks brings in, by field; `calls` counts the all-reduces."""
    found = {"seconds": 0.1, "calls": 0}

    def reduce_step(vector, group):
        found["calls"] += 1
        total = vector.clone()
        for name in ("seconds", "stop_requests"):
            total[INDEX[name]] += found.get(name, 0.0)
        return StepSums(total.numpy())

    monkeypatch.setattr(collective, "reduce_step", reduce_step)
    monkeypatch.setattr(collective.dist, "get_world_size", lambda group=None: 2)
    return found


def vector(**fields):
    values = torch.zeros(VECTOR_SIZE, dtype=torch.float64)
    for name, value in {"grad_sq": 0.0, "seconds": 0.1, **fields}.items():
        values[INDEX[name]] = value
    return values


def reduced(pace, others, steps):
    """Which of the steps had an all-reduce."""
    found = []
    for step in range(steps):
        before = others["calls"]
        pace.reduce(vector(), step, SEVEN)
        found.append(others["calls"] > before)
    return found


def test_every_step_with_interval_1(others):
    assert all(reduced(Pace(None, 1), others, 30))


def test_only_steps_that_measure_while_they_come_within_a_second(others):
    assert [step for step, had in enumerate(reduced(Pace(None, 5), others, 20)) if had] == [0, 5, 10, 15]


def test_an_all_reduce_every_second_where_steps_that_measure_are_rare(others):
    assert [step for step, had in enumerate(reduced(Pace(None, 1000), others, 40)) if had] == [0, 10, 20, 30]


@pytest.mark.parametrize("seconds", [0.9, 60.0])
def test_every_step_where_the_mean_step_takes_long(others, seconds):
    others["seconds"] = 2 * seconds
    assert all(reduced(Pace(None, 1000), others, 5))


def test_a_step_without_knows_the_norm_and_nothing_of_this_rank(others):
    pace = Pace(None, 1000)
    pace.reduce(vector(), 0, SEVEN)
    sums = pace.reduce(vector(grad_sq=3.0, stop_requests=1.0, update_sq=5.0, seconds=9.0), 1, SEVEN)
    assert others["calls"] == 1 and sums["grad_sq"] == 7.0 and sums.vector.sum() == 7.0


def test_a_wish_of_another_rank_is_heard_at_the_next_one_and_from_then_on(others):
    pace = Pace(None, 1000)
    pace.reduce(vector(), 0, SEVEN)
    others["stop_requests"] = 1.0
    heard = [pace.reduce(vector(), step, SEVEN)["stop_requests"] for step in range(1, 14)]
    assert heard == [0.0] * 9 + [1.0] * 4
