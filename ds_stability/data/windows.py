"""Token ids of a text that is too long to be encoded at once: windows that overlap, joined where they agree.

A tokenizer that is given a part of a text may begin it with a prefix of its own, or read a character, a word or a run of
merges otherwise than in its place. Near the middle of an overlap neither window's edge is felt any more: both must have the
same tokens there, and the text between must not be a run such as "aaaa...", in which they may agree by chance. Else the overlap
grows, in the end to the whole text.
"""

from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

WINDOW_CHARACTERS = 1 << 16
GROUP = 16  # windows that are encoded in parallel
OVERLAP = 256  # characters on either side of a cut, half of which must agree
VARIED = 16  # different characters that end a run, where no whitespace does


class Window(NamedTuple):
    """The characters [start, end), of which [first, last) are this window's to give."""

    start: int
    first: int
    last: int
    end: int


def encode_text(text: str, tokenizer: Any, size: int = WINDOW_CHARACTERS, overlap: int = OVERLAP) -> array:
    """The token ids of `text` as the tokenizer gives them for the whole, without special tokens; int32."""
    if tokenizer.is_fast:
        while 2 * overlap <= size:
            ids = _joined(text, tokenizer, size, overlap)
            if ids is not None:
                return ids
            overlap *= 4
    return array("i", _encode(tokenizer, [text])["input_ids"][0])


def _windows(length: int, size: int, overlap: int) -> Iterator[Window]:
    for first in range(0, length, size):
        last = min(first + size, length)
        yield Window(max(0, first - overlap), first, last, min(last + overlap, length))


def _joined(text: str, tokenizer: Any, size: int, overlap: int) -> array | None:
    """The ids, or None where two windows disagree about what stands around their border."""
    ids, before, windows = array("i"), None, list(_windows(len(text), size, overlap))
    strips = [place for window in windows[1:] for place in (window.start, window.first + overlap - overlap // 2)]
    if not all(_varied(text[place : place + overlap // 2]) for place in strips if place + overlap // 2 < len(text)):
        return None
    for number in range(0, len(windows), GROUP):
        group = windows[number : number + GROUP]
        encodings = _encode(tokenizer, [text[window.start : window.end] for window in group]).encodings
        for window, encoding in zip(group, encodings, strict=True):
            low, high = 0, len(encoding)
            if window.first > 0:
                if _around(encoding, window, window.first, overlap) != before:
                    return None
                low = _token_at(encoding, window.first - window.start)
            if window.last < len(text):
                before = _around(encoding, window, window.last, overlap)
                high = _token_at(encoding, window.last - window.start)
            ids.extend(encoding.ids[low:high])
    return ids


def _varied(strip: str) -> bool:
    return any(map(str.isspace, strip)) or len(set(strip)) >= VARIED


def _around(encoding: Any, window: Window, border: int, overlap: int) -> list[tuple[int, int, int]]:
    """(id, first character, character behind the last) of the tokens that begin near a border."""
    low, high = (_token_at(encoding, border - window.start + side * overlap // 2) for side in (-1, 1))
    return [(token, window.start + first, window.start + last)
            for token, (first, last) in zip(encoding.ids[low:high], map(encoding.token_to_chars, range(low, high)), strict=True)]


def _token_at(encoding: Any, place: int) -> int:
    """The first token that begins at or after a character; the number of tokens if there is none."""
    count, character = len(encoding), place
    end = encoding.token_to_chars(count - 1)[1] if count else 0
    while character < end:
        token = encoding.char_to_token(character)
        first, last = encoding.token_to_chars(token) if token is not None else (character, character + 1)
        if token is not None and first >= place:
            return token
        character = last
    return count


def _encode(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
