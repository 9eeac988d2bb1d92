"""Every case of bad input gives a StabilityConfigError of one line: key path, value given, what is allowed."""

import json
import math
import os

import pytest

from ds_stability.config import StabilityConfig, load_ds_config, split_config
from ds_stability.errors import StabilityConfigError, UserError
from ds_stability.inspect_config import inspect_config

LEVEL = "a number from 0 to 1, or a list of [step, level] pairs"
TOP = "allowed here: level, stabilizers, objective, controller, statistics, probe, alarm, ema, loss_path, loss_kernel, max_skipped_steps"
FAMILIES = "feedback, clipping, averaging, regularization"
NESTED: list = []
NESTED.append(NESTED)

# block, key path, value as shown, what is allowed (or the suggestion)
BLOCKS = [
    # wrong keys and near misses, at every level
    ({"levl": 0.5}, "stability.levl", "0.5", 'did you mean "level"? ' + TOP),
    ({"Level": 0.5}, "stability.Level", "0.5", 'did you mean "level"?'),
    ({"stabilisers": {}}, "stability.stabilisers", "{}", 'did you mean "stabilizers"?'),
    ({"xyzzy": [1, 2]}, "stability.xyzzy", "[1, 2]", TOP),
    ({"gain_max": 3}, "stability.gain_max", "3", 'did you mean "controller.gain_max"?'),
    ({"warmup_steps": 3}, "stability.warmup_steps", "3", 'did you mean "controller.warmup_steps"?'),
    ({"controller": {"gain": 3}}, "stability.controller.gain", "3", 'did you mean "gain_max"?'),
    ({"controller": {"warmup": 3}}, "stability.controller.warmup", "3", 'did you mean "warmup_steps"?'),
    ({"controller": {"level": 1}}, "stability.controller.level", "1", 'did you mean "level"?'),
    ({"statistics": {"ema": 0.9}}, "stability.statistics.ema", "0.9", "allowed here: high_frequency_coverage"),
    ({"statistics": {"chunksize": 9}}, "stability.statistics.chunksize", "9", 'did you mean "chunk_size"?'),
    ({"probe": {"intervall": 1}}, "stability.probe.intervall", "1", 'did you mean "interval"?'),
    ({"stabilizers": {"feedbak": {}}}, "stability.stabilizers.feedbak", "{}", 'did you mean "feedback"? allowed here: ' + FAMILIES),
    ({"stabilizers": {"weight_decay": {}}}, "stability.stabilizers.weight_decay", "{}", FAMILIES),
    ({"stabilizers": {"clipping": {"lvl": 1}}}, "stability.stabilizers.clipping.lvl", "1", 'did you mean "level"? allowed here: level, ema_decay'),
    ({"stabilizers": {"feedback": {"beta_max": 1}}}, "stability.stabilizers.feedback.beta_max", "1", 'did you mean "stabilizers.averaging.beta_max"?'),
    ({"a\nb\x1b[31m": 1}, 'stability."a\\nb\\x1b[31m"', "1", TOP),
    ({"": 1}, 'stability.""', "1", TOP),
    ({"controller.gain_max": 3}, 'stability."controller.gain_max"', "3", TOP),
    ({1: 2}, "stability[1]", "1", TOP),
    # wrong types
    ({"level": "0.5"}, "stability.level", '"0.5"', LEVEL),
    ({"level": True}, "stability.level", "true", LEVEL),
    ({"level": None}, "stability.level", "null", LEVEL),
    ({"level": {"0": 1}}, "stability.level", '{"0": 1}', LEVEL),
    ({"level": b"1"}, "stability.level", "a Python bytes", LEVEL),
    ({"controller": None}, "stability.controller", "null", "an object with any of the keys mode, warmup_steps"),
    ({"controller": [8.0]}, "stability.controller", "[8.0]", "an object with any of the keys mode, warmup_steps"),
    ({"controller": {"gain_max": "8"}}, "stability.controller.gain_max", '"8"', "a number above 0 and up to 14"),
    ({"controller": {"gain_max": False}}, "stability.controller.gain_max", "false", "a number above 0 and up to 14"),
    ({"controller": {"warmup_steps": 10.0}}, "stability.controller.warmup_steps", "10.0", "an integer from 0 to"),
    ({"controller": {"ramp_steps": True}}, "stability.controller.ramp_steps", "true", "an integer from 0 to"),
    ({"statistics": {"gradient_noise_scale": 1}}, "stability.statistics.gradient_noise_scale", "1", "true or false"),
    ({"statistics": {"high_frequency_file": 3}}, "stability.statistics.high_frequency_file", "3", "a non-empty string, or null"),
    ({"probe": {"prompts_file": ""}}, "stability.probe.prompts_file", '""', "a non-empty string, or null"),
    ({"probe": {"prompts_file": "\ud800"}}, "stability.probe.prompts_file", '"\\ud800"', "a non-empty string, or null"),
    ({"stabilizers": ["feedback"]}, "stability.stabilizers", '["feedback"]', "an object with any of the keys " + FAMILIES),
    ({"stabilizers": {"feedback": None}}, "stability.stabilizers.feedback", "null", "an object with any of the keys level"),
    ({"stabilizers": {"clipping": 0.2}}, "stability.stabilizers.clipping", "0.2", "an object with any of the keys level, ema_decay"),
    ({"loss_path": "fused"}, "stability.loss_path", '"fused"', '"stock" or "chunked" or "linear", or null'),
    ({"stabilizers": {"regularization": {"kind": "l2"}}}, "stability.stabilizers.regularization.kind", '"l2"', '"z_loss" or "label_smoothing" or "init_decay"'),
    # out of range, not finite, too large
    ({"level": -0.1}, "stability.level", "-0.1", LEVEL),
    ({"level": 1.0001}, "stability.level", "1.0001", LEVEL),
    ({"level": math.nan}, "stability.level", "NaN", LEVEL),
    ({"level": math.inf}, "stability.level", "Infinity", LEVEL),
    ({"level": 10**400}, "stability.level", "an integer of 1329 bits", LEVEL),
    ({"controller": {"gain_max": -1}}, "stability.controller.gain_max", "-1", "a number above 0 and up to 14"),
    ({"controller": {"gain_max": 0}}, "stability.controller.gain_max", "0", "a number above 0 and up to 14"),
    ({"controller": {"gain_max": 14.5}}, "stability.controller.gain_max", "14.5", "a number above 0 and up to 14"),
    ({"controller": {"gain_max": math.nan}}, "stability.controller.gain_max", "NaN", "a number above 0 and up to 14"),
    ({"controller": {"gain_max": 10**400}}, "stability.controller.gain_max", "1329 bits", "a number above 0 and up to 14"),
    ({"controller": {"warmup_steps": -1}}, "stability.controller.warmup_steps", "-1", "an integer from 0 to"),
    ({"controller": {"warmup_steps": 10**30}}, "stability.controller.warmup_steps", str(10**30), "an integer from 0 to"),
    ({"controller": {"mode": "auto"}}, "stability.controller.mode", '"auto"', '"level" or "governor"'),
    ({"controller": {"mode": "governor", "statistic": "loss"}}, "stability.controller.statistic", '"loss"', '"entropy" or "top1_mass" or "high_frequency_mass"'),
    ({"controller": {"mode": "governor", "actuator": "clip"}}, "stability.controller.actuator", '"clip"', '"token_weight" or "entropy_bonus"'),
    ({"controller": {"mode": "governor", "target": -0.5}}, "stability.controller.target", "-0.5", "0 to ln(vocabulary)"),
    ({"controller": {"mode": "governor", "target": 1e9}}, "stability.controller.target", "1000000000.0", "0 to ln(vocabulary)"),
    ({"controller": {"mode": "governor", "target": 10**400}}, "stability.controller.target", "1329 bits", "0 to ln(vocabulary)"),
    ({"controller": {"mode": "governor", "target": math.nan}}, "stability.controller.target", "NaN", '"initial" or "data"'),
    ({"controller": {"mode": "governor", "target": True}}, "stability.controller.target", "true", '"initial" or "data"'),
    ({"controller": {"mode": "governor", "target": None}}, "stability.controller.target", "null", '"initial" or "data"'),
    ({"controller": {"mode": "governor", "target": "first"}}, "stability.controller.target", '"first"', '"initial" or "data"'),
    ({"controller": {"mode": "governor", "target": 1.5, "statistic": "top1_mass"}}, "stability.controller.target", "1.5", "from 0 to 1 for top1_mass"),
    ({"controller": {"mode": "governor", "target": "data", "statistic": "top1_mass"}}, "stability.controller.target", '"data"', "for entropy alone"),
    ({"controller": {"mode": "governor", "target": "data", "probe_interval": 0}}, "stability.controller.probe_interval", "0", "what it memorizes"),
    ({"controller": {"mode": "governor", "gain_max": 2}}, "stability.controller.gain_max", "2", 'controller.mode must be "level"'),
    ({"controller": {"kp": 2}}, "stability.controller.kp", "2", 'controller.mode must be "governor"'),
    ({"controller": {"target": 3.5}}, "stability.controller.target", "3.5", 'controller.mode must be "governor"'),
    ({"level": 0.5, "controller": {"mode": "governor"}}, "stability.controller.mode", '"governor"', "the two would pull against each other"),
    ({"level": [[0, 0], [9, 0.1]], "controller": {"mode": "governor"}}, "stability.controller.mode", '"governor"', "or set level to 0"),
    ({"stabilizers": {"feedback": {"level": 0.1}}, "controller": {"mode": "governor"}}, "stability.controller.mode", '"governor"', "or set level to 0"),
    ({"controller": {"mode": "governor"}, "loss_path": "stock"}, "stability.loss_path", '"stock"', "the governor, and every objective but cross_entropy act through our loss"),
    ({"controller": {"trim_ki": -0.1}}, "stability.controller.trim_ki", "-0.1", "a number from 0 to 10"),
    ({"statistics": {"ema_decay": 1}}, "stability.statistics.ema_decay", "1", "a number above 0 and below 1"),
    ({"statistics": {"ema_decay": 0}}, "stability.statistics.ema_decay", "0", "a number above 0 and below 1"),
    ({"statistics": {"high_frequency_coverage": 1.5}}, "stability.statistics.high_frequency_coverage", "1.5", "above 0 and below 1"),
    ({"statistics": {"interval": 0}}, "stability.statistics.interval", "0", "an integer from 1 to"),
    ({"statistics": {"chunk_size": 0}}, "stability.statistics.chunk_size", "0", "an integer from 1 to"),
    ({"probe": {"interval": -5}}, "stability.probe.interval", "-5", "an integer from 0 to"),
    ({"probe": {"max_gather_gib": 0}}, "stability.probe.max_gather_gib", "0", "a number above 0"),
    ({"loss_kernel": "triton"}, "stability.loss_kernel", "triton", "where loss_path is stock"),
    ({"max_skipped_steps": 0}, "stability.max_skipped_steps", "0", "an integer from 1 to"),
    ({"stabilizers": {"averaging": {"beta_max": 1.0}}}, "stability.stabilizers.averaging.beta_max", "1.0", "above 0 and below 1"),
    ({"stabilizers": {"clipping": {"level": 2}}}, "stability.stabilizers.clipping.level", "2", LEVEL),
    # "auto"
    ({"level": "auto"}, "stability.level", '"auto"', "not allowed inside the stability block"),
    ({"controller": {"gain_max": "auto"}}, "stability.controller.gain_max", '"auto"', "a number above 0 and up to 14"),
    ({"stabilizers": "auto"}, "stability.stabilizers", '"auto"', "not allowed inside the stability block"),
    ("auto", "stability", '"auto"', "an object with any of the keys level"),
    # schedules
    ({"level": []}, "stability.level", "[]", LEVEL),
    ({"level": [0, 0.5]}, "stability.level[0]", "0", "a pair [step, level]"),
    ({"level": [[0, 0.1, 0.2]]}, "stability.level[0]", "[0, 0.1, 0.2]", "a pair [step, level]"),
    ({"level": [[0, 0.1], [0, 0.2]]}, "stability.level[1][0]", "0", "steps must increase"),
    ({"level": [[200, 0.1], [100, 0.2]]}, "stability.level[1][0]", "100", "a step after the one before it (200)"),
    ({"level": [[-1, 0.1]]}, "stability.level[0][0]", "-1", "an integer from 0 to"),
    ({"level": [[0.5, 0.1]]}, "stability.level[0][0]", "0.5", "an integer from 0 to"),
    ({"level": [[0, 0.0], [9, 1.5]]}, "stability.level[1][1]", "1.5", "a number from 0 to 1"),
    ({"level": [[0, "auto"]]}, "stability.level[0][1]", '"auto"', "a number from 0 to 1"),
    ({"stabilizers": {"feedback": {"level": [[0, True]]}}}, "stability.stabilizers.feedback.level[0][1]", "true", "a number from 0 to 1"),
    ({"level": NESTED}, "stability.level[0]", "[[[...]]]", "a pair [step, level]"),
    # values that contradict each other
    ({"level": 0.5, "loss_path": "stock"}, "stability.loss_path", '"stock"', '"linear", "chunked" or null'),
    ({"stabilizers": {"regularization": {"level": 0.1}}, "loss_path": "stock"}, "stability.loss_path", '"stock"', '"linear", "chunked" or null'),
    ({"level": 0.5, "statistics": {"interval": 4}}, "stability.statistics.interval", "4", "1 unless loss_path is stock"),
    # the block is no object
    (None, "stability", "null", "an object with any of the keys level"),
    ([], "stability", "[]", "an object with any of the keys level"),
    (0.5, "stability", "0.5", "an object with any of the keys level"),
    ([{"level": 0.5}], "stability", '[{"level": 0.5}]', "an object with any of the keys level"),
]  # fmt: skip


