"""What the training runs behind the cells recorded (metrics.jsonl): curves over steps, the ratio held, stability measures."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds_stability.effect import held_ratio
from ds_stability.errors import UserError
from ds_stability.recorder import read_metrics

from .aggregate import Group
from .report_cells import Cell, Evaluation

CURVES = {"loss": "optimized loss (nats)", "cross_entropy": "plain cross-entropy (nats)", "stability/entropy": "predictive entropy (nats)"}
STABILITY = {
    "stability/loss_deviation": "sd of the loss (nats)",
    "stability/log_grad_norm_deviation": "sd of log gradient norm",
    "stability/loss_spikes": "loss spikes",
    "stability/grad_norm_spikes": "gradient norm spikes",
    "stability/skipped_steps": "skipped steps",
    "stability/gradient_cosine": "gradient cosine",
    "stability/update_ratio": "update / weights",
}
POINTS = 150  # of a drawn curve
SETTLED_FROM = 30  # steps after warm-up from which the ratio counts as settled


def read_runs(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """Steps of each cell's training run, by cell id; a file that is broken becomes a problem of the evaluation."""
    runs = {}
    for cell in evaluation.cells:
        path = metrics_file(cell, evaluation.folder)
        if path is None:
            continue
        try:
            runs[cell.id] = read_metrics(path)
        except UserError as error:
            evaluation.problems.append(f"cell {cell.id}: training metrics left out: {error}")
    return runs


def metrics_file(cell: Cell, folder: Path) -> Path | None:
    """metrics.jsonl of the run a cell's model comes from; None where there is none (any more)."""
    run = cell.meta.get("run")
    if not isinstance(run, dict):
        return None
    named = [run.get("metrics_file"), run["path"] + "/metrics.jsonl" if isinstance(run.get("path"), str) else None]
    if isinstance(cell.meta.get("model"), str):  # runs/NAME/final, or runs/NAME
        named += [str(Path(cell.meta["model"]).parent / "metrics.jsonl"), cell.meta["model"] + "/metrics.jsonl"]
    places = [base / name for name in named if isinstance(name, str) for base in (Path(), folder)]
    return next((place for place in places if os.path.isfile(place)), None)  # not a pipe or a device, either


def curves(groups: dict[Group, list[Cell]], runs: dict[str, list[dict[str, Any]]], arm: str | None) -> dict[str, dict[float, dict]]:
    """{architecture: {level: {key: (steps, median, low, high)}}} over the seeds of one arm, thinned to POINTS."""
    drawn: dict[str, dict[float, dict]] = defaultdict(dict)
    for group, cells in groups.items():
        series = [runs[cell.id] for cell in cells if runs.get(cell.id)]
        if group.arm == arm and group.level is not None and series:
            drawn[group.architecture][group.level] = {key: _band(series, key) for key in CURVES}
    return dict(drawn)


def _band(series: Sequence[list[dict[str, Any]]], key: str) -> tuple[np.ndarray, ...]:
    """Median and range over runs at the steps that all of them reached; each point is the mean of a bin of steps."""
    length = min(steps[-1]["step"] for steps in series)
    edges = np.linspace(0, length, min(POINTS, length) + 1)
    values = []
    for steps in series:
        at = np.array([row["step"] for row in steps])
        given = np.array([np.nan if row.get(key) is None else row[key] for row in steps], dtype=np.float64)
        kept = np.isfinite(given) & (at <= length)
        total, _ = np.histogram(at[kept] - 0.5, edges, weights=given[kept])
        count, _ = np.histogram(at[kept] - 0.5, edges)
        values.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    stacked = np.stack(values)
    known = np.isfinite(stacked).all(axis=0)
    middle = ((edges[1:] + edges[:-1]) / 2)[known]
    stacked = stacked[:, known]
    return middle, np.median(stacked, axis=0), stacked.min(axis=0), stacked.max(axis=0)


def stability_rows(groups: dict[Group, list[Cell]], runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per group: mean and sd over seeds of the last recorded stability measures, and the settled variance ratio."""
    rows = []
    for group, cells in groups.items():
        known = [(cell, runs[cell.id]) for cell in cells if runs.get(cell.id)]
        if not known:
            continue
        row: dict[str, Any] = {**group._asdict(), "runs": len(known)}
        for key in STABILITY:
            row[key], row[f"{key} sd"] = _mean_sd(_last(steps, key) for _, steps in known)
        settled = [settled_ratio(cell, steps) for cell, steps in known]
        row["ratio"], row["ratio sd"] = _mean_sd(settled)
        row["ratios"] = [value for value in settled if value is not None]
        row["target"] = _mean_sd(_last(steps, "stability/target_ratio") for _, steps in known)[0]
        row["saturated"] = _mean_sd(_mean_after(steps, _saturated, warmup(cell)) for cell, steps in known)[0]
        rows.append(row)
    return rows


def warmup(cell: Cell) -> int:
    """Step from which the cell's block acts: after its warm-up, or after the branch point; 0 where the run does not say."""
    run = cell.meta.get("run") or {}
    block = run.get("stability") if isinstance(run.get("stability"), dict) else {}
    controller = block.get("controller")
    steps = controller.get("warmup_steps") if isinstance(controller, dict) else None
    branch = run.get("branch") if isinstance(run.get("branch"), dict) else {}
    begun = branch.get("step")
    return max(steps if isinstance(steps, int) else 0, begun if isinstance(begun, int) else 0)


def settled_ratio(cell: Cell, steps: Sequence[dict[str, Any]]) -> float | None:
    """Mean variance ratio over the steps from 31 after warm-up; None where the run is shorter than that."""
    return _mean_after(steps, held_ratio, warmup(cell) + SETTLED_FROM)


def _saturated(row: dict[str, Any]) -> float | None:
    return row.get("stability/saturated")


def _mean_after(steps: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], float | None], after: int) -> float | None:
    values = [value for row in steps if row["step"] > after and (value := read(row)) is not None]
    return sum(values) / len(values) if values else None


def _last(steps: Sequence[dict[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(steps) if row.get(key) is not None), None)


def _mean_sd(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return None, None
    return float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else None
