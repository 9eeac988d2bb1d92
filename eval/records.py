"""What the harness passes around: samples, prompts, measurements in units, and the tasks that make them.

Every figure is kept as `Measured`: a (total, count) for each of its units until the last moment. Units are what can be
counted and paired between two models: prompts, documents, or disjoint groups of texts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FINISH_REASONS = ("eos", "length", "non_finite")
REFERENCE = "reference"  # the decoding whose "samples" are the human continuations
Bigrams = tuple[np.ndarray, np.ndarray]  # pairs int64 [R, 2], counts int64 [R]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model continues; `reference_*` is how a human went on (None where nobody did)."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    reference_ids: tuple[int, ...] | None = None
    reference_text: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated text, keyed by (prompt, decoding, sample).

    Attributes:
        prompt: index of the prompt.
        decoding: name of the decoding; "reference" for the human continuation.
        sample: number of the sample of this prompt, over all seeds: sample = seed's position * samples per prompt + j.
        seed: the sampling seed it was drawn under.
        token_ids: generated ids, without the end token.
        text: the decoded ids, special tokens left out.
        finish: "eos" (ended by itself), "length" (hit the cap), or "non_finite" (the model gave NaN or Inf: no text to score).
        entropy_sum, logprob_sum: sums over scored positions (end token included) of the entropy of the untruncated
            distribution at temperature 1, and of the log-probability of the token taken, nats; None where not known.
        scored_tokens: positions in those sums.
    """

    prompt: int
    decoding: str
    sample: int
    seed: int
    token_ids: Sequence[int]
    text: str
    finish: str
    entropy_sum: float | None = None
    logprob_sum: float | None = None
    scored_tokens: int = 0

    @property
    def key(self) -> tuple[int, str, int]:
        return self.prompt, self.decoding, self.sample

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Sample":
        return cls(**record)


@dataclass
class Measured:
    """A figure in units: value = sum(totals) / sum(counts).

    Attributes:
        metric: name, for example "distinct_2".
        units: ids of the units, the same between models where the unit is the same thing.
        totals, counts: fp64 [units].
        decoding, split: what was measured: samples of a decoding, or a split of text ("held_out", "train").
        unit: unit of the value ("nats", "bits", "share", ...).
        settings: whatever fixes the figure: n of n-grams, group size, alpha, method.
        note: why there is no value, or what to know about it.
        n: what was counted, where the counts do not say it.
    """

    metric: str
    units: Sequence[int | str]
    totals: np.ndarray
    counts: np.ndarray
    decoding: str | None = None
    split: str | None = None
    unit: str = "share"
    settings: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        self.totals = np.asarray(self.totals, dtype=np.float64).reshape(-1)
        self.counts = np.asarray(self.counts, dtype=np.float64).reshape(-1)
        if not len(self.units) == len(self.totals) == len(self.counts):
            raise ValueError(f"{self.metric}: {len(self.units)} units, {len(self.totals)} totals, {len(self.counts)} counts")

    @classmethod
    def null(cls, metric: str, note: str, **where: Any) -> "Measured":
        """A figure that could not be taken, and why."""
        return cls(metric, [], np.empty(0), np.empty(0), note=note, **where)

    @property
    def value(self) -> float | None:
        """None over nothing, and where a number is not finite: never a wrong number."""
        count = self.counts.sum()
        if count <= 0:
            return None
        value = float(self.totals.sum() / count)
        return value if np.isfinite(value) else None


def jackknife_units(value: float, without: Sequence[float], sizes: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Units of a pooled statistic that is no mean: pseudo-values of the delete-a-group jackknife, moved so that their mean is `value`.

    Busing, Meijer and van der Leeden 1999 (Statistics and Computing 9, 3): with h_g = n / size_g, pseudo_g = h_g value -
    (h_g - 1) without_g, which counts size_g times. What grows or shrinks with n alone then spreads by size_g / n only, where
    equal weights make it spread by as much as the sizes differ, times their number. The mean of the pseudo-values is the
    bias-corrected estimate, which is not what the table shows, hence the shift.

    Args:
        value: the statistic over all groups.
        without: the statistic without group g, [G].
        sizes: texts or tokens of group g that the statistic is of, [G].

    Returns:
        (totals, counts), each [G]: pseudo_g size_g, and size_g.
    """
    left, size = np.asarray(without, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    n = size.sum()
    totals = n * value - (n - size) * left
    return totals + size * (value - totals.sum() / n), size


@dataclass(frozen=True)
class ScoringContext:
    """What samples are scored against; the same for all cells of a sweep.

    Attributes:
        vocab_size: ids of the model.
        special_ids: ids that count neither as tokens nor as words.
        high_frequency_ids: the high-frequency set, or None (the share is then null).
        high_frequency_words: the same rule applied to words of the training text, or None.
        references: human texts of the same kind, as token ids and as text, of about the samples' length.
        training_unigrams: counts of the training corpus' tokens, int64 [vocab_size], or None.
        training_bigrams: pairs of tokens that follow each other in a training text, in rising order, and how often; or None.
        group_texts: texts of a disjoint group, for what shrinks with size.
        seed: of the stated subsamples.
    """

    vocab_size: int
    special_ids: tuple[int, ...] = ()
    high_frequency_ids: tuple[int, ...] | None = None
    high_frequency_words: tuple[str, ...] | None = None
    reference_ids: tuple[tuple[int, ...], ...] = ()
    reference_texts: tuple[str, ...] = ()
    training_unigrams: np.ndarray | None = None
    training_bigrams: Bigrams | None = None
    group_texts: int = 8
    seed: int = 0


class Task(Protocol):
    """Work that is divided into units, each the same whoever runs it."""

    name: str

    def units(self) -> list[str]:
        """Ids of all units, in an order that depends on the suite only."""

    def run(self, unit: str, scratch: Path) -> list[dict[str, Any]]:
        """Records (JSON) of one unit. `scratch` is a folder of the cell for what is no JSON, written whole or not at all."""

    def measure(self, records: list[dict[str, Any]], scratch: Path) -> list[Measured]:
        """The figures, from the records of all units in the order of `units`."""
