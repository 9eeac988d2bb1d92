"""benchmarks/metric_speed.py on little text: what it compares agrees, and it writes a whole result."""

import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def metric_speed():
    pytest.importorskip("nltk")
    pytest.importorskip("sacrebleu")
    environment = dict(os.environ)
    sys.path.insert(0, str(BENCHMARKS))  # plain scripts: their folder is where they import from
    import metric_speed

    yield metric_speed
    # The script asks numerical libraries for one thread; that must not reach the processes of other tests.
    os.environ.clear()
    os.environ.update(environment)


def run(metric_speed, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "metric_speed.py"), *map(str, arguments)])
    return metric_speed.main()


def test_a_small_run(metric_speed, monkeypatch, tmp_path):
    arguments = ("--texts", 64, "--tokens", 24, "--rounds", 1, "--output", tmp_path)
    assert run(metric_speed, monkeypatch, *arguments) == 0
    result = json.loads((tmp_path / "metric_speed.json").read_text())
    assert result["kind"] == "metric_speed" and result["settings"]["texts"] == 64 and {"nltk", "sacrebleu"} <= result["versions"].keys()
    assert result["all"]["processor_seconds"] > 0 and result["all"]["metrics"] == 38
    assert [pair["by"] for pair in result["comparisons"]] == ["nltk.ngrams", "nltk.ngrams", "nltk.FreqDist", "sacrebleu", "nltk"]
    assert all(pair["ratio"] > 0 and pair["values"] for pair in result["comparisons"])


def test_figures_that_differ_are_not_timed(metric_speed):
    pair = metric_speed.Comparison("x", "y", lambda: {"a": 1.0}, lambda: {"a": 1.1})
    with pytest.raises(SystemExit, match=r"a is 1\.0 here and 1\.1 by y"):
        metric_speed.compare(pair, 1)


def test_bad_numbers_are_refused(metric_speed, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        run(metric_speed, monkeypatch, "--rounds", 0)
    assert error.value.code == 2 and "--rounds 0" in capsys.readouterr().err


def test_missing_libraries_are_one_line(metric_speed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(SystemExit) as error:
        metric_speed.load_libraries()
    assert error.value.code == 2 and capsys.readouterr().err == "error: sacrebleu is missing: pip install nltk sacrebleu\n"
