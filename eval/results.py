"""From the records of a cell's tasks to its figures: every metric, the human continuations, and the memorization gap."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .records import REFERENCE, Measured, Prompt, Sample, ScoringContext, Task
from .sample_table import tables_of
from .suite import Suite
from .work import SAMPLES

SCORES_VERSION = 3  # raised whenever a figure of the same records changes: old cells then do not pass for new ones
GAP = "memorization_gap"


def all_measured(tasks: Sequence[Task], records: Mapping[str, Iterable[dict[str, Any]]], scratch: Path, context: ScoringContext,
                 prompts: Sequence[Prompt], suite: Suite) -> list[Measured]:  # fmt: skip
    """The figures of all tasks, in order; then those of the human continuations, and the memorization gap."""
    measured: list[Measured] = []
    for task in tasks:
        rows = records[task.name]
        # The samples are as many as one asks for; the records of other tasks are few, and may be gone through as a list.
        measured += task.measure(rows if task.name == SAMPLES else list(rows), scratch / task.name)
    measured += samples_measured(reference_samples(prompts, suite.max_new_tokens), context, suite.metrics, scratch)
    gap = memorization_gap(measured)
    return measured if gap is None else [*measured, gap]


def reference_samples(prompts: Sequence[Prompt], max_new_tokens: int) -> list[Sample]:
    """The human continuations, as if they had been generated; one that is shorter than the cap has ended by itself."""
    return [
        Sample(prompt.index, REFERENCE, 0, 0, list(prompt.reference_ids), prompt.reference_text or "",
               "length" if len(prompt.reference_ids) >= max_new_tokens else "eos")
        for prompt in prompts if prompt.reference_ids
    ]  # fmt: skip


def samples_measured(samples: Iterable[Sample], context: ScoringContext, metrics: Sequence[str] | None,
                     folder: Path | None = None) -> list[Measured]:  # fmt: skip
    """The metrics of samples, decoding by decoding; sentence structure too, unless single metrics were asked for.

    Those of the human continuations (decoding "reference") are what a model would show that wrote as people do.

    Args:
        samples: gone through once. folder: for the files that hold them meanwhile; None: where temporary files go.
    """
    from .metrics.score_samples import score_samples
    from .structure import structure_scores

    measured: list[Measured] = []
    tables = tables_of(samples, folder)
    for decoding in list(tables):
        table = tables.pop(decoding)
        measured += score_samples(table, context, None if metrics is None else list(metrics))
        if metrics is None:
            # Not by sample first, as the table is: a group of texts is all samples of a prompt.
            by_prompt = np.lexsort((table.sample, table.prompt)).astype(np.int32)
            texts = (None if sample.finish == "non_finite" else sample.text for sample in table.rows(by_prompt))
            # Groups do not part the samples of a prompt.
            each = len(table.prompt) // max(1, len(np.unique(table.prompt))) or 1
            measured += structure_scores(texts, context.reference_texts, max(1, context.group_texts // each) * each, decoding)
    return measured


def memorization_gap(measured: Sequence[Measured]) -> Measured | None:
    """Bits per byte on held-out text minus those on training text; None unless both were asked for.

    The texts are not paired. Units are groups of both, the windows dealt out in order; each is the gap, plus how far the group is
    from it on either side (the residuals of the two ratios), so that the two variances add up.
    """
    found = {figure.split: figure for figure in measured if figure.metric == "bits_per_byte"}
    if not {"held_out", "train"} <= found.keys():
        return None
    held_out, train = found["held_out"], found["train"]
    where: dict[str, Any] = {"unit": "bits per byte", "settings": {"formula": "bits_per_byte held_out - train"}}
    if held_out.value is None or train.value is None:
        return Measured.null(GAP, held_out.note or train.note or "no bits per byte", **where)
    value, groups = held_out.value - train.value, min(len(held_out.units), len(train.units))
    where["settings"]["groups"] = groups
    n = int(min(held_out.counts.sum(), train.counts.sum()))  # bytes of the shorter
    totals = value + _residuals(held_out, groups) - _residuals(train, groups)
    return Measured(GAP, [str(group) for group in range(groups)], totals, np.ones(groups), **where, n=n)


def _residuals(figure: Measured, groups: int) -> np.ndarray:
    """How far each of `groups` groups, the units dealt out in order, is from the figure's value; their mean is 0."""
    group = np.arange(len(figure.units)) % groups
    residual = figure.totals - figure.totals.sum() / figure.counts.sum() * figure.counts
    return np.bincount(group, residual, groups) * groups / figure.counts.sum()


def scores(cell_id: str, measured: Sequence[Measured]) -> dict[str, Any]:
    """What scores.json holds: a row a figure, with value, n, standard error and interval. No time, no place."""
    from .intervals import row

    return {"version": SCORES_VERSION, "id": cell_id, "rows": [row(figure) for figure in measured]}
