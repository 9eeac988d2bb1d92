"""The part of the page that compares models: sentences, the table of headline figures, the figure, and the pairs."""

from collections.abc import Sequence
from typing import Any

from .comparison import Comparison, Line, Model, common_notes, parts_of, undecided
from .measures import HIGHER, HUMAN, LOWER, ZERO, measure_of
from .report_cells import Key
from .report_drawing import Picture
from .report_forest import Panel, Point, forest
from .report_tables import PLACES, metric_title

PAIR_COLUMNS = ["metric", "where", "model", "minus model", "difference", "low", "high", "p (Holm)", "outcome", "units", "note"]
MAX_NAMED = 6  # metrics in a sentence
CAPTION = ("Models side by side. Bars: 95 % intervals over prompts, windows or items, and over seeds where a line has several; "
           "vertical lines: the human continuations of the prompts, and chance.")  # fmt: skip


def title_of(key: Key, rows: Sequence[Any]) -> str:
    return metric_title(key, next((row.get("unit") for row in rows if row), None))


def sentences(comparison: Comparison) -> list[str]:
    """What can be said of the models, in plain English."""
    models, lines = comparison.models, comparison.lines
    if len(models) < 2:
        return ["One model: its figures with their intervals, beside those of human text and chance. Evaluate another one into the same "
                "folder to compare them."]  # fmt: skip
    text = []
    for place, model in enumerate(models):
        best = [line for line in lines if line.best == place]
        for count in sorted({line.measured for line in best}, reverse=True):
            which = _listed([_name(line) for line in best if line.measured == count])
            text.append(f"{model.name} is the best of {'the ' if count < len(models) else ''}{count}{' that have a value' if count < len(models) else ''} in {which}.")
    reasons = [f"No best in {_listed([_name(line) for line in which])}: {reason}." for reason, which in undecided(lines).items()]
    text += [" ".join(reasons)] if reasons else []
    return text or ["No figure of these models has a direction in which one could be better."]


def _name(line: Line) -> str:
    return metric_title(Key(line.key.metric), None)


def _listed(names: Sequence[str]) -> str:
    if len(names) > MAX_NAMED:
        return f"{', '.join(names[:MAX_NAMED])} and {len(names) - MAX_NAMED} more measures"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def table(comparison: Comparison) -> list[dict[str, Any]]:
    """Lines of the page's table: title, direction, note (what holds for all models), cells (value, low, high, best, note), human, chance."""
    told, found = table_notes(comparison), []
    for line in comparison.lines:
        notes = [[note for note in parts_of(estimate) if note not in told] for estimate in line.estimates]
        shared = [note for note in notes[0] if all(note in own for own in notes)] if len(notes) > 1 else []
        cells = [{"value": estimate.value, "low": estimate.low, "high": estimate.high, "best": line.best == place,
                  "note": "; ".join(note for note in own if note not in shared)}
                 for place, (estimate, own) in enumerate(zip(line.estimates, notes, strict=True))]  # fmt: skip
        found.append({"title": _title(line, comparison.models), "direction": _direction(line, comparison.models), "note": "; ".join(shared),
                      "cells": cells, "human": line.human, "chance": line.chance})  # fmt: skip
    return found


def table_notes(comparison: Comparison) -> list[str]:
    return common_notes([found for line in comparison.lines for found in line.estimates])


def pair_notes(comparison: Comparison) -> list[str]:
    return common_notes([pair.estimate for pair in comparison.pairs if pair.estimate])


def _title(line: Line, models: Sequence[Model]) -> str:
    return title_of(line.key, [cell.rows.get(line.key) for model in models for cell in model.cells])


def _direction(line: Line, models: Sequence[Model]) -> str:
    best = measure_of(line.key, models[0].settings(line.key)).best
    return {None: "", LOWER: "lower is better", HIGHER: "higher is better", HUMAN: "nearest to human text is best",
            ZERO: "nearest to 0 is best"}[best]  # fmt: skip


def pair_rows(comparison: Comparison) -> list[list[Any]]:
    """Lines of the page's table of pairs, in PAIR_COLUMNS."""
    rows, told = [], pair_notes(comparison)
    for pair in comparison.pairs:
        names = [comparison.models[place].name for place in (pair.one, pair.two)]
        where = [pair.key.metric, PLACES.get(pair.key.where, pair.key.where), *names]
        found = pair.estimate
        if found is None:
            rows.append([*where, None, None, None, None, "not compared", None, pair.why_not])
            continue
        outcome = "not decidable" if not pair.decided else f"{names[0]} is {'higher' if found.value > 0 else 'lower'}"
        rows.append([*where, found.value, found.low, found.high, pair.p, outcome, found.units,
                     "; ".join(note for note in parts_of(found) if note not in told)])  # fmt: skip
    return rows


def figure(comparison: Comparison) -> Picture | None:
    """Dots with intervals of every headline figure, a line a model."""
    panels = []
    for line in comparison.lines:
        points = [None if found.value is None else Point(found.value, found.low, found.high) for found in line.estimates]
        beside = {"human text": line.human, "chance": line.chance}
        if any(points):
            panels.append(Panel(_title(line, comparison.models), points, {name: value for name, value in beside.items() if value is not None}))
    names = [model.name for model in comparison.models]
    return forest("models", CAPTION, panels, names, names) if panels else None
