"""Wrong command lines, models, cells and folders of an evaluation: one line each, and no result lost. No model is run."""

import json
import re
from argparse import Namespace

import numpy as np
import pyarrow.parquet as parquet
import pytest

from ds_stability.cli import main as cli
from ds_stability.errors import UserError
from ds_stability.eval import run as eval_run
from ds_stability.eval import tasks as eval_tasks
from ds_stability.eval.cell import (
    CellDir,
    ModelPath,
    cell_ids,
    describe_run,
    high_frequency_file,
    resolve_model,
    write_items,
)
from ds_stability.eval.command import check, launch_line, run_parser, script_arguments
from ds_stability.eval.ranks import Ranks
from ds_stability.eval.records import Measured, Prompt
from ds_stability.eval.results import memorization_gap, reference_samples


@pytest.fixture
def sweep(tmp_path):
    """A sweep of two runs, the second unfinished."""
    root = tmp_path / "runs" / "level"
    for name, level in (("l50-s0", 0.5), ("l75-s0", 0.75)):
        run = root / name
        run.mkdir(parents=True)
        (run / "manifest.json").write_text(json.dumps({
            "config": {"stability": {"level": level, "stabilizers": {"feedback": {"level": level}}}},
            "seeds": {"seed": 3}, "data": {"corpus_fingerprint": "f" * 64, "held_out": "tails", "spec": {"seed": 0}}}))
        (run / "metrics.jsonl").write_text('{"step": 1, "cross_entropy": 4.0}\n{"step": 2, "cross_entropy": 3.5}\n{"step": 3, "cro')
    final = root / "l50-s0" / "final"
    final.mkdir()
    (final / "config.json").write_text('{"model_type": "gpt_neox"}')
    (final / "high_frequency.json").write_text("{}")
    plan = [{"id": name, "arm": "feedback", "axes": {"level": 0.5, "seed": 3}} for name in ("l50-s0", "l75-s0")]
    (root / "sweep.json").write_text(json.dumps({"cells": plan}))
    return root


def error_of(action):
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def test_a_run_means_its_final_folder(sweep):
    for given in (sweep / "l50-s0", sweep / "l50-s0" / "final"):
        model = resolve_model(str(given))
        assert model.load == str(sweep / "l50-s0" / "final") and model.run == sweep / "l50-s0"
        assert cell_ids([model]) == ["l50-s0"]


def test_a_run_is_described_from_its_manifest_and_its_sweep(sweep):
    run = describe_run(str(sweep / "l50-s0"))
    assert (run["name"], run["level"], run["arm"], run["seed"]) == ("l50-s0", 0.5, "feedback", 3)
    assert run["architecture"] == "gpt_neox" and run["axes"] == {"level": 0.5, "seed": 3}
    assert run["final"] == {"step": 2, "cross_entropy": 3.5}  # the torn last line is passed over
    assert run["stability"]["stabilizers"] == {"feedback": {"level": 0.5}}
    (sweep / "sweep.json").write_text("{")
    assert "sweep.json" in error_of(lambda: describe_run(str(sweep / "l50-s0")))
    (sweep / "sweep.json").unlink()
    assert describe_run(str(sweep / "l50-s0"))["arm"] is None


def test_models_that_are_not_there(sweep, tmp_path):
    assert "no final/" in error_of(lambda: resolve_model(str(sweep / "l75-s0")))
    assert "no such folder" in error_of(lambda: resolve_model("./nowhere"))
    (tmp_path / "file").touch()
    assert "is a file" in error_of(lambda: resolve_model(str(tmp_path / "file")))
    assert resolve_model("someone/model") == ModelPath("someone/model", "someone/model", None)


