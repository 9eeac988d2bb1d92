"""Models side by side: what is paired, what is compared at all, and which model is called the best."""

from pathlib import Path

import numpy as np
import pytest

from ds_stability.eval.aggregate import groups_of
from ds_stability.eval.comparison import compare, named_models
from ds_stability.eval.contrasts import holm
from ds_stability.eval.measures import HIGHER, HUMAN, LOWER, OTHER, ZERO, measure_of
from ds_stability.eval.metrics import METRIC_NAMES
from ds_stability.eval.records import Measured
from ds_stability.eval.report_cells import Cell, Key
from ds_stability.eval.report_models import sentences, table
from ds_stability.eval.terminal_table import table_lines

BITS, NATS = Key("bits_per_byte", None, "held_out"), Key("cross_entropy", None, "held_out")
DISTINCT, HUMAN_DISTINCT = Key("distinct_2", "sample", None), Key("distinct_2", "reference", None)
GAP = Key("calibration_gap", None, "held_out")
FACTS = {"prompts_sha": "p", "held_out_sha": "h", "train_sha": "t", "tokenizer": "k"}


def model(name, figures, units=None, **facts) -> Cell:
    """A model that no run made; figures: values of units by key."""
    rows, measured = {}, {}
    for key, values in figures.items():
        names = [str(u) for u in (units or range(len(values)))]
        measured[key] = Measured(key.metric, names, values, np.ones(len(values)), key.decoding, key.split)
        rows[key] = {"metric": key.metric, "value": measured[key].value, "unit": "nats", "note": None, "settings": {}}
    meta = {"suite_fingerprint": "s", "texts": {**FACTS, **facts}, "identity": {"task_files": "f"}, "run": None}
    return Cell(name, Path(name), meta, rows, measured, "x", f"untouched: {name}", None, None)


def compared(*cells):
    found = compare(groups_of(cells))
    return {line.key: line for line in found.lines}


def noise(seed, units=40, scale=0.1):
    return scale * np.random.default_rng(seed).standard_normal(units)


def test_a_pair_is_paired_by_unit_and_its_p_is_holms():
    text = noise(0, scale=2.0)  # a text's own difficulty, far larger than the models' difference
    cells = [model(name, {BITS: 3 + shift + text + noise(seed)}) for name, shift, seed in (("a", 0, 1), ("b", 0.2, 2), ("c", 0.21, 3))]
    line = compared(*cells)[BITS]
    assert [(pair.one, pair.two) for pair in line.pairs] == [(0, 1), (0, 2), (1, 2)]
    differences = cells[0].measured[BITS].totals - cells[1].measured[BITS].totals
    first = line.pairs[0].estimate
    assert first.value == pytest.approx(differences.mean()) and first.stderr == pytest.approx(differences.std(ddof=1) / 40**0.5)
    assert [pair.p for pair in line.pairs] == holm([pair.estimate.p for pair in line.pairs])
    assert line.best == 0 and line.pairs[0].decided and not line.pairs[2].decided, "b and c differ by .01 only"


def test_another_tokenizer_leaves_tokens_uncompared_and_bytes_unpaired():
    text = noise(0, scale=2.0)
    cells = [model("a", {BITS: 3 + text, NATS: 3 + text}), model("b", {BITS: 3.2 + text, NATS: 3.2 + text}, tokenizer="other", prompts_sha="other")]
    lines = compared(*cells)
    (pair,) = lines[BITS].pairs
    spread = [cell.measured[BITS].totals.std(ddof=1) for cell in cells]
    assert pair.estimate.stderr == pytest.approx((spread[0] ** 2 / 40 + spread[1] ** 2 / 40) ** 0.5), "as of independent texts"
    assert "their tokenizers cut other windows from the text" in pair.estimate.note and lines[BITS].best is None
    (pair,) = lines[NATS].pairs
    assert pair.estimate is None and "other tokenizers" in pair.why_not and "other tokenizers" in lines[NATS].undecided


