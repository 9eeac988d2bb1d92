"""Which tokens stand together in a block: texts are cut where a block is full, chats stay whole.

A text's tokens flow from block to block, and the remainder that fills no block is dropped. A chat, and any document that
`truncation` keeps from being cut, goes whole into the fullest of a few open blocks in which it still fits (best fit, within a
window, so that a stream is packed as a file is); what is left of a block is padding. With `alone`, every document has rows of
its own. Documents longer than a block are treated as `truncation` says.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .tokens import Encoded, TokenStore

OPEN_BLOCKS = 64


@dataclass(frozen=True)
class Rules:
    """How documents become blocks.

    truncation: what happens to a document longer than a block; "auto" drops chats and splits texts. alone: one document a
    row. positions: whether blocks have `position_ids`.
    """

    truncation: str = "auto"
    alone: bool = False
    positions: bool = True

    def of(self, chat: bool) -> str:
        """The truncation of a chat, or of a text."""
        return self.truncation if self.truncation != "auto" else "drop" if chat else "split"

    def flows(self, chat: bool) -> bool:
        """Whether such documents are cut at the ends of blocks."""
        return not chat and not self.alone and self.of(chat) == "split"


PACK = Rules()


def kept(length: int, size: int, truncation: str) -> list[tuple[int, int]]:
    """The pieces [first, last) of a document of `length` tokens that go into blocks of `size`."""
    if length <= size:
        return [(0, length)]
    if truncation == "split":
        return [(first, min(first + size, length)) for first in range(0, length, size)]
    return {"drop": [], "keep_start": [(0, size)], "keep_end": [(length - size, length)]}[truncation]


class Piece(NamedTuple):
    """The tokens [first, last) of a document, whatever stands for it."""

    document: Any
    first: int
    last: int


@dataclass
class _Open:
    free: int
    pieces: list[Piece] = field(default_factory=list)


class Planner:
    """Deals documents out to blocks of `size` tokens.

    counts: documents and chats seen; long_chats and long_texts, longer than a block; cut_tokens, which truncation left out;
    padding, in blocks that are given out.
    """

    def __init__(self, size: int, rules: Rules) -> None:
        self.size, self.rules = size, rules
        self.counts: Counter[str] = Counter()
        self.flow = _Open(size)
        self._open: list[_Open] = []

    def add(self, document: Any, length: int, chat: bool) -> Iterator[list[Piece]]:
        """The blocks that are full with this document of `length` tokens in them."""
        if not length:
            return
        self.counts["documents"] += 1
        self.counts["chats"] += chat
        long = length > self.size
        self.counts["long_chats" if chat else "long_texts"] += long
        if self.rules.flows(chat):
            yield from self._flow(document, length)
            return
        spans = kept(length, self.size, self.rules.of(chat))
        self.counts["cut_tokens"] += length - sum(last - first for first, last in spans)
        for first, last in spans:
            yield from self._place(Piece(document, first, last))

    def finish(self, keep_remainder: bool = False) -> Iterator[list[Piece]]:
        """The blocks that are not full; those of texts only with `keep_remainder`."""
        remainder = [self.flow] if keep_remainder and self.flow.pieces else []
        for block in remainder + self._open:
            yield self._closed(block)
        self._open = []

    def _flow(self, document: Any, length: int) -> Iterator[list[Piece]]:
        first = 0
        while first < length:
            last = min(length, first + self.flow.free)
            self.flow.pieces.append(Piece(document, first, last))
            self.flow.free -= last - first
            first = last
            if not self.flow.free:
                yield self.flow.pieces
                self.flow = _Open(self.size)

    def _place(self, piece: Piece) -> Iterator[list[Piece]]:
        length = piece.last - piece.first
        fits = [block for block in self._open if block.free >= length]
        if fits and not self.rules.alone:
            block = min(fits, key=lambda block: block.free)
        else:
            if len(self._open) == OPEN_BLOCKS:
                fullest = min(self._open, key=lambda block: block.free)
                self._open.remove(fullest)
                yield self._closed(fullest)
            block = _Open(self.size)
            self._open.append(block)
        block.pieces.append(piece)
        block.free -= length
        if block.free < 2 or self.rules.alone:  # a block's or document's first token is not trained on
            self._open.remove(block)
            yield self._closed(block)

    def _closed(self, block: _Open) -> list[Piece]:
        self.counts["padding"] += block.free
        return block.pieces


@dataclass(frozen=True)
class Plan:
    """The blocks of a token store: block i has the tokens [first, last) of the pieces offsets[i] to offsets[i + 1]. int64."""

    first: np.ndarray
    last: np.ndarray
    offsets: np.ndarray
    counts: Counter


def plan_store(store: TokenStore, size: int, rules: Rules, keep_remainder: bool) -> Plan:
    """Where the tokens of each block stand in the store."""
    planner = Planner(size, rules)
    first, last, offsets = array("q"), array("q"), array("q", [0])

    def take(blocks: Iterator[list[Piece]]) -> None:
        for pieces in blocks:
            first.extend(piece.document + piece.first for piece in pieces)
            last.extend(piece.document + piece.last for piece in pieces)
            offsets.append(len(first))

    starts = np.asarray(store.starts).tolist()
    chats = [False] * store.num_documents if store.chats is None else np.asarray(store.chats).tolist()
    for start, end, chat in zip(starts[:-1], starts[1:], chats, strict=True):
        take(planner.add(start, end - start, chat))
    take(planner.finish(keep_remainder))
    return Plan(*(np.array(values, np.int64) for values in (first, last, offsets)), planner.counts)


def planned_stream(documents: Iterable[Encoded], planner: Planner) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, document starts, supervised marks) of each block, while documents are read."""
    for encoded in documents:
        ids = np.asarray(encoded.ids, np.int64)
        marks = np.ones(len(ids), np.bool_) if encoded.supervised is None else np.asarray(encoded.supervised, np.bool_)
        for pieces in planner.add((ids, marks), len(ids), encoded.chat):
            yield _joined(pieces)
    for pieces in planner.finish():
        yield _joined(pieces)


def _joined(pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, marks = (np.concatenate([piece.document[part][piece.first : piece.last] for piece in pieces]) for part in (0, 1))
    lengths = [piece.last - piece.first for piece in pieces]
    return ids, np.cumsum([0, *lengths[:-1]]), marks


def truncation_line(counts: Counter, size: int, rules: Rules) -> str | None:
    """One line about the documents that are longer than a block; None where nobody needs to hear of them."""
    parts = []
    for chat, name in ((True, "chats"), (False, "texts")):
        long, seen = counts[f"long_{name}"], counts["chats"] if chat else counts["documents"] - counts["chats"]
        if long and not (rules.of(chat) == "split" and not chat):
            done = {"drop": "dropped", "keep_start": "cut to their start", "keep_end": "cut to their end",
                    "split": "split, and their answers trained without their questions"}[rules.of(chat)]  # fmt: skip
            parts.append(f"{long:,} of {seen:,} {name} are longer than --block_size {size} and were {done}")
    if not parts:
        return None
    return f"{'; '.join(parts)} (--truncation {rules.truncation}; {counts['cut_tokens']:,} tokens left out)"