def test_ids_are_readable_and_stable(tmp_path):
    (tmp_path / "a" / "m odel").mkdir(parents=True)
    (tmp_path / "b" / "m odel").mkdir(parents=True)
    first, second = (resolve_model(str(tmp_path / side / "m odel")) for side in "ab")
    ids = cell_ids([first, second])
    assert ids[0] != ids[1] and all(one.startswith("m_odel-") for one in ids)
    assert cell_ids([first]) == cell_ids([resolve_model(str(tmp_path / "a" / ".." / "a" / "m odel"))])
    assert cell_ids([resolve_model("someone/model")])[0].startswith("model-")


def test_two_cells_of_one_id(sweep, tmp_path):
    other = tmp_path / "elsewhere" / "l50-s0"
    (other / "final").mkdir(parents=True)
    (other / "manifest.json").write_text("{}")
    models = [resolve_model(str(path)) for path in (sweep / "l50-s0", other)]
    text = error_of(lambda: cell_ids(models))
    assert "would both be cell l50-s0" in text and "--cell_names" in text
    assert cell_ids(models, ["a", "b"]) == ["a", "b"]
    assert "would both be cell" in error_of(lambda: cell_ids(models, ["a", "A"]))
    assert "3 names for 2 models" in error_of(lambda: cell_ids(models, ["a", "b", "c"]))
    for bad in ("a/b", "", "..", ".hidden", "a b"):
        assert "--cell_names" in error_of(lambda bad=bad: cell_ids(models, ["a", bad]))


def test_a_model_given_twice_is_evaluated_once_and_named(sweep, capsys):
    models = [resolve_model(str(path)) for path in (sweep / "l50-s0", sweep / "l50-s0" / "final")]
    assert eval_run._once(models, None) == models[:1] and eval_run._once(models, ["a", "b"]) == models
    assert re.search(r"warning: --model .*final is given twice \(as .*l50-s0\): the second is left out\n$", capsys.readouterr().err)


def test_the_set_of_the_model_or_the_one_given(sweep):
    model = resolve_model(str(sweep / "l50-s0"))
    assert high_frequency_file(model, None) == sweep / "l50-s0" / "final" / "high_frequency.json"
    assert str(high_frequency_file(model, "other.json")) == "other.json"
    assert high_frequency_file(ModelPath("a/b", "a/b", None), None) is None


def test_a_cell_is_kept_by_one_process(tmp_path):
    first, second = CellDir(tmp_path, "a"), CellDir(tmp_path, "a")
    first.lock()
    assert "another process is evaluating this cell" in error_of(second.lock)
    CellDir(tmp_path, "b").lock()
    first.unlock()
    second.lock()


IDENTITY = {"suite": "a" * 64, "seeds": [0], "model": "m" * 64, "texts": "t", "high_frequency_set": None, "device": "cpu"}


def finished(folder):
    cell = CellDir(folder, "a")
    assert cell.check(IDENTITY) is False
    cell.begin(IDENTITY)
    with cell.journal.open(0, 1) as writer:
        writer.append("samples", "0", [])
    cell.finish({"identity": IDENTITY}, {"rows": []}, [])
    return cell


def test_a_finished_cell_is_done_and_leaves_no_journal(tmp_path):
    cell = finished(tmp_path)
    assert cell.check(IDENTITY) is True
    assert cell.check({**IDENTITY, "device": "a GPU"}) is True  # results stand, wherever they were made
    assert sorted(path.name for path in cell.path.iterdir()) == ["DONE", "cell.json", "items.parquet", "scores.json"]


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("key, value", [("suite", "b" * 64), ("seeds", [0, 1]), ("texts", "u"), ("high_frequency_set", "s")])
def test_a_folder_of_something_else_is_refused(tmp_path, done, key, value):
    if done:
        cell = finished(tmp_path)
    else:
        cell = CellDir(tmp_path, "a")
        cell.begin(IDENTITY)
    text = error_of(lambda: cell.check({**IDENTITY, key: value}))
    assert f"another {key.replace('_', ' ')}" in text and "another --output_dir" in text


