"""Were the predictions met? In every one: met, not met, or not decidable.

A direction is judged by the difference to the baseline, paired by seed and unit; a bound by the value over seeds. Either is
decided where the interval lies wholly on one side, at a level that allows for the number of comparisons the prediction
makes (levels x architectures, and bounds): Holm's adjusted p below 0.05. On the predicted side everywhere, the prediction is
met; on the other side anywhere, not met; everything else is not decidable, one seed among it. That a difference was not
shown is no sign that there is none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .aggregate import Group
from .contrasts import group_p, holm
from .predictions import Prediction
from .report_cells import Cell, Key
from .trend import FALLS, MINUS, SIGNIFICANT, Trend

MET, NOT_MET, UNDECIDED = "met", "not met", "not decidable"
ENTROPY = Key("predictive_entropy", None, "held_out")
HIGH_FREQUENCY = Key("high_frequency_share", "sample", None)
ONE_SEED = "one seed: nothing is replicated"


@dataclass
class Judgement:
    """`figures`: a line per architecture, with its own outcome. `arm`: the one that was judged."""

    prediction: Prediction
    outcome: str
    figures: list[str]
    arm: str | None = None


class Facts:
    """The aggregated figures, by what verdicts ask for."""

    def __init__(self, rows: Sequence[dict[str, Any]], trends: Sequence[Trend], main_arm: str | None, baseline_level: float = 0.0,
                 groups: Mapping[Group, Sequence[Cell]] | None = None):  # fmt: skip
        self.rows = {(Key(row["metric"], row["decoding"], row["split"]), Group(row["architecture"], row["arm"], row["level"])): row
                     for row in rows}  # fmt: skip
        self.trends = {(trend.key, trend.architecture, trend.arm): trend for trend in trends}
        self.main_arm, self.baseline_level, self.groups = main_arm, baseline_level, groups or {}

    @property
    def arms(self) -> list[str]:
        return sorted({group.arm for _, group in self.rows if group.level is not None})

    def architectures(self, arm: str | None) -> list[str]:
        return sorted({group.architecture for _, group in self.rows if group.arm == arm and group.level is not None})

    def arm_levels(self, arm: str | None) -> list[float]:
        """All levels of an arm, in whatever architecture: one that lacks a level is not judged as if there were none."""
        return sorted({group.level for _, group in self.rows if group.arm == arm and group.level is not None})

    def row(self, key: Key, architecture: str, arm: str | None, level: float) -> dict[str, Any] | None:
        return self.rows.get((key, Group(architecture, arm, level)))

    def bound_p(self, key: Key, group: Group, bound: float) -> float | None:
        """p of the hypothesis that the group's value is `bound`."""
        return group_p(self.groups.get(group, ()), key, bound)


class _Comparison(NamedTuple):
    """One thing that a prediction claims: `ahead` is positive on the predicted side; without p, `text` says why."""

    architecture: str
    text: str
    ahead: float = 0.0
    p: float | None = None


def judge(prediction: Prediction, facts: Facts) -> Judgement:
    """Whether a prediction held in every architecture it names, with the figures that say so."""
    arm = prediction.arm or facts.main_arm
    if arm not in facts.arms:
        there = f"arms with a level: {', '.join(facts.arms)}" if facts.arms else "no arm has a level"
        return Judgement(prediction, UNDECIDED, [f"no cell of arm {arm} has a level; {there}" if arm else there], arm)
    levels = _levels(prediction, facts, arm)
    if not levels:
        return Judgement(prediction, UNDECIDED, [f"arm {arm} has no level beside the baseline, {facts.baseline_level:g}"], arm)
    architectures = list(prediction.architectures or facts.architectures(arm))
    compare = _differences if prediction.direction else _bounds
    made = [item for name in architectures for level in levels for item in compare(prediction, facts, Group(name, arm, level))]
    adjusted = holm([item.p for item in made])
    outcomes, figures = [], []
    for name in architectures:
        own = [(item, p) for item, p in zip(made, adjusted, strict=True) if item.architecture == name]
        outcomes.append(_joint([_outcome(item, p) for item, p in own]))
        text = [item.text + (f" (adjusted {p_text(p)})" if p is not None else "") for item, p in own]
        figures.append(f"{name}, arm {arm}: {outcomes[-1]}: " + "; ".join([*text, *_shape(prediction, facts, name, arm)]))
    return Judgement(prediction, _joint(outcomes), figures, arm)


