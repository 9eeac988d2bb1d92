"""Repetition within a text: seq-rep-n and tail loops, as ds_stability.text_metrics defines them, over many texts at once.

Sources: Welleck et al. 2020 (arXiv 1908.04319), section 6; Holtzman et al. 2020 (arXiv 1904.09751), section 4.
"""

import numpy as np

from ...text_metrics import TAIL_LOOP_MIN_PHRASE, TAIL_LOOP_MIN_REPEATS
from ..records import Measured
from .gram_counts import GramCounts
from .layout import Layout
from .ngrams import Corpus


def seq_rep(distinct: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 - distinct n-grams / n-grams of each text [T] (0 where there is none), and whether it has any [T]."""
    defined = total > 0
    return np.where(defined, 1.0 - distinct / np.maximum(total, 1), 0.0), defined


def tail_loops(corpus: Corpus) -> np.ndarray:
    """Whether each text ends in a phrase of 2 or more tokens that occurs 3 or more times in a row; bool [T]."""
    ends = corpus.starts + corpus.lengths
    loops = np.zeros(len(corpus.lengths), dtype=bool)
    longest = int(corpus.lengths.max(initial=0)) // TAIL_LOOP_MIN_REPEATS
    for phrase in range(TAIL_LOOP_MIN_PHRASE, longest + 1):
        texts = np.flatnonzero(~loops & (corpus.lengths >= phrase * TAIL_LOOP_MIN_REPEATS))
        # The last token alone rules most texts out before the whole phrase is compared.
        last = ends[texts] - 1
        texts = texts[corpus.tokens[last] == corpus.tokens[last - phrase]]
        span = phrase * (TAIL_LOOP_MIN_REPEATS - 1)
        at = ends[texts][:, None] - 1 - np.arange(span)
        loops[texts] = (corpus.tokens[at] == corpus.tokens[at - phrase]).all(axis=1)
    return loops


def measure_repetition(layout: Layout, grams: GramCounts) -> list[Measured]:
    """seq_rep_1..4 and tail_loop_rate; units are prompts."""
    rows = []
    for n, counts in enumerate(zip(grams.text_distinct, grams.text_total, strict=True), start=1):
        values, defined = seq_rep(*counts)
        rows.append(layout.per_prompt(f"seq_rep_{n}", values, defined, f"no text has {n} tokens",
                                      settings={"n": n, "texts_too_short": int((~defined).sum())}))  # fmt: skip
    loops = np.zeros(len(layout.lengths), dtype=bool)
    for texts in layout.parts():
        loops[texts] = tail_loops(layout.corpus_of(texts))
    settings = {"min_phrase": TAIL_LOOP_MIN_PHRASE, "min_repeats": TAIL_LOOP_MIN_REPEATS}
    return [*rows, layout.per_prompt("tail_loop_rate", loops, np.ones(len(loops)), "no text", settings=settings)]
