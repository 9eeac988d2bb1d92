"""The written report: what it holds, and that nothing in it is code that came from a model."""

import base64
import csv
import html.parser
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import report_data  # noqa: E402

from ds_stability import cli  # noqa: E402
from ds_stability.eval import report, report_page, report_samples, report_tables  # noqa: E402
from ds_stability.eval.report_drawing import DARK, themed  # noqa: E402

PREDICTIONS = Path(report.__file__).with_name("predictions.yaml")


class Page(html.parser.HTMLParser):
    """Tags, attributes, and the text of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id", "code") if tag == "script" else None
        if self._script:
            self.scripts[self._script] = ""

    def handle_data(self, data):
        if self._script:
            self.scripts[self._script] += data

    def handle_endtag(self, tag):
        self._script = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep with arms, an untouched model, one unfinished cell, one torn samples file and hostile names and texts."""
    folder = report_data.write_evaluation(tmp_path_factory.mktemp("evals") / "<b>hostile</b>", ("gpt2", "llama"), (0.0, 0.5, 1.0), (0, 1),
                                          units=6, decodings=("greedy", "sample"), steps=40)  # fmt: skip
    report_data.write_cell(folder, "unfinished", level=0.25)
    (folder / "cells" / "unfinished" / "DONE").unlink()
    for name in ("gpt2-feedback-0-0", "llama-feedback-0-0"):
        samples = folder / "cells" / name / "samples.jsonl"
        lines = samples.read_text().splitlines()
        lines[0] = json.dumps({**json.loads(lines[0]), "text": report_data.HOSTILE})
        samples.write_text("\n".join(lines)[:-20])
    scores = folder / "cells" / "gpt2-feedback-0-1" / "scores.json"
    content = json.loads(scores.read_text())
    content["rows"][0]["note"] = report_data.HOSTILE
    content["rows"].append({**content["rows"][0], "metric": "=cmd()", "note": "=1+1", "value": float("nan")})
    scores.write_text(json.dumps(content))
    (folder / "cells" / "gpt2-feedback-0-1" / "cell.json").write_text(
        (folder / "cells" / "gpt2-feedback-0-1" / "cell.json").read_text().replace('"made up"', json.dumps(report_data.HOSTILE)))
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return report.write_report(folder, predictions=PREDICTIONS)


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page.read_text(encoding="utf-8"))


def test_the_page_stands_alone(page, parsed):
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe") or attributes.get("href") == "data:,"
        for name in ("src", "href", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"(?:src|href)=[\"']?https?:", page.read_text(encoding="utf-8"))


def test_hostile_text_is_data(page, parsed):
    """Only the elements that the template has, and the scripts it has; the text comes back out of the JSON whole."""
    tags = [tag for tag, _ in parsed.tags]
    assert set(parsed.scripts) == {"data-results", "data-trends", "data-models", "data-samples", "code"} and tags.count("script") == 5
    assert tags.count("img") == len(list(page.parent.glob("figures/*.png")))
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    texts = [text[3] for text in json.loads(parsed.scripts["data-samples"])["texts"]]
    shown = report_samples.visible(report_data.HOSTILE)
    assert shown in texts and "</script>" in shown and "\0" not in shown and "\x1b" not in shown
    raw = page.read_text(encoding="utf-8")
    assert not set(raw) & {"\0", "\x1b", "\x07", "\u202e"} and "<b>hostile" not in raw


def test_the_page_says_what_is_missing(page):
    text = page.read_text(encoding="utf-8")
    assert "Cell unfinished is left out: not finished: no DONE." in text
    assert re.search(r"samples\.jsonl line 12 is cut off", text)


def test_json_holds_no_nan(parsed):
    for name, script in parsed.scripts.items():
        if name != "code":
            json.loads(script, parse_constant=lambda constant: pytest.fail(constant))


