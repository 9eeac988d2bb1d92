"""The verdict in plain English: no more than the intervals allow."""

from collections.abc import Mapping, Sequence
from typing import Any

from .arms import IN_PART, YES
from .contrasts import holm
from .report_cells import Key
from .trend import FALLS, RISES, Trend
from .verdict import ENTROPY, HIGH_FREQUENCY, MET, NOT_MET, SIGNIFICANT, UNDECIDED, Facts, Judgement, bracket

CLAIMS = ((ENTROPY, "Predictive entropy", FALLS), (HIGH_FREQUENCY, "The high-frequency share of sampled tokens", RISES))


def sentences(facts: Facts, judged: Sequence[Judgement], arms: Sequence[dict[str, Any]]) -> list[str]:
    """Trends of the two measures of the claim, outcomes of predictions, and arms; an empty list where there are none.

    The trends' slopes are adjusted (Holm) for the architectures and the two measures.
    """
    trends = [trend for key, *_ in CLAIMS for (found, _, arm), trend in facts.trends.items() if found == key and arm == facts.main_arm]
    adjusted = {(trend.key, trend.architecture): p for trend, p in zip(trends, holm([trend.slope_p for trend in trends]), strict=True)}
    text = [_trend_sentence(facts, key, name, expected, [trend for trend in trends if trend.key == key], adjusted)
            for key, name, expected in CLAIMS]  # fmt: skip
    if judged:
        count = {outcome: sum(item.outcome == outcome for item in judged) for outcome in (MET, NOT_MET, UNDECIDED)}
        text.append(f"Of {_number(len(judged), 'prediction')} written down before the runs, {count[MET]} {_were(count[MET])} met, "
                    f"{count[NOT_MET]} not met, {count[UNDECIDED]} not decidable.")  # fmt: skip
    return [sentence for sentence in [*text, _arm_sentence(facts, arms)] if sentence]


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _trend_sentence(facts: Facts, key: Key, name: str, expected: str, trends: Sequence[Trend], adjusted: Mapping[tuple[Key, str], float | None]) -> str:
    sides: dict[str, list[str]] = {FALLS: [], RISES: [], "": []}
    for trend in trends:
        p = adjusted[key, trend.architecture]
        sides["" if p is None or p >= SIGNIFICANT else FALLS if trend.slope.value < 0 else RISES].append(trend.architecture)
    measured = [trend for trend in trends if len(trend.levels) > 1]
    if not measured:
        return ""
    everywhere, other = facts.architectures(facts.main_arm), FALLS if expected == RISES else RISES
    unknown = [architecture for architecture in everywhere if architecture not in sides[FALLS] + sides[RISES]]
    how = "with the level" if max(len(trend.levels) for trend in measured) > 2 else "between two levels"
    count = f"{_number(len(everywhere), 'architecture')} ({_basis(measured)})"
    if len(unknown) == len(everywhere):
        text = f"{name}: whether it {expected} {how} is not decidable in any of {count}"
    else:
        text = f"{name} {expected} {how} in {len(sides[expected])} of {count}"
    slopes = [f"{trend.architecture} {bracket(trend.slope.value, trend.slope.low, trend.slope.high, '+')}" for trend in measured if trend.slope.value is not None]
    text += f"; slope per unit of level{_unit(facts, key)}: {', '.join(slopes)}." if slopes else "."
    if sides[other]:
        text += f" It {other} in {', '.join(sides[other])}."
    if 0 < len(unknown) < len(everywhere):
        text += f" Not decidable in {', '.join(unknown)}."
    if any(trend.seeds == 1 for trend in measured):
        text += " With one seed, intervals are over prompts only and decide nothing about training."
    bent = [f"{trend.architecture} ({', '.join(map(str, trend.reversals))}{', within noise' * ('within' in trend.shape)})"
            for trend in measured if trend.monotone is False]  # fmt: skip
    return text + (f" The means turn back in {'; '.join(bent)}." if bent else "")


def _basis(trends: Sequence[Trend]) -> str:
    """"arm feedback, 5 levels, 3 seeds"."""
    spans = []
    for counts, noun in ((sorted({len(trend.levels) for trend in trends}), "level"), (sorted({trend.seeds for trend in trends}), "seed")):
        spans.append(_number(counts[0], noun) if len(counts) == 1 else f"{counts[0]} to {_number(counts[-1], noun)}")
    return f"arm {trends[0].arm}, {', '.join(spans)}"


def _unit(facts: Facts, key: Key) -> str:
    unit = next((row["unit"] for (found, _), row in facts.rows.items() if found == key and row["unit"] not in (None, "", "-", "share")), None)
    return f" in {unit}" if unit else ""


def _arm_sentence(facts: Facts, arms: Sequence[dict[str, Any]]) -> str:
    """Each other arm once, by the most that it was shown to do at any level."""
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for line in arms:
        if line["group"].arm != facts.main_arm:
            by_arm.setdefault(line["group"].arm, []).append(line)
    if not by_arm:
        return ""
    answers = {arm: {line["concentrates"] for line in lines} for arm, lines in sorted(by_arm.items())}
    yes = [arm for arm, found in answers.items() if YES in found]
    part = [arm for arm, found in answers.items() if arm not in yes and IN_PART in found]
    unknown = [arm for arm, found in answers.items() if found == {UNDECIDED}]
    rest = [arm + _room(by_arm[arm]) for arm in answers if arm not in (*yes, *part, *unknown)]
    return (f"Besides {facts.main_arm}, arms that concentrate at some level: {', '.join(yes) or 'none'}"
            + (f"; in part: {', '.join(part)}" if part else "")
            + (f"; not shown to at any level: {', '.join(rest)}" if rest else "")
            + (f"; not decidable: {', '.join(unknown)}" if unknown else "") + ".")  # fmt: skip


def _room(lines: Sequence[dict[str, Any]]) -> str:
    """How much lower the intervals still allow entropy to be: what was not shown is bounded, not absent."""
    rows = [line["entropy"] for line in lines]
    if not all(row and row["difference_low"] is not None and row["difference_seeds"] > 1 for row in rows):
        return ""  # of one level nothing is known
    low = min(row["difference_low"] for row in rows)
    unit = f" {rows[0]['unit']}" if rows[0]["unit"] else ""
    return f" (by its intervals, entropy {'no lower' if low >= 0 else f'lower by at most {-low:.2g}{unit}'})"