def check_one_line(message, *parts):
    assert message.isprintable() and len(message) < 700, repr(message)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("block, path, shown, allowed", BLOCKS, ids=[case[1][:40] for case in BLOCKS])
def test_wrong_block(block, path, shown, allowed):
    with pytest.raises(StabilityConfigError) as error:
        split_config({"train_batch_size": 8, "stability": block})
    assert isinstance(error.value, UserError) and isinstance(error.value, ValueError) and error.value.exit_code == 2
    check_one_line(str(error.value), path + ":", shown, allowed)


TOP_LEVEL = [
    ("stabilty", {"level": 0.5}, '{"level": 0.5}'),
    ("stability_", {}, "{}"),
    ("Stability", {}, "{}"),
    ("stabilization", 0.5, "0.5"),
    ("ds_stability", {}, "{}"),
    ("stabilizers", {"feedback": {}}, "stability"),
    ("level", 0.5, 'did you mean "stability.level"?'),
    ("controller", {}, 'did you mean "stability.controller"?'),
]


@pytest.mark.parametrize("key, value, shown", TOP_LEVEL)
@pytest.mark.parametrize("beside", [{}, {"stability": {"level": 0.5}}])
def test_near_miss_of_the_block_at_the_top_level(key, value, shown, beside):
    with pytest.raises(StabilityConfigError) as error:
        split_config({"train_batch_size": 8, **beside, key: value})
    check_one_line(str(error.value), key + ":", shown, '"stability')


