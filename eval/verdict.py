"""Were the predictions met, which arms concentrate, and the whole in a few plain sentences.

Predictions are written down before the runs, in a JSON or YAML file, a list of

    - id: P1
      statement: Held-out predictive entropy falls with the level in every architecture.
      metric: predictive_entropy
      split: held_out                 # or decoding: sample
      direction: decreasing           # or increasing; or minimum: .95 and/or maximum: ...
      levels: [.25, .5, .75, 1]       # optional (or level: 1): all above the baseline; for a bound, the highest
      architectures: [gpt2, llama]    # optional: all that were run
      arm: feedback                   # optional: the arm of the dose-response

A direction is met in an architecture if, at each of the levels that any architecture has, the paired difference to the
baseline has a 95 % interval that excludes 0 on the predicted side, by the bootstrap over seeds and units and by the t-interval over
seeds; arms are judged by the same rule. A bound is met where
the value over seeds lies within it; where its interval does not, the figures say so. One seed decides nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_stability.config_errors import show_value
from ds_stability.errors import UserError
from ds_stability.safe_read import read_json, read_yaml

from .aggregate import Group
from .report_cells import UNTOUCHED, Key
from .trend import FALLS, RISES, Trend

MINUS = "\N{MINUS SIGN}"
MET, NOT_MET, UNDECIDED = "met", "not met", "not decidable"
ENTROPY = Key("predictive_entropy", None, "held_out")
HIGH_FREQUENCY = Key("high_frequency_share", "sample", None)
DIRECTIONS = {"decreasing": FALLS, "increasing": RISES}
FIELDS = {"id", "statement", "metric", "decoding", "split", "direction", "minimum", "maximum", "level", "levels",
          "architectures", "arm"}  # fmt: skip
REQUIRED = ("id", "statement", "metric")


@dataclass(frozen=True)
class Prediction:
    """One line of the predictions file; `direction` is FALLS or RISES; the bounds are None where open."""

    id: str
    statement: str
    key: Key
    direction: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    levels: tuple[float, ...] | None = None
    architectures: tuple[str, ...] | None = None
    arm: str | None = None


@dataclass
class Judgement:
    prediction: Prediction
    outcome: str
    figures: list[str]


def load_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file.

    Raises:
        UserError: one line: it cannot be read, or which prediction lacks or misspells what.
    """
    content = _read(path)
    entries = content.get("predictions") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise UserError(f"--predictions {path}: give a list under the key predictions")
    predictions = [_prediction(entry, f"--predictions {path}: prediction {number}") for number, entry in enumerate(entries, 1)]
    if len({prediction.id for prediction in predictions}) < len(predictions):
        raise UserError(f"--predictions {path}: two predictions have one id; give each its own")
    return predictions


def _read(path: Path) -> Any:
    if path.suffix != ".json":
        return read_yaml(path, f"--predictions {path}")
    try:
        return read_json(path)
    except OSError as error:
        raise UserError(f"--predictions {path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"--predictions {path}: not JSON ({error})") from None


def _prediction(entry: Any, where: str) -> Prediction:
    if not isinstance(entry, dict) or any(not isinstance(entry.get(name), str) for name in REQUIRED):
        raise UserError(f"{where}: give {', '.join(REQUIRED)} as text")
    named = [entry.get(name) for name in ("decoding", "split", "arm")]
    if not all(name is None or isinstance(name, str) for name in named):
        raise UserError(f"{where}: decoding, split and arm are names, not {show_value(named)}")
    unknown = sorted(map(str, set(entry) - FIELDS))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(FIELDS))}")
    direction, bounds = entry.get("direction"), [entry.get("minimum"), entry.get("maximum")]
    given = [bound for bound in bounds if bound is not None]
    if (direction is None) == (not given) or not (direction is None or (isinstance(direction, str) and direction in DIRECTIONS)):
        raise UserError(f"{where}: give either direction ({' or '.join(DIRECTIONS)}), or minimum, maximum or both")
    if not _numbers(given):
        raise UserError(f"{where}: minimum and maximum are numbers, not {show_value(given)}")
    levels = entry.get("levels", entry.get("level"))
    levels = levels if isinstance(levels, list) or levels is None else [levels]
    if levels is not None and not _numbers(levels):
        raise UserError(f"{where}: levels are numbers, not {show_value(levels)}")
    named = entry.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise UserError(f"{where}: architectures is a list of names, not {show_value(named)}")
    return Prediction(
        entry["id"], entry["statement"], Key(entry["metric"], entry.get("decoding"), entry.get("split")),
        DIRECTIONS[direction] if direction else None, *bounds, None if levels is None else tuple(map(float, levels)),
        None if named is None else tuple(named), entry.get("arm"),
    )  # fmt: skip