def test_results_table_has_every_group_and_figure(folder, parsed):
    data = json.loads(parsed.scripts["data-results"])
    assert data["columns"] == report_tables.TABLE_COLUMNS and {len(row) for row in data["rows"]} == {len(data["columns"])}
    found = [row for row in data["rows"] if row[:5] == ["predictive_entropy", "held_out", "llama", "feedback", 1.0]]
    assert len(found) == 1 and found[0][data["columns"].index("seeds")] == 2
    frame = pd.read_parquet(folder / "results.parquet")
    cells = frame[(frame.metric == "predictive_entropy") & (frame.split == "held_out") & (frame.arch == "llama") & (frame.level == 1.0)
                  & (frame.arm == "feedback")]  # fmt: skip
    assert found[0][5] == pytest.approx(cells.value.mean(), rel=1e-4) and len(cells) == 2


def test_verdict_and_predictions_are_on_the_page(page):
    text = page.read_text(encoding="utf-8")
    assert text.index('id="verdict"') < text.index('id="headline"')
    assert "Predictive entropy falls with the level in 2 of 2 architectures" in text
    assert "P1. Held-out predictive entropy falls" in text and "not decidable" in text


def test_the_arm_is_named_and_no_other_statistics_than_those_used(page):
    text = page.read_text(encoding="utf-8")
    assert "Arm feedback: slope per unit of level" in text and "gpt2, arm feedback: " in text and "Page's L" in text
    assert not re.search("bootstrap|Jonckheere|t-interval|resample", text)
    tables = {name: pd.read_csv(page.parent / "tables" / f"{name}.csv") for name in ("trends", "predictions", "arms")}
    assert set(tables["trends"].arm) == set(tables["predictions"].arm) == {"feedback"}
    found = tables["trends"].set_index(["metric", "split", "decoding", "architecture"]).loc[("predictive_entropy", "held_out", np.nan, "gpt2")]
    assert found.slope_low < found.slope < found.slope_high < 0 and found.p < found.p_adjusted < 1 and "rho_low" not in found
    null = tables["trends"][tables["trends"].metric == "mauve"]
    assert len(null) == 2 and null.note.str.contains("not measured at two levels").all() and null.slope.isna().all()
    assert "predictive_entropy (held_out) adjusted p" in tables["arms"]


def test_the_page_of_an_arm_with_more_levels_than_feedback(tmp_path):
    """Feedback at 0.5 alone, clipping at 0.5 and 1: the prediction on level 1 is not clipping's."""
    folder = report_data.write_evaluation(tmp_path / "evals", ("llama",), (0.0, 0.5), (0, 1), arms=False, untouched=False, units=6,
                                          decodings=("sample",), steps=0)  # fmt: skip
    for path in folder.glob("cells/llama-feedback-0-*"):
        shutil.rmtree(path)
    for level in (0.5, 1.0):
        for seed in (0, 1):
            report_data.write_cell(folder, f"clipping-{level}-{seed}", "llama", "clipping", level, seed, 6, None, ("sample",), 0)
    page = report.write_report(folder, predictions=PREDICTIONS)
    figures = pd.read_csv(page.parent / "tables" / "predictions.csv").set_index("id")
    assert set(figures.arm) == {"feedback"} and set(figures.outcome) == {"not decidable"}
    assert "llama, arm feedback: not decidable: level 1: no value" in figures.loc["P3", "figures"]
    assert json.loads(Page(page.read_text(encoding="utf-8")).scripts["data-samples"])["arm"] == "feedback"  # what the samples show first


def test_figures_are_saved_and_embedded(page, parsed):
    names = {path.stem for path in page.parent.glob("figures/*.png")}
    assert {"headline", "training", "stability", "arms"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in page.parent.glob("figures/*.png"))
    for tag, attributes in parsed.tags:
        if tag in ("img", "source"):  # for a wide window, and for a narrow one
            svg = base64.b64decode(attributes["src" if tag == "img" else "srcset"].split(",", 1)[1]).decode()
            assert svg.startswith("<svg") and (tag == "source" or attributes["alt"])