FILES = [
    ("empty.json", b"", "line 1", "an empty file", "must be JSON"),
    ("broken.json", b'{\n  "a": 1,\n  "b": }\n', "line 3", '"\\"b\\": }"', "must be JSON"),
    ("latin1.json", b'{"a": 1,\n"b": "caf\xe9"}', "line 2", "0xe9", "UTF-8"),
    ("utf16.json", '{"a": 1}'.encode("utf-16"), "line 1", "0xff", "UTF-8"),
    ("null_bytes.json", b"\x00\x00", "line 1", "\\x00", "must be JSON"),
    ("list.json", b'[{"stability": {}}]', "at the top", '[{"stability": {}}]', "a JSON object"),
    ("number.json", b"3", "at the top", "3", "a JSON object"),
    ("twice.json", b'{"stability": {"level": 0}, "stability": {"level": 1}}', "twice", '"stability"', "must stand once"),
    ("deep.json", b"[" * 100_000, "deep.json", "deep", ""),
    ("digits.json", b'{"a": ' + b"9" * 5000 + b"}", "digits.json", "4300", "plain JSON"),
]


@pytest.mark.parametrize("name, content, where, shown, allowed", FILES, ids=[case[0] for case in FILES])
def test_wrong_file(tmp_path, name, content, where, shown, allowed):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(StabilityConfigError) as error:
        load_ds_config(str(path))
    check_one_line(str(error.value), name, where, shown.replace('\\"', '"'), allowed)


