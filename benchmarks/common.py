"""What the benchmark scripts share: statistics of a settled ratio, the description of a measurement, tables and files."""

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ds_stability.recorder import read_metrics
from ds_stability.run_dir import git_revision, package_versions, utc_now

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN_SCRIPT = REPOSITORY / "launchers" / "train.py"
SETTLED_FROM = 30  # steps after warm-up from which the ratio counts as settled
MOVING_WINDOW = 30  # steps
BOOTSTRAP = 2000  # resamples of an interval
VERSIONS = ("python", "torch", "deepspeed", "transformers", "accelerate")  # that a page names


class Estimate(NamedTuple):
    """A mean over time, its standard error, and the number of values."""

    mean: float
    error: float
    n: int


def autocorrelation_time(values: Sequence[float]) -> float:
    """Integrated autocorrelation time tau of a stationary series: the variance of its mean is tau * variance / n.

    Initial positive sequence estimator, Geyer 1992 (Statistical Science 7, section 3.3): autocorrelations are summed in
    pairs as long as a pair is positive. Never below 1, so that a series is never worth more than independent values.
    """
    series = np.asarray(values, dtype=np.float64)
    centered = series - series.mean()
    # Rounding leaves a constant series a variance of 1e-32 or so, whose autocorrelations mean nothing.
    if len(series) < 4 or not np.any(np.abs(centered) > 1e-12 * max(1.0, float(np.abs(series).max()))):
        return 1.0
    covariance = np.correlate(centered, centered, mode="full")[len(series) - 1 :] / len(series)
    correlation = covariance / covariance[0]
    tau = -1.0
    for lag in range(0, len(series) - 1, 2):
        pair = correlation[lag] + correlation[lag + 1]
        if pair <= 0:
            break
        tau += 2.0 * pair
    return max(1.0, float(tau))


def mean_over_time(values: Sequence[float]) -> Estimate | None:
    """Mean of a series with its autocorrelation-corrected standard error; None for fewer than two values."""
    if len(values) < 2:
        return None
    series = np.asarray(values, dtype=np.float64)
    error = math.sqrt(autocorrelation_time(series) * series.var(ddof=1) / len(series))
    return Estimate(float(series.mean()), error, len(series))


def bootstrap_median(values: Sequence[float]) -> list[float]:
    """95 % percentile bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(np.asarray(values), size=(BOOTSTRAP, len(values)))
    return [float(bound) for bound in np.percentile(np.median(draws, axis=1), [2.5, 97.5])]


def series_of(rows: Sequence[Mapping[str, Any]], key: str, first: int, last: int | None = None) -> list[float]:
    """Values of `key` in steps first..last (both included) of a metrics.jsonl; skipped steps have none."""
    chosen = (row for row in rows if row["step"] >= first and (last is None or row["step"] <= last))
    return [row[key] for row in chosen if row.get(key) is not None and not row.get("skipped")]


def worst_moving_mean(values: Sequence[float], target: float, window: int = MOVING_WINDOW) -> float | None:
    """Largest |moving mean - target| over windows of `window` values; None if the series is shorter."""
    if len(values) < window:
        return None
    means = np.convolve(np.asarray(values, dtype=np.float64), np.full(window, 1.0 / window), mode="valid")
    return float(np.abs(means - target).max())


def settled(rows: Sequence[Mapping[str, Any]], level: float, warmup_steps: int, last: int | None = None) -> dict[str, Any]:
    """How well a run held its level, from the rows of its metrics.jsonl.

    Args:
        last: last step after warm-up that counts; None counts to the end.

    Returns:
        target_ratio; ratio, ratio_error, ratio_n: mean variance ratio over the steps 31.. after warm-up, its standard
        error and the number of steps; worst_moving_mean: largest distance from the target of the 30-step moving mean
        that ends at step 60 after warm-up or later; saturated: share of those steps. None where there are no such steps.
    """
    first, final = warmup_steps + SETTLED_FROM + 1, None if last is None else warmup_steps + last
    ratios = series_of(rows, "stability/variance_ratio", first, final)
    estimate, saturated = mean_over_time(ratios), series_of(rows, "stability/saturated", first, final)
    return {
        "target_ratio": 1.0 - level,
        "ratio": estimate.mean if estimate else None,
        "ratio_error": estimate.error if estimate else None,
        "ratio_n": len(ratios),
        "worst_moving_mean": worst_moving_mean(ratios, 1.0 - level),
        "saturated": sum(saturated) / len(saturated) if saturated else None,
    }


STABILITY_KEYS = ("loss_deviation", "log_grad_norm_deviation", "loss_spikes", "grad_norm_spikes", "skipped_steps")


def stability_measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How stable the training was, apart from the law: the measures of the last step that has them (tags.py)."""

    def latest(key: str) -> float | None:
        return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)

    return {key: latest(f"stability/{key}") for key in STABILITY_KEYS} | {
        "update_ratio": latest("stability/update_ratio"),
        "train_loss": latest("loss"),
        "train_cross_entropy": latest("cross_entropy"),
    }


