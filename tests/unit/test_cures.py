"""benchmarks/cures.py without training: the sweep that it writes, the choice of learning rates, its table and figure."""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ds_stability.errors import UserError
from ds_stability.launchers.sweep_plan import load_plan

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cures
import cures_figure


def arguments(**given):
    return argparse.Namespace(**{"pretrain_file": None, "train_file": None, "arms": None, "seeds": [0, 1], **given})


def figure(value, spread=0.1):
    return {name: None for name in cures.headline.FIGURES} | {"value": value, "ci_low": value - spread, "ci_high": value + spread}


def row(arm, bits, entropy, rate=1e-3):
    figures = {name: figure(entropy) for name in cures_figure.DIVERSITY} | {"self-BLEU-4": figure(-entropy), cures.QUALITY: figure(bits)}
    return {"arm": arm, "learning_rate": rate, "figures": figures}


RESULT = {
    "rows": [row("untouched", 3.0, 4.0, None), row("plain", 2.0, 2.0), row("gem", 1.9, 2.5), row("governor_initial", 2.1, 3.0)],
    "search": [{"arm": "plain", "learning_rate": 1e-3, "seed": 0, **dict.fromkeys(cures.COLUMNS, 2.0), "entropy": None}],
    "human": {"distinct-2": 0.5}, "chance": {"minimal pairs": 0.5},
}  # fmt: skip


def test_texts_of_the_user_reach_the_base_and_the_arms(tmp_path):
    document = cures.sweep_document(arguments(pretrain_file=["a.txt"], train_file=["b.txt"], arms=["gem"]))
    assert list(document["arms"]) == ["base", "untouched", "plain", "gem"]
    assert document["flags"]["train_file"] == [str(Path("b.txt").resolve())] and document["flags"]["dataset_name"] is None
    assert document["arms"]["base"]["flags"]["train_file"] == [str(Path("a.txt").resolve())]
    with pytest.raises(UserError, match="--arms gim: allowed are base, untouched, plain"):
        cures.sweep_document(arguments(arms=["gim"]))


def test_every_arm_starts_from_the_base_and_differs_in_its_cure_only():
    cells = load_plan("cures").cells
    base = next(cell for cell in cells if cell.arm == "base")
    common = None
    for cell in cells:
        if cell.arm in ("base", "untouched"):
            continue
        assert cell.flags["model_name_or_path"] == f"{{cell:{base.id}}}/final" and base.id in cell.needs
        flags = {key: value for key, value in cell.flags.items() if key not in ("seed", "learning_rate", "neftune_noise_alpha")}
        common = common or flags
        assert flags == common


def test_the_learning_rate_with_the_lowest_held_out_loss_is_chosen(tmp_path):
    document = cures.sweep_document(arguments(arms=["gem"]))
    file = tmp_path / "cures.yaml"
    file.write_text(cures.yaml.safe_dump(document, sort_keys=False))
    plan = load_plan(file)
    losses = {("plain", 1e-3): 2.0, ("gem", 3e-4): 1.0, ("plain", 3e-4): None}
    for cell in plan.cells:
        folder = tmp_path / "runs" / cell.id
        folder.mkdir(parents=True)
        loss = losses.get((cell.arm, cell.axes["learning_rate"]), 3.0)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/cross_entropy": loss}) + "\n")
    assert cures.choose(plan, tmp_path / "runs", 0) == {"plain": 1e-3, "gem": 3e-4}


@pytest.mark.parametrize(("error", "code", "words"), [
    (UserError("the sweep x failed"), 2, "error: the sweep x failed\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted; the same command keeps what is complete\n"),
])  # fmt: skip
def test_a_sweep_that_fails_or_is_interrupted_is_told_in_one_line(monkeypatch, tmp_path, capsys, error, code, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sys, "argv", ["cures.py", "--output", str(tmp_path)])
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(cures.__file__, run_name="__main__")
    assert ended.value.code == code and capsys.readouterr().err == words


def test_table_ends_with_human_text_and_chance():
    header, rows = cures.cures_table(RESULT, ("bits per byte", "distinct-2", "minimal pairs", "pass@1"))
    assert header == ["arm", "learning rate", "bits per byte", "distinct-2", "bits per byte beyond plain"]  # what no arm has is left out
    assert [line[0] for line in rows] == ["untouched", "plain", "gem", "governor initial", "human text"] and rows[-1][-2:] == ["0.500", "-"]


def test_who_beats_whom_on_both():
    text = cures.sentences(RESULT)
    assert "**entropy** against bits per byte: not beaten on both by any other arm: gem, governor initial." in text
    assert "governor initial is beaten on both by none." in text
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0)}
    assert cures.beaten_by("b", points) == ["a"] and not cures.beaten_by("a", points)


def test_the_figure_is_drawn_with_gaps(tmp_path):
    cures_figure.pareto(RESULT, tmp_path / "cures.png", "title")
    assert (tmp_path / "cures.png").read_bytes().startswith(b"\x89PNG")
