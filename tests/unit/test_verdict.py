"""Predictions that must come out met, not met and not decidable; arms; and sentences that say no more than was shown."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ds_stability.errors import UserError
from ds_stability.eval import arms, predictions, report, sentences, verdict
from ds_stability.eval.aggregate import Group
from ds_stability.eval.predictions import Prediction
from ds_stability.eval.records import Measured
from ds_stability.eval.report_cells import Cell, Evaluation
from ds_stability.eval.verdict import ENTROPY, HIGH_FREQUENCY, MET, NOT_MET, UNDECIDED, Facts

PREDICTIONS = Path(verdict.__file__).with_name("predictions.yaml")
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
FALLING, RISING, BENT = [4.0, 3.0, 2.0, 1.0, 0.3], [0.5, 0.6, 0.7, 0.9, 0.99], [4.0, 3.0, 3.5, 1.0, 0.3]


def make_cells(curves, seeds=(0, 1, 2), noise=0.02, units=12, levels=LEVELS, run=0.0, random=None):
    """Cells of {key: {(architecture, arm): [value per level]}}; `run`: sd of a training run's own deviation. None: no cell."""
    cells, random = {}, random or np.random.default_rng(0)
    for key, by_curve in curves.items():
        for (architecture, arm), values in by_curve.items():
            for level, value in zip(levels, values, strict=True):
                for seed in seeds if value is not None else ():
                    name = f"{architecture}-{arm}-{level}-{seed}"
                    cell = cells.setdefault(name, Cell(name, Path(name), {}, {}, {}, architecture, arm, level, seed))
                    totals = value + run * random.normal() + noise * random.normal(size=units)
                    measured = Measured(key.metric, [str(u) for u in range(units)], totals, np.ones(units))
                    cell.measured[key] = measured
                    cell.rows[key] = {"value": measured.value, "n": units, "unit": "nats", "note": None}
    return list(cells.values())


def facts_of(cells) -> Facts:
    """As a report makes them."""
    found = report.analyze(Evaluation("made up", Path("made up"), cells))
    return Facts(found.rows, found.trends, found.arm, 0.0, found.groups)


def make_facts(curves, **kwargs) -> Facts:
    """{key: {architecture: values}} of the arm feedback, or {key: {(architecture, arm): values}}."""
    named = {key: {name if isinstance(name, tuple) else (name, "feedback"): values for name, values in by_curve.items()}
             for key, by_curve in curves.items()}  # fmt: skip
    return facts_of(make_cells(named, **kwargs))


FALLS = Prediction("P1", "falls", ENTROPY, direction="falls")
NEAR_ONE = Prediction("P3", "near one", HIGH_FREQUENCY, minimum=0.95, levels=(1.0,))


def test_predictions_met_in_every_architecture():
    facts = make_facts({ENTROPY: {"a": FALLING, "b": FALLING}, HIGH_FREQUENCY: {"a": RISING, "b": RISING}})
    assert verdict.judge(FALLS, facts).outcome == MET
    assert verdict.judge(Prediction("P2", "rises", HIGH_FREQUENCY, direction="rises"), facts).outcome == MET
    assert verdict.judge(NEAR_ONE, facts).outcome == MET
    assert [line[:21] for line in verdict.judge(FALLS, facts).figures] == ["a, arm feedback: met:", "b, arm feedback: met:"]


def test_one_architecture_against_it_refutes():
    facts = make_facts({ENTROPY: {"a": FALLING, "b": FALLING[::-1]}, HIGH_FREQUENCY: {"a": RISING, "b": [0.5, 0.6, 0.7, 0.7, 0.7]}})
    assert verdict.judge(FALLS, facts).outcome == NOT_MET
    assert verdict.judge(NEAR_ONE, facts).outcome == NOT_MET


def test_what_was_not_shown_is_not_decidable():
    """Nothing at level .25: no sign that the prediction is wrong."""
    facts = make_facts({ENTROPY: {"a": [4.0, 4.0, 2.0, 1.0, 0.5]}}, noise=0.2)
    judged = verdict.judge(FALLS, facts)
    assert judged.outcome == UNDECIDED and "level 1: −3.5" in judged.figures[0] and "adjusted p" in judged.figures[0]
    assert verdict.judge(Prediction("P", "from 0.5 on", ENTROPY, direction="falls", levels=(0.5, 1.0)), facts).outcome == MET
    facts = make_facts({ENTROPY: {"a": [4.0, 4.3, 2.0, 1.0, 0.5]}}, noise=0.02)
    assert verdict.judge(FALLS, facts).outcome == NOT_MET