@pytest.mark.parametrize(
    ("key", "facts", "why"),
    [(BITS, {"held_out_sha": "x"}, "other held-out texts"), (DISTINCT, {"prompts_sha": "x", "held_out_sha": "x"}, "other held-out texts"),
     (Key("bits_per_byte", None, "train"), {"train_sha": "x"}, "other training texts"),
     (Key("memorization_gap"), {"train_sha": "x"}, "other training texts")],
)  # fmt: skip
def test_other_texts_are_not_compared(key, facts, why):
    from ds_stability.eval.comparison import comparable

    one, two = named_models(groups_of([model("a", {key: noise(0)}), model("b", {key: noise(1)}, **facts)]))
    assert comparable(one, two, key) == (why, "") and comparable(one, one, key) == ("", "")


def test_prompts_cut_elsewhere_are_compared_unpaired():
    cells = [model("a", {DISTINCT: 0.5 + noise(0)}), model("b", {DISTINCT: 0.9 + noise(1)}, prompts_sha="x")]
    line = compared(*cells)[DISTINCT]
    assert "other prompts from the text" in line.pairs[0].estimate.note and line.pairs[0].decided
    assert line.best is None and line.undecided == "no human text to compare with"


def human(values, human_values, **facts):
    return {DISTINCT: values, HUMAN_DISTINCT: human_values, **facts}


def test_nearest_to_human_text_needs_one_side():
    people, text = 0.8 + noise(9, scale=0.01), noise(0)
    same = compared(model("near", human(0.7 + text, people)), model("far", human(0.5 + text + noise(1, scale=0.01), people)))[DISTINCT]
    assert same.best == 1 and same.human == pytest.approx(people.mean()), "far comes first by name"
    apart = compared(model("above", human(0.9 + text, people)), model("below", human(0.5 + text + noise(1, scale=0.01), people)))[DISTINCT]
    assert apart.pairs[0].decided and apart.best == 0, "the middle, .7, is clearly below .8"
    balanced = compared(model("above", human(0.92 + text, people)), model("below", human(0.69 + text + noise(1, scale=0.01), people)))[DISTINCT]
    assert balanced.pairs[0].decided and balanced.best is None and "on both sides of human text" in balanced.undecided


def test_nearest_to_zero():
    text = noise(0, scale=0.02)
    line = compared(model("a", {GAP: 0.3 + text}), model("b", {GAP: 0.1 + text + noise(1, scale=0.01)}))[GAP]
    assert line.best == 1
    assert compared(model("a", {GAP: 0.11 + text}), model("b", {GAP: -0.1 + text + noise(1, scale=0.01)}))[GAP].best is None


@pytest.mark.parametrize("case", ["equal", "both sides"])
def test_a_best_that_is_none_is_rarely_marked(case):
    """Two equal models, and two as far from human text on either side: one is called the better in at most about 5 % of evaluations."""
    marked = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        text, people = 0.1 * rng.standard_normal(30), 0.8 + 0.1 * rng.standard_normal(30)
        shifts = (-0.2, -0.2) if case == "equal" else (-0.1, 0.1)
        cells = [model(name, human(0.8 + shift + text + 0.1 * rng.standard_normal(30), people)) for name, shift in zip("ab", shifts)]
        marked += compared(*cells)[DISTINCT].best is not None
    assert marked <= 200 * 0.05 + 8


def test_few_units_and_missing_values_say_why():
    line = compared(model("a", {BITS: np.array([3.0])}), model("b", {BITS: np.array([2.0])}), model("c", {NATS: noise(0)}))[BITS]
    assert line.best is None and "one seed and one unit: no interval" in line.estimates[0].note
    assert line.estimates[2].value is None and line.estimates[2].note == "not measured" and len(line.pairs) == 1
    equal = compared(model("a", {BITS: np.full(9, 3.0)}), model("b", {BITS: np.full(9, 3.0)}))[BITS]
    assert equal.estimates[0].low is None and "equal: no interval" in equal.estimates[0].note and equal.best is None


