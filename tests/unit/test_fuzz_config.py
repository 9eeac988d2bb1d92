"""The config space, fuzzed: a block resolves and round-trips, or ends in one line; so does the DeepSpeed JSON around it.

2,000 blocks by default; DS_STABILITY_FUZZ=20 tries twenty times as many, and other ones each time (docs/security.md).
"""

import copy
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_support import HOSTILE_NUMBERS, HOSTILE_TEXTS, JUNK, SCALARS, assert_one_line, fuzz  # noqa: E402

from ds_stability.config import StabilityConfig, describe, find_auto, load_ds_config, split_config, unsupported  # noqa: E402
from ds_stability.deepspeed_config import offload_devices, precision, unknown_keys, zero_stage  # noqa: E402
from ds_stability.errors import StabilityConfigError, UserError  # noqa: E402
from ds_stability.inspect_config import inspect_config, render  # noqa: E402
from ds_stability.schedule import parse_level_flag  # noqa: E402

levels = st.floats(0, 1)
pairs = st.lists(st.tuples(st.integers(0, 10**9), levels), min_size=1, max_size=4, unique_by=lambda pair: pair[0])
schedules = st.one_of(levels, st.sampled_from([0, 1, 0.0, 1.0]), pairs.map(lambda items: [list(pair) for pair in sorted(items)]))
near_levels = st.one_of(schedules, HOSTILE_NUMBERS, st.lists(st.lists(HOSTILE_NUMBERS, max_size=3), max_size=3), HOSTILE_TEXTS)
steps = st.integers(0, 10**9)
counts = st.integers(1, 10**9)
shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
paths = st.sampled_from(["high_frequency.json", "runs/a/metrics.jsonl", "\N{LATIN SMALL LETTER E WITH ACUTE} b.txt"])

# What is right for each key; the nearly right and the hostile replace it here and there.
SECTIONS = {
    "controller": {"warmup_steps": st.none() | steps, "ramp_steps": steps, "gain_max": st.floats(0, 14, exclude_min=True),
                   "trim_kp": st.floats(0, 10), "trim_ki": st.floats(0, 10), "trim_max": st.floats(0, 14),
                   "mode": st.sampled_from(["level", "governor"]), "actuator": st.sampled_from(["token_weight", "entropy_bonus"]),
                   "statistic": st.sampled_from(["entropy", "top1_mass", "high_frequency_mass"]),
                   "target": st.sampled_from(["initial", "data"]) | st.floats(0, 1), "kp": st.floats(0, 100), "ki": st.floats(0, 10),
                   "dead_band": st.floats(0, 1, exclude_max=True), "slew_rate": st.floats(0, 16, exclude_min=True),
                   "output_limit": st.floats(0, 8, exclude_min=True), "setpoint_ramp_steps": steps, "probe_interval": steps,
                   "probe_size": counts, "start": st.sampled_from(["warmup", "alarm"])},
    "statistics": {"high_frequency_coverage": shares, "high_frequency_file": st.none() | paths, "ema_decay": shares,
                   "interval": st.just(1) | counts, "gradient_noise_scale": st.booleans(), "update_ratio_interval": steps,
                   "chunk_size": st.none() | counts},
    "probe": {"interval": steps, "num_prompts": counts, "max_new_tokens": counts, "prompts_file": st.none() | paths,
              "max_gather_gib": st.floats(0, 10**6, exclude_min=True)},
    "alarm": {"action": st.sampled_from(["off", "warn", "stop"]), "reference_file": st.none() | paths, "start_step": st.none() | steps,
              "patience": st.integers(1, 1000), "share_tolerance": st.floats(0, 1, exclude_max=True), "entropy_tolerance": shares},
    "ema": {"decay": shares, "start_step": steps, "warmup": st.booleans()},
}  # fmt: skip
gammas, coefficients, positive = st.floats(0, 20), st.floats(0, 100), st.floats(0, 10, exclude_min=True)
OBJECTIVES = {
    "cross_entropy": {}, "label_smoothing": {"smoothing": st.floats(0, 1)}, "focal": {"gamma": gammas},
    "tofu": {"gamma": gammas, "beta": st.floats(0.01, 10)}, "entropy_regularized": {"coefficient": coefficients},
    "gem": {"beta": st.floats(0.01, 10), "h": st.sampled_from(["linear", "logsigmoid"])}, "unlikelihood_token": {"alpha": coefficients},
    "unlikelihood_sequence": {"max_new_tokens": st.integers(1, 10**6), "prefix_tokens": st.integers(1, 10**6),
                              "n": st.integers(1, 1000), "probability": st.floats(0, 1, exclude_min=True)},
    "reverse_kl": {"reference": paths, "coefficient": positive, "cross_entropy": coefficients},
}  # fmt: skip
NEEDED = {"unlikelihood_sequence": ["max_new_tokens"], "reverse_kl": ["reference"]}  # keys without a default
FAMILIES = {
    "feedback": {"level": st.none() | schedules, "permute": st.booleans(), "replay": st.none() | paths},
    "clipping": {"level": st.none() | schedules, "ema_decay": shares},
    "averaging": {"level": st.none() | schedules, "beta_max": shares},
    "regularization": {"level": st.none() | schedules, "kind": st.sampled_from(["z_loss", "label_smoothing", "init_decay"]),
                       "max": st.none() | shares},
}  # fmt: skip
TOP = {"level": schedules, "loss_path": st.sampled_from([None, "stock", "chunked", "linear"]), "loss_kernel": st.sampled_from(["torch", "triton"]),
       "max_skipped_steps": counts}  # fmt: skip


