"""Trends against brute force, and predictions that must come out met, not met and not decidable."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ds_stability.errors import UserError
from ds_stability.eval import aggregate, trend, verdict
from ds_stability.eval.records import Measured
from ds_stability.eval.report_cells import Cell
from ds_stability.eval.verdict import ENTROPY, HIGH_FREQUENCY, MET, NOT_MET, UNDECIDED, Facts, Prediction

PREDICTIONS = Path(verdict.__file__).with_name("predictions.yaml")


def brute_force_p(groups) -> float:
    """Share of all orders of the pooled values whose statistic is at least as far from the middle."""
    sizes = [len(group) for group in groups]
    labels = np.repeat(np.arange(len(groups)), sizes)

    def statistic(values):
        pairs = [(i, j) for i, j in itertools.permutations(range(len(values)), 2) if labels[i] < labels[j]]
        return sum((values[j] > values[i]) + 0.5 * (values[j] == values[i]) for i, j in pairs), len(pairs) / 2

    pooled = np.concatenate(groups)
    observed, middle = statistic(pooled)
    orders = [statistic(pooled[list(order)])[0] for order in itertools.permutations(range(len(pooled)))]
    return float(np.mean([abs(value - middle) >= abs(observed - middle) for value in orders]))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2, 2), (3, 2, 1), (3, 3)])
def test_jonckheere_is_exact(sizes):
    random = np.random.default_rng(sum(sizes))
    for shift in (0.0, 1.0, 3.0):
        groups = [random.normal(shift * place, 1, size) for place, size in enumerate(sizes)]
        p, method = trend.jonckheere(groups)
        assert p == pytest.approx(brute_force_p(groups)) and "exact" in method


def test_jonckheere_with_ties_agrees_with_all_permutations():
    groups = [np.array([1.0, 2.0]), np.array([2.0, 2.0]), np.array([3.0, 2.0])]
    p, method = trend.jonckheere(groups)
    assert p == pytest.approx(brute_force_p(groups), abs=0.02) and "permutations" in method


def test_jonckheere_of_two_groups_is_mann_whitney():
    one, two = np.array([1.0, 4.0, 5.0, 2.0]), np.array([3.0, 7.0, 8.0])
    assert trend.jonckheere([one, two])[0] == pytest.approx(stats.mannwhitneyu(one, two, method="exact").pvalue)


def test_null_counts_count_every_arrangement():
    assert trend._null_counts([3, 3, 3, 3, 3])[0] == 1 and sum(trend._null_counts([3, 3, 3, 3, 3])) == 168168000


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-5, 5)), min_size=3, max_size=20))
@settings(max_examples=60, deadline=None)
def test_spearman_agrees_with_scipy(points):
    x, y = np.array(points, dtype=float).T
    ours = trend.spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(stats.spearmanr(x, y).statistic)


# cells with a known dose-response


def make_facts(curves, seeds=(0, 1, 2), noise=0.02, units=12, arms=None):
    """Facts of one or more figures: {key: {architecture: [value per level]}}, and of arms {arm: {key: [value per level]}}."""
    cells, random = {}, np.random.default_rng(0)

    def add(key, architecture, arm, values):
        for place, value in enumerate(values):
            level = place / (len(values) - 1) if len(values) > 1 else 0.0
            for seed in seeds:
                name = f"{architecture}-{arm}-{level}-{seed}"
                cell = cells.setdefault(name, Cell(name, Path(name), {}, {}, {}, architecture, arm, level, seed))
                totals = value + noise * random.normal(size=units)
                measured = Measured(key.metric, [str(u) for u in range(units)], totals, np.ones(units))
                cell.measured[key] = measured
                cell.rows[key] = {"value": measured.value, "n": units, "unit": "nats", "note": None}

    for key, by_architecture in curves.items():
        for architecture, values in by_architecture.items():
            add(key, architecture, "feedback", values)
    for arm, by_key in (arms or {}).items():
        for key, values in by_key.items():
            add(key, next(iter(curves[key])), arm, values)
    groups = aggregate.groups_of(cells.values())
    arm, rows, trends = aggregate.main_arm(groups), [], []
    for key in curves:
        drawn = aggregate.draw(groups, key)
        rows += aggregate.group_rows(groups, key)
        found = [trend.trend(architecture, arm, key, drawn) for architecture in {group.architecture for group in groups}]
        trends += [item for item in found if item]
    return Facts(rows, trends, arm)


FALLING, RISING, BENT = [4.0, 3.0, 2.0, 1.0, 0.3], [0.5, 0.6, 0.7, 0.9, 0.99], [4.0, 3.0, 3.5, 1.0, 0.3]
FALLS = Prediction("P1", "falls", ENTROPY, direction="falls")
NEAR_ONE = Prediction("P3", "near one", HIGH_FREQUENCY, minimum=0.95, levels=(1.0,))


def test_trend_of_a_clear_fall():
    found = make_facts({ENTROPY: {"a": FALLING}}).trends[ENTROPY, "a", "feedback"]
    assert found.direction == "falls" and found.monotone and found.shape == "monotone"
    assert -1 <= found.rho_low <= found.rho <= found.rho_high < -0.9 and found.p < 1e-6 and found.seeds == 3


def test_a_curve_that_turns_back_is_said_to():
    found = make_facts({ENTROPY: {"a": BENT}}).trends[ENTROPY, "a", "feedback"]
    assert found.shape == "not monotone" and found.direction == "falls"
    (turn,) = found.reversals
    assert (turn.low_level, turn.high_level) == (0.25, 0.5) and turn.difference == pytest.approx(0.5, abs=0.05) and turn.beyond_noise
    facts = make_facts({ENTROPY: {"a": BENT}})
    assert "not monotone in a (0.25 to 0.5: +0.5" in " ".join(verdict.sentences(facts, [], []))


def test_a_reversal_within_noise_is_told_apart():
    found = make_facts({ENTROPY: {"a": [4.0, 3.0, 3.001, 1.0]}}, noise=0.5, seeds=(0, 1, 2, 3, 4)).trends[ENTROPY, "a", "feedback"]
    assert found.shape in ("monotone", "not monotone, within noise")


def test_a_constant_figure_has_no_rho():
    found = make_facts({ENTROPY: {"a": [2.0, 2.0, 2.0]}}, noise=0.0).trends[ENTROPY, "a", "feedback"]
    assert found.rho is None and found.shape == "constant" and found.p == 1.0


def test_one_level_has_no_trend():
    assert not make_facts({ENTROPY: {"a": [4.0]}}).trends


def test_predictions_met_in_every_architecture():
    facts = make_facts({ENTROPY: {"a": FALLING, "b": FALLING}, HIGH_FREQUENCY: {"a": RISING, "b": RISING}})
    assert verdict.judge(FALLS, facts).outcome == MET
    assert verdict.judge(Prediction("P2", "rises", HIGH_FREQUENCY, direction="rises"), facts).outcome == MET
    assert verdict.judge(NEAR_ONE, facts).outcome == MET
    assert [line.split(":")[0] for line in verdict.judge(FALLS, facts).figures] == ["a", "b"]


def test_one_architecture_against_it_refutes():
    facts = make_facts({ENTROPY: {"a": FALLING, "b": FALLING[::-1]}, HIGH_FREQUENCY: {"a": RISING, "b": [0.5, 0.6, 0.7, 0.7, 0.7]}})
    assert verdict.judge(FALLS, facts).outcome == NOT_MET
    assert verdict.judge(NEAR_ONE, facts).outcome == NOT_MET


def test_no_effect_at_one_level_refutes():
    facts = make_facts({ENTROPY: {"a": [4.0, 4.0, 2.0, 1.0, 0.5]}}, noise=0.2)
    assert verdict.judge(FALLS, facts).outcome == NOT_MET
    assert verdict.judge(Prediction("P", "from .5 on", ENTROPY, direction="falls", levels=(0.5, 1.0)), facts).outcome == MET


def test_a_turn_back_alone_does_not_fail_a_prediction():
    judged = verdict.judge(FALLS, make_facts({ENTROPY: {"a": BENT}}))
    assert judged.outcome == MET and "not monotone" in judged.figures[0]


def test_two_seeds_that_disagree_fail_by_the_t_interval():
    """The bootstrap of two seeds cannot see beyond them; the t-interval can."""
    facts = make_facts({ENTROPY: {"a": [4.0, 3.0]}}, seeds=(0, 1), noise=0.0)
    row = facts.rows[ENTROPY, aggregate.Group("a", "feedback", 1.0)]
    row.update(difference_low=-1.9, difference_high=-0.1, difference_t_low=-12.0, difference_t_high=10.0)
    judged = verdict.judge(FALLS, facts)
    assert judged.outcome == NOT_MET and "t [" in judged.figures[0]


def test_what_is_missing_decides_nothing():
    facts = make_facts({ENTROPY: {"a": FALLING}})
    assert verdict.judge(NEAR_ONE, facts).outcome == UNDECIDED
    assert verdict.judge(Prediction("P", "other", ENTROPY, direction="falls", levels=(0.33,)), facts).outcome == UNDECIDED
    assert verdict.judge(Prediction("P", "other", ENTROPY, direction="falls", architectures=("z",)), facts).outcome == UNDECIDED
    single = make_facts({ENTROPY: {"a": FALLING}, HIGH_FREQUENCY: {"a": RISING}}, seeds=(0,))
    assert verdict.judge(FALLS, single).outcome == verdict.judge(NEAR_ONE, single).outcome == UNDECIDED
    assert "one seed" in verdict.judge(FALLS, single).figures[0]
    assert verdict.judge(FALLS, Facts([], [], None)).outcome == UNDECIDED


def test_a_level_that_one_architecture_lacks_is_missing_there():
    """A cell that was never evaluated must not turn "at each level" into "at each level that there is"."""
    facts = make_facts({ENTROPY: {"a": FALLING, "b": FALLING}})
    del facts.rows[ENTROPY, aggregate.Group("b", "feedback", 1.0)]
    judged = verdict.judge(FALLS, facts)
    assert judged.outcome == UNDECIDED and "no difference at level 1" in judged.figures[1]


def test_an_arm_concentrates_only_if_the_t_interval_agrees():
    """Three seeds of one sign by chance (one time in four) leave out 0 in the bootstrap over seeds."""
    arms = {"replay": {ENTROPY: FALLING, HIGH_FREQUENCY: RISING}}
    facts = make_facts({ENTROPY: {"a": FALLING}, HIGH_FREQUENCY: {"a": RISING}}, arms=arms)
    for key in (ENTROPY, HIGH_FREQUENCY):
        facts.rows[key, aggregate.Group("a", "replay", 1.0)].update(difference_t_low=-9.0, difference_t_high=9.0)
    lines = {line["group"].level: line["concentrates"] for line in verdict.arms_table(facts, [ENTROPY]) if line["group"].arm == "replay"}
    assert lines[1.0] == "no" and lines[0.5] == "yes"


def test_arms_of_one_seed_are_not_said_to_concentrate_or_not():
    arms = {"replay": {ENTROPY: FALLING, HIGH_FREQUENCY: RISING}}
    facts = make_facts({ENTROPY: {"a": FALLING}, HIGH_FREQUENCY: {"a": RISING}}, seeds=(0,), arms=arms)
    lines = verdict.arms_table(facts, [ENTROPY])
    assert {line["concentrates"] for line in lines} == {UNDECIDED}
    text = " ".join(verdict.sentences(facts, [], lines))
    assert "not shown" not in text and "not decidable: replay" in text


def test_the_interval_of_rho_pairs_seeds_not_places():
    """Where a level lacks a seed, the seeds that all levels have are drawn together."""
    groups = {}
    for level, seeds in ((0.0, (0, 1)), (1.0, (1,))):
        cells = []
        for seed in seeds:
            totals = np.full(4, {(0.0, 0): 9.0, (0.0, 1): 1.0, (1.0, 1): 2.0}[level, seed]) + 0.01 * np.arange(4)
            measured = Measured(ENTROPY.metric, list("abcd"), totals, np.ones(4))
            row = {"value": measured.value, "n": 4, "unit": "nats", "note": None}
            cells.append(Cell(f"{level}-{seed}", Path("x"), {}, {ENTROPY: row}, {ENTROPY: measured}, "a", "feedback", level, seed))
        groups[aggregate.Group("a", "feedback", level)] = cells
    found = trend.trend("a", "feedback", ENTROPY, aggregate.draw(groups, ENTROPY))
    assert found.rho_low == found.rho_high == 1.0  # seed 1 rises; seed 0 has no partner
    assert found.note == "one seed: interval over prompts only"


def test_which_arms_concentrate():
    arms = {"replay": {ENTROPY: FALLING, HIGH_FREQUENCY: RISING}, "permuted": {ENTROPY: [4.0] * 5, HIGH_FREQUENCY: [0.5] * 5},
            "spreading": {ENTROPY: RISING[::-1] and [4.0, 4.2, 4.4, 4.8, 5.0], HIGH_FREQUENCY: [0.5, 0.4, 0.3, 0.2, 0.1]},
            "half": {ENTROPY: FALLING, HIGH_FREQUENCY: [0.5] * 5}}  # fmt: skip
    facts = make_facts({ENTROPY: {"a": FALLING}, HIGH_FREQUENCY: {"a": RISING}}, noise=0.02, arms=arms)
    lines = {(line["group"].arm, line["group"].level): line for line in verdict.arms_table(facts, [ENTROPY, HIGH_FREQUENCY])}
    answers = {arm: lines[arm, 1.0]["concentrates"] for arm in ("feedback", "replay", "permuted", "spreading", "half")}
    assert answers == {"feedback": "yes", "replay": "yes", "permuted": "no", "spreading": "spreads", "half": "in part"}
    assert lines["replay", 1.0]["relative"] == pytest.approx(1.0, abs=0.02) and abs(lines["permuted", 1.0]["relative"]) < 0.02
    text = " ".join(verdict.sentences(facts, [], list(lines.values())))
    assert "arms that concentrate at some level: replay" in text


def test_sentences_count_predictions():
    facts = make_facts({ENTROPY: {"a": FALLING}, HIGH_FREQUENCY: {"a": RISING}})
    judged = [verdict.judge(prediction, facts) for prediction in (FALLS, NEAR_ONE)]
    text = " ".join(verdict.sentences(facts, judged, []))
    assert "falls with the level in 1 of 1 architectures" in text and "Of 2 predictions written down before the runs, 2 were met" in text


# the file of predictions


def test_the_shipped_predictions_are_read():
    predictions = verdict.load_predictions(PREDICTIONS)
    assert [item.id for item in predictions] == ["P1", "P2", "P3"]
    assert predictions[0].key == ENTROPY and predictions[0].direction == "falls" and predictions[2].minimum == 0.95
    assert predictions[2].levels == (1.0,) and predictions[1].key == HIGH_FREQUENCY


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
        ({**GOOD, "architectures": "gpt2"}, "list of names"),
    ],
)
def test_wrong_predictions_are_refused_in_one_line(tmp_path, entry, message):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump([GOOD, entry]))
    with pytest.raises(UserError, match=message) as error:
        verdict.load_predictions(path)
    assert "prediction 2" in str(error.value) and "\n" not in str(error.value)


def test_files_of_predictions_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        verdict.load_predictions(tmp_path / "absent.yaml")
    for name, content in (("a.yaml", "a: [b"), ("b.json", "{"), ("c.yaml", "predictions: 3"), ("d.json", json.dumps([GOOD, GOOD]))):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as error:
            verdict.load_predictions(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [((None, None, None), "no value"), ((2.0, None, None), "2 (no interval)"), ((-0.924, -0.949, -0.903), "−0.924 [−0.949, −0.903]"),
     ((0.5, 0.5, 0.5), "0.500 [0.500, 0.500]"), ((123.4, 100.0, 150.0), "123 [100, 150]")],
)  # fmt: skip
def test_intervals_show_as_many_digits_as_they_support(given, text):
    assert verdict.bracket(*given) == text
