"""How the samples of one decoding are divided: what a unit is, and which tokens go into what is compared at equal size.

Everything follows from the keys of the samples and from the references, never from what a model wrote, so that units of two
models are the same thing and can be paired. Prompts are nested in seeds: all samples of a prompt are in one unit.

    prompt   a unit of what is a mean over texts or tokens
    block    `group_texts` neighbouring prompts. Read block by block, within one by (sample, prompt), the texts form a stream
             that is cut into groups of exactly `group_tokens` tokens (or bytes); a group belongs to the block it starts in
    pool     the stream by (sample, prompt), cut into pools of exactly `pool_tokens` tokens
    fold     at most 20 runs of neighbouring prompts: left out one at a time, for the jackknife of pooled statistics
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..records import Measured, Sample, ScoringContext, jackknife_units
from .ngrams import Corpus

SELF_NOTE = "the references measured against themselves"
MAX_FOLDS = 20
SUBSAMPLE_TEXTS = 500


@dataclass(frozen=True)
class Layout:
    """Samples of one decoding by (sample, prompt).

    Attributes:
        everything: all samples.
        samples: those with a text to score (finish other than "non_finite"), T of them.
        prompts: indices of all prompts, sorted.
        prompt_of: place in `prompts` of each of `samples`, int64 [T].
        context: what they are scored against.
    """

    everything: list[Sample]
    samples: list[Sample]
    prompts: np.ndarray
    prompt_of: np.ndarray
    context: ScoringContext

    @classmethod
    def of(cls, samples: Sequence[Sample], context: ScoringContext) -> "Layout":
        """
        Raises:
            ValueError: samples of several decodings.
        """
        decodings = sorted({sample.decoding for sample in samples})
        if len(decodings) > 1:
            raise ValueError(f"samples of one decoding at a time, not of {', '.join(decodings)}")
        ordered = sorted(samples, key=lambda sample: (sample.sample, sample.prompt))
        prompts = np.unique(np.array([sample.prompt for sample in ordered], dtype=np.int64))
        kept = [sample for sample in ordered if sample.finish != "non_finite"]
        prompt_of = np.searchsorted(prompts, np.array([sample.prompt for sample in kept], dtype=np.int64))
        return cls(ordered, kept, prompts, prompt_of, context)

    @property
    def decoding(self) -> str:
        return self.everything[0].decoding

    @cached_property
    def corpus(self) -> Corpus:
        """The tokens of `samples`, special ones left out."""
        return Corpus.of([sample.token_ids for sample in self.samples], self.context.special_ids)

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
            lengths = self.corpus.lengths[self._usual]
        return max(1, int(np.median(lengths))) if len(lengths) else 1

    @cached_property
    def text_bytes(self) -> int:
        """The same in bytes of UTF-8."""
        texts = self.context.reference_texts or [self.samples[i].text for i in self._usual]
        lengths = [len(encode(text)) for text in texts]
        return max(1, int(np.median(lengths))) if lengths else 1

    @cached_property
    def _usual(self) -> np.ndarray:
        capped = np.flatnonzero([sample.finish == "length" for sample in self.samples])
        return capped if len(capped) else np.arange(len(self.samples))

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

    @property
    def block_of(self) -> np.ndarray:
        """The block of each text, int64 [T]."""
        return self.prompt_of // self.group_texts

    @property
    def blocks(self) -> int:
        return -(-len(self.prompts) // self.group_texts)

    @cached_property
    def block_order(self) -> np.ndarray:
        """The texts block by block; within a block by (sample, prompt), which is the order they are in."""
        return np.argsort(self.block_of, kind="stable")

    @property
    def folds(self) -> int:
        return min(MAX_FOLDS, len(self.prompts))

    @property
    def fold_of(self) -> np.ndarray:
        """The fold of each text, int64 [T]."""
        return self.prompt_of * self.folds // max(1, len(self.prompts))

    @cached_property
    def subsample(self) -> np.ndarray:
        """Up to SUBSAMPLE_TEXTS places in `samples`, for what grows with the square: sample 0 of the prompts in a random
        order that the seed fixes, then sample 1, ... Chosen by key before texts that failed are left out."""
        rank = np.random.default_rng(self.context.seed).permutation(len(self.prompts))
        numbers, prompts = (np.array([getattr(s, name) for s in self.everything], dtype=np.int64) for name in ("sample", "prompt"))
        chosen = np.lexsort((rank[np.searchsorted(self.prompts, prompts)], numbers))[:SUBSAMPLE_TEXTS]
        kept = np.array([sample.finish != "non_finite" for sample in self.everything])
        return (np.cumsum(kept) - 1)[chosen[kept[chosen]]]

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
        return Measured(metric, self.prompts.tolist(), totals_P, counts_P, decoding=self.decoding, unit=unit,
                        settings=settings or {}, note=note)  # fmt: skip

    def per_block(self, metric: str, first_texts: np.ndarray, totals: np.ndarray, counts: np.ndarray,
                  unit: str, settings: dict[str, Any]) -> Measured:
        """A mean over groups: (total, count) of each group, summed by the block of the text it starts in."""
        block = self.block_of[first_texts]
        totals_B, counts_B = (np.bincount(block, values, self.blocks) for values in (totals, counts))
        return Measured(metric, list(range(self.blocks)), totals_B, counts_B, decoding=self.decoding, unit=unit,
                        settings=settings)  # fmt: skip

    def jackknife(self, metric: str, value: float, without: np.ndarray, unit: str, settings: dict[str, Any], n: int,
                  note: str | None = None) -> Measured:
        """A pooled statistic of `n` texts or tokens, with its value when each fold [folds] is left out (see
        records.jackknife_units)."""
        fields = {"decoding": self.decoding, "unit": unit, "note": note, "n": n,
                  "settings": settings | {"units": f"delete-one jackknife over {self.folds} runs of prompts"}}  # fmt: skip
        if self.folds < 2 or not np.isfinite(without).all():
            reason = "one prompt" if self.folds < 2 else "undefined when some prompts are left out"
            fields["note"] = "; ".join(filter(None, [note, f"{reason}: no interval"]))
            return Measured(metric, ["all"], np.array([value]), np.ones(1), **fields)
        totals, counts = jackknife_units(value, without)
        return Measured(metric, list(range(self.folds)), totals, counts, **fields)


def encode(text: str) -> bytes:
    """UTF-8; a lone surrogate, which no UTF-8 has, becomes "?"."""
    return text.encode("utf-8", errors="replace")
