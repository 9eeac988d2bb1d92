"""All metrics of the samples of one decoding."""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from ...errors import UserError
from ..records import Measured, Sample, ScoringContext
from . import (
    COMPRESSION,
    CONCENTRATION,
    DISTINCT,
    FINISH,
    METRIC_NAMES,
    NEIGHBOURS,
    POOLED,
    REPETITION,
    SELF_BLEU,
    WORDS,
)
from .concentration import measure_divergence, measure_shares
from .diversity import measure_compression, measure_distinct, measure_entropy
from .gram_counts import count_grams
from .layout import Layout
from .neighbours import measure_neighbours
from .pools import make_pools
from .repetition import measure_repetition
from .self_bleu import measure_self_bleu
from .words import measure_words

__all__ = ["METRIC_NAMES", "score_samples"]


def score_samples(
    samples: Sequence[Sample], context: ScoringContext, metrics: Collection[str] | None = None
) -> list[Measured]:
    """Measure the samples of one decoding (or the human continuations, decoding "reference").

    Samples that finished "non_finite" have no text: they are left out of everything but `non_finite_rate`, and counted
    there. What cannot be measured comes as a null with a note, never as a number.

    Args:
        samples: a SampleTable, or others in any order.
        metrics: names out of METRIC_NAMES; None means all.

    Returns:
        One Measured for each name asked for, in the order of METRIC_NAMES.

    Raises:
        UserError: an unknown name.
        ValueError: samples of several decodings.
    """
    wanted = set(METRIC_NAMES if metrics is None else metrics)
    unknown = sorted(wanted - set(METRIC_NAMES))
    if unknown:
        raise UserError(f"metrics: {unknown[0]!r} is not a metric; allowed are {', '.join(METRIC_NAMES)}")
    if not samples:
        return [Measured.null(name, "no samples") for name in METRIC_NAMES if name in wanted]
    layout = Layout.of(samples, context)
    rows: list[Measured] = []
    for names, measure in (
        (FINISH, measure_finish),
        ((*REPETITION, *DISTINCT), _measure_grams),
        (CONCENTRATION, measure_shares),
        (WORDS, measure_words),
        (COMPRESSION, measure_compression),
        (POOLED, _measure_pools),
        (SELF_BLEU, measure_self_bleu),
        (NEIGHBOURS, measure_neighbours),
    ):
        rows += _measure_if_wanted(layout, names, wanted, measure)
    found = {row.metric: row for row in rows}
    return [found[name] for name in METRIC_NAMES if name in wanted]


def _measure_if_wanted(
    layout: Layout, names: Collection[str], wanted: set[str], measure: Callable[[Layout], list[Measured]]
) -> list[Measured]:
    if not wanted & set(names):
        return []
    if not len(layout.kept) and names is not FINISH:
        return [layout.null(name, f"all {len(layout.everything)} samples are non-finite") for name in names]
    return measure(layout)


def _measure_grams(layout: Layout) -> list[Measured]:
    grams = count_grams(layout)
    return [*measure_repetition(layout, grams), *measure_distinct(layout, grams)]


def _measure_pools(layout: Layout) -> list[Measured]:
    pools = make_pools(layout)
    return [*measure_entropy(layout, pools), *measure_divergence(layout, pools)]


def measure_finish(layout: Layout) -> list[Measured]:
    """How texts ended, how long they are, and what the model's own distribution was like along them; units are prompts.

    generation_entropy is the mean entropy (nats) of the untruncated distribution at temperature 1 at the positions that the
    model wrote; generation_surprisal the mean of -log p of the tokens it took, which at T=1 without truncation estimates the
    same without bias.
    """
    table, texts = layout.everything, np.ones(len(layout.kept))
    failed = table.finished("non_finite")
    prompt = np.searchsorted(layout.prompts, table.prompt)
    non_finite = Measured("non_finite_rate", layout.prompt_units, np.bincount(prompt, failed, len(layout.prompts)),
                          np.bincount(prompt, minlength=len(layout.prompts)), decoding=layout.decoding,
                          settings={"texts": int(failed.sum())})  # fmt: skip
    return [
        layout.per_prompt("eos_rate", table.finished("eos")[layout.kept], texts, "no text"),
        layout.per_prompt("length_cap_rate", table.finished("length")[layout.kept], texts, "no text"),
        non_finite,
        layout.per_prompt("tokens_per_text", layout.lengths, texts, "no text", unit="tokens"),
        _per_position(layout, "generation_entropy", "entropy_sum", 1.0),
        _per_position(layout, "generation_surprisal", "logprob_sum", -1.0),
    ]


def _per_position(layout: Layout, name: str, column: str, sign: float) -> Measured:
    """Sum over positions by their number, over the texts whose sum is known and finite."""
    totals, positions = np.zeros((2, len(layout.kept)))
    for texts in layout.parts():
        numbers = layout.everything.numbers(layout.kept[texts])
        known = np.isfinite(numbers[column])
        totals[texts] = np.where(known, sign * numbers[column], 0.0)
        positions[texts] = np.where(known, numbers["scored_tokens"], 0.0)
    return layout.per_prompt(name, totals, positions, "the samples carry no sums of the model's distribution", unit="nats")