def test_a_bound_is_judged_by_the_whole_interval():
    for value, outcome in ((0.99, MET), (0.951, UNDECIDED), (0.949, UNDECIDED), (0.9, NOT_MET)):
        facts = make_facts({HIGH_FREQUENCY: {"a": [0.5, 0.6, 0.7, 0.8, value]}}, run=0.005)
        row = facts.rows[HIGH_FREQUENCY, Group("a", "feedback", 1.0)]
        judged = verdict.judge(NEAR_ONE, facts)
        assert judged.outcome == outcome and (row["ci_low"] <= 0.95 <= row["ci_high"]) == (outcome == UNDECIDED), value
    within = Prediction("P", "within", HIGH_FREQUENCY, minimum=0.6, maximum=0.95, levels=(1.0,))
    for value, outcome in ((0.8, MET), (0.99, NOT_MET), (0.5, NOT_MET), (0.949, UNDECIDED)):
        assert verdict.judge(within, make_facts({HIGH_FREQUENCY: {"a": [0.5, 0.6, 0.7, 0.8, value]}}, run=0.005)).outcome == outcome


def test_comparisons_are_adjusted_for_their_number():
    """A difference that is decided alone, and not among the 24 of four levels and six architectures."""
    facts = make_facts({ENTROPY: dict.fromkeys("abcdef", FALLING)})
    for row in facts.rows.values():
        row["difference_p"] = 0.01
    alone = Prediction("P", "alone", ENTROPY, direction="falls", levels=(1.0,), architectures=("a",))
    assert verdict.judge(alone, facts).outcome == MET
    judged = verdict.judge(FALLS, facts)
    assert judged.outcome == UNDECIDED and "(adjusted p = 0.240)" in judged.figures[0]


def test_a_turn_back_alone_does_not_fail_a_prediction():
    judged = verdict.judge(FALLS, make_facts({ENTROPY: {"a": BENT}}))
    assert judged.outcome == MET and "not monotone" in judged.figures[0]


def test_seeds_that_disagree_decide_nothing():
    cells = make_cells({ENTROPY: {("a", "feedback"): FALLING}}, seeds=(0, 1))
    for cell in cells:
        if cell.seed == 1 and cell.level:
            cell.measured[ENTROPY].totals[:] += 3.9 - cell.measured[ENTROPY].value
            cell.rows[ENTROPY]["value"] = cell.measured[ENTROPY].value
    assert verdict.judge(FALLS, facts_of(cells)).outcome == UNDECIDED


def test_what_is_missing_decides_nothing():
    facts = make_facts({ENTROPY: {"a": FALLING}})
    assert verdict.judge(NEAR_ONE, facts).outcome == UNDECIDED
    assert verdict.judge(Prediction("P", "other", ENTROPY, direction="falls", levels=(0.33,)), facts).outcome == UNDECIDED
    assert verdict.judge(Prediction("P", "other", ENTROPY, direction="falls", architectures=("z",)), facts).outcome == UNDECIDED
    single = make_facts({ENTROPY: {"a": FALLING}, HIGH_FREQUENCY: {"a": RISING}}, seeds=(0,))
    assert verdict.judge(FALLS, single).outcome == verdict.judge(NEAR_ONE, single).outcome == UNDECIDED
    assert "one seed: nothing is replicated" in verdict.judge(FALLS, single).figures[0]
    assert verdict.judge(FALLS, Facts([], [], None)).outcome == UNDECIDED
    baseline = Prediction("P", "itself", ENTROPY, direction="falls", levels=(0.0,))
    assert "no level beside the baseline" in verdict.judge(baseline, facts).figures[0]


def test_equal_values_are_not_decidable_and_say_why():
    judged = verdict.judge(FALLS, make_facts({ENTROPY: {"a": [2.0] * 5}}, noise=0.0))
    assert judged.outcome == UNDECIDED and "equal" in judged.figures[0] and "no interval" in judged.figures[0]


