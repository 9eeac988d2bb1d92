"""The figures of an evaluated sweep, from its cells to docs/results.md."""

import json
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]

import headline  # noqa: E402
import render  # noqa: E402
import report_data  # noqa: E402

PREDICTIONS = HERE.parents[1] / "eval" / "predictions.yaml"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headline")
    evaluation = report_data.write_evaluation(folder / "evals", units=6, steps=3)
    (folder / "sweep").mkdir()
    ends = [{"event": "end", "cell": f"c{i}", "outcome": "done", "seconds": seconds} for i, seconds in enumerate((30.0, 50.0, 100.0))]
    lines = [{"event": "start", "cell": "c0"}, *ends, {"event": "end", "cell": "no longer in it", "outcome": "done", "seconds": 7.0}]
    (folder / "sweep" / "sweep.json").write_text(json.dumps({"cells": [], "removed": [{"id": "no longer in it"}]}))
    (folder / "sweep" / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["headline.py", "--evaluation", str(evaluation), "--sweep", str(folder / "sweep"), "--predictions", str(PREDICTIONS),
                 "--output", str(folder / "results"), "--figures", str(folder / "figures")]  # fmt: skip
    saved, sys.argv = sys.argv, arguments
    try:
        assert headline.main() == 0
    finally:
        sys.argv = saved
    return folder


@pytest.fixture(scope="module")
def result(written):
    return json.loads((written / "results" / "headline.json").read_text())


def value_of(cell_folder, metric, decoding):
    rows = json.loads((cell_folder / "scores.json").read_text())["rows"]
    return next(row["value"] for row in rows if (row["metric"], row["decoding"]) == (metric, decoding))


def test_a_figure_is_the_mean_over_the_seeds(written, result):
    found = [value_of(cell, "high_frequency_share", "sample") for cell in (written / "evals" / "cells").glob("gpt2-feedback-0.5-*")]
    assert len(found) == 3
    row = next(row for row in result["rows"] if (row["architecture"], row["arm"], row["level"]) == ("gpt2", "feedback", 0.5))
    figure = row["figures"]["high-freq. share"]
    assert figure["value"] == pytest.approx(sum(found) / 3, abs=1e-9) and figure["seeds"] == 3
    assert figure["ci_low"] < figure["value"] < figure["ci_high"]


def test_the_time_is_that_of_the_attempts(result):
    assert result["times"] == {"attempts": 3, "seconds": 180.0, "median": 50.0, "shortest": 30.0, "longest": 100.0}
    assert result["seconds"] == pytest.approx(180.0 + result["evaluation_seconds"])


def test_predictions_are_judged_by_the_report(result):
    outcomes = {item["id"]: item["outcome"] for item in result["predictions"]}
    assert set(outcomes) == {"P1", "P2", "P3"} and outcomes["P1"] == "met" and outcomes["P2"] == "met"


def test_tables_of_the_page(written, result):
    text = render.section("headline", written / "results")
    row = next(row for row in result["rows"] if (row["architecture"], row["arm"], row["level"]) == ("llama", "feedback", 1.0))
    assert f"| 1 | {headline.interval(row['figures']['entropy'])} |" in text
    assert "3 runs, median 50 s, 30 to 100 s" in text and result["sentences"][0] in text and "P3" in text
    trend = next(item for item in result["trends"] if (item["architecture"], item["metric"]) == ("llama", "predictive_entropy"))
    line = next(line for line in text.splitlines() if line.startswith("| entropy | llama |"))
    assert f"| {trend['slope']:.2f} [".replace("-", "\N{MINUS SIGN}") in line and line.split("|")[4].count(",") == 2 and "complete separation" in line
    arms = render.section("arms", written / "results")
    assert "| permuted |" in arms and "| clipping |" in arms
    for name in ("headline", "arms"):
        assert (written / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_untouched_model_stands_first(written, result):
    folder = written / "again"
    folder.mkdir()
    (folder / "pretrained.json").write_text(json.dumps({**result, "kind": "pretrained"}))
    header, rows = headline.pretrained_table(json.loads((folder / "pretrained.json").read_text()))
    assert header[0] == "model" and rows[0][0] == "untouched" and rows[1][0] == "level 0"
    assert "untouched" in render.section("pretrained", folder)
    shutil.rmtree(folder)


def test_missing_figures_are_a_dash():
    assert headline.interval(None) == headline.difference(None) == "-"
    assert headline.interval({"value": None, "ci_low": None, "ci_high": None}) == "-"
    assert headline.difference({"difference": -0.5, "difference_low": -0.75, "difference_high": -0.25}) == "−0.50 [−0.75, −0.25]"


def test_a_folder_without_cells_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["headline.py", "--evaluation", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        headline.main()
    assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err