def test_every_key_of_the_block_is_fuzzed():
    ours = set(TOP) | {"stabilizers"} | set(SECTIONS)
    ours |= {f"{name}.{key}" for name, section in SECTIONS.items() for key in section}
    ours |= {f"stabilizers.{name}.{key}" for name, section in FAMILIES.items() for key in section}
    ours |= {f"objective({name}).{key}" for name, section in OBJECTIVES.items() for key in section} | {"objective", "objective.name"}
    assert ours == {info.path for info in describe()}


def mapping(strategies):
    return st.fixed_dictionaries({}, optional=strategies)


def objective(name):
    section, needed = OBJECTIVES[name], NEEDED.get(name, [])
    return st.fixed_dictionaries({"name": st.just(name), **{key: section[key] for key in needed}},
                                 optional={key: value for key, value in section.items() if key not in needed})  # fmt: skip


right_blocks = mapping({
    **TOP, "objective": st.sampled_from(list(OBJECTIVES)).flatmap(objective), **{name: mapping(section) for name, section in SECTIONS.items()},
    "stabilizers": st.none() | mapping({name: mapping(section) for name, section in FAMILIES.items()}),
})  # fmt: skip


@st.composite
def blocks(draw):
    """A right block with up to three things changed: values, names of keys, whole sections, or keys that are none."""
    block = draw(right_blocks)
    for _ in range(draw(st.integers(0, 3))):
        node = draw(st.sampled_from(list(_mappings(block))))
        kind = draw(st.sampled_from(["value", "add", "rename", "level"]))
        keys = list(node)
        if kind == "add" or not keys:
            node[draw(st.one_of(HOSTILE_TEXTS, st.text(max_size=8), st.sampled_from(["levels", "Level", "probe", "replay", "kind"])))] = draw(JUNK)
            continue
        key = draw(st.sampled_from(keys))
        if kind == "rename":
            node[draw(st.sampled_from([key.upper(), key + "s", key[:-1], f" {key}", key.replace("_", "-")]))] = node.pop(key)
        else:
            node[key] = draw(near_levels if kind == "level" else JUNK)
    return block


def _mappings(node):
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _mappings(value)


def check_block(block):
    """The parsed block, or None where it was refused as it should be."""
    before = copy.deepcopy(block)
    try:
        parsed = StabilityConfig.parse(block)
    except StabilityConfigError as error:
        text = assert_one_line(error)
        assert text.startswith("stability") and ("must be" in text or "unknown key" in text), text
        return None
    finally:
        assert repr(block) == repr(before)
    plain = json.loads(json.dumps(parsed.to_dict(), allow_nan=False))
    again = StabilityConfig.parse(plain)
    assert again == parsed and again.to_dict() == parsed.to_dict() and again.fingerprint() == parsed.fingerprint()
    for pretrained in (False, True):
        resolved = parsed.resolve(pretrained)
        assert resolved.resolve(pretrained) == resolved == StabilityConfig.parse(resolved.to_dict())
        assert resolved.controller.warmup_steps is not None and resolved.loss_path in ("stock", "chunked", "linear")
        for family in ("feedback", "clipping", "averaging", "regularization"):
            assert resolved.max_level(family) == parsed.max_level(family)
            for step in (0, 1, 10**9):
                assert 0 <= parsed.family_level(family, step) <= parsed.max_level(family) <= 1
    return parsed


