"""The comparison as lines of text for a terminal or a file: ASCII only, no escape codes, names of strangers made harmless.

Metrics are lines and models columns, stacked where they do not fit beside each other; many models are lines, with as many
metrics as fit.
"""

import textwrap
from collections.abc import Sequence

from ds_stability.safe_text import safe_line

from .comparison import MAX_RANKED, Comparison, Line, common_notes, parts_of, undecided
from .contrasts import Estimate
from .measures import HIGHER, HUMAN, LOWER, ZERO, measure_of
from .report_cells import Key
from .report_tables import PLACES, metric_title
from .verdict import bracket

MAX_COLUMNS = 6  # models; more are lines
LABEL, COLUMN = 30, 20  # characters of a line's name and of a column's heading, at most
WORDS = {LOWER: "lower is better", HIGHER: "higher is better", HUMAN: "nearest to human text is best", ZERO: "nearest to 0 is best"}
FIRST = ("predictive_entropy", "high_frequency_share", "bits_per_byte")  # where models are lines
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Footnotes:
    """Notes by letter, in the order in which they are first needed; what holds for every figure is told once for all."""

    def __init__(self, estimates: Sequence[Estimate]) -> None:
        self.common = common_notes(estimates)
        self.letters: dict[str, str] = {}

    def marks(self, estimate: Estimate) -> str:
        notes = [note for note in parts_of(estimate) if note not in self.common]
        for note in notes:
            number = len(self.letters)
            self.letters.setdefault(note, LETTERS[number] if number < len(LETTERS) else str(number + 1))
        return f" ({','.join(self.letters[note] for note in notes)})" if notes else ""


def ascii_line(text: object, limit: int = 2000) -> str:
    """`text` as printable ASCII: a file, a pipe and an old terminal show the same."""
    plain = str(text).replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ").replace("\N{EN DASH}", "-")
    return safe_line(plain, limit).encode("ascii", "backslashreplace").decode()


def short(text: str, width: int) -> str:
    line = ascii_line(text)
    half = (width - 2) // 2
    return line if len(line) <= width else f"{line[: width - 2 - half]}..{line[-half:]}"


def table_lines(comparison: Comparison, width: int = 80) -> list[str]:
    """The table with its notes, at most `width` characters wide where names and figures allow it."""
    lines, models = comparison.lines, comparison.models
    if not lines:
        return [f"No headline figure was measured; {comparison.figures} figures are on the page."]
    footnotes = Footnotes([estimate for line in lines for estimate in line.estimates])
    names = _headings([model.name for model in models])
    if len(models) <= MAX_COLUMNS:
        columns = [(name, [_figure(line, place, footnotes) for line in lines]) for place, name in enumerate(names)]
        labels = [_label(line.key) for line in lines]
        beside = ("to compare with", list(map(_beside, lines)))
        if any(beside[1]) and _width_of(labels, [*columns, beside]) <= width:
            columns, beside = [*columns, beside], None
        shown = _stacked(labels, columns, width)
    else:
        beside = None
        labels = [short(model.name, LABEL + 10) for model in models]
        lines = sorted(lines, key=lambda line: FIRST.index(line.key.metric) if line.key.metric in FIRST else len(FIRST))
        columns = [(_label(line.key), [_figure(line, place, footnotes) for place in range(len(models))]) for line in lines]
        fitting = next((count for count in range(len(lines), 1, -1) if _width_of(labels, columns[:count]) <= width), 1)
        lines, columns = lines[:fitting], columns[:fitting]
        shown = _stacked(labels, columns, width)
    told = [f"{_name(line.key)}: {text}." for line, text in zip(lines, beside[1], strict=True) if text] if beside else []
    return [*shown, "", *(line for note in _notes(comparison, lines, footnotes, names, told) for line in _wrapped(note, width))]