def _levels(prediction: Prediction, facts: Facts, arm: str) -> list[float]:
    if prediction.direction is None:
        return list(prediction.levels or facts.arm_levels(arm)[-1:])
    return [level for level in prediction.levels or facts.arm_levels(arm) if level != facts.baseline_level]


def _outcome(item: _Comparison, adjusted: float | None) -> str:
    if adjusted is None or adjusted >= SIGNIFICANT:
        return UNDECIDED
    return MET if item.ahead > 0 else NOT_MET


def _joint(outcomes: Sequence[str]) -> str:
    """One clear failure refutes "in every architecture", whatever is missing elsewhere."""
    return NOT_MET if NOT_MET in outcomes else UNDECIDED if UNDECIDED in outcomes else MET


def _differences(prediction: Prediction, facts: Facts, group: Group) -> list[_Comparison]:
    row = facts.row(prediction.key, *group)
    where = f"level {group.level:g}: "
    if row is None or row["value"] is None:
        return [_Comparison(group.architecture, where + _absent(row))]
    if row["difference"] is None:
        return [_Comparison(group.architecture, f"{where}no value at level {facts.baseline_level:g} to compare with")]
    text = where + bracket(row["difference"], row["difference_low"], row["difference_high"], "+")
    if row["difference_p"] is None or row["difference_seeds"] < 2:
        return [_Comparison(group.architecture, f"{text}, {_why_open(row['note'], row['difference_seeds'])}")]
    ahead = -row["difference"] if prediction.direction == FALLS else row["difference"]
    return [_Comparison(group.architecture, text, ahead, row["difference_p"])]


def _bounds(prediction: Prediction, facts: Facts, group: Group) -> list[_Comparison]:
    row = facts.row(prediction.key, *group)
    where = f"level {group.level:g}: "
    if row is None or row["value"] is None:
        return [_Comparison(group.architecture, where + _absent(row))]
    text, made = where + bracket(row["value"], row["ci_low"], row["ci_high"]), []
    for bound, sign in ((prediction.minimum, 1.0), (prediction.maximum, -1.0)):
        if bound is None:
            continue
        against = f"{text} against {'at least' if sign > 0 else 'at most'} {bound:g}"
        p = facts.bound_p(prediction.key, group, bound)
        if p is None or row["seeds"] < 2:
            made.append(_Comparison(group.architecture, f"{against}, {_why_open(row['note'], row['seeds'])}"))
        else:
            made.append(_Comparison(group.architecture, against, sign * (row["value"] - bound), p))
    return made


def _absent(row: dict[str, Any] | None) -> str:
    return "no value" + (f" ({row['note']})" if row and row["note"] else "")


def _why_open(note: str | None, seeds: int) -> str:
    return ONE_SEED if seeds < 2 else note or "no interval"


def _shape(prediction: Prediction, facts: Facts, architecture: str, arm: str) -> list[str]:
    trend = facts.trends.get((prediction.key, architecture, arm))
    return [f"means over all levels: {trend.shape}"] if trend and prediction.direction and trend.monotone is not None else []


def bracket(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """"2.31 [2.20, 2.44]", or what there is of it."""
    if value is None:
        return "no value"
    if low is None or high is None or not high > low:
        return f"{value:{sign}.3g} (no interval)".replace("-", MINUS)
    # Two significant digits of the interval's width: more would be noise, fewer could show two ends as one.
    decimals = max(0, 1 - math.floor(math.log10(high - low)))
    digits = f".{decimals}f" if decimals <= 5 else f".{decimals + 1 + math.floor(math.log10(max(-low, high)))}g"
    return f"{value:{sign}{digits}} [{low:{sign}{digits}}, {high:{sign}{digits}}]".replace("-", MINUS)


def p_text(value: float | None) -> str:
    return "no p" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.9995 else "p = 1"
