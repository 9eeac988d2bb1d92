"""Parts of one-line error messages: where it is wrong, what was given, what may have been meant."""

import difflib
import json
from collections.abc import Iterable, Sequence
from itertools import islice

from ds_stability.safe_text import escaped

MAX_SHOWN = 60  # characters of a value or key that a message repeats


class InvalidValue(ValueError):
    """A value that a validator refuses; `translate` (config.py) turns it into a StabilityConfigError.

    Args:
        where: what to append to the key path of the validated value, such as "[1][0]" or ".loss_path"; may be "".
        given: the offending value.
        allowed: what would be right; completes the sentence "must be ...".
    """

    def __init__(self, where: str, given: object, allowed: str):
        super().__init__(allowed)
        self.where, self.given, self.allowed = where, given, allowed


def one_line(text: str, limit: int | None = None) -> str:
    """`text` with everything that is not printable escaped (so no line breaks), cut after `limit` characters."""
    if limit is not None and len(text) > limit:
        text = text[:limit] + "..."
    return escaped(text)


def show_value(value: object, depth: int = 2) -> str:
    """`value` as it would stand in JSON, on one line, cut to a readable length; never raises, whatever the value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f'"{one_line(value, MAX_SHOWN)}"'
    if isinstance(value, int):
        bits = int.bit_length(value)
        return int.__repr__(value) if bits < 200 else f"an integer of {bits} bits"
    if isinstance(value, float):
        return json.dumps(float(value))
    if isinstance(value, (list, tuple)):
        return _show_items((show_value(item, depth - 1) for item in value), len(value), "[]", depth)
    if isinstance(value, dict):
        items = (f"{show_value(k, 0)}: {show_value(v, depth - 1)}" for k, v in value.items())
        return _show_items(items, len(value), "{}", depth)
    return one_line(f"a Python {type(value).__name__}", MAX_SHOWN)


def _show_items(items: Iterable[str], count: int, brackets: str, depth: int) -> str:
    shown = list(islice(items, 4)) if depth > 0 else []
    if len(shown) < count:
        shown.append("...")
    return brackets[0] + one_line(", ".join(shown), 2 * MAX_SHOWN) + brackets[1]


def key_path(parts: Sequence[object], root: str = "") -> str:
    """("level", 1) under root "stability" -> "stability.level[1]"; what is no plain name is quoted."""
    path = root
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        plain = isinstance(part, str) and part.isidentifier() and len(part) <= MAX_SHOWN
        path += ("." if path else "") + (str(part) if plain else show_value(part))
    return path


def did_you_mean(key: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The entry of `known` that is closest to `key` (case ignored), or None if none is close."""
    if not isinstance(key, str) or len(key) > MAX_SHOWN:
        return None
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None
