"""Words: their number, the share of frequent ones, and lexical diversity within a text.

What a word is stands in `segments`. Sources: MTLD, McCarthy and Jarvis 2010 (Behavior Research Methods 42); HD-D, McCarthy
and Jarvis 2007 (Language Testing 24).
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from ..records import Measured
from ..segments import UNSPACED_NOTE, is_unspaced, words_of
from .layout import Layout
from .ngrams import Corpus, distinct_per_owner

MTLD_THRESHOLD = 0.72
HDD_DRAWS = 42
MIN_WORDS = HDD_DRAWS  # of a text, for both: below, HD-D is undefined and MTLD rests on part of one factor


def number_words(texts: Iterable[Sequence[str]]) -> tuple[Corpus, dict[str, int]]:
    """Texts of words as texts of numbers, and the number of each word, by first occurrence."""
    numbers: dict[str, int] = {}
    coded = [array("i", [numbers.setdefault(word, len(numbers)) for word in text]) for text in texts]
    return Corpus.of(coded), numbers


def _factors(words: Sequence[int]) -> float:
    """Factors of one direction: stretches until the type-token ratio falls below the threshold, the rest in part."""
    factors, types, length = 0.0, set(), 0
    for word in words:
        types.add(word)
        length += 1
        if len(types) < MTLD_THRESHOLD * length:
            factors, types, length = factors + 1.0, set(), 0
    if length:
        factors += (1.0 - len(types) / length) / (1.0 - MTLD_THRESHOLD)
    return factors


def mtld(words: Sequence[int]) -> float | None:
    """Measure of textual lexical diversity: words per factor, mean of both directions; None if no word ever repeats."""
    forward, backward = _factors(words), _factors(words[::-1])
    return (len(words) / forward + len(words) / backward) / 2.0 if forward and backward else None


def hdd(corpus: Corpus) -> np.ndarray:
    """HD-D of each text [T]: the expected type-token ratio of 42 words drawn without replacement; NaN below 42 words.

    Sum over types of the hypergeometric probability that at least one of its k occurrences among N words is drawn, / 42.
    """
    text, count = _counts_by_text(corpus)
    total = corpus.lengths[text]
    # log of C(N - k, 42) / C(N, 42); minus infinity where fewer than 42 other words are left.
    enough = total - count >= HDD_DRAWS
    k, n = count[enough], total[enough]
    log_missed = gammaln(n - k + 1) - gammaln(n - k - HDD_DRAWS + 1) - gammaln(n + 1) + gammaln(n - HDD_DRAWS + 1)
    drawn = np.ones(len(text))
    drawn[enough] = 1.0 - np.exp(log_missed)
    values = np.bincount(text, drawn, len(corpus.lengths)) / HDD_DRAWS
    return np.where(corpus.lengths >= HDD_DRAWS, values, np.nan)


def _counts_by_text(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """(text, count) of each distinct word of each text."""
    types = int(corpus.tokens.max(initial=0)) + 1
    keys, counts = np.unique(corpus.text_of * types + corpus.tokens, return_counts=True)
    return keys // types, counts


@dataclass(frozen=True)
class WordCounts:
    """Of each text, [T].

    Attributes:
        words: its number of words. frequent: those in the high-frequency set.
        mtld, hdd: NaN where undefined. unique: whether it has MIN_WORDS words or more and repeats none.
        unspaced: its words in scripts without spaces between words.
    """

    words: np.ndarray
    frequent: np.ndarray
    mtld: np.ndarray
    hdd: np.ndarray
    unique: np.ndarray
    unspaced: np.ndarray

    @property
    def note(self) -> str | None:
        """What most words are, where these are not words as readers know them."""
        return UNSPACED_NOTE if 2 * self.unspaced.sum() > self.words.sum() else None

    @classmethod
    def of(cls, layout: Layout) -> "WordCounts":
        """Part by part: words are numbered anew in each."""
        texts, chosen = len(layout.lengths), layout.context.high_frequency_words or ()
        whole = cls(*(np.zeros(texts, dtype=kind) for kind in (np.int32, np.int32, np.float64, np.float64, bool, np.int32)))
        for part in layout.parts():
            corpus, numbers = number_words(map(words_of, layout.written(part)))
            member = np.zeros(len(numbers) + 1, dtype=bool)
            member[[numbers[word] for word in chosen if word in numbers]] = True
            whole.words[part] = corpus.lengths
            whole.frequent[part] = np.bincount(corpus.text_of, member[corpus.tokens], len(part))
            unspaced = np.fromiter(map(is_unspaced, numbers), bool, len(numbers))
            if unspaced.any():
                whole.unspaced[part] = np.bincount(corpus.text_of, unspaced[corpus.tokens], len(part))
            whole.mtld[part], whole.unique[part] = _mtld_of(corpus)
            whole.hdd[part] = hdd(corpus)
        return whole


def measure_words(layout: Layout) -> list[Measured]:
    """high_frequency_word_share, words_per_text, no_words_rate, mtld, hdd; units are prompts."""
    counts = WordCounts.of(layout)
    texts, none = np.ones(len(counts.words)), counts.words == 0
    return [
        _high_frequency(layout, counts),
        layout.per_prompt("words_per_text", counts.words, texts, "no text", unit="words", note=counts.note),
        layout.per_prompt("no_words_rate", none, texts, "no text", settings={"texts": int(none.sum())}),
        *_diversity(layout, counts),
    ]


def _high_frequency(layout: Layout, counts: WordCounts) -> Measured:
    """Share of words in the high-frequency set. A text without words has no share: it adds (0, 0), and is counted."""
    name, chosen = "high_frequency_word_share", layout.context.high_frequency_words
    wordless = int((counts.words == 0).sum())
    settings = {"texts_without_words": wordless}
    if chosen is None:
        return layout.null(name, "no high-frequency set of words: give --reference_file", settings=settings)
    notes = [f"{wordless} of {len(counts.words)} texts have no word"] * bool(wordless) + [counts.note] * bool(counts.note)
    settings["set_size"] = len(chosen)
    return layout.per_prompt(name, counts.frequent, counts.words, "no text has a word", settings=settings,
                             note="; ".join(notes) or None)  # fmt: skip


def _mtld_of(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """MTLD of each text [T], NaN below MIN_WORDS words and where no word is repeated; and whether it is that."""
    distinct, total = distinct_per_owner(corpus.text_of, corpus.tokens, len(corpus.lengths))
    long = total >= MIN_WORDS
    values = np.full(len(total), np.nan)
    for i in np.flatnonzero(long & (distinct < total)):
        start = int(corpus.starts[i])
        values[i] = mtld(corpus.tokens[start : start + int(total[i])].tolist())
    return values, long & (distinct == total)


def _diversity(layout: Layout, counts: WordCounts) -> list[Measured]:
    """MTLD and HD-D of each text of 42 words or more, averaged."""
    # MTLD is infinite for a text that repeats no word: it is left out, and counted.
    nothing, unique = f"no text has {MIN_WORDS} words", int(counts.unique.sum())
    left_out = {"min_words": MIN_WORDS, "texts_too_short": int((counts.words < MIN_WORDS).sum())}
    settings = left_out | {"threshold": MTLD_THRESHOLD, "texts_without_repeat": unique}
    return [
        layout.per_prompt("mtld", np.nan_to_num(counts.mtld), np.isfinite(counts.mtld),
                          nothing + (" and a repeated one" if unique else ""), "words", settings, counts.note),
        layout.per_prompt("hdd", np.nan_to_num(counts.hdd), np.isfinite(counts.hdd), nothing, "type-token ratio",
                          left_out | {"draws": HDD_DRAWS}, counts.note),
    ]  # fmt: skip