def test_a_level_that_one_architecture_lacks_is_missing_there():
    """A cell that was never evaluated must not turn "at each level" into "at each level that there is"."""
    facts = make_facts({ENTROPY: {"a": FALLING, "b": [*FALLING[:-1], None]}})
    judged = verdict.judge(FALLS, facts)
    assert judged.outcome == UNDECIDED and "level 1: no value;" in judged.figures[1]
    facts = make_facts({HIGH_FREQUENCY: {"a": RISING, "b": [0.5, 0.6, 0.7, 0.96, None]}})
    highest = Prediction("P", "near one", HIGH_FREQUENCY, minimum=0.95)  # without a level: the highest, which b lacks
    judged = verdict.judge(highest, facts)
    assert judged.outcome == UNDECIDED and "level 1: no value" in judged.figures[1]


# arms


def test_feedback_is_the_dose_response_though_clipping_has_more_levels():
    """Feedback at 0.5, clipping at 0.5 and 1: clipping's figure must not decide what was said of feedback."""
    curves = {("a", "feedback"): [0.5, None, 0.97, None, None], ("a", "clipping"): [None, None, 0.5, None, 0.5]}
    facts = make_facts({HIGH_FREQUENCY: curves})
    assert facts.main_arm == "feedback"
    judged = verdict.judge(NEAR_ONE, facts)
    assert judged.outcome == UNDECIDED and judged.arm == "feedback" and judged.figures == ["a, arm feedback: not decidable: level 1: no value"]
    at_half = Prediction("P", "near one", HIGH_FREQUENCY, minimum=0.95, levels=(0.5,))
    assert verdict.judge(at_half, facts).outcome == MET


def test_a_level_without_a_baseline_is_not_said_to_be_equal_to_it():
    judged = verdict.judge(FALLS, make_facts({ENTROPY: {"a": [None, *FALLING[1:]]}}))
    assert judged.outcome == UNDECIDED and "level 1: no value at level 0 to compare with" in judged.figures[0]


@pytest.mark.parametrize("name", ["predictions", "predictions_quick"])
def test_our_predictions_are_of_feedback_whatever_else_was_run(name):
    """Of a report that has clipping alone, they say nothing."""
    facts = make_facts({ENTROPY: {("llama", "clipping"): RISING}, HIGH_FREQUENCY: {("llama", "clipping"): [0.5] * 5}})
    for prediction in predictions.load_predictions(Path(verdict.__file__).parent / f"{name}.yaml"):
        judged = verdict.judge(prediction, facts)
        assert judged.outcome == UNDECIDED and judged.figures == ["no cell of arm feedback has a level; arms with a level: clipping"]


def test_a_prediction_may_name_its_arm():
    curves = {("a", "feedback"): FALLING, ("a", "clipping"): [None, None, 4.5, None, 5.0]}
    facts = make_facts({ENTROPY: curves})
    named = Prediction("P", "clipping raises it", ENTROPY, direction="rises", arm="clipping")
    judged = verdict.judge(named, facts)
    assert judged.outcome == MET and judged.arm == "clipping" and "arm clipping" in judged.figures[0]
    judged = verdict.judge(Prediction("P", "s", ENTROPY, direction="rises", arm="cliping", architectures=("a",)), facts)
    assert judged.outcome == UNDECIDED and judged.figures == ["no cell of arm cliping has a level; arms with a level: clipping, feedback"]


def arm_facts(by_arm, **kwargs):
    """Facts of one architecture: {arm: {key: values}} beside feedback."""
    curves = {ENTROPY: {("a", "feedback"): FALLING}, HIGH_FREQUENCY: {("a", "feedback"): RISING}}
    for arm, by_key in by_arm.items():
        for key, values in by_key.items():
            curves[key]["a", arm] = values
    return make_facts(curves, **kwargs)


def test_which_arms_concentrate():
    facts = arm_facts({"replay": {ENTROPY: FALLING, HIGH_FREQUENCY: RISING}, "permuted": {ENTROPY: [4.0] * 5, HIGH_FREQUENCY: [0.5] * 5},
                       "spreading": {ENTROPY: [None, None, 4.4, 4.8, 5.0], HIGH_FREQUENCY: [None, None, 0.3, 0.2, 0.1]},
                       "half": {ENTROPY: FALLING, HIGH_FREQUENCY: [0.5] * 5}})  # fmt: skip
    lines = {(line["group"].arm, line["group"].level): line for line in arms.arms_table(facts, [ENTROPY, HIGH_FREQUENCY])}
    answers = {arm: lines[arm, 1.0]["concentrates"] for arm in ("feedback", "replay", "permuted", "spreading", "half")}
    assert answers == {"feedback": "yes", "replay": "yes", "permuted": "not shown", "spreading": "spreads", "half": "in part"}
    assert lines["replay", 1.0]["relative"] == pytest.approx(1.0, abs=0.02) and abs(lines["permuted", 1.0]["relative"]) < 0.02
    text = " ".join(sentences.sentences(facts, [], list(lines.values())))
    assert "Besides feedback, arms that concentrate at some level: replay; in part: half; not shown to at any level: permuted (by its intervals, entropy lower by at most 0.0" in text
    assert "nats), spreading (by its intervals, entropy no lower)." in text


