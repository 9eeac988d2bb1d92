"""The first rows of a data set as they will be trained: read, encoded and packed by the code that training uses."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice, pairwise
from typing import Any

import numpy as np

from ..errors import UserError
from .long_documents import Rules
from .packing import IGNORE, PackedBlocks
from .readers import read_documents
from .spec import DataSpec, Document, check_file
from .tokenizer import load_pretrained, train_bpe
from .tokens import Encoded, TokenStoreBuilder, encode_documents

MOST_ROWS = 1000
MOST_BLOCKS = 100  # a row may be a novel


@dataclass(frozen=True)
class Segment:
    """What of row number `row` (from 1; `where` in its file) stands in a block: its tokens [first, last) of `length`.

    runs: (supervised?, text), one after another, as the labels of the block have it.
    """

    row: int
    where: str
    first: int
    last: int
    length: int
    runs: list[tuple[bool, str]]

    @property
    def title(self) -> str:
        whole = self.first == 0 and self.last == self.length
        part = f"{self.length} tokens" if whole else f"tokens {self.first + 1} to {self.last} of {self.length}"
        return f"row {self.row}, {self.where}: {part}"


@dataclass
class DataView:
    """`blocks` of segments, packed from the `rows` alone.

    left_out: rows that are in no block, by their place. more_blocks: those beyond the first MOST_BLOCKS, which are counted, too.
    """

    tokenizer: str
    block_size: int
    rows: int
    tokens: int
    supervised: int
    blocks: list[list[Segment]]
    left_out: list[str] = field(default_factory=list)
    more_blocks: int = 0

    @property
    def summary(self) -> str:
        share = f" ({self.supervised / self.tokens:.0%})" if self.tokens else ""
        return (f"{self.rows} row{'s' if self.rows != 1 else ''}, {self.tokens:,} tokens, {self.supervised:,} of them supervised"
                f"{share}; tokenizer: {self.tokenizer}; blocks of {self.block_size} tokens")


def view_data(spec: DataSpec, tokenizer_name: str | None, vocab_size: int, block_size: int, rows: int) -> DataView:
    """The first `rows` rows of spec's training data. Without a tokenizer, one is trained on the data, as for a fresh model.

    Raises:
        UserError: whatever training would refuse, or a number of rows or a block size that is not allowed.
    """
    if not 1 <= rows <= MOST_ROWS:
        raise UserError(f"--rows {rows}: allowed is a number from 1 to {MOST_ROWS}")
    if block_size < 2:
        raise UserError(f"--block_size {block_size}: allowed is a number of tokens from 2")
    for path in spec.train_files:
        check_file(path, "--data")
    spec.check()
    tokenizer = load_pretrained(tokenizer_name) if tokenizer_name else train_bpe(read_documents(spec), vocab_size)
    documents = list(islice(read_documents(spec), rows))
    name = tokenizer_name or f"a BPE of {len(tokenizer)} tokens, trained on the data"
    return view_documents(documents, tokenizer, spec, block_size, name)


def view_documents(documents: list[Document], tokenizer: Any, spec: DataSpec, block_size: int, name: str) -> DataView:
    """`documents` in blocks, as `load_blocks` makes them of the whole data; the remainder that it drops is shown, too."""
    encoded = list(encode_documents(documents, tokenizer, spec.assistant_only_loss))
    builder = TokenStoreBuilder()
    for item in encoded:
        builder.add(item)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rules = Rules(spec.truncation, alone=spec.packing == "pad")
    packed = PackedBlocks(builder.finish(), block_size, pad_id, drop_remainder=False, rules=rules)
    rows = _Rows(documents, encoded, tokenizer)
    parts = [list(_parts(packed[index], pad_id)) for index in range(len(packed))]
    blocks = [[rows.segment(*part) for part in block] for block in parts[:MOST_BLOCKS]]
    more = len(parts) - len(blocks)
    found = {segment.row for block in blocks for segment in block}
    return DataView(
        name, block_size, len(documents), tokens=sum(len(ids) for block in parts for ids, _ in block),
        supervised=sum(int(marks.sum()) for block in parts for _, marks in block), blocks=blocks,
        left_out=[] if more else [document.where for number, document in enumerate(documents, 1) if number not in found], more_blocks=more)


def _parts(block: dict[str, Any], pad_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, supervised marks) of each document in a block, without the padding at its end."""
    ids, marks = block["input_ids"].numpy(), block["labels"].numpy() != IGNORE
    borders = [*np.flatnonzero(block["position_ids"].numpy() == 0).tolist(), len(ids)]
    for first, last in pairwise(borders):
        padding = last == len(ids) and first > 0 and (ids[first:last] == pad_id).all() and not marks[first:last].any()
        if not padding:
            yield ids[first:last], marks[first:last]


class _Rows:
    """Finds the row that a piece of a block comes from: the first one that has these tokens where no piece was found yet."""

    def __init__(self, documents: Iterable[Document], encoded: list[Encoded], tokenizer: Any):
        self.documents, self.tokenizer = list(documents), tokenizer
        self.ids = [np.asarray(item.ids, np.int64) for item in encoded]
        self.done = [0] * len(encoded)

    def segment(self, ids: np.ndarray, marks: np.ndarray) -> Segment:
        for number in sorted(range(len(self.ids)), key=lambda number: len(self.ids[number]) != len(ids)):  # whole rows first
            row = self.ids[number]
            starts = [self.done[number], len(row) - len(ids)]  # where it went on, or its end
            first = next((start for start in starts if start >= self.done[number] and np.array_equal(row[start : start + len(ids)], ids)), None)
            if first is not None:
                self.done[number] = first + len(ids)
                return Segment(number + 1, self.documents[number].where, first, first + len(ids), len(row), self._runs(ids, marks))
        raise AssertionError("a block has tokens that no row has")

    def _runs(self, ids: np.ndarray, marks: np.ndarray) -> list[tuple[bool, str]]:
        """Decoded from the beginning each time: some tokenizers drop the blank before a piece that is decoded alone."""
        runs, done, shown = [], 0, ""
        for mark, run in groupby(marks.tolist()):
            done += len(list(run))
            text = self.tokenizer.decode(ids[:done], clean_up_tokenization_spaces=False)
            runs.append((mark, text[len(shown) :]))
            shown = text
        return runs
