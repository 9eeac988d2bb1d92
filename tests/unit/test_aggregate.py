"""Reading cells, and the rows of groups of them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import report_data  # noqa: E402

from ds_stability.errors import UserError  # noqa: E402
from ds_stability.eval import aggregate  # noqa: E402
from ds_stability.eval.aggregate import Group  # noqa: E402
from ds_stability.eval.records import Measured  # noqa: E402
from ds_stability.eval.report_cells import Cell, Key, read_evaluation  # noqa: E402
from ds_stability.eval.verdict import ENTROPY  # noqa: E402

KEY = Key("m", None, "held_out")


def make_cell(seed, totals, counts=None, level=0.0, arm="feedback", architecture="a", units=None) -> Cell:
    counts = np.ones(len(totals)) if counts is None else np.asarray(counts)
    measured = Measured("m", [str(u) for u in (units or range(len(totals)))], np.asarray(totals), counts, split="held_out", unit="nats")
    row = {"metric": "m", "split": "held_out", "value": measured.value, "n": float(counts.sum()), "unit": "nats", "note": None}
    name = f"{architecture}-{arm}-{level}-{seed}"
    return Cell(name, Path(name), {"run": {}}, {KEY: row}, {KEY: measured}, architecture, arm, level, seed)


def rows_of(cells):
    return {(row["arm"], row["level"]): row for row in aggregate.group_rows(aggregate.groups_of(cells), KEY)}


def test_group_value_is_the_mean_over_seeds_of_ratios_of_sums():
    cells = [make_cell(0, [1.0, 9.0], [1.0, 3.0]), make_cell(1, [4.0, 4.0], [1.0, 1.0])]
    row = rows_of(cells)["feedback", 0.0]
    assert row["value"] == pytest.approx((10 / 4 + 4) / 2) and row["seeds"] == 2 and row["units"] == 2
    assert row["sd"] == pytest.approx(np.std([2.5, 4.0], ddof=1))


def test_difference_is_paired_by_seed_and_unit():
    """Prompts and seeds differ widely, the effect does not: the interval of the difference must see the effect only."""
    random = np.random.default_rng(0)
    cells = []
    for seed in range(3):
        base = 10 * random.normal(size=20) + 5 * random.normal()
        cells += [make_cell(seed, base), make_cell(seed, base + 1 + 0.01 * random.normal(size=20), level=0.5)]
    row = rows_of(cells)["feedback", 0.5]
    assert row["difference"] == pytest.approx(1.0, abs=0.02)
    assert row["difference_high"] - row["difference_low"] < 0.05 and row["difference_p"] < 0.001
    assert row["ci_high"] - row["ci_low"] > 1.0
    assert rows_of(cells)["feedback", 0.0]["difference"] is None


def test_difference_uses_common_units_and_common_seeds_only():
    cells = [make_cell(0, [1.0, 2.0, 3.0], units=[0, 1, 2]), make_cell(0, [5.0, 7.0], level=1.0, units=[1, 2]), make_cell(7, [99.0, 99.0], level=1.0)]
    row = rows_of(cells)["feedback", 1.0]
    assert row["difference"] == pytest.approx(6.0 - 2.5)
    assert "1 of 3 units are not in every cell: left out; not on both sides: seed 7" in row["note"].partition("difference: ")[2]


def test_difference_without_a_common_unit_is_independent_and_says_so():
    cells = [make_cell(0, [1.0, 2.0], units=[0, 1]), make_cell(0, [5.0, 7.0], level=1.0, units=[2, 3])]
    row = rows_of(cells)["feedback", 1.0]
    assert row["difference"] == 4.5 and row["difference_low"] < -5 and "no unit in common: taken as independent" in row["note"]


def test_one_seed_says_that_its_interval_is_over_prompts_only():
    row = rows_of([make_cell(0, np.arange(20.0))])["feedback", 0.0]
    assert row["ci_low"] < row["value"] < row["ci_high"] and "over prompts only" in row["note"]


def test_one_seed_and_one_unit_has_no_interval():
    row = rows_of([make_cell(0, [2.0])])["feedback", 0.0]
    assert row["value"] == 2.0 and row["ci_low"] is None and "no interval" in row["note"]


def test_constant_metric_has_no_interval_and_says_why():
    cells = [make_cell(seed, np.full(5, 0.25 + level), level=level) for seed in range(3) for level in (0.0, 1.0)]
    row = rows_of(cells)["feedback", 1.0]
    assert row["value"] == 1.25 and row["ci_low"] is None and row["stderr"] is None
    assert row["difference"] == 1.0 and row["difference_low"] is None and row["difference_p"] is None
    assert row["note"] == "all 3 seeds and 5 units are equal: no interval"


def test_a_figure_that_is_null_in_some_cells_names_them():
    cells = [make_cell(0, [1.0, 2.0]), make_cell(1, [np.nan, 2.0]), make_cell(0, [3.0, 5.0], level=1.0), make_cell(1, [4.0, 4.0], level=1.0)]
    rows = rows_of(cells)
    assert rows["feedback", 0.0]["seeds"] == 1 and "no value in seed 1" in rows["feedback", 0.0]["note"]
    assert rows["feedback", 1.0]["difference"] == 2.5 and "difference: one seed" in rows["feedback", 1.0]["note"]
    assert "not on both sides: seed 1" in rows["feedback", 1.0]["note"]


def test_a_group_without_any_value_has_a_row_that_says_so():
    row = rows_of([make_cell(0, [np.nan]), make_cell(1, [np.nan])])["feedback", 0.0]
    assert row["value"] is None and row["seeds"] == 0 and row["note"] == "no value"


def test_many_units():
    random = np.random.default_rng(2)
    row = rows_of([make_cell(seed, random.normal(size=3000)) for seed in range(2)])["feedback", 0.0]
    assert row["units"] == 3000 and row["n"] == 6000 and row["ci_high"] - row["ci_low"] < 1.0


def test_baseline_of_an_arm_is_the_dose_responses_level_zero():
    groups = [Group("a", "feedback", level) for level in (0.0, 0.5, 1.0)] + [Group("a", "longer", 0.0), Group("a", "clipping", 1.0)]
    assert aggregate.main_arm(groups) == "feedback"
    assert aggregate.baseline_of(groups[3], groups, 0.0, "feedback") == groups[0]
    assert aggregate.baseline_of(groups[4], groups, 0.0, "feedback") == groups[0]
    assert aggregate.baseline_of(groups[0], groups, 0.0, "feedback") is None
    assert aggregate.baseline_of(Group("b", "feedback", 1.0), groups, 0.0, "feedback") is None


def test_feedback_is_the_dose_response_wherever_it_has_a_level():
    groups = [Group("a", "feedback", 0.5), Group("a", "clipping", 0.5), Group("a", "clipping", 1.0), Group("b", "clipping", 0.0)]
    assert aggregate.main_arm(groups) == "feedback"
    assert aggregate.main_arm(groups[1:]) == "clipping"
    assert aggregate.main_arm([*groups[1:], Group("a", "feedback", None)]) == "clipping"  # a schedule is no level
    assert aggregate.main_arm([Group("a", "z", 0.5), Group("a", "y", 0.5)]) == "y" and aggregate.main_arm([Group("a", "none", None)]) is None


def test_a_figure_that_feedback_lacks_gets_no_other_arms_baseline():
    cells = [make_cell(0, [1.0, 2.0], arm="z_loss", level=0.5), *(make_cell(0, [1.0, 3.0], arm="clipping", level=level) for level in (0.0, 1.0))]
    lacking = make_cell(0, [1.0, 2.0])
    lacking.rows[KEY]["value"] = None
    rows = rows_of([*cells, lacking])
    assert rows["z_loss", 0.5]["baseline"] is None and rows["clipping", 1.0]["baseline"] == "clipping, level 0"


# reading


@pytest.fixture
def folder(tmp_path):
    return report_data.write_evaluation(tmp_path / "evals" / "small", ("gpt2",), (0.0, 1.0), (0, 1), arms=False, untouched=False,
                                        units=4, decodings=("sample",), steps=5)  # fmt: skip


def test_results_frame_has_a_line_per_cell_and_figure(folder):
    evaluation = read_evaluation(folder)
    frame = aggregate.results_frame(evaluation.cells)
    assert list(frame.columns) == list(aggregate.RESULT_COLUMNS)
    assert len(frame) == sum(len(cell.rows) for cell in evaluation.cells) and set(frame["level"]) == {0.0, 1.0}
    assert frame["metric"].eq("mauve").sum() == 4 and frame.loc[frame["metric"].eq("mauve"), "value"].isna().all()


def test_items_add_up_to_the_scores(folder):
    for cell in read_evaluation(folder).cells:
        for key, measured in cell.measured.items():
            assert measured.value == pytest.approx(cell.value(key), rel=1e-9)


def test_an_unfinished_cell_is_named_and_the_others_stand(folder):
    (folder / "cells" / "gpt2-feedback-1-0" / "DONE").unlink()
    evaluation = read_evaluation(folder)
    assert [cell.id for cell in evaluation.incomplete] == ["gpt2-feedback-1-0"] and len(evaluation.cells) == 3
    assert "DONE" in evaluation.incomplete[0].reason


@pytest.mark.parametrize("name", ["cell.json", "scores.json", "items.parquet"])
def test_a_result_that_is_cut_off_makes_the_cell_incomplete(folder, name):
    path = folder / "cells" / "gpt2-feedback-1-0" / name
    path.write_bytes(path.read_bytes()[:-40])
    (cut,) = read_evaluation(folder).incomplete
    assert cut.id == "gpt2-feedback-1-0" and name in cut.reason and "\n" not in cut.reason
    assert "remove cells/gpt2-feedback-1-0/DONE and run the same ds-stability eval" in cut.reason


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("spoil", [lambda items: items.assign(total=np.nan), lambda items: items.assign(count=0.0),
                                   lambda items: items.assign(total=items.total.where(items.unit_id != "1", np.nan)),
                                   lambda items: items.assign(total=items.total.where(items.unit_id != "1", np.inf))])  # fmt: skip
def test_units_that_are_no_numbers_are_left_out_without_a_word_of_numpy(folder, spoil):
    clean = entropy_by_level(folder)
    path = folder / "cells" / "gpt2-feedback-1-0" / "items.parquet"
    spoil(pd.read_parquet(path)).to_parquet(path, index=False)
    spoiled = entropy_by_level(folder)
    assert spoiled[0.0] == clean[0.0] and spoiled[1.0]["value"] == clean[1.0]["value"]
    low, high = spoiled[1.0]["ci_low"], spoiled[1.0]["ci_high"]
    assert np.isfinite([low, high]).all() and low <= high


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_a_figure_that_is_no_number_is_none(folder, number):
    path = folder / "cells" / "gpt2-feedback-1-0" / "scores.json"
    content = json.loads(path.read_text())
    row = next(row for row in content["rows"] if row["metric"] == ENTROPY.metric and row["split"] == ENTROPY.split)
    row["value"] = float(number)
    path.write_text(json.dumps(content))
    rows = entropy_by_level(folder)
    assert (rows[1.0]["seeds"], rows[0.0]["seeds"]) == (1, 2) and np.isfinite(rows[1.0]["value"])


def entropy_by_level(folder):
    groups = aggregate.groups_of(read_evaluation(folder).cells)
    return {row["level"]: row for row in aggregate.group_rows(groups, ENTROPY)}


def test_scores_without_rows_make_the_cell_incomplete(folder):
    (folder / "cells" / "gpt2-feedback-1-0" / "scores.json").write_text('{"rows": [3]}')
    assert "scores.json" in read_evaluation(folder).incomplete[0].reason


def test_of_two_cells_of_one_name_the_later_is_left_out_and_named(folder):
    before = {cell.folder.name for cell in read_evaluation(folder).cells}
    shutil.copytree(folder / "cells" / "gpt2-feedback-1-0", folder / "cells" / "zweite")
    found = read_evaluation(folder)
    assert {cell.folder.name for cell in found.cells} == before
    assert [cell.id for cell in found.incomplete] == ["zweite"]
    assert "it has the id, gpt2-feedback-1-0, of cell gpt2-feedback-1-0" in found.incomplete[0].reason
    meta = json.loads((folder / "cells" / "zweite" / "cell.json").read_text())
    (folder / "cells" / "zweite" / "cell.json").write_text(json.dumps({**meta, "id": "zweite"}))
    found = read_evaluation(folder)
    assert {cell.folder.name for cell in found.cells} == before
    assert "it has the place in the sweep (arm, level, architecture, seed)" in found.incomplete[0].reason


def test_two_models_with_one_place_in_the_sweep_are_two(folder):
    """Runs that differ in their learning rate alone have one level, architecture and seed: to compare them is why they were evaluated."""
    shutil.copytree(folder / "cells" / "gpt2-feedback-1-0", folder / "cells" / "zweite")
    for name in ("gpt2-feedback-1-0", "zweite"):
        path = folder / "cells" / name / "cell.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "id": name, "model_fingerprint": f"of {name}"}))
    found = read_evaluation(folder)
    assert found.incomplete == [] and {cell.id: cell.arm for cell in found.cells}["zweite"] == "feedback, cell zweite"
    assert any("have one place in the sweep" in problem and "two models" in problem for problem in found.problems)


def test_another_axis_makes_an_arm_of_its_own(folder):
    path = folder / "cells" / "gpt2-feedback-1-0"
    meta = json.loads((path / "cell.json").read_text())
    shutil.copytree(path, folder / "cells" / "again")
    for name, rate in (("gpt2-feedback-1-0", 0.1), ("again", 0.2)):
        run = {**meta["run"], "axes": {**meta["run"]["axes"], "learning_rate": rate}}
        (folder / "cells" / name / "cell.json").write_text(json.dumps({**meta, "id": name, "run": run}))
    arms = {cell.id: cell.arm for cell in read_evaluation(folder).cells}
    assert arms["again"] == "feedback, learning_rate=0.2" and arms["gpt2-feedback-1-0"] == "feedback, learning_rate=0.1"
    assert arms["gpt2-feedback-0-0"] == "feedback"


def test_a_schedule_of_levels_is_an_arm_not_a_level(folder):
    path = folder / "cells" / "gpt2-feedback-1-0" / "cell.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "run": {**meta["run"], "level": [[0, 0.0], [9, 1.0]], "axes": {}}}))
    cell = next(cell for cell in read_evaluation(folder).cells if cell.id == "gpt2-feedback-1-0")
    assert cell.level is None and "[[0, 0.0], [9, 1.0]]" in cell.arm


def test_different_suites_and_sets_are_told(folder):
    path = folder / "cells" / "gpt2-feedback-1-0" / "cell.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "suite_fingerprint": "other", "high_frequency": None}))
    problems = " ".join(read_evaluation(folder).problems)
    assert "2 different suites" in problems and "2 different high-frequency sets" in problems


def test_scores_of_different_versions_are_told(folder):
    for cell, version in (("gpt2-feedback-1-0", 2), ("gpt2-feedback-0-0", 3)):
        path = folder / "cells" / cell / "cell.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "identity": {"scores_version": version}}))
    assert "scores version 2, 3" in " ".join(read_evaluation(folder).problems)


def test_nothing_to_read(tmp_path, folder):
    with pytest.raises(UserError, match="no folder cells/"):
        read_evaluation(tmp_path / "absent")
    for cell in (folder / "cells").iterdir():
        (cell / "DONE").unlink()
    with pytest.raises(UserError, match="no complete cell"):
        read_evaluation(folder)


def test_a_cell_without_items_still_counts_by_seed(folder):
    for path in folder.glob("cells/*/items.parquet"):
        path.unlink()
    evaluation = read_evaluation(folder)
    groups = aggregate.groups_of(evaluation.cells)
    key = Key("predictive_entropy", None, "held_out")
    row = aggregate.group_rows(groups, key)[0]
    assert row["value"] is not None and row["ci_low"] < row["value"] < row["ci_high"]


def test_parquet_round_trip(folder, tmp_path):
    frame = aggregate.results_frame(read_evaluation(folder).cells)
    frame.to_parquet(tmp_path / "r.parquet", index=False)
    assert len(pd.read_parquet(tmp_path / "r.parquet")) == len(frame)


def test_cells_on_different_text_are_said_to_be(tmp_path):
    """Units go by number: the same number in another text, or another high-frequency set of words, is no pair."""
    folder = report_data.write_evaluation(tmp_path / "e", architectures=("gpt2",), levels=(0.0, 1.0), seeds=(0,), arms=False, untouched=False)
    places = sorted((folder / "cells").iterdir())

    def problems(*facts):
        for place, (held_out, train) in zip(places, facts, strict=True):
            meta = json.loads((place / "cell.json").read_text())
            meta["texts"] = {"held_out_characters": held_out, "train_tokens_counted": train}
            (place / "cell.json").write_text(json.dumps(meta))
        return " ".join(read_evaluation(folder).problems)

    assert problems((1000, 5000), (1000, 5000)) == ""
    assert "different held-out text" in problems((1000, 5000), (900, 5000))
    found = problems((1000, 5000), (1000, 50))
    assert "different training text" in found and "word share" in found and "held-out" not in found
