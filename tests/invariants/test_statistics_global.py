"""Invariant 2: a statistic does not depend on how the global batch is cut over ranks, micro-batches and accumulation."""

import pytest

BLOCK = {"level": 0.5, "controller": {"warmup_steps": 1, "ramp_steps": 1}, "statistics": {"gradient_noise_scale": True}}
LAYOUTS = {"1x2x4": (1, 2, 4), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "2x4x1": (2, 4, 1)}
KEYS = ("loss", "cross_entropy", "grad_norm", "stability/variance_ratio", "stability/surprisal",
        "stability/surprisal_variance", "stability/weighted_surprisal_variance", "stability/effective_tokens",
        "stability/entropy", "stability/top1_mass", "stability/log_partition", "stability/high_frequency_mass",
        "stability/tokens", "stability/gain", "stability/mean_weight")  # fmt: skip


@pytest.fixture(scope="module")
def rows(trainings):
    collected = {}
    for ranks in (1, 2):
        runs = [{"name": name, "micro": micro, "gas": gas, "num_items": True, "lr": 1e-4, "optimizer": "sgd", "steps": 4,
                 "stability": BLOCK, "high_frequency": [0, 1, 2, 3, 4]}
                for name, (world, micro, gas) in LAYOUTS.items() if world == ranks]  # fmt: skip
        results = trainings(runs, ranks=ranks)
        collected |= {run["name"]: results[run["name"]]["metrics"] for run in runs}
    return collected


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1x8x1"])
def test_same_value_for_every_layout(rows, layout, key):
    for reference, row in zip(rows["1x8x1"], rows[layout], strict=True):
        assert row[key] == pytest.approx(reference[key], rel=1e-5), row["step"]


def test_gain_was_in_force(rows):
    assert rows["1x8x1"][-1]["stability/gain"] > 0.05