def _numbers(values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 for value in values)


class Facts:
    """The aggregated figures, by what verdicts ask for."""

    def __init__(self, rows: Sequence[dict[str, Any]], trends: Sequence[Trend], main_arm: str | None, baseline_level: float = 0.0):
        self.rows = {(Key(row["metric"], row["decoding"], row["split"]), Group(row["architecture"], row["arm"], row["level"])): row
                     for row in rows}  # fmt: skip
        self.trends = {(trend.key, trend.architecture, trend.arm): trend for trend in trends}
        self.main_arm, self.baseline_level = main_arm, baseline_level

    def architectures(self, arm: str | None) -> list[str]:
        return sorted({group.architecture for _, group in self.rows if group.arm == arm and group.level is not None})

    def arm_levels(self, arm: str | None) -> list[float]:
        """All levels of an arm, in whatever architecture: one that lacks a level is not judged as if there were none."""
        return sorted({group.level for _, group in self.rows if group.arm == arm and group.level is not None})

    def levels(self, key: Key, architecture: str, arm: str | None) -> list[float]:
        return sorted(group.level for found, group in self.rows
                      if found == key and group[:2] == (architecture, arm) and group.level is not None)  # fmt: skip

    def row(self, key: Key, architecture: str, arm: str | None, level: float) -> dict[str, Any] | None:
        return self.rows.get((key, Group(architecture, arm, level)))


def judge(prediction: Prediction, facts: Facts) -> Judgement:
    """Whether a prediction held in every architecture it names, with the figures that say so."""
    arm = prediction.arm or facts.main_arm
    architectures = list(prediction.architectures or facts.architectures(arm))
    single = _judge_direction if prediction.direction else _judge_bound
    judged = [single(prediction, facts, architecture, arm) for architecture in architectures]
    outcomes = [outcome for outcome, _ in judged]
    figures = [f"{architecture}: {outcome}: {text}" for architecture, (outcome, text) in zip(architectures, judged, strict=True)]
    if not judged:
        return Judgement(prediction, UNDECIDED, [f"no cell of arm {arm!r} has a level"])
    # One clear failure refutes "in every architecture", whatever is missing elsewhere.
    outcome = NOT_MET if NOT_MET in outcomes else UNDECIDED if UNDECIDED in outcomes else MET
    return Judgement(prediction, outcome, figures)


def _judge_direction(prediction: Prediction, facts: Facts, architecture: str, arm: str | None) -> tuple[str, str]:
    key, sign = prediction.key, -1 if prediction.direction == FALLS else 1
    trend = facts.trends.get((key, architecture, arm))
    levels = prediction.levels or facts.arm_levels(arm)
    levels = [level for level in levels if level != facts.baseline_level]
    if trend is None or not levels:
        return UNDECIDED, f"{key} was not measured at two levels"
    rows = {level: facts.row(key, architecture, arm, level) for level in levels}
    absent = [level for level, row in rows.items() if row is None or row["difference"] is None]
    text = [f"rho {bracket(trend.rho, trend.rho_low, trend.rho_high)}, {trend.shape}"]
    text += [f"level {level:g}: {bracket(row['difference'], row['difference_low'], row['difference_high'], '+')}"
             + _t_note(row) for level, row in rows.items() if level not in absent]  # fmt: skip
    if absent:
        return UNDECIDED, "; ".join([*text, f"no difference at level {', '.join(f'{level:g}' for level in absent)}"])
    if any(row["difference_t_low"] is None for row in rows.values()):
        return UNDECIDED, "; ".join([*text, "one seed only: nothing is replicated"])
    return (MET if all(_differs(row, sign) for row in rows.values()) else NOT_MET), "; ".join(text)


