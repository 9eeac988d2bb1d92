"""A DataView as text for a terminal, and as one HTML page that needs no other file."""

import unicodedata
from collections.abc import Iterator
from html import escape
from itertools import groupby

from ..safe_text import escaped
from .inspection import DataView, Segment

COLOR = ("\x1b[1;32m", "\x1b[0m")
BRACKETS = ("[[", "]]")
NEWLINE = "\u21b5"
_INDENT = "    "

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --muted: #616161; --rule: #d9d9d9; --mark: #c9ead9; --markink: #00432f; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e6e6e6; --muted: #a3a3a3; --rule: #3a3d42; --mark: #0d4a37; --markink: #d5f5e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 960px; padding: 2rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .4rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; padding-top: .7rem; border-top: 2px solid var(--ink); }
h3 { font-size: .8125rem; font-weight: 400; color: var(--muted); margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; overflow-wrap: anywhere; } .note { color: var(--muted); }
pre { margin: 0; padding: .7rem .9rem; border: 1px solid var(--rule); border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: isolate; font: .8125rem/1.6 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
mark { background: var(--mark); color: var(--markink); border-radius: 2px; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
i { color: var(--muted); font-style: normal; user-select: none; }
"""


def as_text(view: DataView, color: bool, width: int = 80) -> str:
    """Blocks, rows and their text, at most `width` columns wide; supervised tokens in color, or in [[ ]]."""
    marks = COLOR if color else BRACKETS
    shown = f"{marks[0]}green{marks[1]}" if color else "[[so]]"
    lines = [*_wrapped([(False, view.summary)], BRACKETS, width), f"supervised tokens are {shown}; {NEWLINE} is a line's end in the text"]
    for number, block in enumerate(view.blocks, 1):
        lines += ["", f"block {number}"]
        for segment in block:
            lines += [f"  {line}" for line in _wrapped([(False, segment.title)], BRACKETS, width - 2)]
            lines += [_INDENT + line for line in _wrapped(segment.runs, marks, width - len(_INDENT))]
    lines += ["", *(line for note in _notes(view) for line in _wrapped([(False, note)], BRACKETS, width))]
    return "\n".join(lines).rstrip()


def as_html(view: DataView) -> str:
    """The same as a page. All that comes from files is escaped."""
    body = [f"<h1>As it will be trained</h1>\n<p>{escape(escaped(view.summary))}</p>",
            f'<p class="note"><mark>Supervised tokens</mark> are marked; {NEWLINE} is a line\'s end in the text.</p>']
    body += [f'<p class="note">{escape(escaped(note))}</p>' for note in _notes(view)]
    for number, block in enumerate(view.blocks, 1):
        body.append(f"<section><h2>Block {number}</h2>")
        body += [f"<h3>{escape(escaped(segment.title))}</h3>\n<pre>{_marked(segment)}</pre>" for segment in block]
        body.append("</section>")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>Training data</title>
<style>{_STYLE}</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""


def _notes(view: DataView) -> list[str]:
    notes = [f"{len(view.left_out)} left out, because longer than a block or empty: "
             + ", ".join(view.left_out[:5]) + (", ..." if len(view.left_out) > 5 else "")] if view.left_out else []  # fmt: skip
    if view.more_blocks:
        notes.append(f"{view.more_blocks} more blocks of these rows are not shown")
    if not view.supervised:
        notes.append("no token of these rows is supervised: nothing would be learned from them")
    return notes


def _marked(segment: Segment) -> str:
    parts = []
    for supervised, text in segment.runs:
        shown = escape(escaped(text, "\n\t")).replace("\n", f"<i>{NEWLINE}</i>\n")
        parts.append(f"<mark>{shown}</mark>" if supervised else shown)
    return "".join(parts)


def _wrapped(runs: list[tuple[bool, str]], marks: tuple[str, str], width: int) -> Iterator[str]:
    """Lines of at most `width` columns, broken after a blank where there is one in a line's second half."""
    line: list[tuple[str, bool]] = []
    used = 0
    for cell in _cells(runs, marks):
        columns = _columns(cell[0])
        while line and used + columns > width:
            blank = max((place for place, (text, _) in enumerate(line) if text == " "), default=0)
            cut = blank + 1 if blank > len(line) // 2 else len(line)
            yield _painted(line[:cut], marks)
            line = line[cut:]
            used = sum(_columns(text) for text, _ in line)
        line.append(cell)
        used += columns
        if cell[0] == NEWLINE:
            yield _painted(line, marks)
            line, used = [], 0
    if line:
        yield _painted(line, marks)


def _cells(runs: list[tuple[bool, str]], marks: tuple[str, str]) -> Iterator[tuple[str, bool]]:
    """(what is shown, supervised?) of each character; brackets are characters of their own."""
    for supervised, text in runs:
        cells = [(_shown(character), supervised) for character in text]
        if supervised and marks == BRACKETS:
            cells = [(BRACKETS[0], True), *cells, (BRACKETS[1], True)]
        yield from cells


def _painted(line: list[tuple[str, bool]], marks: tuple[str, str]) -> str:
    """The cells as text; colors are opened and closed within the line."""
    if marks == BRACKETS:
        return "".join(text for text, _ in line)
    parts = (("".join(text for text, _ in run), on) for on, run in groupby(line, key=lambda cell: cell[1]))
    return "".join(f"{marks[0]}{text}{marks[1]}" if on else text for text, on in parts)


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not unicodedata.combining(c))


def _shown(character: str) -> str:
    return NEWLINE if character == "\n" else "    " if character == "\t" else escaped(character)
