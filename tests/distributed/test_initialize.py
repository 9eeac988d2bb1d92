"""`initialize`: the ways to give it a config, what it refuses on every rank, and models that are not transformers'."""

import importlib.util

import pytest

STAGE0 = {"zero_optimization": {"stage": 0}}
STAGE2 = {"zero_optimization": {"stage": 2}}
REFUSED = {
    "clipping_stage0": ({"ds": STAGE0, "stability": {"level": 0.5, "stabilizers": {"clipping": {}}}}, ["clipping", "stage"]),
    "averaging_stage0": ({"ds": STAGE0, "stability": {"level": 0.5, "stabilizers": {"averaging": {}}}}, ["averaging", "stage"]),
    "init_decay_stage0": (
        {"ds": STAGE0, "stability": {"level": 0.5, "stabilizers": {"regularization": {"kind": "init_decay"}}}},
        ["init_decay", "stage"],
    ),
    "own_loss_feedback": ({"arch": "own_loss", "ds": STAGE2, "stability": {"level": 0.5}}, ["OwnLossModel", "level"]),
    "own_loss_clipping": (
        {"arch": "own_loss", "ds": STAGE2, "stability": {"level": 0.5, "stabilizers": {"clipping": {}}, "loss_path": "stock"}},
        ["OwnLossModel", "level"],
    ),
    "auto": ({"ds": {"train_batch_size": "auto"}, "stability": {"level": 0.5}}, ["train_batch_size", "auto"]),
    "near_miss": ({"ds": {"stabilty": {"level": 0.5}}}, ["stabilty", "stability"]),
    "no_norm": ({"clip": 0.0, "ds": {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}}, ["compute_grad_norm"]),
}
RUNS = [{"name": name, "steps": 2, **case} for name, (case, _) in REFUSED.items()] + [
    {"name": "by_config", "steps": 2, "stability": {"level": 0.5, "controller": {"warmup_steps": 1}}},
    {"name": "by_args", "steps": 2, "via_args": True, "stability": {"level": 0.5, "controller": {"warmup_steps": 1}}},
    {"name": "triton", "steps": 2, "stability": {"level": 0.5, "controller": {"warmup_steps": 1}, "loss_kernel": "triton"}},
    {"name": "own_loss", "steps": 2, "arch": "own_loss", "ds": STAGE2, "stability": {"level": 0.0}},
]


@pytest.fixture(scope="module")
def results(trainings):
    return trainings(RUNS)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank_in_one_line(results, name):
    errors = results[name]["errors"]
    assert set(errors) == {0, 1}
    for text in errors.values():
        assert text.startswith("StabilityConfigError: ") and "\n" not in text
        assert all(word in text for word in REFUSED[name][1]), text


def test_a_config_in_args_is_the_same_as_one_in_config(results):
    assert results["by_args"]["losses"] == results["by_config"]["losses"]
    assert results["by_args"]["metrics"][-1]["stability/gain"] > 0


def test_a_model_with_a_loss_of_its_own_is_observed_at_level_0(results):
    row = results["own_loss"]["metrics"][-1]
    assert row["grad_norm"] > 0 and row["cross_entropy"] is None and row["stability/tokens"] is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_train_as_the_passes_of_torch(results):
    """In the interpreter, where there is no GPU (conftest.py)."""
    mine, theirs = results["triton"], results["by_config"]
    assert "errors" not in mine, mine["errors"]
    assert mine["metrics"] != theirs["metrics"]  # another order of sums: the kernels were at work
    assert mine["metrics"][-1]["stability/gain"] > 0
    for row, wanted in zip(mine["metrics"], theirs["metrics"], strict=True):
        for name in ("loss", "cross_entropy", "stability/entropy", "stability/gain", "grad_norm"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), name


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")
def test_triton_that_is_not_installed_is_refused(results):
    assert all("ds_stability[triton]" in text for text in results["triton"]["errors"].values())