@pytest.mark.parametrize("unknown", [{"difference_low": None, "difference_high": None}, {"difference_seeds": 1}])
def test_how_much_an_arm_may_still_do_is_said_only_where_every_level_is_known(unknown):
    facts = arm_facts({"permuted": {ENTROPY: [None, None, 4.0, None, 4.0], HIGH_FREQUENCY: [None, None, 0.5, None, 0.5]}})
    lines = arms.arms_table(facts, [ENTROPY, HIGH_FREQUENCY])
    assert "permuted (by its intervals" in " ".join(sentences.sentences(facts, [], lines))
    next(line for line in lines if line["group"].arm == "permuted" and line["group"].level == 1.0)["entropy"].update(unknown)
    assert "not shown to at any level: permuted." in " ".join(sentences.sentences(facts, [], lines))


def test_arms_are_adjusted_for_their_number():
    """Over all arms and levels of an architecture, each measure for itself."""
    facts = arm_facts({f"arm {n}": {ENTROPY: [4.0] * 5, HIGH_FREQUENCY: [0.5] * 5} for n in range(3)})
    lines = arms.arms_table(facts, [ENTROPY])
    p = sorted(facts.rows[ENTROPY, line["group"]]["difference_p"] for line in lines)
    adjusted = sorted(line["adjusted"][ENTROPY] for line in lines)
    assert len(p) == 19 and adjusted[0] == pytest.approx(min(1.0, 19 * p[0])) and adjusted[-1] >= p[-1]


def test_seeds_that_disagree_do_not_concentrate():
    facts = arm_facts({"replay": {ENTROPY: FALLING, HIGH_FREQUENCY: RISING}}, seeds=(0, 1, 2))
    replay = Group("a", "replay", 1.0)
    for key in (ENTROPY, HIGH_FREQUENCY):
        facts.rows[key, replay].update(difference_low=-9.0, difference_high=9.0, difference_p=0.2)
    lines = {line["group"].level: line["concentrates"] for line in arms.arms_table(facts, [ENTROPY]) if line["group"].arm == "replay"}
    assert lines[1.0] == "not shown" and lines[0.5] == "yes"


def test_arms_of_one_seed_are_not_said_to_concentrate_or_not():
    facts = arm_facts({"replay": {ENTROPY: FALLING, HIGH_FREQUENCY: RISING}}, seeds=(0,))
    lines = arms.arms_table(facts, [ENTROPY])
    assert {line["concentrates"] for line in lines} == {UNDECIDED}
    text = " ".join(sentences.sentences(facts, [], lines))
    assert "not shown" not in text and "not decidable: replay" in text


def test_a_difference_of_one_shared_seed_is_one_seed():
    """Three seeds in each arm, one in common: what is replicated is the pair."""
    cells = make_cells({ENTROPY: {("a", "feedback"): [4.0, 3.0]}}, levels=(0.0, 1.0), seeds=(0, 1, 2))
    cells = [cell for cell in cells if cell.level == 0.0 or cell.seed == 0]
    assert verdict.judge(FALLS, facts_of(cells)).outcome == UNDECIDED


# sentences


def test_sentences_name_arm_levels_and_seeds():
    facts = make_facts({ENTROPY: {"a": FALLING, "b": FALLING}, HIGH_FREQUENCY: {"a": RISING, "b": RISING}})
    judged = [verdict.judge(prediction, facts) for prediction in (FALLS, NEAR_ONE)]
    text = sentences.sentences(facts, judged, [])
    assert text[0].startswith("Predictive entropy falls with the level in 2 of 2 architectures (arm feedback, 5 levels, 3 seeds); slope per unit of level")
    assert "slope per unit of level in nats: a −3.763 [−3.7" in text[0] and "rho" not in " ".join(text)
    assert text[2].startswith("Of 2 predictions written down before the runs, 2 were met, 0 not met, 0 not decidable")


