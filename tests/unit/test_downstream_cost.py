"""benchmarks/downstream.py: pooled minimal pairs, and which skills fall."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]

import downstream  # noqa: E402

from ds_stability.eval.minimal_pairs_templates import PHENOMENA  # noqa: E402
from ds_stability.eval.records import Measured  # noqa: E402
from ds_stability.eval.report_cells import Cell, Key  # noqa: E402


def cell(level, right):
    measured = {
        Key("minimal_pairs_npi_ever"): Measured("minimal_pairs_npi_ever", range(40), [1.0] * 40, [1.0] * 40),
        Key("minimal_pairs_npi_any"): Measured("minimal_pairs_npi_any", range(20), [right] * 20, [1.0] * 20),
        Key("bits_per_byte", None, "held_out"): Measured("bits_per_byte", range(30), [1.0 + level + 0.01 * i * (1 + level) for i in range(30)], [1.0] * 30),
    }
    rows = {key: {"metric": key.metric, "split": key.split, "value": item.value, "n": len(item.units)} for key, item in measured.items()}
    return Cell(f"level-{level}", Path("."), {"suite": {"name": "x"}, "seconds": {}}, rows, measured, "llama", "feedback", level, 0)


def test_every_phenomenon_is_in_one_family():
    for name in PHENOMENA:
        assert sum(name.startswith(tuple(beginnings)) for beginnings in downstream.PAIRS.values()) == 1, name


def test_pairs_are_pooled_and_losses_are_marked():
    rows = {row["skill"]: row for row in downstream.skill_rows([cell(0.0, 1.0), cell(0.9, 0.0)])}
    polarity = {figure["level"]: figure for figure in rows["minimal pairs: negative polarity"]["figures"]}
    assert polarity[0.0]["value"] == 1.0 and polarity[0.0]["falls"] is None
    assert polarity[0.9]["value"] == pytest.approx(40 / 60) and polarity[0.9]["falls"] is True
    assert "minimal pairs: agreement" not in rows  # nothing was measured
    bits = {figure["level"]: figure for figure in rows["bits per byte, held-out"]["figures"]}
    assert bits[0.9]["falls"] is True and bits[0.9]["difference"] == pytest.approx(0.9 * (1 + 0.01 * 14.5))  # less is better


def test_what_did_not_fall_is_not_marked():
    result = {"rows": json.loads(json.dumps(downstream.skill_rows([cell(0.0, 1.0), cell(0.5, 1.0)])))}
    header, rows = downstream.skills_table(result)
    assert header == ["kind", "skill", "level 0", "level 0.5", "chance"]
    marks = {row[1]: row[3].endswith("*") for row in rows}
    assert marks == {"minimal pairs: negative polarity": False, "bits per byte, held-out": True}
    assert "choosing between given answers 0 of 1; running text 1 of 1" in downstream.summary(result)
