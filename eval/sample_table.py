"""The samples of one decoding as columns: keys in memory, 29 bytes a sample whatever its length; ids and texts on the disk.

Everything is read by places, a part at a time, with plain reads: pages of a mapped file would count as the process's own.
"""

import os
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .records import FINISH_REASONS, Sample

NUMBERS = np.dtype([("seed", "<i8"), ("scored_tokens", "<i8"), ("entropy_sum", "<f8"), ("logprob_sum", "<f8")])
_NUMBERS = struct.Struct("<qqdd")  # the same, of one sample
TOKEN = np.dtype("<i4")
PART = 2**12  # samples at once, where nothing else says how many
_FINISH = {reason: number for number, reason in enumerate(FINISH_REASONS)}


class _Column:
    """Rows of bytes in a file of its own: row i is bytes starts[i] to starts[i + 1]."""

    def __init__(self, file: BinaryIO, starts: np.ndarray):
        self.file, self.starts = file, starts

    def sizes(self, places: np.ndarray) -> np.ndarray:
        """Bytes of each row, int64."""
        return self.starts[places + 1] - self.starts[places]

    def read(self, places: np.ndarray) -> bytes:
        """The rows end to end, in the order given; one read for each run of neighbors."""
        if not len(places):
            return b""
        first = np.flatnonzero(np.diff(places, prepend=places[0] - 2) != 1)
        last = np.append(first[1:], len(places)) - 1
        begin, end = self.starts[places[first]].tolist(), self.starts[places[last] + 1].tolist()
        descriptor = self.file.fileno()
        return b"".join(os.pread(descriptor, to - at, at) for at, to in zip(begin, end, strict=True))

    def sorted(self, order: np.ndarray, folder: Path | None) -> "_Column":
        """The same rows, laid down in another order."""
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, lives as long as the column
        for part in _parts(order, PART):
            file.write(self.read(part))
        file.flush()
        starts = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(self.sizes(order), out=starts[1:])
        return _Column(file, starts)


class _Writer:
    """Takes the samples of one decoding as they come."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.prompts, self.samples, self.ends = array("q"), array("i"), array("b")
        self.sizes = [array("i") for _ in range(3)]
        self.files = [tempfile.TemporaryFile(dir=folder) for _ in range(3)]  # noqa: SIM115, likewise

    def add(self, sample: Sample) -> None:
        self.prompts.append(sample.prompt)
        self.samples.append(sample.sample)
        self.ends.append(_FINISH[sample.finish])
        numbers = _NUMBERS.pack(sample.seed, sample.scored_tokens, _or_nan(sample.entropy_sum), _or_nan(sample.logprob_sum))
        row = (np.asarray(sample.token_ids, dtype=TOKEN).tobytes(), sample.text.encode("utf-8", "surrogatepass"), numbers)
        for data, sizes, file in zip(row, self.sizes, self.files, strict=True):
            sizes.append(len(data))
            file.write(data)

    def table(self, decoding: str) -> "SampleTable":
        prompts, samples, ends = (np.frombuffer(column, dtype=f"i{column.itemsize}") for column in (self.prompts, self.samples, self.ends))
        order = np.lexsort((prompts, samples))
        columns = []
        for sizes, file in zip(self.sizes, self.files, strict=True):
            file.flush()
            starts = np.zeros(len(order) + 1, dtype=np.int64)
            np.cumsum(np.frombuffer(sizes, dtype=np.int32), out=starts[1:])
            columns.append(_Column(file, starts).sorted(order, self.folder))
        return SampleTable(decoding, prompts[order], samples[order], ends[order], columns, self.folder)


class SampleTable(Sequence[Sample]):
    """Samples of one decoding by (sample, prompt).

    Attributes:
        prompt, sample, finish: of each, int64, int32 and int8 [S]; finish counts in FINISH_REASONS.
        folder: where the files are; None: where temporary files go.
    """

    def __init__(self, decoding: str, prompt: np.ndarray, sample: np.ndarray, finish: np.ndarray, columns: Sequence[_Column],
                 folder: Path | None):  # fmt: skip
        self.decoding, self.prompt, self.sample, self.finish, self.folder = decoding, prompt, sample, finish, folder
        self._ids, self._texts, self._numbers = columns
        # Every row of the numbers is of one size; it needs no place of its own.
        self._numbers.starts = _EvenStarts()

    def finished(self, reason: str) -> np.ndarray:
        """Whether each sample ended so, bool [S]."""
        return self.finish == _FINISH[reason]

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Tokens of samples, special ones included, int64."""
        return self._ids.sizes(places) // TOKEN.itemsize

    def tokens(self, places: np.ndarray) -> np.ndarray:
        """Ids of samples end to end, int64."""
        return np.frombuffer(self._ids.read(places), dtype=TOKEN).astype(np.int64)

    def texts(self, places: np.ndarray) -> list[str]:
        data, ends = self._texts.read(places), np.cumsum(self._texts.sizes(places)).tolist()
        return [data[start:end].decode("utf-8", "surrogatepass") for start, end in zip([0, *ends], ends, strict=False)]

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Seed, scored tokens, and the sums of entropy and log-probability (NaN where not known): records of NUMBERS."""
        return np.frombuffer(self._numbers.read(places), dtype=NUMBERS)

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, place: int) -> Sample:
        """Raises: IndexError."""
        return next(self._rows(np.array([range(len(self))[place]])))

    def __iter__(self) -> Iterator[Sample]:
        return self.rows(np.arange(len(self)))

    def rows(self, places: np.ndarray) -> Iterator[Sample]:
        """Samples at `places`, one after the other."""
        return chain.from_iterable(map(self._rows, _parts(places, PART)))

    def _rows(self, places: np.ndarray) -> Iterator[Sample]:
        ids, ends, numbers = self.tokens(places).tolist(), np.cumsum(self.lengths(places)).tolist(), self.numbers(places).tolist()
        for place, text, start, end, (seed, scored, entropy, logprob) in zip(
            places.tolist(), self.texts(places), [0, *ends], ends, numbers, strict=False
        ):
            yield Sample(int(self.prompt[place]), self.decoding, int(self.sample[place]), seed, ids[start:end], text,
                         FINISH_REASONS[self.finish[place]], _or_none(entropy), _or_none(logprob), scored)  # fmt: skip


class _EvenStarts:
    """Starts of rows that are all of NUMBERS' size."""

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return places.astype(np.int64) * NUMBERS.itemsize


def tables_of(samples: Iterable[Sample], folder: Path | None = None) -> dict[str, SampleTable]:
    """A table for each decoding, in the order in which they first come.

    Args:
        samples: gone through once.
        folder: on the disk that holds ids and texts; the files have no name and are gone with the tables.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, _Writer] = {}
    for sample in samples:
        if sample.decoding not in writers:
            writers[sample.decoding] = _Writer(folder)
        writers[sample.decoding].add(sample)
    return {decoding: writers.pop(decoding).table(decoding) for decoding in list(writers)}


def _parts(places: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (places[start : start + size] for start in range(0, len(places), size))


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _or_none(value: float) -> float | None:
    return None if value != value else value
