"""The page where there are no levels: one model, several that nobody here trained, and such beside a sweep."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import report_data  # noqa: E402

from ds_stability.errors import UserError  # noqa: E402
from ds_stability.eval import report, report_models  # noqa: E402


def foreign(folder, names=("one-0123abcd", "two-0123abcd", "three")):
    for place, name in enumerate(names):
        report_data.write_cell(folder, name, None, None, 0.3 * place, None, 8, None, ("sample",), 0)
    return folder


def test_one_model(tmp_path):
    text = report.write_report(foreign(tmp_path / "e", ("only",))).read_text(encoding="utf-8")
    assert "<h1>One model: e</h1>" in text and "One model: its figures with their intervals" in text
    assert "dose-response" not in text.lower().split("<script", 1)[0] and 'id="arms"' not in text and 'id="models-table"' not in text
    assert 'id="samples"' in text and (tmp_path / "e" / "report" / "figures" / "models.png").is_file()


def test_models_that_nobody_here_trained(tmp_path):
    folder = foreign(tmp_path / "e")
    page = report.write_report(folder)
    text = page.read_text(encoding="utf-8")
    assert "<h1>Models compared: e</h1>" in text and "dose-response" not in text.lower().split("<script", 1)[0]
    assert "one is the best of 3 in bits per byte, cross-entropy" in text and text.count('class="n best"') >= 2
    assert text.count("one seed: over prompts only, says nothing about training") == 2 + text.count('"one seed'), "once for each table"
    assert '<a href="#pairs">' in text and '<a href="#arms">' not in text
    assert not list(page.parent.glob("figures/dose-*")) and (page.parent / "figures" / "models.png").is_file()
    rows = report_models.pair_rows(report.read_analysis(folder).comparison)
    assert {(row[2], row[3]) for row in rows} == {("one", "three"), ("one", "two"), ("three", "two")}
    assert {len(row) for row in rows} == {len(report_models.PAIR_COLUMNS)}


def test_a_sweep_with_an_untouched_model_has_both(tmp_path):
    folder = report_data.write_evaluation(tmp_path / "e", ("gpt2",), (0.0, 1.0), (0, 1), arms=False, units=6, decodings=("sample",), steps=5)
    text = report.write_report(folder).read_text(encoding="utf-8")
    assert "<h1>Dose-response of training stabilization: e</h1>" in text
    assert text.index('id="headline"') < text.index('id="arms"') < text.index('id="models"') < text.index('id="pairs"')
    assert '<a href="#models">' in text
    alone = report_data.write_evaluation(tmp_path / "f", ("gpt2",), (0.0, 1.0), (0, 1), arms=False, units=6, decodings=("sample",), steps=5, untouched=False)
    assert not report.read_analysis(alone).has_models, "levels of one run are no rivals"


def test_each_sample_stands_under_its_own_prompt(tmp_path):
    folder = foreign(tmp_path / "e", ("a", "b"))
    prompts = folder / "cells" / "b" / "prompts.jsonl"
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps({**line, "text": f"Other {line['index']}"}) + "\n" for line in lines))
    analysis = report.read_analysis(folder)
    found = report.collect(analysis.evaluation, {"a": "a", "b": "b"})
    assert [cell["prompts"] for cell in found["cells"]] == [0, 1] and [cell["model"] for cell in found["cells"]] == ["a", "b"]
    assert found["prompts"][0]["0"] == "Prompt 0: It was" and found["prompts"][1]["0"] == "Other 0"


@pytest.mark.parametrize("units", [1, 2])
def test_next_to_nothing_is_reported_with_reasons(tmp_path, units):
    folder = tmp_path / "e"
    for place, name in enumerate(("a", "b")):
        report_data.write_cell(folder, name, None, None, 0.3 * place, None, units, None, ("sample",), 0)
    text = report.write_report(folder).read_text(encoding="utf-8")
    assert ("one seed and one unit: no interval" in text) == (units == 1)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """With --output elsewhere, what stands beside the cells is what fails."""
    folder = foreign(tmp_path / "e", ("a",))
    (folder / "results.parquet").mkdir()
    with pytest.raises(UserError, match=r"/e: cannot be written .*results.parquet and tensorboard/ go there"):
        report.write_report(folder, tmp_path / "r")
    (folder / "results.parquet").rmdir()
    (tmp_path / "r").write_text("")
    with pytest.raises(UserError, match=r"r: cannot be written .*give another --output"):
        report.write_report(folder, tmp_path / "r")


def test_what_makes_cells_incomparable_is_told_on_the_terminal(tmp_path, capsys):
    folder = foreign(tmp_path / "e", ("a", "b"))
    cell = folder / "cells" / "b" / "cell.json"
    cell.write_text(json.dumps({**json.loads(cell.read_text()), "suite_fingerprint": "e" * 8}))
    report.read_analysis(folder)
    assert "warning: the cells were evaluated under 2 different suites" in capsys.readouterr().err