@pytest.mark.parametrize("content", [b'{\n  // warm-up\n  "a": 1, # b\n}', b'{"a": 1,}', b"{a: 1}", b'/* x */ {"a": 1}', b"\xef\xbb\xbf" b'{"a": 1}'])
def test_a_file_that_deepspeed_reads_is_read(tmp_path, content):
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config as deepspeeds

    path = tmp_path / "ds.json"
    path.write_bytes(content)
    assert load_ds_config(str(path)) == deepspeeds(str(path)) == {"a": 1}
    assert any("Trainer does not" in warning for warning in inspect_config(str(path)).warnings)
    with pytest.raises(StabilityConfigError, match="twice"):
        path.write_bytes(b'{"a": 1, # x\n"a": 2}')
        load_ds_config(str(path))


def test_missing_file_directory_and_odd_names(tmp_path):
    for path, part in [
        (tmp_path / "no.json", "no such file"),
        (tmp_path, "directory"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("line\nbreak", "no such file"),
    ]:
        with pytest.raises(StabilityConfigError) as error:
            load_ds_config(path)
        check_one_line(str(error.value), part, "DeepSpeed JSON file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "secret.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(StabilityConfigError) as error:
        load_ds_config(path)
    check_one_line(str(error.value), "secret.json", "Permission denied")


@pytest.mark.parametrize("config", [None, 3, [], b"a.json", "", object()])
def test_what_is_neither_a_dict_nor_a_path(config):
    with pytest.raises(StabilityConfigError) as error:
        load_ds_config(config)
    check_one_line(str(error.value), "must be a dict or the path of a JSON file")


def test_a_dict_nested_too_deeply():
    deep: dict = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(StabilityConfigError) as error:
        load_ds_config(deep)
    check_one_line(str(error.value), "too deeply")
    with pytest.raises(StabilityConfigError) as error:
        StabilityConfig.parse({"controller": deep})
    check_one_line(str(error.value), "stability.controller.a")


def test_several_problems_are_counted_and_the_unknown_key_comes_first():
    with pytest.raises(StabilityConfigError) as error:
        StabilityConfig.parse({"level": 3, "controller": {"gain_max": -1}, "levl": 0.5})
    check_one_line(str(error.value), "stability.levl: unknown key", "(and 2 more)")


def test_huge_values_are_cut():
    with pytest.raises(StabilityConfigError) as error:
        StabilityConfig.parse({"level": "x\n\u202e" * 10**5, "k" * 10**5: 0})
    check_one_line(str(error.value), "kkk...")
    with pytest.raises(StabilityConfigError) as error:
        StabilityConfig.parse({"level": list(range(10**5))})
    check_one_line(str(error.value), "stability.level[0]: 0")
    with pytest.raises(StabilityConfigError) as error:
        StabilityConfig.parse({"stabilizers": list(range(10**5))})
    check_one_line(str(error.value), "[0, 1, 2, 3, ...]")


def test_the_source_names_where_a_block_comes_from():
    with pytest.raises(StabilityConfigError) as error:
        StabilityConfig.parse({"level": 2}, source="recipe.yaml: stability")
    assert str(error.value).startswith("recipe.yaml: stability.level: 2 ")
    assert json.loads(json.dumps(str(error.value))) == str(error.value)
