"""What is said before a run of so many steps, and after it."""

import pytest

from ds_stability.config import StabilityConfig
from ds_stability.effect import Effect, held_ratio, outlook

GOVERNOR = {"controller": {"mode": "governor", "target": "initial"}}


def resolved(block, pretrained=False):
    return StabilityConfig.parse(block).resolve(pretrained)


@pytest.mark.parametrize("block, steps, wanted", [
    ({"level": 0.5}, 300, "feedback: 300 steps; warm-up 100, ramp to 105; acts for 195 steps"),
    ({"level": 0.5}, 60, "feedback: 60 steps; warm-up 100; never acts: lower stability.controller.warmup_steps or controller.ramp_steps, "
     "or raise the number of steps (--max_steps)"),
    ({"level": 0.5}, 103, "feedback: 103 steps; warm-up 100, ramp to 105; only its ramp acts, for 3 steps: lower "),
    ({"level": [[0, 0.0], [150, 0.0], [160, 0.5]]}, 300, "feedback: 300 steps; level 0 until 151, ramp to 156; acts for 144 steps"),
    ({"level": [[0, 0.0], [150, 0.0], [160, 0.5]]}, 120, "feedback: 120 steps; level 0 until 151; never acts: "),
    ({"level": 0.5, "stabilizers": {"clipping": {}}}, 60, "clipping: 60 steps; warm-up 100; never acts: "),
    ({"level": 0.5, "stabilizers": {"averaging": {}}}, 60, "averaging: 60 steps; no warm-up; acts for 60 steps"),
    ({**GOVERNOR, "controller": {**GOVERNOR["controller"], "warmup_steps": 20}}, 200,
     "governor: 200 steps; warm-up 20, ramp to 120; acts for 80 steps"),
    ({**GOVERNOR, "controller": {**GOVERNOR["controller"], "warmup_steps": 20}}, 60,
     "governor: 60 steps; warm-up 20, ramp to 120; only its ramp acts, for 40 steps: lower stability.controller.warmup_steps or "
     "controller.setpoint_ramp_steps"),
])  # fmt: skip
def test_outlook(block, steps, wanted):
    (line,) = outlook(resolved(block), steps)
    assert line.startswith(wanted)


def test_nothing_is_said_where_nothing_is_to_act():
    config = resolved({"level": 0.0})
    assert outlook(config, 10) == [] == Effect(config).lines()
    assert len(outlook(resolved({"level": 0.5, "stabilizers": {"feedback": {}, "clipping": {}}}), 10)) == 2


def row(ratio=0.5, gain=1.0, **more):
    return {"stability/variance_ratio": ratio, "stability/target_ratio": 0.5, "stability/gain": gain, "stability/saturated": 0, **more}


def test_what_was_held_and_for_how_long():
    effect = Effect(resolved({"level": 0.5, "controller": {"warmup_steps": 2, "ramp_steps": 2}}))
    for step in range(8):
        effect.observe(step, row(gain=float(step >= 2), ratio=1.0 if step < 4 else 0.4 + 0.05 * step))  # .6 to .75
    effect.observe(8, {"skipped": True})
    assert effect.lines() == ["feedback: held variance ratio 0.675 (target 0.5) over 4 of 9 steps; saturated in 0"]


def test_a_run_that_ends_in_its_warm_up_says_so():
    effect = Effect(resolved({"level": 0.5}))
    for step in range(5):
        effect.observe(step, row(gain=0.0))
    assert effect.lines()[0].startswith("feedback: acted in no step of 5, so nothing was held: lower stability.controller.warmup_steps")
    effect = Effect(resolved(GOVERNOR))
    for step in range(4):
        metrics = {"stability/governor_statistic": 3.0, "stability/governor_setpoint": 3.0, "stability/governor_target": 2.0}
        effect.observe(step, {**metrics, "stability/gain": 0.1})
    assert effect.lines()[0].startswith("governor: acted on its ramp alone, for 4 steps of 4, so nothing was held")
    effect.observe(5, {**metrics, "stability/governor_setpoint": 2.0, "stability/gain": 0.1, "stability/saturated": 1})
    assert effect.lines() == ["governor: held entropy 3 (set point 2) over 1 of 5 steps; saturated in 1"]


def test_how_often_the_others_acted():
    stabilizers = {"clipping": {}, "averaging": {}, "regularization": {"kind": "z_loss"}}
    effect = Effect(resolved({"level": 0.5, "stabilizers": stabilizers}))
    effect.observe(0, {"stability/clip_threshold": None, "grad_norm": 9.0, "stability/averaging_beta": 0.5,
                       "stability/regularization_coefficient": 0.1})  # fmt: skip
    effect.observe(1, {"stability/clip_threshold": 1.0, "grad_norm": 9.0, "stability/averaging_beta": 0.5})
    assert sorted(effect.lines()) == [
        "averaging: acted in 2 of 2 steps", "clipping: acted in 1 of 2 steps", "regularization: acted in 1 of 2 steps",
    ]  # fmt: skip


def test_of_few_tokens_the_windows_ratio_is_what_was_held():
    """A step's own ratio is .55 on the mean where the level holds .5 at 32 tokens a step."""
    own, window = {"stability/variance_ratio": 0.55}, {"stability/windowed_variance_ratio": 0.5}
    assert held_ratio(own | window | {"stability/tokens": 32.0}) == 0.5
    assert held_ratio(own | window | {"stability/tokens": 1016.0}) == held_ratio(own | {"stability/tokens": 32.0}) == 0.55
    assert held_ratio({"stability/variance_ratio": None, "stability/tokens": None}) is None
