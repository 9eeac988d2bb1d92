"""Text of strangers on its way to a terminal: file names, values and samples that messages repeat.

A control character moves the cursor, recolors the screen or retitles the window; U+202E turns the direction of what
follows; a line break makes one message look like two. Here all of them become escapes such as \\x1b and \\u202e.
No imports of ours: every module may use this one.
"""

MAX_LINE = 2000  # characters of a message: a list of all metrics fits, a file's content does not
_KEPT = "\n\t"


def escaped(text: str, keep: str = "") -> str:
    """`text` with everything that is not printable as Python escapes, but for the characters in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def safe_line(value: object, limit: int = MAX_LINE) -> str:
    """`value` as one printable line of at most about `limit` characters; what is longer loses its middle."""
    text = str(value)
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} ... {text[-half:]}"
    line = escaped(text)
    if len(line) > limit:  # an escape takes up to ten characters
        half = limit // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return line


def safe_text(text: str) -> str:
    """Text of several lines, such as the end of a log, for a terminal: line breaks and tabs stay."""
    return escaped(text.replace("\r\n", "\n"), _KEPT)
