"""When a sweep may end an evaluation that does not end by itself."""

from pathlib import Path
from types import SimpleNamespace

from ds_stability.launchers import sweep


def test_an_evaluation_may_be_ended_only_when_its_page_is_there(tmp_path, monkeypatch):
    """All cells DONE is not enough: the page is drawn after them."""
    folder, seen = sweep.evaluation_folder(tmp_path / "runs" / "x"), []
    marks = [folder / "cells" / name / "DONE" for name in "ab"]

    def script(hosts, path, words, log, watch, keep_open):
        for mark in marks:
            mark.parent.mkdir(parents=True)
            mark.touch()
        seen.append(watch())
        (folder / sweep.PAGE).parent.mkdir(parents=True)
        (folder / sweep.PAGE).touch()
        seen.append(watch())

    monkeypatch.setattr(sweep, "run_script", script)
    one = SimpleNamespace(folder=SimpleNamespace(path=tmp_path / "runs" / "x"), progress=SimpleNamespace(update=lambda text: None), hosts=None)
    assert sweep.Sweep._evaluation(one, [], Path("log"), marks, 0) == 0 and seen == [False, True]