def _figure(line: Line, place: int, footnotes: Footnotes) -> str:
    estimate = line.estimates[place]
    if estimate.value is None:
        return f"no value{footnotes.marks(estimate)}"
    text = bracket(estimate.value, estimate.low, estimate.high).replace(" (no interval)", "")
    return ascii_line(f"{text}{' *' if line.best == place else ''}{footnotes.marks(estimate)}")


def _label(key: Key) -> str:
    place = PLACES.get(key.where, key.where)
    return ascii_line(f"{_name(key)}{', ' + place if place else ''}", 60)


def _name(key: Key) -> str:
    return metric_title(Key(key.metric), None)


def _beside(line: Line) -> str:
    found = [f"{name} {value:.3g}" for name, value in (("human text", line.human), ("chance", line.chance)) if value is not None]
    return ", ".join(found)


def _headings(names: Sequence[str]) -> list[str]:
    """Names cut to a column's width; numbered where two would be one."""
    cut = [short(name, COLUMN) for name in names]
    return [name if cut.count(name) == 1 else f"{place}: {short(names[place - 1], COLUMN - 4)}" for place, name in enumerate(cut, 1)]


def _stacked(labels: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]], width: int) -> list[str]:
    """Columns beside each other as far as they fit, the rest below, each block with the labels before it."""
    lines: list[str] = []
    rest = list(columns)
    while rest:
        block = [rest.pop(0)]
        while rest and _width_of(labels, [*block, rest[0]]) <= width:
            block.append(rest.pop(0))
        headings = [_heading(name) for name, _ in block]
        height = max(map(len, headings))
        padded = [[""] * (height - len(heading)) + heading for heading in headings]
        rows = [["", *row] for row in zip(*padded, strict=True)]
        rows += [[label, *(figures[place] for _, figures in block)] for place, label in enumerate(labels)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [""] * bool(lines)
        lines += ["  ".join(text.ljust(size) for text, size in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines


def _heading(name: str) -> list[str]:
    return textwrap.wrap(name, COLUMN, break_on_hyphens=False) or [""]


def _width_of(labels: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]]) -> int:
    return max(map(len, labels)) + sum(2 + max(map(len, (*_heading(name), *figures))) for name, figures in columns)


def _notes(comparison: Comparison, lines: Sequence[Line], footnotes: Footnotes, names: Sequence[str],
           told: Sequence[str]) -> list[str]:  # fmt: skip
    models = comparison.models
    notes = [" ".join(["[ ]: 95 % intervals.", *told])]
    notes += [f"All figures: {note}." for note in footnotes.common]
    notes += [f"({letter}) {note}" for note, letter in footnotes.letters.items()]
    if len(models) > 1:
        directions: dict[str, list[str]] = {}
        for line in lines:
            best = measure_of(line.key, models[0].settings(line.key)).best
            if best is not None:
                directions.setdefault(best, []).append(_name(line.key))
        marked = [line for line in lines if line.best is not None]
        others = "every other model" if all(line.measured == len(models) for line in marked) else "every other model with a value"
        notes.append((f"* best: {others} is worse, Holm-adjusted p < 0.05." if marked else "No model is marked as the best.")
                     + "".join(f" {WORDS[best].capitalize()}: {', '.join(which)}." for best, which in directions.items()))  # fmt: skip
        notes += [f"No best in {', '.join(_name(line.key) for line in which)}: {reason}." for reason, which in undecided(lines).items()]
    if len(models) > MAX_RANKED and sum(model.trained for model in models) > 1:
        notes.append(f"More than {MAX_RANKED} models: those that were trained here are not compared in pairs.")
    notes += [f"{name} is {ascii_line(model.name)}" for name, model in zip(names, models, strict=True)
              if name != ascii_line(model.name) and len(models) <= MAX_COLUMNS]  # fmt: skip
    if len(lines) < comparison.figures:
        notes.append(f"{len(lines)} of {comparison.figures} figures; the page has the others.")
    return notes


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(ascii_line(text), width, subsequent_indent="   ", break_on_hyphens=False)
