"""Coverage of the report's intervals where the truth is known, and the benchmark that measures it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import interval_coverage  # noqa: E402
import render  # noqa: E402

from ds_stability.eval.contrasts import difference_estimate, group_estimate  # noqa: E402
from ds_stability.eval.report_cells import Key  # noqa: E402


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_the_report_hold_where_seeds_differ_as_real_runs_do(seeds):
    """300 figures through the report's analysis: bootstrap intervals over seeds and units covered 0.63 to 0.85 here."""
    found = interval_coverage.real_runs(seeds, np.random.default_rng(seeds), rounds=1)
    assert found["group"] >= 0.92 and found["difference"] >= 0.92
    assert found["error_ratio"] == pytest.approx(1.0, abs=0.12)
    assert found["bootstrap group"] < 0.92 and found["bootstrap difference"] < 0.92


def test_every_cell_of_a_small_grid_holds(monkeypatch):
    monkeypatch.setattr(interval_coverage, "SEEDS", (2, 5))
    monkeypatch.setattr(interval_coverage, "UNITS", (8, 32))
    monkeypatch.setattr(interval_coverage, "BETWEEN", (0.0, 0.9))
    for row in interval_coverage.grid(1000, np.random.default_rng(0)):
        assert row["coverage"] >= 0.92, row


def test_the_page_is_rendered_from_what_the_script_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(interval_coverage, "SEEDS", (2, 3))
    monkeypatch.setattr(interval_coverage, "UNITS", (8, 32))
    monkeypatch.setattr(interval_coverage, "SHARES", {0.02: 0.1})
    monkeypatch.setattr(interval_coverage, "real_runs", lambda seeds, rng: {
        "seeds": seeds, "error_ratio": 1.0, **dict.fromkeys(interval_coverage.METHODS, 0.95)})  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["interval_coverage.py", "--output", str(tmp_path), "--figures", "100"])
    assert interval_coverage.main() == 0
    result = json.loads((tmp_path / "coverage.json").read_text())
    assert result["kind"] == "coverage" and result["git"] is not None and {"report", "grid", "shares", "single"} <= result.keys()
    text = render.section("coverage", tmp_path)
    printed = capsys.readouterr().out
    assert all(title in text and title in printed for title in interval_coverage.tables(result))


@pytest.mark.parametrize("share, other", [(0.0, 0.0), (0.0, 0.3), (0.05, 0.1), (0.5, 0.5)])
def test_shares_are_taken_as_the_report_takes_them(share, other):
    """The benchmark's shortcut for many shares at once, against the estimates of cells."""
    rng = np.random.default_rng(3)
    tables = [(rng.random((1, 3, 12)) < chance).astype(float) for chance in (share, other)]
    shortcut = [interval_coverage.Share(table) for table in tables]
    key = Key("figure_0", None, "held_out")
    sides = []
    for table in tables:
        cells = interval_coverage.evaluation(table[:, None]).cells
        for cell in cells:
            cell.rows[key]["unit"] = "share"
        sides.append(cells)
    group, apart = group_estimate(sides[0], key), difference_estimate(*sides, key)
    assert (group.low, group.high) == pytest.approx([float(bound[0]) for bound in shortcut[0].bounds])
    assert (apart.low, apart.high) == pytest.approx([float(bound[0]) for bound in interval_coverage.share_difference(*shortcut)])
