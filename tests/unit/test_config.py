import hashlib
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability import loss_kernel
from ds_stability.config import (
    StabilityConfig,
    describe,
    level_at,
)
from ds_stability.errors import StabilityConfigError
from ds_stability.same_block import require_same_block, training_part

FULL = {
    "level": [[0, 0], [200, 0.5]],
    "stabilizers": {
        "feedback": {"level": 0.25, "permute": True, "replay": "a.jsonl"},
        "clipping": {"level": 0.2, "ema_decay": 0.9},
        "averaging": {"beta_max": 0.9},
        "regularization": {"kind": "label_smoothing", "max": 0.2},
    },
    "controller": {"warmup_steps": 7, "ramp_steps": 0, "gain_max": 14, "trim_kp": 0, "trim_ki": 0, "trim_max": 0},
    "statistics": {"high_frequency_coverage": 0.4, "high_frequency_file": "a.json", "ema_decay": 0.5, "interval": 1,
                   "gradient_noise_scale": False, "update_ratio_interval": 0, "chunk_size": 128},
    "probe": {"interval": 5, "num_prompts": 2, "max_new_tokens": 3, "prompts_file": "p.txt", "max_gather_gib": 0.5},
    "loss_path": "linear",
    "loss_kernel": "triton",
    "max_skipped_steps": 1,
    "objective": {"name": "focal", "gamma": 1.5},
    "alarm": {"action": "stop", "reference_file": "r.txt", "start_step": 3, "patience": 1, "share_tolerance": 0.1, "entropy_tolerance": 0.3},
    "ema": {"decay": 0.9, "start_step": 3, "warmup": False},
}  # fmt: skip


GOVERNOR = {
    "mode": "governor", "warmup_steps": 7, "statistic": "top1_mass", "target": 0.25, "actuator": "entropy_bonus", "start": "alarm", "kp": 0.5, "ki": 0,
    "dead_band": 0.01, "slew_rate": 0.5, "output_limit": 2, "setpoint_ramp_steps": 0, "probe_interval": 0, "probe_size": 3,
}  # fmt: skip


def parse(**block):
    return StabilityConfig.parse(block)


def test_the_empty_block_is_plain_training():
    cfg = parse()
    assert cfg == StabilityConfig()
    assert not cfg.active and cfg.resolved_loss_path == "stock"
    assert cfg.family_level("feedback", 10**6) == 0.0
    assert (cfg.controller.gain_max, cfg.controller.trim_kp, cfg.controller.trim_ki) == (8.0, 0.1, 0.02)
    assert (cfg.controller.ramp_steps, cfg.controller.trim_max, cfg.controller.warmup_steps) == (5, 0.5, None)
    assert (cfg.statistics.high_frequency_coverage, cfg.statistics.ema_decay, cfg.statistics.interval) == (0.5, 0.9, 1)
    assert (cfg.statistics.gradient_noise_scale, cfg.statistics.update_ratio_interval) == (True, 10)
    assert (cfg.probe.interval, cfg.probe.num_prompts, cfg.probe.max_new_tokens) == (0, 16, 64)
    assert cfg.probe.max_gather_gib == 20
    assert cfg.max_skipped_steps == 10


