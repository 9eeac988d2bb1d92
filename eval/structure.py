"""Sentence lengths and punctuation of samples, beside those of human text.

What a sentence and a word are stands in `segments`; a blank line is a border too, but does not complete a sentence. A text that is cut off, or that never ends a sentence, leaves a fragment:
its length is unknown, so that it counts in no distribution of lengths. Two figures see it nevertheless: words per
sentence end, which divides *all* words by the ends, and the share of texts without any end.

Samples and references should be about equally long: the longer a sentence, the more often a cut-off text loses it.
"""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import regex

from .records import Measured, jackknife_units
from .segments import UNSPACED_NOTE, count_unspaced, find_words, plain, sentence_ends

LONGEST = 80  # words: the last cell of the histogram takes all longer sentences (total variation only)
MARKS = ".,;:!?-()\"'"  # what the distribution of punctuation runs over, and "other"
_MARK_NAMES = (*MARKS, "other")
_BORDER = regex.compile(r"\n\s*\n")
_PUNCTUATION = regex.compile(r"[^\w\s\p{N}\p{C}]")
_INSIDE = regex.compile(r"(?<=\w)['‘’.·״׳‧-](?=\w)|(?<=\p{Hebrew})\"(?=\p{Hebrew})|(?<=\d)[,٫٬](?=\d)")
_ALIKE = {'"': "“”„‟«»「」『』", "'": "‘’‚‛‹›", "-": "‐‑‒–—―", "(": "[（【《〈", ")": "]）】》〉", ".": "。｡．।॥۔።", ",": "，、､،፣",
          "!": "！", "?": "？؟", ";": "；؛", ":": "："}  # fmt: skip
_SAME = str.maketrans({mark: like for like, marks in _ALIKE.items() for mark in marks})


def sentence_lengths(text: str) -> tuple[list[int], int]:
    """(words of each complete sentence, words in fragments). A sentence without a word is none."""
    complete, loose = [], 0
    text = plain(text)
    cased = text != text.lower()
    for paragraph in _BORDER.split(text):
        start = 0
        for end in sentence_ends(paragraph, cased):
            words = len(find_words(paragraph[start:end]))
            start = end
            if words:
                complete.append(words)
        loose += len(find_words(paragraph[start:]))
    return complete, loose


def punctuation_counts(text: str) -> Counter[str]:
    """How often each of MARKS stands in `text`; typographic marks and those of other scripts count as the plain ones, if
    there is one, all else that is neither letter, digit nor combining mark as "other".

    An apostrophe, hyphen, full stop, comma or other mark inside a word or number is no punctuation.
    """
    found = _PUNCTUATION.findall(_INSIDE.sub("", plain(text)))
    return Counter(mark if mark in MARKS else "other" for mark in "".join(found).translate(_SAME))


@dataclass
class Structure:
    """What is counted over a group of texts; adds up."""

    lengths: Counter[int] = field(default_factory=Counter)
    marks: Counter[str] = field(default_factory=Counter)
    words: int = 0
    unspaced: int = 0  # words of scripts without spaces
    texts: int = 0
    endless: int = 0

    @classmethod
    def of(cls, texts: Iterable[str | None]) -> "Structure":
        result = cls()
        for text in texts:
            if text is None:
                continue
            lengths, loose = sentence_lengths(text)
            result.lengths.update(lengths)
            result.marks.update(punctuation_counts(text))
            result.words += sum(lengths) + loose
            result.unspaced += count_unspaced(plain(text))
            result.texts += 1
            result.endless += not lengths
        return result

    def __add__(self, other: "Structure") -> "Structure":
        return Structure(self.lengths + other.lengths, self.marks + other.marks, self.words + other.words,
                         self.unspaced + other.unspaced, self.texts + other.texts, self.endless + other.endless)  # fmt: skip

    @property
    def note(self) -> str | None:
        """What most words are, where these are not words as readers know them."""
        return UNSPACED_NOTE if 2 * self.unspaced > self.words else None

    @property
    def sentences(self) -> int:
        return self.lengths.total()


class PackedStructures(Sequence[Structure]):
    """Structures of many groups, as whole numbers: some dozen of four bytes a group instead of two dictionaries."""

    def __init__(self, structures: Iterable[Structure]):
        self.numbers, self.places = array("i"), array("q")
        for one in structures:
            self.places.append(len(self.numbers))
            self.numbers.extend((one.words, one.unspaced, one.texts, one.endless, len(one.lengths)))
            for length, count in one.lengths.items():
                self.numbers.extend((length, count))
            for mark, count in one.marks.items():
                self.numbers.extend((_MARK_NAMES.index(mark), count))
        self.places.append(len(self.numbers))

    def __len__(self) -> int:
        return len(self.places) - 1

    def __getitem__(self, group: int) -> Structure:
        words, unspaced, texts, endless, lengths, *pairs = self.numbers[self.places[group] : self.places[group + 1]]
        keys, counts = pairs[::2], pairs[1::2]
        marks = Counter({_MARK_NAMES[mark]: count for mark, count in zip(keys[lengths:], counts[lengths:], strict=True)})
        return Structure(Counter(dict(zip(keys[:lengths], counts[:lengths], strict=True))), marks, words, unspaced, texts, endless)

    def pooled(self) -> Structure:
        """The sum of all."""
        total = Structure()
        for one in self:
            total.lengths.update(one.lengths)
            total.marks.update(one.marks)
            total.words, total.unspaced = total.words + one.words, total.unspaced + one.unspaced
            total.texts, total.endless = total.texts + one.texts, total.endless + one.endless
        return total


