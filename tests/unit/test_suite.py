"""Suites: shipped files, round trip, fingerprints, and one line for everything that is wrong in one."""

from pathlib import Path

import pytest

from ds_stability.errors import UserError
from ds_stability.eval.suite import SUITES, Suite, describe

SHIPPED = sorted(path.stem for path in SUITES.glob("*.yaml"))


def message(block, source="suite"):
    with pytest.raises(UserError) as caught:
        Suite.parse(block, source)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_suites_that_ship():
    assert {"quick", "standard", "synthetic"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_suite_is_valid_and_survives_a_round_trip(name):
    suite = Suite.load(name)
    assert suite.name == name
    again = Suite.parse(suite.to_dict())
    assert again == suite and again.fingerprint() == suite.fingerprint()
    decodings = ["greedy", "sample", "top_p_95", "top_k_40", "beam_4"]
    assert list(suite.parsed_decodings()) == (decodings[:2] if name == "cures" else decodings)


def test_fingerprint_follows_content_and_not_the_name():
    suite = Suite.parse({"name": "a"})
    assert Suite.parse({"name": "b"}).fingerprint() == suite.fingerprint()
    assert Suite.parse({"name": "a", "batch_size": 7}).fingerprint() != suite.fingerprint()
    assert Suite.parse({"name": "a", "text": {"window": 7}}).fingerprint() != suite.fingerprint()


def test_a_default_decoding_written_out_is_the_same_suite():
    short = Suite.parse({"name": "a", "decodings": {"top_p_95": None}})
    written = Suite.parse({"name": "a", "decodings": {"top_p_95": {"kind": "sample", "top_p": 0.95}}})
    other = Suite.parse({"name": "a", "decodings": {"top_p_95": {"kind": "sample", "top_p": 0.9}}})
    assert short.fingerprint() == written.fingerprint() != other.fingerprint()


def test_flags_change_a_suite_and_none_leaves_it():
    suite = Suite.load("quick")
    assert suite.changed(dtype=None, backend=None) is suite
    assert suite.changed(dtype="float32").dtype == "float32"
    with pytest.raises(UserError, match="backend"):
        suite.changed(backend="nothing")


@pytest.mark.parametrize(
    "block, parts",
    [
        ({"name": "x", "bach_size": 3}, ["bach_size", "unknown key", '"batch_size"']),
        ({"name": "x", "prompts": {"cout": 3}}, ["prompts.cout", '"count"']),
        ({"name": "x", "batch_size": 0}, ["batch_size: 0", "from 1"]),
        ({"name": "x", "batch_size": True}, ["batch_size: true"]),
        ({"name": "x", "batch_size": "auto"}, ["batch_size", "an integer"]),
        ({"name": "x", "batch_size": 1.5}, ["batch_size: 1.5"]),
        ({"name": "x", "dtype": "int8"}, ["dtype", "bfloat16"]),
        ({"name": "x", "synthetic": "yes"}, ["synthetic", '"auto"']),
        ({"name": "x", "decodings": {"gredy": None}}, ["gredy", "did you mean greedy"]),
        ({"name": "x", "decodings": {"a": {"kind": "sample", "top_p": 2}}}, ["decodings.a.top_p"]),
        ({"name": "x", "decodings": {"a": 3}}, ["decodings.a: 3"]),
        ({"name": "x", "decodings": {"reference": {"kind": "greedy"}}}, ["reference"]),
        ({"name": "x", "decodings": ["greedy"]}, ["decodings"]),
        ({"name": "x", "metrics": ["distinct_22"]}, ["metrics[0]", "did you mean distinct_2"]),
        ({"name": "x", "metrics": "distinct_2"}, ["metrics", "a list"]),
        ({"name": "x", "metrics": ["distinct_2", "distinct_2"]}, ["metrics[1]"]),
        ({"name": "x", "prompts": {"source": "file"}}, ["prompts.source is file", "null"]),
        ({"name": "x", "prompts": {"file": "a.txt"}}, ["prompts.file", "a.txt"]),
        ({"name": "x", "downstream": {"tasks": "lambada"}}, ["downstream.tasks"]),
        ({"name": "x", "exact_match": {"samples": 8}}, ["exact_match.task", "missing"]),
        ({"name": "x", "bootstrap": {"resamples": 3}}, ["bootstrap is no key any more", "take it out"]),
        ({}, ["name is missing"]),
        (["name"], ["a suite is a mapping"]),
        (None, ["a suite is a mapping"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(block, parts):
    text = message(block, "my.yaml")
    assert text.startswith("my.yaml: ")
    assert "stability block" not in text
    for part in parts:
        assert part in text


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UserError, match=r"quik: no such suite; did you mean quick\?"):
        Suite.load("quik")
    with pytest.raises(UserError, match="no such suite"):
        Suite.load("nowhere/a.yaml")


@pytest.mark.parametrize(
    "content, part",
    [(b"a: [1,\nb: 2\n", "is no YAML (line"), (b"name: \xff\xfe\n", "not UTF-8 (byte 6)"), (b"", "a suite is a mapping")],
)
def test_files_that_are_no_suite(tmp_path, content, part):
    path = tmp_path / "suite.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Suite.load(str(path))
    assert part in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompts_file_is_found_beside_its_suite(tmp_path):
    (tmp_path / "suite.yaml").write_text("name: mine\nprompts: {source: file, file: prompts.txt}\n")
    suite = Suite.load(str(tmp_path / "suite.yaml"))
    assert Path(suite.prompts.file) == tmp_path / "prompts.txt"


def test_every_key_is_described():
    keys = describe()
    assert {"batch_size", "prompts.count", "text.window", "downstream.limit"} <= {key.path for key in keys}
    assert all(key.meaning and key.allowed for key in keys)
