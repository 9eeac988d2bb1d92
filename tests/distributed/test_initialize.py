"""`initialize`: the ways to give it a config, what it refuses on every rank, models that are not transformers', loops as people write them."""

import importlib.util

import pytest
import torch

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
    "expert_layers": ({"arch": "moe", "ds": STAGE2, "stability": {"level": 0.0}}, ["expert layers", "deepspeed.initialize"]),
    "no_norm": ({"clip": 0.0, "ds": {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}}, ["compute_grad_norm"]),
}
STAGES = {"0": STAGE0, "2": STAGE2, "3": {}, "1_bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True},
          "data_types": {"grad_accum_dtype": "fp32"}}}  # fmt: skip
WEIGHED = [{"name": f"weights_{stage}_{by}", "ds": ds, "steps": 3 if by else 2, "optimizer": "sgd", "clip": 0.0, "lr": 1e-2,
            "shrink": by and {"step": 2, "by": by}, "stability": {"level": 0.5, "controller": {"warmup_steps": 1, "ramp_steps": 0}}}
           for stage, ds in STAGES.items() for by in (0, 1, 10, 200)]  # fmt: skip
RUNS = [{"name": name, "steps": 2, **case} for name, (case, _) in REFUSED.items()] + [
    {"name": "by_config", "steps": 2, "stability": {"level": 0.5, "controller": {"warmup_steps": 1}}},
    {"name": "by_args", "steps": 2, "via_args": "deepspeed_config", "stability": {"level": 0.5, "controller": {"warmup_steps": 1}}},
    {"name": "triton", "steps": 2, "stability": {"level": 0.5, "controller": {"warmup_steps": 1}, "loss_kernel": "triton"}},
    *WEIGHED,
    {"name": "own_loss", "steps": 2, "arch": "own_loss", "ds": STAGE2, "stability": {"level": 0.0}},
]
CONTROLLED = {"level": 0.5, "controller": {"warmup_steps": 1, "ramp_steps": 0}}
GAIN_0 = {"level": 0.5, "controller": {"warmup_steps": 100}}
DIRECT = {"direct": True, "steps": 1, "lr": 1e-4}
LOOPS = {
    "usual": {"stability": CONTROLLED},
    "usual_0": {"stability": {}},
    "eval_mode": {"mode": "eval", "stability": CONTROLLED},
    "eval_mode_0": {"mode": "eval", "stability": {}},
    "stray": {"stray": True, "stability": CONTROLLED},
    "stray_0": {"stray": True, "stability": {}},
    "usual_stage2": {"ds": STAGE2, "stability": CONTROLLED},
    "died": {"died": True, "ds": STAGE2, "stability": CONTROLLED},
    "by_deepscale": {"via_args": "deepscale_config", "comments": True, "stability": CONTROLLED},
    **{f"direct_plain_{n}": {**DIRECT, "engine": "plain", "ds": {"zero_optimization": {"stage": n}}} for n in (1, 2, 3)},
    **{f"direct_{n}": {**DIRECT, "stability": GAIN_0, "ds": {"zero_optimization": {"stage": n}}} for n in (1, 2, 3)},
    **{f"direct_chunked_{n}": {**DIRECT, "stability": {**GAIN_0, "loss_path": "chunked"}, "ds": {"zero_optimization": {"stage": n}}}
       for n in (1, 2, 3)},
}  # fmt: skip
RUNS += [{"name": name, "steps": 3, **case} for name, case in LOOPS.items()]


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
    assert results["by_deepscale"]["losses"] == results["usual"]["losses"]  # the older flag, and a file with a comment
    assert results["by_args"]["metrics"][-1]["stability/gain"] > 0


def rows(result):
    """The metrics, times aside."""
    return [{key: value for key, value in row.items() if "second" not in key} for row in result["metrics"]]


@pytest.mark.parametrize("name, usual", [("eval_mode", "usual"), ("eval_mode_0", "usual_0"), ("stray", "usual"), ("stray_0", "usual_0"),
                                         ("died", "usual_stage2")])  # fmt: skip
def test_the_same_training_whatever_the_mode_says_and_whatever_was_before(results, name, usual):
    """A model in eval mode is trained; an evaluation with gradients is no training; a dead engine of the model leaves nothing."""
    assert "errors" not in results[name], results[name]["errors"]
    assert rows(results[name]) == rows(results[usual]) and rows(results[name])[-1]["stability/tokens"] == 91
    assert (results[name]["metrics"][-1]["stability/gain"] > 0) == (not usual.endswith("_0"))
    for key, weight in results[usual]["weights"].items():
        assert weight.equal(results[name]["weights"][key]), key


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("path", ["direct", "direct_chunked"])
def test_a_direct_backward_gives_the_gradient_that_it_gives_without_us(results, path, stage):
    ours, plain = results[f"{path}_{stage}"]["grad_norm"], results[f"direct_plain_{stage}"]["grad_norm"]
    assert float(ours) == pytest.approx(float(plain), rel=1e-4)


def test_a_model_with_a_loss_of_its_own_is_observed_at_level_0(results):
    row = results["own_loss"]["metrics"][-1]
    assert row["grad_norm"] > 0 and row["cross_entropy"] is None and row["stability/tokens"] is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_whose_weights_were_not_foretold_is_scaled_back(results, stage):
    """The loss is divided by a predicted mean weight; where the weights are k times that, so was the whole step."""
    before, foretold, strange, stranger = (results[f"weights_{stage}_{by}"] for by in (0, 1, 10, 200))
    realized = [result["metrics"][-1]["stability/realized_weight"] for result in (foretold, strange, stranger)]
    assert 0.5 < realized[0] < 2 and realized[1] == pytest.approx(10 * realized[0]) and realized[2] == pytest.approx(200 * realized[0])
    scale, rel = 2.0 / realized[0], 0.02 if "bf16" in stage else 1e-3
    for result in (strange, stranger):
        assert result["metrics"][-1]["loss"] == pytest.approx(scale * foretold["metrics"][-1]["loss"], rel=rel)
        updates = [torch.cat([(end["weights"][name] - start).flatten() for name, start in before["weights"].items()])
                   for end in (foretold, result)]  # fmt: skip
        assert (updates[1] - scale * updates[0]).norm() < rel * updates[1].norm()


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