def test_a_half_cell_does_not_change_its_device(tmp_path):
    cell = CellDir(tmp_path, "a")
    cell.begin(IDENTITY)
    assert "another device (cpu then, a GPU now)" in error_of(lambda: cell.check({**IDENTITY, "device": "a GPU"}))


def test_a_journal_without_its_identity_is_not_taken_over(tmp_path):
    cell = CellDir(tmp_path, "a")
    cell.begin(IDENTITY)
    with cell.journal.open(0, 1) as writer:
        writer.append("samples", "0", [])
    assert cell.check(IDENTITY) is False
    cell.identity.unlink()  # its units may be another model's
    assert "identity.json: is missing" in error_of(lambda: cell.check(IDENTITY))


def test_a_wrong_reference_file_is_named_by_its_flag(tmp_path):
    (tmp_path / "r.json").write_text('{"token')
    loaded = Namespace(vocab_size=4, tokenizer=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_tasks, "tokenizer_hash", lambda tokenizer: "0")
        assert "--reference_file" in error_of(lambda: eval_tasks.high_frequency(str(tmp_path / "r.json"), loaded))


def test_abbreviated_flags_and_ctrl_c(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        cli(["eval", "m", "--suit", "quick", "--output_dir", str(tmp_path / "o")])
    assert caught.value.code == 2 and "--suit" in capsys.readouterr().err

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ds_stability.cli._run_eval", interrupted)
    assert cli(["eval", "m", "--output_dir", str(tmp_path / "o")]) == 130
    assert capsys.readouterr().err.startswith("interrupted;")


def test_a_cell_file_cut_in_the_middle_is_named(tmp_path):
    cell = finished(tmp_path)
    cell.cell.write_text('{"identity": {"sui')
    assert "cell.json: cannot be read" in error_of(lambda: cell.check(IDENTITY))


def test_samples_are_sorted_by_decoding_prompt_and_sample(tmp_path):
    cell = CellDir(tmp_path, "a")
    rows = [{"decoding": d, "prompt": p, "sample": s} for s in (1, 0) for p in (10, 2) for d in ("beam", "greedy")]
    cell.write_records({"samples": rows, "other": [{"b": 1}, {"a": 2}]}, ["greedy", "beam"])
    keys = [(row["decoding"], row["prompt"], row["sample"]) for row in map(json.loads, cell.samples.read_text().splitlines())]
    assert keys == [(d, p, s) for d in ("greedy", "beam") for p in (2, 10) for s in (0, 1)]
    assert (cell.path / "records" / "other.jsonl").read_text() == '{"b":1}\n{"a":2}\n'


def test_items_hold_every_unit(tmp_path):
    measured = [Measured("a", [3, "x"], [1.0, 2.0], [1, 2], decoding="greedy"), Measured.null("b", "no text"),
                Measured("c", [0], [np.nan], [1], split="train")]  # fmt: skip
    write_items(tmp_path / "items.parquet", measured)
    rows = parquet.read_table(tmp_path / "items.parquet").to_pylist()
    assert rows[0] == {"metric": "a", "decoding": "greedy", "split": None, "unit_id": "3", "total": 1.0, "count": 1.0}
    assert [row["unit_id"] for row in rows] == ["3", "x", "0"]
    first = (tmp_path / "items.parquet").read_bytes()
    write_items(tmp_path / "items.parquet", measured)
    assert (tmp_path / "items.parquet").read_bytes() == first


def bits(split, totals, counts):
    return Measured("bits_per_byte", list(range(len(totals))), totals, counts, split=split)


def test_memorization_gap_is_the_difference_with_the_errors_of_both():
    draw = np.random.default_rng(0)
    held, train = draw.normal(2.0, 0.3, 400), draw.normal(1.5, 0.4, 400)
    gap = memorization_gap([bits("held_out", held * 10, np.full(400, 10.0)), bits("train", train * 7, np.full(400, 7.0))])
    assert gap.value == pytest.approx(held.mean() - train.mean(), abs=1e-9)
    error = gap.totals.std(ddof=1) / np.sqrt(len(gap.totals))
    assert error == pytest.approx(np.sqrt((0.3**2 + 0.4**2) / 400), rel=0.15)


def test_memorization_gap_over_little():
    assert memorization_gap([bits("held_out", [1.0], [1.0])]) is None
    one = memorization_gap([bits("held_out", [3.0], [1.0]), bits("train", [2.0, 2.0], [1.0, 1.0])])
    assert one.value == 1.0 and len(one.units) == 1
    null = memorization_gap([bits("held_out", [3.0], [1.0]), Measured.null("bits_per_byte", "no bytes", split="train")])
    assert null.value is None and null.note == "no bytes"


def test_reference_samples_are_the_human_continuations():
    prompts = [Prompt(0, "a", (1,), (2, 3), "bc"), Prompt(1, "b", (1,)), Prompt(2, "c", (1,), (2,), "b")]
    first, second = reference_samples(prompts, 2)
    assert first.key == (0, "reference", 0) and first.token_ids == [2, 3] and first.text == "bc"
    assert (first.finish, second.finish) == ("length", "eos")


def arguments(*words):
    return run_parser().parse_args(["--model", "m", "--output_dir", "o", *words])


@pytest.mark.parametrize(
    "words, part",
    [
        (["--seeds", "1", "1"], "--seeds 1 1"), (["--seeds", "-1"], "--seeds -1"), (["--gpus_per_model", "0"], "from 1"),
        (["--max_memory_gib", "nan"], "above 0"), (["--reference_file", "nowhere.json"], "no such file"),
        (["--text_from", "nowhere"], "not the folder of a run"),
    ],
)  # fmt: skip
def test_flags_out_of_range(words, part):
    assert part in error_of(lambda: check(arguments(*words)))


@pytest.mark.parametrize("words", [["--dtype", "int3"], ["--nonsense"], ["--seeds", "x"], ["--sui", "quick"]])
def test_flags_that_are_none(words):
    assert words[0] in error_of(lambda: arguments(*words))


def test_the_launched_command_line_means_the_same():
    words = ["--model", "a", "b", "--suite", "s", "--output_dir", "o", "--dtype", "float32", "--gpus_per_model", "2", "--seeds", "3",
             "4", "--cell_names", "x", "y", "--held_out_file", "h.txt", "--train_file", "t.txt", "u.txt",
             "--trust_remote_code", "--max_memory_gib", "2.5", "--reference_file", "r.json", "--text_from", "run"]  # fmt: skip
    args = run_parser().parse_args(words)
    assert run_parser().parse_args(script_arguments(args)) == args
    line = launch_line(Namespace(**vars(args), num_gpus=2, hostfile="hosts", master_port=12345))
    assert line[1:8] == ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--num_gpus", "2", "--master_port"]


def test_ds_stability_eval_says_mistakes_in_one_line(tmp_path, capsys):
    out = str(tmp_path / "o")
    for words, part in ((["m", "--seeds", "0", "0"], "--seeds"), (["m", "--suite", "quik"], "did you mean quick?"),
                        (["./nowhere"], "no such folder"), (["m", "--num_gpus", "0"], "--num_gpus 0"),
                        (["m", "--hostfile", "none"], "no such file")):  # fmt: skip
        assert cli(["eval", *words, "--output_dir", out]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and part in err


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    text = error_of(lambda: eval_run.require_shared(tmp_path / "file", Ranks()))
    assert "--output_dir" in text and "cannot be written" in text


def test_a_rank_that_does_not_see_the_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_run, "SEEN_SECONDS", 0.0)
    ranks = Ranks()
    ranks.all_say = lambda seen: [seen, True, False]
    assert "rank 2 does not see" in error_of(lambda: eval_run.require_shared(tmp_path, ranks))
    assert list(tmp_path.iterdir()) == []