def test_every_key_can_be_set_and_is_kept():
    cfg = StabilityConfig.parse(FULL)
    defaults = parse().to_dict()["controller"]
    assert set(defaults) == set(FULL["controller"]) | set(GOVERNOR)
    assert parse(controller=GOVERNOR).to_dict()["controller"] == {**defaults, **GOVERNOR}
    assert cfg.to_dict() == {**FULL, "controller": {**defaults, **FULL["controller"]}, "stabilizers": {
        "feedback": {"level": 0.25, "permute": True, "replay": "a.jsonl"},
        "clipping": {"level": 0.2, "ema_decay": 0.9},
        "averaging": {"level": None, "beta_max": 0.9},
        "regularization": {"level": None, "kind": "label_smoothing", "max": 0.2},
    }}  # fmt: skip
    assert StabilityConfig.parse(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_the_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse().level = 0.5
    with pytest.raises(ValueError, match="frozen"):
        parse().controller.gain_max = 1.0


def test_families_take_the_level_of_the_block_unless_they_have_their_own():
    cfg = StabilityConfig.parse(FULL)
    for step in (0, 50, 200, 999):
        assert cfg.family_level("feedback", step) == 0.25
        assert cfg.family_level("averaging", step) == level_at(cfg.level, step) == min(step, 200) / 200 * 0.5
    assert cfg.max_level("averaging") == 0.5
    assert cfg.family_level("clipping", 3) == 0.2


def test_absent_families_are_off():
    cfg = parse(level=0.9, stabilizers={"clipping": {}})
    assert cfg.max_level("feedback") == cfg.family_level("feedback", 5) == 0.0
    assert cfg.max_level("clipping") == 0.9 and cfg.active
    none = parse(level=0.9, stabilizers={})
    assert not none.active and none.resolved_loss_path == "stock"


@pytest.mark.parametrize(
    "block, path",
    [
        ({}, "stock"),
        ({"level": 0}, "stock"),
        ({"level": [[0, 0], [10, 0.0]]}, "stock"),
        ({"level": [[0, 0], [10, 0.01]]}, "linear"),
        ({"level": 0.5}, "linear"),
        ({"level": 0.5, "loss_path": "chunked"}, "chunked"),
        ({"level": 0.5, "stabilizers": {}}, "stock"),
        ({"level": 0.5, "stabilizers": {"feedback": {"level": 0}}}, "stock"),
        ({"stabilizers": {"clipping": {"level": 0.1}}}, "linear"),
        ({"stabilizers": {"clipping": {"level": 0.1}}, "loss_path": "stock"}, "stock"),
        ({"stabilizers": {"regularization": {"level": 0.1, "kind": "init_decay"}}, "loss_path": "stock"}, "stock"),
        ({"level": 0, "loss_path": "chunked"}, "chunked"),
        ({"level": 0, "loss_path": "linear"}, "linear"),
        ({"controller": {"mode": "governor"}}, "linear"),
        ({"controller": {"mode": "governor"}, "stabilizers": {"clipping": {"level": 0.2}}}, "linear"),
    ],
)
def test_loss_path(block, path):
    cfg = StabilityConfig.parse(block)
    assert cfg.resolved_loss_path == path
    assert cfg.resolve(pretrained=False).loss_path == path


@pytest.mark.parametrize("kind, most", [("z_loss", 1e-2), ("label_smoothing", 0.3), ("init_decay", 0.1)])
def test_resolve_fills_every_null_that_needs_no_model(kind, most):
    block = {"level": 0.5, "stabilizers": {"feedback": {}, "regularization": {"kind": kind, "level": 0.1}}}
    cfg = StabilityConfig.parse(block)
    for pretrained, warmup in ((True, 10), (False, 100)):
        resolved = cfg.resolve(pretrained)
        assert resolved.controller.warmup_steps == warmup
        assert resolved.stabilizers["feedback"].level == 0.5
        assert resolved.stabilizers["regularization"].max == most
        assert resolved.loss_path == "linear"
        assert resolved.resolve(not pretrained) == resolved
    assert parse(controller={"warmup_steps": 3}).resolve(True).controller.warmup_steps == 3
    assert set(parse().resolve(True).stabilizers) == {"feedback"}
    assert parse(stabilizers={}).resolve(True).stabilizers == {}


def test_resolving_changes_no_level():
    cfg = StabilityConfig.parse(FULL)
    resolved = cfg.resolve(pretrained=True)
    for family in ("feedback", "clipping", "averaging", "regularization"):
        for step in range(250):
            assert resolved.family_level(family, step) == cfg.family_level(family, step)


def test_with_level_overrides_the_block_and_leaves_own_levels():
    cfg = StabilityConfig.parse(FULL).with_level(0.75)
    assert cfg.level == 0.75 and cfg.max_level("averaging") == 0.75 and cfg.max_level("feedback") == 0.25
    with pytest.raises(StabilityConfigError, match="stability.loss_path"):
        parse(loss_path="stock").with_level(0.5)


def test_the_fingerprint_is_of_the_canonical_json_and_tells_blocks_apart():
    cfg = StabilityConfig.parse(FULL)
    text = json.dumps(cfg.to_dict(), sort_keys=True, separators=(",", ":"))
    assert cfg.fingerprint() == hashlib.sha256(text.encode()).hexdigest()
    assert parse(level=1).fingerprint() == parse(level=1.0).fingerprint()
    reordered = dict(reversed(FULL.items()))
    assert StabilityConfig.parse(reordered).fingerprint() == cfg.fingerprint()
    changes = [{"level": 0.1}, {"max_skipped_steps": 2}, {"controller": {"trim_kp": 0.2}}, {"stabilizers": {}}]
    prints = {StabilityConfig.parse({**FULL, **change}).fingerprint() for change in changes} | {cfg.fingerprint()}
    assert len(prints) == 5


def test_statistics_interval_needs_the_stock_loss():
    assert parse(statistics={"interval": 10}).statistics.interval == 10
    with pytest.raises(StabilityConfigError, match="stability.statistics.interval: 10"):
        parse(level=0.1, statistics={"interval": 10})
    with pytest.raises(StabilityConfigError, match="stability.statistics.interval: 10"):
        parse(loss_path="linear", statistics={"interval": 10})


def test_the_triton_kernels_are_for_the_linear_loss():
    assert parse().loss_kernel == "torch" and parse(level=0.5, loss_kernel="triton").loss_kernel == "triton"
    assert parse(loss_path="linear", loss_kernel="triton").loss_kernel == "triton"
    for block, path in ({}, "stock"), ({"level": 0.5, "loss_path": "chunked"}, "chunked"), ({"objective": {"name": "unlikelihood_token"}}, "chunked"):
        with pytest.raises(StabilityConfigError, match=rf'stability.loss_kernel: "triton" is not allowed; must be "torch" where loss_path is {path}'):
            parse(**block, loss_kernel="triton")
    with pytest.raises(StabilityConfigError, match='stability.loss_kernel: "cuda" is not allowed; must be "torch" or "triton"'):
        parse(level=0.5, loss_kernel="cuda")


def test_kernels_that_cannot_run_here_are_refused_in_one_line(monkeypatch):
    config = parse(level=0.5, loss_kernel="triton")
    monkeypatch.setattr(loss_kernel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loss_kernel.require_kernel(parse(level=0.5))
    with pytest.raises(StabilityConfigError, match=r"^stability.loss_kernel: .* pip install 'ds_stability\[triton\]'") as caught:
        loss_kernel.require_kernel(config)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    monkeypatch.setattr(loss_kernel.importlib.util, "find_spec", lambda name: name)
    loss_kernel.require_kernel(config)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cpu"))
    for value in ("0", None):
        monkeypatch.setenv("TRITON_INTERPRET", value) if value else monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(StabilityConfigError, match="needs CUDA, and DeepSpeed runs on cpu; .* TRITON_INTERPRET=1"):
            loss_kernel.require_kernel(config)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    loss_kernel.require_kernel(config)


def test_a_block_from_before_the_kernels_is_one_with_torch():
    torch_block, triton_block = (parse(level=0.5, loss_kernel=name).resolve(pretrained=False).to_dict() for name in ("torch", "triton"))
    older = {key: value for key, value in torch_block.items() if key != "loss_kernel"}
    require_same_block(training_part(older), training_part(torch_block))
    with pytest.raises(StabilityConfigError, match=r"stability.loss_kernel: 'torch' there, 'triton' here"):
        require_same_block(training_part(older), training_part(triton_block))


@pytest.mark.parametrize("objective, message", [
    ({"name": "focl"}, 'stability.objective.name: "focl" is not allowed; must be "cross_entropy" or "label_smoothing"'),
    ({"gamma": 1.0}, "stability.objective.name: null is not allowed"),
    ({"name": "focal", "gama": 1}, 'stability.objective.gama: unknown key (value 1); did you mean "gamma"? allowed here: name, gamma'),
    ({"name": "label_smoothing", "smoothing": 1.01}, "stability.objective.smoothing: 1.01 is not allowed; must be a number from 0 to 1"),
    ({"name": "label_smoothing", "smoothing": -0.1}, "must be a number from 0 to 1"),
    ({"name": "unlikelihood_sequence"}, "stability.objective.max_new_tokens: null is not allowed; must be an integer from 1 to 1000000, the "
     "tokens to generate per text, as the sequence level needs a generation budget"),
    ({"name": "reverse_kl"}, "stability.objective.reference: null is not allowed; must be the folder or hub name of a causal LM, as this "
     "objective needs a reference model"),
    ("focal", 'stability.objective: "focal" is not allowed; must be an object with a name'),
])  # fmt: skip
def test_a_wrong_objective_is_one_line(objective, message):
    with pytest.raises(StabilityConfigError) as error:
        parse(objective=objective)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_objective_acts_through_our_loss_at_any_level():
    gem = {"name": "gem"}
    assert parse(objective=gem).resolved_loss_path == "linear" and not parse(objective=gem).active
    assert parse(objective={"name": "unlikelihood_token"}).resolved_loss_path == "chunked"
    with pytest.raises(StabilityConfigError, match="logits of whole sequences"):
        parse(objective={"name": "unlikelihood_token"}, loss_path="linear")
    assert parse(objective={"name": "cross_entropy"}) == parse() and parse().resolved_loss_path == "stock"
    with pytest.raises(StabilityConfigError, match='stability.loss_path: "stock" is not allowed'):
        parse(objective=gem, loss_path="stock")
    with pytest.raises(StabilityConfigError, match="stability.statistics.interval: 2"):
        parse(objective=gem, statistics={"interval": 2})
    resolved = parse(objective=gem).resolve(pretrained=True)
    assert resolved.to_dict()["objective"] == {"name": "gem", "beta": 0.7, "h": "linear"}


def test_describe_lists_every_key_with_meaning_default_and_range():
    infos = {info.path: info for info in describe()}
    values = StabilityConfig.parse(FULL).to_dict()

    def leaves(node, prefix=""):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    kinds = {path for path in infos if "(" in path}  # keys of one kind of objective
    assert {path for path in kinds if "(focal)" in path} == {"objective(focal).gamma"}
    assert set(leaves(values)) == {path for path, info in infos.items() if not info.section} - kinds | {"objective.gamma"}
    assert all(info.meaning and info.allowed for info in infos.values())
    assert infos["controller.gain_max"].allowed == "a number above 0 and up to 14"
    assert infos["statistics.ema_decay"].allowed == "a number above 0 and below 1"
    assert infos["max_skipped_steps"].allowed == "an integer from 1 to 1000000000"
    assert infos["probe.prompts_file"].allowed == "a non-empty string, or null"
    assert infos["controller.gain_max"].default == 8.0


def test_the_described_defaults_are_the_defaults():
    block: dict = {}
    for info in describe():
        if info.section or info.path.startswith("stabilizers.") or "(" in info.path:
            continue
        node = block
        *parents, key = info.path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = info.default
    assert block.pop("ema") == {"decay": 0.999, "start_step": 0, "warmup": True} == parse(ema={}).ema.model_dump()
    assert StabilityConfig.parse(block) == StabilityConfig() and StabilityConfig().ema is None


def test_importing_the_config_loads_nothing_heavy():
    code = """
        import sys, ds_stability.config, ds_stability.cli, ds_stability.inspect_config
        print([name for name in ("torch", "deepspeed", "transformers", "numpy", "accelerate") if name in sys.modules])
    """
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# -- fuzz ------------------------------------------------------------------------------------------------------------

KNOWN = sorted({part for info in describe() for part in info.path.split(".")})
words = st.sampled_from(KNOWN) | st.text(max_size=8)
scalars = (
    st.none() | st.booleans() | st.integers(-3, 12) | st.integers() | st.floats() | st.floats(0, 1) | words
    | st.sampled_from(["auto", "stock", "chunked", "z_loss", "init_decay", 10**400, math.inf])
)  # fmt: skip
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4), max_leaves=10
)
small = st.floats(0.01, 0.99)
schedule = small | st.lists(st.tuples(st.integers(0, 99), small).map(list), max_size=3) | scalars
family = st.fixed_dictionaries({}, optional={"level": schedule, "ema_decay": small | scalars, "kind": scalars})
likely_blocks = st.fixed_dictionaries(
    {},
    optional={
        "level": schedule,
        "stabilizers": st.dictionaries(st.sampled_from(["feedback", "clipping"]) | words, family, max_size=2) | scalars,
        "controller": st.fixed_dictionaries({}, optional={"gain_max": small | scalars, "warmup_steps": scalars}),
        "statistics": st.fixed_dictionaries({}, optional={"interval": scalars, "ema_decay": small | scalars}),
        "loss_path": st.sampled_from(["stock", "chunked", "linear", None, "Stock"]),
        "max_skipped_steps": st.integers(-1, 20),
    },
)