def _differs(row: dict[str, Any], sign: int) -> bool:
    """Whether both intervals of the paired difference, over seeds and units and over seeds alone, lie on one side of 0."""
    return all(_side(row[f"difference_{kind}low"], row[f"difference_{kind}high"], sign) for kind in ("", "t_"))


def _side(low: float | None, high: float | None, sign: int) -> bool:
    """Whether an interval lies on the predicted side of 0 (a constant figure has none, and does not)."""
    return low is not None and (low > 0 if sign > 0 else high < 0)


def _t_note(row: dict[str, Any]) -> str:
    low, high = row["difference_t_low"], row["difference_t_high"]
    return "" if low is None else ", t " + bracket(row["difference"], low, high, "+").split(" ", 1)[1]


def _judge_bound(prediction: Prediction, facts: Facts, architecture: str, arm: str | None) -> tuple[str, str]:
    measured = facts.levels(prediction.key, architecture, arm)
    if not measured:
        return UNDECIDED, f"{prediction.key} was not measured"
    outcomes, text = [], []
    for level in prediction.levels or measured[-1:]:  # without a level: the extreme one
        row = facts.row(prediction.key, architecture, arm, level)
        if row is None or row["value"] is None:
            outcomes.append(UNDECIDED)
            text.append(f"level {level:g}: no value")
            continue
        inside = _within(row["value"], prediction)
        outcomes.append(UNDECIDED if row["seeds"] < 2 else MET if inside else NOT_MET)
        crossing = row["ci_low"] is not None and not (_within(row["ci_low"], prediction) == _within(row["ci_high"], prediction) == inside)
        notes = [" (the interval crosses the bound)"] * crossing + [", one seed only: nothing is replicated"] * (row["seeds"] < 2)
        text.append(f"level {level:g}: {bracket(row['value'], row['ci_low'], row['ci_high'])}{''.join(notes)}")
    outcome = NOT_MET if NOT_MET in outcomes else UNDECIDED if UNDECIDED in outcomes else MET
    return outcome, "; ".join(text)


def _within(value: float, prediction: Prediction) -> bool:
    low, high = prediction.minimum, prediction.maximum
    return (low is None or value >= low) and (high is None or value <= high)