def output_folder(name: str) -> Path:
    """The folder that `--output` names, absolute, and there."""
    folder = Path(name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_run(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / "metrics.jsonl")


def median_step_seconds(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Median wall time of the steps after the first, which pays for allocations."""
    values = series_of(rows, "step_seconds", 2)
    return float(np.median(values)) if values else None


def describe_measurement(kind: str, seeds: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The head of a results file: what was run, by which code and versions, on what machine."""
    return {
        "kind": kind,
        "finished_at": utc_now(),
        "command": portable_command(sys.argv),
        "git": git_revision(REPOSITORY),
        "versions": package_versions(),
        "machine": describe_machine(),
        "seeds": dict(seeds),
        "settings": dict(settings),
    }


def portable_command(argv: Sequence[str]) -> str:
    """The command line as one can type it elsewhere: paths relative to the repository, others by their last part."""
    words = ["python"]
    for word in argv:
        path = Path(word)
        if os.sep in word and path.resolve().is_relative_to(REPOSITORY):
            word = str(path.resolve().relative_to(REPOSITORY))
        elif path.is_absolute():
            word = path.name
        words.append(word)
    return " ".join(words)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator; no host name."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": gpus,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return name + (" (AMX bf16)" if "amx_bf16" in flags else "")


def provenance(result: dict[str, Any]) -> str:
    """How the figures came about: command, commit, versions, seeds, machine, settings."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in VERSIONS if result["versions"].get(name))
    seeds = ", ".join(f"{name} {value}" for name, value in result["seeds"].items()) or "none"
    machine = result["machine"]
    place = ", ".join(machine["accelerators"]) or machine["processor"]
    settings = ", ".join(f"{name} {_plain(value)}" for name, value in result["settings"].items())
    lines = [
        f"```bash\n{result['command']}\n```\n",
        f"Commit {commits(result)}. {versions}. Seeds: {seeds}. {place}, {machine['cores']} cores, "
        f"{machine['memory_gib']:g} GiB. Took {result['seconds'] / 60:.1f} minutes; finished {result['finished_at'][:10]}.",
        f"Settings: {settings}.",
    ]
    return "\n".join(lines)


def commits(result: dict[str, Any]) -> str:
    """The commit of the script and, where cells of a resumed sweep were trained by others, theirs."""
    git = result["git"]
    if git is None:
        return "unknown"
    text = f"`{git['revision'][:12]}`" + (" with uncommitted changes" if git["dirty"] else "")
    trained = {row.get("revision") for row in result.get("rows", [])} - {None, git["revision"]}
    return text + (f", some runs at {', '.join(f'`{name[:12]}`' for name in sorted(trained))}" if trained else "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table; a dash where it is unknown."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    return number(value, digits) if value is None or error is None else f"{number(value, digits)} ± {number(error, digits)}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: columns aligned, first to the left, others to the right."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for the docs."""
    rules = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (list(header), rules, *rows))
