"""Figures in units (documents) from what lm-eval logged of each document, with the chance level beside them."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Number
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean

from .records import Measured, jackknife_units

# Blocks of documents, for a figure that is no mean over documents (F1, perplexity, BLEU).
JACKKNIFE_BLOCKS = 50
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
MATCH_METRICS = ("exact_match", "acc", "em")
DEFAULT_FILTER = "none"


def metric_name(task: str, metric: str, filter_name: str) -> str:
    return f"{task}_{metric}" if filter_name == DEFAULT_FILTER else f"{task}_{metric}_{filter_name}"


def task_measures(task: Any, documents: list[dict], unanswered: set[int], settings: dict[str, Any]) -> list[Measured]:
    """All metrics of one task.

    Args:
        task: lm-eval's task, for its aggregations.
        documents: lm-eval's log, one entry for each filter and document.
        unanswered: documents for which the model gave no finite number: then the task has no figure, as a choice among
            NaN would be the first choice.
        settings: what fixes all of the figures.
    """
    measures = []
    for filter_name in sorted({document["filter"] for document in documents}):
        logged = sorted((d for d in documents if d["filter"] == filter_name), key=lambda d: d["doc_id"])
        for metric in dict.fromkeys(name for document in logged for name in document["metrics"]):
            holding = [document for document in logged if metric in document]
            name = metric_name(task.task_name, metric, filter_name)
            known = {
                **settings, "task": task.task_name, "metric": metric, "filter": filter_name, "documents": len(holding),
                "num_fewshot": task.get_config("num_fewshot"), "chance": chance(task.OUTPUT_TYPE, metric, holding),
                "higher_is_better": task.higher_is_better().get(metric),
            }  # fmt: skip
            if unanswered:
                note = f"{len(unanswered)} of {len(logged)} documents have no finite score, or do not fit into the model"
                measures.append(Measured.null(name, note, unit=unit_of(metric), settings=known))
                continue
            aggregation = task.aggregation().get(metric, mean)
            measures.append(metric_measure(name, metric, holding, aggregation, known))
    return measures


def metric_measure(
    name: str, metric: str, documents: list[dict], aggregation: Callable, settings: dict[str, Any]
) -> Measured:
    """Documents as units where the figure is their mean, else blocks of documents and the jackknife."""
    values, ids = [document[metric] for document in documents], [document["doc_id"] for document in documents]
    unit = unit_of(metric)
    if aggregation is mean and all(isinstance(value, Number) for value in values):
        return Measured(name, ids, values, np.ones(len(values)), unit=unit, settings=settings)
    if metric == "bits_per_byte":  # (log-likelihood in nats, bytes): a ratio of sums as it is
        nats, sizes = np.array(values, dtype=np.float64).T
        return Measured(name, ids, -nats / math.log(2), sizes, unit=unit, settings=settings)
    whole = float(aggregation(values))
    blocks = np.array_split(np.arange(len(values)), min(len(values), JACKKNIFE_BLOCKS))
    settings = {**settings, "units": f"jackknife over {len(blocks)} blocks of documents"}
    if len(blocks) == 1:
        return Measured(name, ids, [whole], [1.0], unit=unit, settings=settings)
    without = [float(aggregation([value for i, value in enumerate(values) if i not in set(block)])) for block in blocks]
    totals, counts = jackknife_units(whole, without, [len(block) for block in blocks])
    return Measured(name, [f"from {ids[block[0]]}" for block in blocks], totals, counts, unit=unit, settings=settings)


def unit_of(metric: str) -> str:
    if metric.endswith("perplexity"):
        return "perplexity"
    return "bits" if metric == "bits_per_byte" else "share"


def chance(output_type: str, metric: str, documents: Sequence[dict]) -> float | None:
    """What guessing scores: right answers over choices, averaged over documents; 0 for a text that must match; else None."""
    if output_type == "generate_until":
        return 0.0 if metric in MATCH_METRICS else None
    if output_type != "multiple_choice" or metric not in CHOICE_METRICS or not documents:
        return None
    shares = []
    for document in documents:
        # The mutual-information score asks for each choice once more, without its context.
        choices = len(document["arguments"]) // (2 if "acc_mutual_info" in document["metrics"] else 1)
        right = len(set(document["target"])) if isinstance(document["target"], list) else 1
        shares.append(right / choices)
    return float(np.mean(shares))


def group_measures(groups: Iterable[Any], measures: list[Measured]) -> list[Measured]:
    """Figures of lm-eval's groups (mmlu, ...): documents of all their tasks, or each task with the same weight."""
    found = {measured.metric: measured for measured in measures}
    rows = []
    for group in groups:
        tasks = [task.task_name for task in group.get_all_tasks()]
        for wanted in group.aggregate_metric_list or []:
            filters = wanted.filter_list or sorted({m.settings["filter"] for m in measures if m.settings["task"] in tasks})
            for filter_name in filters:
                names = [metric_name(task, wanted.metric, filter_name) for task in tasks]
                parts = [found[name] for name in names if name in found]
                if parts:
                    name = metric_name(group.name, wanted.metric, filter_name)
                    rows.append(_pooled(name, group.name, parts, wanted.weight_by_size))
    return rows


def _pooled(name: str, group: str, parts: list[Measured], by_size: bool) -> Measured:
    sizes = [part.counts.sum() for part in parts]
    levels = [part.settings["chance"] for part in parts]
    weights = sizes if by_size else np.ones(len(parts))
    first = parts[0]
    settings = {
        **first.settings, "task": group, "tasks": len(parts), "documents": sum(p.settings["documents"] for p in parts),
        "weights": "documents" if by_size else "tasks",
        "chance": None if None in levels or not sum(weights) else float(np.average(levels, weights=weights)),
    }  # fmt: skip
    missing = [part.settings["task"] for part in parts if part.value is None]
    if missing:
        note = f"no score of {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        return Measured.null(name, note, unit=first.unit, settings=settings)
    scale = [1.0] * len(parts) if by_size else [1 / size for size in sizes]
    units = [f"{part.settings['task']}:{unit}" for part in parts for unit in part.units]
    totals = np.concatenate([part.totals * factor for part, factor in zip(parts, scale, strict=True)])
    counts = np.concatenate([part.counts * factor for part, factor in zip(parts, scale, strict=True)])
    return Measured(name, units, totals, counts, unit=first.unit, settings=settings)