def bracket(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """"2.31 [2.20, 2.44]", or what there is of it."""
    if value is None:
        return "no value"
    if low is None or high is None:
        return f"{value:{sign}.3g} (no interval)".replace("-", MINUS)
    # Two significant digits of the interval's width: more would be noise.
    decimals = min(5, max(0, 1 - math.floor(math.log10(high - low)))) if high - low > 1e-12 else 3
    return f"{value:{sign}.{decimals}f} [{low:{sign}.{decimals}f}, {high:{sign}.{decimals}f}]".replace("-", MINUS)


def arms_table(facts: Facts, keys: Sequence[Key]) -> list[dict[str, Any]]:
    """Each arm and level against the baseline, paired by seed and unit: does it concentrate?"""
    groups = {group for _, group in facts.rows if group.level is not None}
    lines = []
    for group in sorted(groups, key=lambda g: (g.architecture, g.arm != facts.main_arm, g.arm, g.level)):
        found = {key: facts.rows.get((key, group)) for key in keys}
        if group.arm.startswith(UNTOUCHED) or not any(row and row["difference"] is not None for row in found.values()):
            continue
        entropy, share = facts.rows.get((ENTROPY, group)), facts.rows.get((HIGH_FREQUENCY, group))
        own = facts.rows.get((ENTROPY, group._replace(arm=facts.main_arm or "")))
        lines.append({"group": group, "rows": found, "concentrates": concentration(entropy, share), "relative": _relative(entropy, own)})
    return lines


def _relative(row: dict[str, Any] | None, reference: dict[str, Any] | None) -> float | None:
    """A change of entropy as a share of the dose-response arm's at the same level; None where that changes nothing."""
    if not row or not reference or row["difference"] is None or reference["difference_low"] is None:
        return None
    changes = _side(reference["difference_low"], reference["difference_high"], -1) or _side(reference["difference_low"], reference["difference_high"], 1)
    return row["difference"] / reference["difference"] if changes else None


def concentration(entropy: dict[str, Any] | None, share: dict[str, Any] | None) -> str:
    """By the paired differences: entropy below and high-frequency share above the baseline, both intervals leaving out 0.

    The bootstrap alone would say so of three seeds that have one sign by chance. One seed decides nothing.
    """
    if any(not row or row["difference_low"] is None or row["difference_t_low"] is None for row in (entropy, share)):
        return UNDECIDED
    toward, away = ([_differs(entropy, -sign), _differs(share, sign)] for sign in (1, -1))
    if any(away):
        return "mixed" if any(toward) else "spreads"
    return "yes" if all(toward) else "in part" if any(toward) else "no"


def sentences(facts: Facts, judged: Sequence[Judgement], arms: Sequence[dict[str, Any]]) -> list[str]:
    """The verdict in plain English."""
    text = [_trend_sentence(facts, ENTROPY, "Predictive entropy", FALLS),
            _trend_sentence(facts, HIGH_FREQUENCY, "The high-frequency share of sampled tokens", RISES)]  # fmt: skip
    if judged:
        count = {outcome: sum(item.outcome == outcome for item in judged) for outcome in (MET, NOT_MET, UNDECIDED)}
        text.append(f"Of {len(judged)} predictions written down before the runs, {count[MET]} {_were(count[MET])} met, "
                    f"{count[NOT_MET]} not met, {count[UNDECIDED]} not decidable.")  # fmt: skip
    others = [line for line in arms if line["group"].arm != facts.main_arm]
    if others:
        yes = sorted({line["group"].arm for line in others if line["concentrates"] == "yes"})
        judged_arms = {line["group"].arm for line in others if line["concentrates"] != UNDECIDED}
        rest, open_arms = sorted(judged_arms - set(yes)), sorted({line["group"].arm for line in others} - judged_arms)
        text.append(f"Besides {facts.main_arm}, arms that concentrate at some level: {', '.join(yes) or 'none'}"
                    + (f"; arms not shown to at any: {', '.join(rest)}" if rest else "")
                    + (f"; not decidable: {', '.join(open_arms)}." if open_arms else "."))  # fmt: skip
    return [sentence for sentence in text if sentence]


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _trend_sentence(facts: Facts, key: Key, name: str, expected: str) -> str:
    trends = [trend for (found, _, arm), trend in facts.trends.items() if found == key and arm == facts.main_arm]
    if not trends:
        return ""
    sign = -1 if expected == FALLS else 1
    clear = [trend for trend in trends if _side(trend.rho_low, trend.rho_high, sign)]
    rhos = sorted(trend.rho for trend in trends if trend.rho is not None)
    span = "" if not rhos else f" (Spearman's rho {rhos[0]:.2f})" if len(rhos) == 1 else f" (Spearman's rho {rhos[0]:.2f} to {rhos[-1]:.2f})"
    span = span.replace("-", MINUS)
    text = f"{name} {expected} with the level in {len(clear)} of {len(trends)} architectures{span}."
    bent = [trend for trend in trends if trend.monotone is False]
    if bent:
        text += " The dose-response is not monotone in " + "; ".join(
            f"{trend.architecture} ({', '.join(map(str, trend.reversals))}{'' if 'within' not in trend.shape else ', within noise'})"
            for trend in bent
        ) + "."  # fmt: skip
    if min(trend.seeds for trend in trends) < 2:
        text += " With one seed, intervals are over prompts only."
    return text
