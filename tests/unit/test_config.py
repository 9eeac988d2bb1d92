import hashlib
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.config import (
    StabilityConfig,
    describe,
    find_auto,
    level_at,
    load_ds_config,
    split_config,
    unsupported,
)
from ds_stability.deepspeed_config import DEEPSPEED_KEYS, precision, unknown_keys, uses_deepspeed_cpu_adam, zero_stage
from ds_stability.errors import StabilityConfigError

FULL = {
    "level": [[0, 0], [200, 0.5]],
    "stabilizers": {
        "feedback": {"level": 0.25, "permute": True, "replay": "a.jsonl"},
        "clipping": {"level": 0.2, "ema_decay": 0.9},
        "averaging": {"beta_max": 0.9},
        "regularization": {"kind": "label_smoothing", "max": 0.2},
    },
    "controller": {"warmup_steps": 7, "ramp_steps": 0, "gain_max": 50, "trim_kp": 0, "trim_ki": 0, "trim_max": 0},
    "statistics": {"high_frequency_coverage": 0.4, "high_frequency_file": "a.json", "ema_decay": 0.5, "interval": 1,
                   "gradient_noise_scale": False, "update_ratio_interval": 0, "chunk_size": 128},
    "probe": {"interval": 5, "num_prompts": 2, "max_new_tokens": 3, "prompts_file": "p.txt", "max_gather_gib": 0.5},
    "loss_path": "chunked",
    "max_skipped_steps": 1,
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
    assert cfg.to_dict() == {**FULL, "stabilizers": {
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


def test_describe_lists_every_key_with_meaning_default_and_range():
    infos = {info.path: info for info in describe()}
    values = StabilityConfig.parse(FULL).to_dict()

    def leaves(node, prefix=""):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    assert set(leaves(values)) == {path for path, info in infos.items() if not info.section}
    assert all(info.meaning and info.allowed for info in infos.values())
    assert infos["controller.gain_max"].allowed == "a number above 0 and up to 50"
    assert infos["statistics.ema_decay"].allowed == "a number above 0 and below 1"
    assert infos["max_skipped_steps"].allowed == "an integer from 1 to 1000000000"
    assert infos["probe.prompts_file"].allowed == "a non-empty string, or null"
    assert infos["controller.gain_max"].default == 8.0


def test_the_described_defaults_are_the_defaults():
    block: dict = {}
    for info in describe():
        if info.section or info.path.startswith("stabilizers."):
            continue
        node = block
        *parents, key = info.path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = info.default
    assert StabilityConfig.parse(block) == StabilityConfig()


# -- around the block ------------------------------------------------------------------------------------------------


def test_split_config_takes_the_block_out_and_leaves_the_input_alone():
    ds_config = {"train_batch_size": 8, "stability": {"level": 0.5}}
    rest, cfg = split_config(ds_config)
    assert rest == {"train_batch_size": 8} and cfg.level == 0.5
    assert ds_config == {"train_batch_size": 8, "stability": {"level": 0.5}}
    assert split_config({"bf16": {"enabled": True}}) == ({"bf16": {"enabled": True}}, StabilityConfig())


def test_no_real_deepspeed_key_looks_like_the_block():
    rest, cfg = split_config(dict.fromkeys(DEEPSPEED_KEYS))
    assert set(rest) == DEEPSPEED_KEYS and cfg == StabilityConfig()
    assert unknown_keys(rest) == []


@pytest.mark.parametrize(
    "key, guess",
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("optimiser", "optimizer"),
        ("train_batchsize", "train_batch_size"),
        ("bf16_", "bf16"),
        ("xyzzy", None),
    ],
)
def test_misspelled_deepspeed_keys_are_found(key, guess):
    assert unknown_keys({key: 1, "fp16": {}}) == [(key, guess)]


def test_the_key_list_is_that_of_the_installed_deepspeed():
    import importlib.util

    root = Path(importlib.util.find_spec("deepspeed").origin).parent
    sources = [root / "__init__.py", *(root / "runtime").glob("*.py"), *(root / "utils").glob("*.py")]
    for folder in ("comm", "profiling", "autotuning", "monitor", "datastates", "runtime/swap_tensor",
                   "runtime/activation_checkpointing", "runtime/data_pipeline", "runtime/tensor_parallel"):  # fmt: skip
        sources += (root / folder).glob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    missing = [key for key in DEEPSPEED_KEYS if f'"{key}"' not in text and f"'{key}'" not in text]
    assert set(missing) <= {"inference"}  # read by transformers, not by DeepSpeed's training engine


def test_find_auto_names_every_path_in_order_and_survives_cycles():
    ds_config = {"a": "auto", "b": {"c": [1, "auto", {"d": "auto"}]}, "e": "automatic"}
    ds_config["b"]["self"] = ds_config
    assert find_auto(ds_config) == ["a", "b.c[1]", "b.c[2].d"]
    assert find_auto({}) == []


def test_load_ds_config_copies_a_dict_and_reads_a_file_and_base64(tmp_path):
    import base64

    ds_config = {"zero_optimization": {"stage": 3}}
    copy = load_ds_config(ds_config)
    assert copy == ds_config and copy["zero_optimization"] is not ds_config["zero_optimization"]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds_config), encoding="utf-8")
    assert load_ds_config(path) == load_ds_config(str(path)) == ds_config
    packed = base64.urlsafe_b64encode(json.dumps(ds_config).encode()).decode()
    assert load_ds_config(packed) == ds_config
    long = {**ds_config, "tensorboard": {"job_name": "x" * 5000}}  # longer than a file name may be
    assert load_ds_config(base64.urlsafe_b64encode(json.dumps(long).encode()).decode()) == long