def total_variation(first: Counter, second: Counter) -> float | None:
    """Half the sum of |p - q| over all outcomes, in 0..1; None if one of the two is empty."""
    if not first.total() or not second.total():
        return None
    # fsum: exact, so that the order of a set of strings, which differs from process to process, does not matter.
    return 0.5 * math.fsum(abs(first[key] / first.total() - second[key] / second.total()) for key in first.keys() | second.keys())


def wasserstein(first: Counter[int], second: Counter[int]) -> float | None:
    """Earth mover's distance between two distributions over whole numbers: the area between their cumulative functions."""
    if not first.total() or not second.total():
        return None
    points = np.array(sorted(first.keys() | second.keys()))
    shares = [np.cumsum([counts[point] for point in points.tolist()]) / counts.total() for counts in (first, second)]
    return float((np.abs(shares[0] - shares[1])[:-1] * np.diff(points)).sum())


def _capped(lengths: Counter[int]) -> Counter[int]:
    capped: Counter[int] = Counter()
    for length, count in lengths.items():
        capped[min(length, LONGEST)] += count
    return capped


def structure_scores(
    texts: Iterable[str | None], reference_texts: Sequence[str], group_texts: int = 8, decoding: str | None = None
) -> list[Measured]:
    """Figures of the samples `texts` of one decoding; units are groups of `group_texts` consecutive texts.

    A text that is None (the model failed) counts nowhere, but keeps its place: a group is the same prompts for every model.
    Distances are pooled over all texts, with jackknife units; the references are taken as fixed. Null, with a note:
    means without a sentence end, distances without one on either side, anything about no text at all.
    """
    build = _Builder(PackedStructures(map(Structure.of, _groups(texts, group_texts))), Structure.of(reference_texts), {"group_texts": group_texts}, decoding)
    no_end, no_word, no_text = "no text ends a sentence", "no text holds a word", "no texts"
    return [
        build.ratio("sentence_length", lambda s: sum(n * c for n, c in s.lengths.items()), lambda s: s.sentences, "words", no_end),
        build.ratio("words_per_sentence_end", lambda s: s.words, lambda s: s.sentences, "words", no_end),
        build.ratio("texts_without_sentence_end", lambda s: s.endless, lambda s: s.texts, "share", no_text),
        build.distance("sentence_length_wasserstein", lambda s: s.lengths, wasserstein, "words", no_end),
        build.distance("sentence_length_total_variation", lambda s: _capped(s.lengths), total_variation, "share", no_end, longest=LONGEST),
        build.ratio("punctuation_per_word", lambda s: s.marks.total(), lambda s: s.words, "marks per word", no_word),
        build.distance("punctuation_total_variation", lambda s: s.marks, total_variation, "share", "no punctuation", marks=MARKS),
    ]  # fmt: skip


def _groups(texts: Iterable[str | None], size: int) -> Iterator[list[str | None]]:
    source = iter(texts)
    return iter(lambda: list(islice(source, size)), [])


@dataclass
class _Builder:
    groups: PackedStructures
    reference: Structure
    settings: dict[str, Any]
    decoding: str | None

    @cached_property
    def units(self) -> list[int]:
        return list(range(len(self.groups)))

    @cached_property
    def pooled(self) -> Structure:
        return self.groups.pooled()

    def ratio(self, metric: str, total: Callable, count: Callable, unit: str, missing: str) -> Measured:
        totals, counts = np.array([(total(group), count(group)) for group in self.groups], dtype=np.float64).reshape(-1, 2).T
        note = self._note(None if counts.sum() else missing, metric, unit)
        return Measured(metric, self.units, totals, counts, self.decoding, unit=unit, settings=self.settings, note=note)

    def _note(self, note: str | None, metric: str, unit: str) -> str | None:
        """`note`, and what a word is in the samples where the figure is of words."""
        of_words = metric.startswith("sentence_length") or "word" in unit
        return "; ".join(filter(None, (note, self.pooled.note if of_words else None))) or None

    def distance(self, metric: str, of: Callable[[Structure], Counter], between: Callable, unit: str, missing: str, **settings: Any) -> Measured:
        """`between` two distributions, `of` the samples and of the references; a group counts by what it adds to that of the samples."""
        where = {"decoding": self.decoding, "unit": unit, "settings": {**self.settings, "method": "pooled, jackknife over groups", **settings}}
        pooled, reference = of(self.pooled), of(self.reference)
        value = between(pooled, reference)
        if value is None:
            place = "the references" if pooled.total() else "the samples"
            return Measured.null(metric, self._note(f"{missing}, among {place}", metric, unit), **where)
        parts = [of(group) for group in self.groups]
        # A group may hold everything there is; then there is nothing to leave out, and no spread.
        without = [between(pooled - part, reference) for part in parts]
        if len(parts) == 1 or None in without:
            return Measured(metric, ["all"], [value], [1.0], **where,
                            note=self._note("one group only holds all there is: no spread", metric, unit))  # fmt: skip
        return Measured(metric, self.units, *jackknife_units(value, without, [part.total() for part in parts]), **where,
                        note=self._note(None, metric, unit))  # fmt: skip