def test_the_best_of_those_that_have_a_value_is_no_best_of_all():
    cells = [model("a", {BITS: 2 + noise(0)}), model("b", {BITS: 3 + noise(1)}), model("c", {BITS: noise(2)})]
    cells[2].rows[BITS]["value"] = float("nan")
    comparison = compare(groups_of(cells))
    (line,) = comparison.lines
    assert line.best == 0 and line.measured == 2 and line.estimates[2].note == "not a finite number"
    assert sentences(comparison) == ["a is the best of the 2 that have a value in bits per byte."]
    assert "every other model with a value is worse" in "\n".join(table_lines(comparison))


def test_what_holds_for_all_models_of_a_line_is_told_once():
    comparison = compare(groups_of([model(name, {BITS: np.full(9, 3.0), NATS: noise(1)}) for name in "ab"]))
    lines = table(comparison)
    assert [line["note"] for line in lines] == ["all 9 units are equal: no interval", ""]
    assert [cell["note"] for line in lines for cell in line["cells"]] == [""] * 4


def test_each_measure_without_a_best_has_its_own_reason():
    text = noise(0, scale=2.0)
    cells = [model("a", {BITS: 3 + text, NATS: 3 + text}), model("b", {BITS: 3 + text + noise(1), NATS: 3 + text}, tokenizer="other")]
    expected = "No best in bits per byte: not decidable. No best in cross-entropy: other tokenizers: their tokens are not the same amount of text."
    assert sentences(compare(groups_of(cells))) == [expected]


def test_scores_of_another_version_are_not_compared():
    cells = [model("a", {BITS: 2 + noise(0)}), model("b", {BITS: 3 + noise(1)})]
    cells[1].meta["identity"]["scores_version"] = 3
    line = compared(*cells)[BITS]
    assert line.best is None and line.undecided == "scored by other versions of the metrics"


def test_units_that_differ_are_told():
    line = compared(model("a", {BITS: 3 + noise(0)}), model("b", {BITS: 2 + noise(1, 30)}, units=range(10, 40)))[BITS]
    assert line.pairs[0].estimate.units == 30 and "10 of 40 units are not in every cell: left out" in line.pairs[0].estimate.note


def test_two_runs_of_two_seeds_are_paired_by_prompt():
    text = noise(0, scale=2.0)
    cells = [model(name, {BITS: 3 + shift + text + noise(seed)}) for name, shift, seed in (("a", 0, 1), ("b", 0.3, 2))]
    for seed, cell in enumerate(cells):
        cell.seed, cell.arm, cell.meta["run"] = seed, f"feedback {seed}", {"name": cell.id}
    assert compared(*cells)[BITS].best == 0


def test_names_are_short_where_they_can_be():
    cells = [model("gpt-0123abcd", {BITS: noise(0)}), model("gpt-9999abcd", {BITS: noise(1)}), model("llama-0123abcd", {BITS: noise(2)})]
    assert [found.name for found in named_models(groups_of(cells))] == ["gpt-0123abcd", "gpt-9999abcd", "llama"]


def test_every_metric_has_a_direction_or_a_reason_for_none():
    assert [name for name in METRIC_NAMES if measure_of(Key(name, "sample")) is OTHER] == []
    expected = {"distinct_4": HUMAN, "wrep_l_16": LOWER, "rep_l_16": None, "minimal_pairs_agreement": HIGHER, "calibration_gap": ZERO,
                "arithmetic_pass_8": HIGHER, "sentence_length": HUMAN, "sentence_length_wasserstein": LOWER, "synthetic_entropy": None}  # fmt: skip
    assert {name: measure_of(Key(name)).best for name in expected} == expected
    assert measure_of(Key("wikitext_word_perplexity"), {"higher_is_better": False}).best == LOWER
    assert measure_of(Key("never heard of")) is OTHER