def test_sentences_do_not_call_two_levels_a_trend():
    text = sentences.sentences(make_facts({ENTROPY: {"a": [4.0, 3.0]}}, levels=(0.0, 1.0)), [], [])[0]
    assert "falls between two levels in 1 of 1 architecture" in text and "with the level" not in text and "monotone" not in text


def test_sentences_where_nothing_is_decided():
    text = sentences.sentences(make_facts({ENTROPY: {"a": [4.0] * 5, "b": FALLING}}, noise=0.2), [], [])[0]
    assert "in 1 of 2 architectures" in text and "Not decidable in a." in text
    text = sentences.sentences(make_facts({ENTROPY: {"a": FALLING}}, seeds=(0,)), [], [])[0]
    assert "not decidable" in text and "falls with the level in" not in text and "intervals are over prompts only" in text
    text = sentences.sentences(make_facts({ENTROPY: {"a": FALLING[::-1]}}), [], [])[0]
    assert "in 0 of 1 architecture" in text and "It rises in a." in text


def test_sentences_count_architectures_that_were_not_measured():
    text = sentences.sentences(make_facts({ENTROPY: {"a": FALLING, "b": [4.0, None, None, None, None]}}), [], [])[0]
    assert "falls with the level in 1 of 2 architectures (arm feedback, 5 levels, 3 seeds)" in text and "Not decidable in b." in text


def test_sentences_say_where_the_means_turn_back():
    text = sentences.sentences(make_facts({ENTROPY: {"a": BENT}}), [], [])[0]
    assert "The means turn back in a (0.25 to 0.5: +0.49 [" in text and "within noise" not in text


def test_no_levels_no_sentence():
    assert sentences.sentences(make_facts({ENTROPY: {"a": [4.0]}}, levels=(0.0,)), [], []) == []


# the file of predictions


def test_the_shipped_predictions_are_read():
    found = predictions.load_predictions(PREDICTIONS)
    assert [item.id for item in found] == ["P1", "P2", "P3"]
    assert found[0].key == ENTROPY and found[0].direction == "falls" and found[2].minimum == 0.95
    assert found[2].levels == (1.0,) and found[1].key == HIGH_FREQUENCY


GOOD = {"id": "P", "statement": "s", "metric": "m", "direction": "decreasing"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text", "give id, statement, metric"),
        ({**GOOD, "id": 3}, "give id, statement, metric"),
        ({**GOOD, "directoin": "x"}, "unknown key 'directoin'"),
        ({**GOOD, "direction": "falls"}, "decreasing or increasing"),
        ({**GOOD, "minimum": 1}, "either direction"),
        ({"id": "P", "statement": "s", "metric": "m"}, "either direction"),
        ({"id": "P", "statement": "s", "metric": "m", "minimum": "x"}, "are numbers"),
        ({**GOOD, "levels": ["a"]}, "levels are numbers"),
        ({**GOOD, "levels": []}, "levels are numbers"),
        ({"id": "P", "statement": "s", "metric": "m", "minimum": 2, "maximum": 1}, "minimum 2 lies above maximum 1"),
        ({**GOOD, "architectures": "gpt2"}, "list of names"),
    ],
)
def test_wrong_predictions_are_refused_in_one_line(tmp_path, entry, message):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump([GOOD, entry]))
    with pytest.raises(UserError, match=message) as error:
        predictions.load_predictions(path)
    assert "prediction 2" in str(error.value) and "\n" not in str(error.value)


def test_files_of_predictions_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        predictions.load_predictions(tmp_path / "absent.yaml")
    for name, content in (("a.yaml", "a: [b"), ("b.json", "{"), ("c.yaml", "predictions: 3"), ("d.json", json.dumps([GOOD, GOOD]))):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as error:
            predictions.load_predictions(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [((None, None, None), "no value"), ((2.0, None, None), "2 (no interval)"), ((-0.924, -0.949, -0.903), "−0.924 [−0.949, −0.903]"),
     ((0.5, 0.5, 0.5), "0.5 (no interval)"), ((123.4, 100.0, 150.0), "123 [100, 150]"), ((1e-7, 5e-8, 1.5e-7), "1e−07 [5e−08, 1.5e−07]"),
     ((5.0, 4.99999998, 5.00000002), "5 [4.99999998, 5.00000002]"), ((0.0, -2e-9, 3e-9), "0 [−2e−09, 3e−09]")],
)  # fmt: skip
def test_intervals_show_as_many_digits_as_they_support(given, text):
    assert verdict.bracket(*given) == text