@settings(max_examples=200, deadline=None)
@given(likely_blocks | json_values)
def test_any_json_value_either_round_trips_or_gives_one_line(block):
    try:
        cfg = StabilityConfig.parse(block)
    except StabilityConfigError as error:
        message = str(error)
        assert message.startswith("stability") and message.isprintable() and len(message) < 1000
        return
    again = StabilityConfig.parse(json.loads(json.dumps(cfg.to_dict(), allow_nan=False)))
    assert again == cfg and again.fingerprint() == cfg.fingerprint()
    resolved = cfg.resolve(pretrained=True)
    assert StabilityConfig.parse(resolved.to_dict()) == resolved
    for name in cfg.families:
        assert 0.0 <= cfg.family_level(name, 17) <= cfg.max_level(name) <= 1.0


# ---- the governor -----------------------------------------------------------------------------------------------------


def test_the_governor_waits_longer_from_scratch():
    block = parse(controller={"mode": "governor"})
    assert block.active and block.governed and not parse().governed
    assert (block.resolve(pretrained=True).controller.warmup_steps, block.resolve(pretrained=False).controller.warmup_steps) == (10, 250)
    assert parse(controller={"mode": "governor", "warmup_steps": 3}).resolve(pretrained=False).controller.warmup_steps == 3