def test_csv_tables_run_nothing(page):
    for path in page.parent.glob("tables/*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            for line in csv.reader(file):
                for cell in line:
                    assert not cell.startswith(("=", "@", "+")), (path, cell)
                    assert not cell.startswith("-") or float(cell) < 0, (path, cell)
    cells = (page.parent / "tables" / "cells.csv").read_text()
    assert "'=cmd()" in cells and "'=1+1" in cells


def test_tensorboard_has_an_entry_per_cell_and_no_second_one_after_another_report(folder, page):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def metrics():
        found = EventAccumulator(str(folder / "tensorboard" / "gpt2-feedback-1-0"))
        found.Reload()
        return {tag: len(found.Scalars(tag)) for tag in found.Tags()["scalars"]}, found.summary_metadata

    before, metadata = metrics()
    assert "predictive_entropy/held_out" in before and "high_frequency_share/sample" in before
    assert any(name.startswith("_hparams_") for name in metadata)
    report.write_tensorboard(report.analyze(report.read_evaluation(folder)), folder / "tensorboard")
    assert metrics()[0] == before


def test_command(folder, tmp_path, capsys):
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "r"), "--baseline_level", "0.5"]) == 0
    assert (tmp_path / "r" / "index.html").exists() and str(tmp_path / "r" / "index.html") in capsys.readouterr().out
    groups = pd.read_csv(tmp_path / "r" / "tables" / "groups.csv")
    assert {baseline.split(", ")[1] for baseline in groups.baseline.dropna()} == {"level 0.5"}
    assert cli.main(["report", str(folder)]) == 0  # what is left out is said where the command was given, too
    assert "warning: cell unfinished is left out: not finished: no DONE\n" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "options",
    [
        {"architectures": (), "levels": (), "seeds": (), "arms": False},  # an untouched model alone
        {"architectures": ("gpt2",), "levels": (0.0,), "seeds": (0,), "arms": False, "untouched": False},
        {"architectures": ("gpt2",), "levels": (0.0, 1.0), "seeds": (0,), "arms": False, "untouched": False, "steps": 0},
        {"architectures": ("gpt2",), "levels": (0.5, 1.0), "seeds": (0, 1), "arms": False, "units": 1, "decodings": ()},
    ],
    ids=["untouched alone", "one cell", "one seed, no metrics", "no baseline, one unit, no samples"],
)
def test_small_evaluations(tmp_path, options):
    folder = report_data.write_evaluation(tmp_path / "evals", **{"units": 4, "decodings": ("sample",), "steps": 3, **options})
    text = report.write_report(folder, predictions=PREDICTIONS).read_text(encoding="utf-8")
    assert "not decidable" in text
    if options.get("seeds") == (0,) and len(options["levels"]) > 1:
        assert "intervals are over prompts only" in text


def test_names_are_no_formulas(tmp_path):
    folder = report_data.write_evaluation(tmp_path / "evals", ("llama",), (0.0, 0.5), (0, 1), units=6, decodings=("sample",), steps=10)
    for path in folder.glob("cells/*/cell.json"):
        cell = json.loads(path.read_text())
        if cell.get("run"):
            cell["run"]["architecture"] = "a $\\frac{$ b"
            path.write_text(json.dumps(cell))
    report.write_report(folder)
    assert (folder / "report" / "index.html").is_file()


def test_text_is_made_visible():
    assert report_samples.visible("a\0b\x1b[0m\x7f\n\tc\u202ed\ud800") == "a\u2400b\u241b[0m\u2421\n\tc\u27e8U+202E\u27e9d\ufffd"
    assert report_samples.visible("naïve 日本 🙂 e\u0301") == "naïve 日本 🙂 e\u0301"


def test_script_json_cannot_leave_its_element():
    text = report_page.script_json({"a": "</script><!--&\u2028", "b": [float("nan"), 1.23456789012345, None], "ends": [1.0, 1.0 + 1.1e-9]})
    assert "<" not in text and ">" not in text and "&" not in text and "\u2028" not in text
    assert json.loads(text) == {"a": "</script><!--&\u2028", "b": [None, 1.23456789, None], "ends": [1.0, 1.000000001]}


def test_figures_follow_light_and_dark():
    svg = themed('<?xml version="1.0"?><svg width="1"><path style="fill: #0072B2"/></svg>')
    assert "<text x='1.23'>0.025</text>" in themed("<svg><text x='1.23456'>0.025</text></svg>")
    assert f"--c{list(DARK).index('#0072b2')}" in svg and "prefers-color-scheme:dark" in svg and DARK["#0072b2"] in svg
