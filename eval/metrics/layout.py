"""How the samples of one decoding are divided: what a unit is, and which tokens go into what is compared at equal size.

Everything follows from the keys of the samples and from the references, never from what a model wrote, so that units of two
models are the same thing and can be paired. Prompts are nested in seeds: all samples of a prompt are in one unit.

    prompt   a unit of what is a mean over texts or tokens
    block    `group_texts` neighbouring prompts. Read block by block, within one by (sample, prompt), the texts form a stream
             that is cut into groups of exactly `group_tokens` tokens (or bytes); a group belongs to the block it starts in
    pool     the stream by (sample, prompt), cut into pools of exactly `pool_tokens` tokens
    fold     14 to 20 runs of neighbouring prompts (fewer for fewer prompts), as equal as can be: left out one at a time, for the
             jackknife of pooled statistics
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..records import Measured, Sample, ScoringContext, jackknife_units
from ..sample_table import SampleTable, tables_of
from .ngrams import Corpus

SELF_NOTE = "the references measured against themselves"
MIN_FOLDS, MAX_FOLDS = 14, 20
SUBSAMPLE_TEXTS = 500
PART_TOKENS, PART_TEXTS = 2**18, 2**15  # some tens of MiB


@dataclass(frozen=True)
class Layout:
    """Samples of one decoding by (sample, prompt). What is as long as the samples is a few bytes of each; ids and texts are
    read in parts.

    Attributes:
        everything: all samples.
        kept: places in `everything` of those with a text to score (finish other than "non_finite"), int32 [T].
        prompts: indices of all prompts, sorted.
        prompt_of: place in `prompts` of each text, int32 [T].
        context: what they are scored against.
        part_tokens: about so many tokens are in memory at once.
    """

    everything: SampleTable
    kept: np.ndarray
    prompts: np.ndarray
    prompt_of: np.ndarray
    context: ScoringContext
    part_tokens: int = PART_TOKENS

    @classmethod
    def of(cls, samples: Sequence[Sample], context: ScoringContext, part_tokens: int = PART_TOKENS) -> "Layout":
        """
        Args:
            samples: a SampleTable, or any others, of which one is made.

        Raises:
            ValueError: samples of several decodings.
        """
        if isinstance(samples, SampleTable):
            table = samples
        else:
            tables = tables_of(samples)
            if len(tables) > 1:
                raise ValueError(f"samples of one decoding at a time, not of {', '.join(sorted(tables))}")
            (table,) = tables.values()
        prompts = np.unique(table.prompt)
        kept = np.flatnonzero(~table.finished("non_finite")).astype(np.int32)
        prompt_of = np.searchsorted(prompts, table.prompt[kept]).astype(np.int32)
        return cls(table, kept, prompts, prompt_of, context, part_tokens)

    @property
    def decoding(self) -> str:
        return self.everything.decoding

    @property
    def samples(self) -> "Texts":
        """The samples with a text to score, [T]."""
        return Texts(self)

    def corpus_of(self, texts: np.ndarray) -> Corpus:
        """The tokens of some texts, in the order given, special ones left out."""
        places = self.kept[texts]
        return Corpus.of_stream(self.everything.tokens(places), self.everything.lengths(places), self.context.special_ids)

    def parts(self, order: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """All texts, or those of `order`, about `part_tokens` at a time and PART_TEXTS texts at most."""
        count = len(self.kept) if order is None else len(order)
        for start in range(0, count, PART_TEXTS):
            end = min(start + PART_TEXTS, count)
            texts = np.arange(start, end) if order is None else order[start:end]
            part = np.cumsum(self.everything.lengths(self.kept[texts])) // self.part_tokens
            yield from np.split(texts, np.flatnonzero(np.diff(part)) + 1)

    def written(self, texts: np.ndarray) -> list[str]:
        """Some texts as they were written."""
        return self.everything.texts(self.kept[texts])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, special ones left out, int32 [T]."""
        return self._scan[0]

    @property
    def largest_id(self) -> int:
        """Of all tokens but special ones; 0 without any."""
        return self._scan[1]

    @cached_property
    def _scan(self) -> tuple[np.ndarray, int]:
        lengths, largest = np.zeros(len(self.kept), dtype=np.int32), 0
        for texts in self.parts():
            corpus = self.corpus_of(texts)
            lengths[texts] = corpus.lengths
            largest = max(largest, int(corpus.tokens.max(initial=0)))
        return lengths, largest

    @cached_property
    def references(self) -> Corpus:
        """The references, likewise."""
        return Corpus.of(self.context.reference_ids, self.context.special_ids)

    @cached_property
    def text_tokens(self) -> int:
        """Tokens of a usual text: the references' median. Without references that of the texts that hit the length cap, else
        of all texts, which then depends on the model (settings' `size_from` says so). At least 1."""
        lengths = self.references.lengths
        if not len(lengths):
            lengths = self.lengths[self._usual]
        return max(1, int(np.median(lengths))) if len(lengths) else 1

    @cached_property
    def text_bytes(self) -> int:
        """The same in bytes of UTF-8."""
        texts = self.context.reference_texts or (text for part in self.parts(self._usual) for text in self.written(part))
        lengths = np.fromiter((len(encode(text)) for text in texts), dtype=np.int64)
        return max(1, int(np.median(lengths))) if len(lengths) else 1

    @property
    def _usual(self) -> np.ndarray:
        capped = np.flatnonzero(self.everything.finished("length")[self.kept])
        return capped if len(capped) else np.arange(len(self.kept))

    @property
    def size_from(self) -> str:
        """Where the sizes of groups and pools come from, for settings."""
        return "references" if self.context.reference_ids and self.context.reference_texts else "the texts"

    @cached_property
    def is_reference(self) -> bool:
        """Whether these texts are among the references themselves."""
        references = set(map(tuple, self.context.reference_ids))
        return self.decoding == "reference" and any(tuple(sample.token_ids) in references for sample in self.samples)

    @property
    def group_texts(self) -> int:
        return max(1, min(self.context.group_texts, len(self.prompts)))

    @property
    def group_tokens(self) -> int:
        """Tokens of a group: as many as `group_texts` usual texts have."""
        return self.group_texts * self.text_tokens

    @property
    def pool_tokens(self) -> int:
        """Tokens of a pool: half of what one usual text per prompt would have, so that texts may end early."""
        return max(1, len(self.prompts) * self.text_tokens // 2)

    def blocks_of(self, texts: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The block of each text."""
        return self.prompt_of[texts] // self.group_texts

    @property
    def blocks(self) -> int:
        return -(-len(self.prompts) // self.group_texts)

    @cached_property
    def block_order(self) -> np.ndarray:
        """The texts block by block; within a block by (sample, prompt), which is the order they are in; int32 [T]."""
        return np.argsort(self.blocks_of(), kind="stable").astype(np.int32)

    @cached_property
    def folds(self) -> int:
        """That number from MIN_FOLDS to MAX_FOLDS by which the prompts divide with the least left over, the larger of two such."""
        prompts = len(self.prompts)
        return prompts if prompts <= MAX_FOLDS else min(range(MAX_FOLDS, MIN_FOLDS - 1, -1), key=lambda folds: prompts % folds)

    def folds_of(self, texts: np.ndarray) -> np.ndarray:
        """The fold of each text, int64."""
        return self.prompt_of[texts].astype(np.int64) * self.folds // max(1, len(self.prompts))

    @cached_property
    def subsample(self) -> np.ndarray:
        """Up to SUBSAMPLE_TEXTS places in `samples`, for what grows with the square: sample 0 of the prompts, then sample 1, ...
        The prompts are taken from the folds in turns, in a random order that the seed fixes: equally many of each fold. Chosen
        by key before texts that failed are left out."""
        order = np.random.default_rng(self.context.seed).permutation(len(self.prompts))
        fold = order * self.folds // max(1, len(order))
        by_fold = np.argsort(fold, kind="stable")
        turn = np.arange(len(order)) - np.searchsorted(fold[by_fold], fold[by_fold])
        rank = np.empty(len(order), dtype=np.int64)
        rank[order[by_fold][np.argsort(turn, kind="stable")]] = np.arange(len(order))
        table = self.everything
        chosen = np.lexsort((rank[np.searchsorted(self.prompts, table.prompt)], table.sample))[:SUBSAMPLE_TEXTS]
        kept = ~table.finished("non_finite")
        return (np.cumsum(kept) - 1)[chosen[kept[chosen]]]

    @cached_property
    def prompt_units(self) -> list[int]:
        """Ids of the units of means over texts; one list for all of them."""
        return self.prompts.tolist()

    @cached_property
    def block_units(self) -> list[int]:
        return list(range(self.blocks))

    def null(self, metric: str, note: str, **fields: Any) -> Measured:
        return Measured.null(metric, note, decoding=self.decoding, **fields)

    def per_prompt(self, metric: str, totals: np.ndarray, counts: np.ndarray, nothing: str, unit: str = "share",
                   settings: dict[str, Any] | None = None, note: str | None = None) -> Measured:
        """A mean over texts or tokens: `totals` and `counts` [T] of each text, summed by prompt.

        Args:
            nothing: the note if there was nothing to count.
        """
        counts_P = np.bincount(self.prompt_of, counts, len(self.prompts))
        if not counts_P.sum():
            return self.null(metric, nothing, unit=unit, settings=settings or {})
        totals_P = np.bincount(self.prompt_of, totals, len(self.prompts))
        return Measured(metric, self.prompt_units, totals_P, counts_P, decoding=self.decoding, unit=unit,
                        settings=settings or {}, note=note)  # fmt: skip

    def per_block(self, metric: str, first_texts: np.ndarray, totals: np.ndarray, counts: np.ndarray,
                  unit: str, settings: dict[str, Any]) -> Measured:
        """A mean over groups: (total, count) of each group, summed by the block of the text it starts in."""
        block = self.blocks_of(first_texts)
        totals_B, counts_B = (np.bincount(block, values, self.blocks) for values in (totals, counts))
        return Measured(metric, self.block_units, totals_B, counts_B, decoding=self.decoding, unit=unit,
                        settings=settings)  # fmt: skip

    def jackknife(self, metric: str, value: float, without: Callable[[int], float], fold: np.ndarray, unit: str,
                  settings: dict[str, Any], note: str | None = None) -> Measured:  # fmt: skip
        """A statistic of some texts that is no mean over them: `value`, and `without(f)` when fold f is left out.

        Args:
            fold: of each text that the statistic is of.
        """
        sizes = np.bincount(fold, minlength=self.folds)
        left = np.array([without(f) if sizes[f] else value for f in range(self.folds)])
        return self.in_folds(metric, value, left, sizes, unit, settings, note)

    def in_folds(self, metric: str, value: float, without: np.ndarray, sizes: np.ndarray, unit: str, settings: dict[str, Any],
                 note: str | None = None) -> Measured:  # fmt: skip
        """The same, from the statistic without each fold, and the texts or tokens in each, [folds] both (records.jackknife_units)."""
        fields = {"decoding": self.decoding, "unit": unit, "note": note,
                  "settings": settings | {"units": f"delete-a-group jackknife over {self.folds} runs of prompts"}}  # fmt: skip
        if self.folds < 2 or not np.isfinite(without).all():
            reason = "one prompt" if self.folds < 2 else "undefined when some prompts are left out"
            fields["note"] = "; ".join(filter(None, [note, f"{reason}: no interval"]))
            return Measured(metric, ["all"], np.array([value]), np.ones(1), n=int(sizes.sum()), **fields)
        return Measured(metric, list(range(self.folds)), *jackknife_units(value, without, sizes), **fields)


class Texts(Sequence[Sample]):
    """The samples of a layout that have a text, read as they are asked for."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def __len__(self) -> int:
        return len(self.layout.kept)

    def __getitem__(self, text: int) -> Sample:
        return self.layout.everything[int(self.layout.kept[text])]

    def __iter__(self) -> Iterator[Sample]:
        return self.layout.everything.rows(self.layout.kept)


def encode(text: str) -> bytes:
    """UTF-8; a lone surrogate, which no UTF-8 has, becomes "?"."""
    return text.encode("utf-8", errors="replace")