@pytest.mark.parametrize(
    ("control", "needs"),
    [
        ({"mode": "level"}, False),
        ({"mode": "governor"}, True),
        ({"mode": "governor", "target": 4.5}, True),
        ({"mode": "governor", "target": 4.5, "probe_interval": 0}, False),
        ({"mode": "governor", "target": "initial", "probe_interval": 0}, True),
    ],
)
def test_when_the_governor_needs_held_out_text(control, needs):
    assert parse(controller=control).controller.needs_probe is needs


def test_a_target_replaces_the_level():
    block = parse(level=0.5, controller={"gain_max": 4, "warmup_steps": 9})
    for text, target in (("4.5", 4.5), ("initial", "initial"), ("data", "data"), ("0", 0.0)):
        governed = block.with_target(text)
        assert governed.level == 0.0 and governed.governed and governed.controller.target == target
        assert governed.controller.warmup_steps == 9 and governed.controller.gain_max == 8.0


@pytest.mark.parametrize("text", ["", "nan", "inf", "-1", "first", "4.5 nats", "1e3", "\0"])
def test_a_wrong_target_flag_is_one_line(text):
    with pytest.raises(StabilityConfigError, match="^--stability_target: .* is not allowed; must be a number") as error:
        parse().with_target(text)
    assert "\n" not in str(error.value)
