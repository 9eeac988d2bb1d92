"""The table that an evaluation and a report end with: what it says, that it is plain text, and that a page that fails loses nothing."""

import errno
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import report_data  # noqa: E402
from test_comparison import BITS, model, noise  # noqa: E402

from ds_stability.errors import PageError, StorageError  # noqa: E402
from ds_stability.eval import conclusion, report  # noqa: E402
from ds_stability.eval.aggregate import groups_of  # noqa: E402
from ds_stability.eval.comparison import compare  # noqa: E402
from ds_stability.eval.terminal_table import table_lines  # noqa: E402


def table(*cells, width=80):
    return table_lines(compare(groups_of(cells)), width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models that no run made, and one unfinished cell."""
    folder = report_data.write_evaluation(tmp_path_factory.mktemp("evals") / "e", (), (), (), arms=False, units=8, decodings=("sample",))
    for name, level in (("gptish-0123abcd", 0.3), ("llamaish-0123abcd", 0.6), ("unfinished", 0.0)):
        report_data.write_cell(folder, name, None, None, level, None, 8, None, ("sample",), 0)
    (folder / "cells" / "unfinished" / "DONE").unlink()
    return folder


def arguments(folder, **changed):
    values = {"suite": "quick", "seeds": [0], "held_out_file": ["a b.txt"], "train_file": [], "text_from": None, "reference_file": None,
              "dtype": None, "backend": None, "output_dir": str(folder)}  # fmt: skip
    return Namespace(**{**values, **changed})


def test_an_evaluation_ends_with_table_page_and_next_command(folder, capsys):
    conclusion.conclude_evaluation(arguments(folder))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["gptish", "llamaish"], "names without the hash; the third stands below"
    assert any(line.split() == ["pretrained"] for line in lines)
    assert any(line.startswith("bits per byte, held-out") and line.endswith(" *") for line in lines)
    assert "* best: every other model is worse, Holm-adjusted p < 0.05." in out and "nearest to human text is best".capitalize() in " ".join(out.split())
    assert f"page: {folder}/report/index.html" in lines and (folder / "report" / "index.html").is_file()
    assert lines[-1] == (f"next: compare another model, with ds-stability eval ANOTHER_MODEL --suite quick --held_out_file 'a b.txt' --output_dir {folder}")
    assert max(map(len, lines[:-2])) <= 80 and out.isascii() and "\x1b" not in out
    assert "warning: cell unfinished is left out: not finished: no DONE" in err
    assert "7 of 19 figures; the page has the others." in lines


def test_one_model_has_human_text_beside_it():
    lines = table(model("m", {BITS: 3 + noise(0)}))
    assert lines[0].strip() == "m" and not any("best" in line for line in lines)


def test_names_of_strangers_are_harmless():
    evil = "\x1b[31m" + "模型" * 30 + "\n[bold]x[/bold]\u202e"
    text = "\n".join(table(model(evil, {BITS: 3 + noise(0)}), model("b", {BITS: 2 + noise(1)})))
    assert text.isascii() and "\x1b" not in text and max(map(len, text.splitlines())) <= 80


def test_names_that_are_cut_to_one_stay_apart():
    names = [f"{'long' * 10}-{middle}-{'name' * 10}" for middle in "ab"]
    lines = table(*(model(name, {BITS: 3 + noise(0)}) for name in names))
    assert lines[0].split()[0] != lines[0].split()[2] and all(name in "".join(line.strip() for line in lines) for name in names)


def test_many_models_are_lines():
    lines = table(*(model(f"m{number:02d}", {BITS: 3 + 0.1 * number + noise(0) + noise(number, scale=0.01)}) for number in range(9)))
    assert [line.split()[0] for line in lines[2:11]] == [f"m{number:02d}" for number in range(9)]
    assert sum(line.endswith("*") for line in lines) == 1


def test_models_of_others_are_compared_however_many():
    cells = [model(f"m{number:02d}", {BITS: 3 + 0.1 * number + noise(0)}) for number in range(14)]
    assert "not compared in pairs" not in "\n".join(table(*cells))


def test_why_there_is_no_interval_is_a_footnote():
    lines = table(model("a", {BITS: np.full(5, 2.0)}), model("b", {BITS: 3 + noise(0)}))
    assert any("  2 * (a)  " in line for line in lines), "no width 0"
    assert "(a) all 5 units are equal: no interval" in lines


@pytest.mark.parametrize(("failure", "error", "code"), [(OSError(errno.ENOSPC, "No space left"), StorageError, 74), (ValueError("a bug"), PageError, 73)])
def test_a_page_that_fails_is_one_line_and_a_code_and_loses_nothing(folder, capsys, monkeypatch, failure, error, code):
    def fail(*_):
        raise failure

    monkeypatch.setattr(report, "draw_figures", fail)
    before = {path: path.read_bytes() for path in sorted(folder.glob("cells/**/*")) if path.is_file()}
    with pytest.raises(error, match=r"the cells in .* are done, but their page could not be made.*ds-stability report") as caught:
        conclusion.conclude_evaluation(arguments(folder))
    assert caught.value.exit_code == code and "bits per byte" in capsys.readouterr().out, "the table comes first"
    assert {path: path.read_bytes() for path in sorted(folder.glob("cells/**/*")) if path.is_file()} == before