@pytest.mark.parametrize(
    "ds_config, named",
    [
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "zero_optimization.zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
         "zero_optimization.offload_optimizer.super_offload"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled"),
        ({"stability": {"stabilizers": {"clipping": {"level": 0.1}}}}, "stability.stabilizers.clipping"),
        ({"zero_optimization": {"stage": 0}, "stability": {"level": 0.1, "stabilizers": {"averaging": {}}}},
         "stability.stabilizers.averaging"),
    ],
)  # fmt: skip
def test_unsupported_features_get_a_sentence(ds_config, named):
    problems = unsupported(ds_config)
    assert len(problems) == 1 and problems[0].startswith(named + ": ") and problems[0].isprintable()


@pytest.mark.parametrize(
    "ds_config",
    [
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": False}}},
        {"optimizer": {"type": "AdamW"}, "compile": {"deepcompile": False}, "pipeline": {}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "hybrid_engine": {"enabled": False}},
        {"zero_optimization": {"stage": 1}, "stability": {"level": 1, "stabilizers": {"clipping": {}, "averaging": {}}}},
        {"zero_optimization": {"stage": "auto"}, "stability": {"level": 0.5, "stabilizers": {"clipping": {}}}},
        {"stability": {"stabilizers": {"clipping": {"level": 0}}}},
        {"optimizer": [], "zero_optimization": 7, "compile": None, "torch_autocast": "x"},
    ],
)
def test_supported_and_malformed_configs_pass(ds_config):
    assert unsupported(ds_config) == []


def test_stage_and_precision_of_odd_configs():
    assert [zero_stage({"zero_optimization": z}) for z in ({}, {"stage": 2}, True, False, {"stage": 7}, [], None)] == [
        0, 2, 1, 0, None, None, None]  # fmt: skip
    assert zero_stage({}) == 0
    assert precision({}) == precision({"bf16": {"enabled": False}, "fp16": 3}) == "fp32"
    assert precision({"fp16": {"enabled": True}}) == "fp16"
    assert precision({"bfloat16": {"enabled": True}}) == "bf16"
    assert precision({"bf16": {"enabled": "auto"}}) == "bf16 if --bf16 is given, else fp32"


@pytest.mark.parametrize(
    "extra, cpu_adam",
    [
        ({}, True),
        ({"zero_force_ds_cpu_optimizer": False}, False),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, True),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, False),
        ({"optimizer": {"type": "SGD"}}, False),
    ],
)
def test_deepspeed_cpu_adam_is_recognized(extra, cpu_adam):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert uses_deepspeed_cpu_adam({"zero_optimization": zero, **extra}) is cpu_adam
    assert not uses_deepspeed_cpu_adam({"zero_optimization": {"stage": 3}, **extra})


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