resolved_blocks = []


@fuzz(2000)
@given(blocks())
def test_a_block_resolves_or_is_refused_in_one_line(block):
    resolved_blocks.append(check_block(block) is not None)


def test_both_outcomes_were_tried_often():
    if not resolved_blocks:
        pytest.skip("test_a_block_resolves_or_is_refused_in_one_line did not run")
    share = sum(resolved_blocks) / len(resolved_blocks)
    assert 0.15 < share < 0.85, share


@fuzz(300)
@given(JUNK)
def test_any_json_value_as_the_block(value):
    check_block(value)


zero = mapping({"stage": st.one_of(st.integers(0, 3), SCALARS), "offload_optimizer": st.one_of(mapping({"device": SCALARS, "super_offload": SCALARS}), JUNK),
                "offload_param": JUNK, "zenflow": JUNK, "cpu_offload": SCALARS})  # fmt: skip
ds_configs = mapping({
    "stability": blocks(), "zero_optimization": zero | JUNK, "optimizer": mapping({"type": SCALARS, "params": JUNK}) | JUNK, "bf16": JUNK,
    "fp16": mapping({"enabled": SCALARS}), "gradient_clipping": SCALARS, "torch_autocast": JUNK, "compile": JUNK, "pipeline": JUNK,
    "train_batch_size": SCALARS, "stabilty": JUNK, "level": SCALARS, "hybrid_engine": JUNK, "zero_force_ds_cpu_optimizer": SCALARS,
    "\x1b[2J\u202e": JUNK, "tensor_parallel": JUNK,
})  # fmt: skip


@fuzz(400)
@given(ds_configs)
def test_a_deepspeed_config_around_it(config):
    try:
        rest, stability = split_config(load_ds_config(config))
        texts = [*unsupported(rest, stability), *find_auto(rest), precision(rest), *offload_devices(rest).values()]
        texts += [guess for _, guess in unknown_keys(rest) if guess]
        assert all(text.isprintable() and len(text) < 5000 for text in texts)
        assert zero_stage(rest) in (None, 0, 1, 2, 3)
    except StabilityConfigError as error:
        assert_one_line(error)
    try:
        report = inspect_config(config)
        json.dumps(report.to_dict(), allow_nan=False)
        assert all(line.isprintable() for line in render(report).split("\n"))
    except UserError as error:
        assert_one_line(error)


GOOD = json.dumps({"stability": {"level": 0.5, "probe": {"interval": 5}}, "zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}).encode()


@st.composite
def mutated(draw, good=GOOD):
    """Bytes of a good file with a few of them cut, repeated, or replaced."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        data[start:end] = draw(st.one_of(st.binary(max_size=6), st.sampled_from([b"\0", b"\xff", b"[" * 3000, b"9" * 5000, b"1e999", b"NaN", b'"', b"{", b"\\ud800"])))
    return bytes(data)


@fuzz(400)
@given(data=st.one_of(mutated(), st.binary(max_size=60)))
def test_a_file_of_noise(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz_config.json"
    path.write_bytes(data)
    try:
        split_config(load_ds_config(path))
    except StabilityConfigError as error:
        assert_one_line(error)


@fuzz(400)
@given(st.one_of(st.text(max_size=40), HOSTILE_TEXTS, st.text("0123456789.:,e+- ", max_size=40)))
def test_the_level_flag(text):
    try:
        schedule = parse_level_flag(text)
        assert check_block({"level": schedule if isinstance(schedule, float) else [list(point) for point in schedule]}) is not None
    except StabilityConfigError as error:
        assert_one_line(error)
    try:
        load_ds_config(text)
    except StabilityConfigError as error:
        assert_one_line(error)


@pytest.mark.parametrize("depth", [50, 500, 5000, 100_000])
def test_deep_nesting(tmp_path, depth):
    path = tmp_path / "deep.json"
    path.write_text('{"stability": ' + '{"probe":' * depth + "1" + "}" * depth + "}")
    with pytest.raises(StabilityConfigError) as caught:
        split_config(load_ds_config(path))
    assert_one_line(caught.value)
    value: dict = {}
    for _ in range(depth):
        value = {"stabilizers": value, "x": [value]} if depth < 25 else {"stabilizers": value}
    with pytest.raises(StabilityConfigError) as caught:
        split_config(load_ds_config({"stability": value}))
    assert_one_line(caught.value)
