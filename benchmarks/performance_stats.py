"""The arithmetic of docs/performance.md: ratios with intervals, verdicts on targets, growth, and names for operators. No torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import common
import numpy as np

FLAT = 0.01  # a ratio that rises by less than this for each doubling counts as flat


def ratios(rounds: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Ratio of each round to the same round of another arm, their median, and its 95 % bootstrap interval over rounds.

    Raises:
        ValueError: unequal numbers of rounds.
    """
    each = [mine / other for mine, other in zip(rounds, base, strict=True)]
    return {"ratios": each, "ratio": statistics.median(each), "interval": common.bootstrap_median(each)}


def memory_of(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median over processes of every kind of memory, bytes."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def judge(value: float | None, limit: float, interval: Sequence[float] | None = None) -> str:
    """Whether the median is within its limit, and whether the whole interval is on that side."""
    if value is None or not math.isfinite(value):
        return "not measured"
    if value <= limit:
        return "met" if interval is None or interval[1] <= limit else "met; the interval reaches above"
    return "missed" if interval is None or interval[0] > limit else "missed; the interval reaches below"


def verdicts(arms: Mapping[str, Mapping[str, Any]], targets: Mapping[str, Any], plain: str) -> list[dict[str, Any]]:
    """One row a target: arm, quantity, limit, value, interval, verdict. `targets`: {arm: {time, activation, copy}}."""
    rows = []
    for name, target in targets.items():
        arm = arms.get(name, {})
        value, interval = arm.get("ratio"), arm.get("interval")
        rows.append({"arm": name, "quantity": "step time", "limit": target["time"], "value": value, "interval": interval,
                     "verdict": judge(value, target["time"], interval)})  # fmt: skip
        if target["activation"] is None:
            continue
        value = activation_ratio(arm, arms[plain], target["copy"])
        quantity = "activation memory" + (" without the stated copy" if target["copy"] else "")
        rows.append({"arm": name, "quantity": quantity, "limit": target["activation"], "value": value, "interval": None,
                     "verdict": judge(value, target["activation"])})  # fmt: skip
    return rows


def activation_ratio(arm: Mapping[str, Any], plain: Mapping[str, Any], without_copy: bool = False) -> float | None:
    """Activation part of the memory relative to plain DeepSpeed's; `without_copy` leaves out the averaging's means."""
    if not arm.get("memory") or not plain.get("memory"):
        return None
    copy = arm["memory"]["copy"] if without_copy else 0.0
    return (arm["memory"]["activation"] - copy) / plain["memory"]["activation"]


def against(arm: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's figures relative to another arm of the same case: step time with its interval, activation and whole memory."""
    found: dict[str, Any] = {}
    if "seconds" in arm and "seconds" in other:
        timed = ratios(arm["seconds"], other["seconds"])
        found |= {"ratio": timed["ratio"], "interval": timed["interval"]}
    if arm.get("memory") and other.get("memory"):
        found["memory"] = {key: arm["memory"][key] / other["memory"][key] for key in ("peak", "activation", "resident_activation")
                           if other["memory"][key] > 0}  # fmt: skip
    return found


def messages(arm: Mapping[str, Mapping[str, int]], plain: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Collectives of a step, and those that plain DeepSpeed does not have: [operation, bytes of its argument, calls]; fewer
    calls than plain are negative.

    Args:
        arm, plain: {operation: {bytes: calls}}.
    """
    extra = []
    for operation in sorted(arm.keys() | plain.keys()):
        mine, theirs = arm.get(operation, {}), plain.get(operation, {})
        for size in sorted(mine.keys() | theirs.keys(), key=int):
            calls = mine.get(size, 0) - theirs.get(size, 0)
            if calls:
                extra.append([operation, int(size), calls])
    return {"calls": sum(calls for sizes in arm.values() for calls in sizes.values()), "extra": extra}


# ---- growth ---------------------------------------------------------------------------------------------------------


def slope(points: Sequence[tuple[float, Sequence[float]]]) -> dict[str, Any]:
    """Change of the ratio for each doubling of x: least squares through the medians over log2 x, 95 % interval by bootstrap
    over the rounds of every point, and the verdict.

    Args:
        points: (x, ratio of each round), at least two different x.
    """
    logs = np.log2([x for x, _ in points])
    medians = np.array([np.median(values) for _, values in points])
    rng = np.random.default_rng(0)
    draws = np.stack(
        [np.median(rng.choice(np.asarray(v), size=(common.BOOTSTRAP, len(v))), axis=1) for _, v in points], axis=1
    )
    centered = logs - logs.mean()
    slopes = draws @ centered / (centered @ centered)
    low, high = (float(bound) for bound in np.percentile(slopes, [2.5, 97.5]))
    return {
        "slope": float(medians @ centered / (centered @ centered)),
        "interval": [low, high],
        "verdict": shape_of(low, high),
    }


def shape_of(low: float, high: float) -> str:
    """The stated rule: the interval of the slope against 0 and FLAT."""
    if high < 0:
        return "falling"
    if high <= FLAT:
        return "flat"
    return "growing" if low > 0 else "undecided"


# ---- where the time goes --------------------------------------------------------------------------------------------

#: Words for groups of operators; the first whose part stands in the operator's name counts.
GROUPS = (
    ("communication", ("c10d", "gloo", "nccl", "all_gather", "allgather", "all_reduce", "allreduce", "reduce_scatter", "deepspeed_comm",
                       "inference_all_reduce", "broadcast")),
    ("optimizer", ("adam", "addcdiv", "addcmul", "_foreach", "clip_grad", "lerp", "optimizer")),
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention")),
    ("matrix products", ("::mm", "addmm", "bmm", "matmul", "linear", "gemm", "cutlass", "baddbmm", "nvjet")),
    ("softmax, exp and log", ("softmax", "::exp", "::log", "logsumexp", "nll_loss", "cross_entropy", "log_softmax")),
    ("embedding, gather and scatter", ("embedding", "gather", "scatter", "index", "bucketize", "searchsorted")),
    ("sums, norms and extrema", ("::sum", "::mean", "norm", "::amax", "::max", "::cumsum", "::pow", "isfinite", "reduce_kernel")),
    ("copies and casts", ("copy", "::to", "::cat", "clone", "contiguous", "memcpy", "narrow")),
    ("allocation and filling", ("empty", "zero", "fill", "full", "ones", "resize", "memset", "new_")),
)  # fmt: skip
REST = "other element-wise operators"
OUTSIDE = "Python, waiting and what has no operator"


def group_of(operator: str) -> str:
    """The group of a torch operator or kernel, in words."""
    name = operator.lower()
    return next((words for words, parts in GROUPS if any(part in name for part in parts)), REST)


def profile_difference(arm: Mapping[str, Any], plain: Mapping[str, Any], top: int = 8) -> dict[str, Any]:
    """Where an arm's step takes longer than plain DeepSpeed's.

    Args:
        arm, plain: {"wall_ms": a step's wall time under the profiler, "operators": {name: self ms a step}}.

    Returns:
        groups: [name, plain ms, arm ms], largest difference first; operators: the `top` that differ most.
    """
    groups: dict[str, list[float]] = {}
    operators: dict[str, list[float]] = {}
    for place, profile in enumerate((plain, arm)):
        for name, milliseconds in profile["operators"].items():
            groups.setdefault(group_of(name), [0.0, 0.0])[place] += milliseconds
            operators.setdefault(name, [0.0, 0.0])[place] += milliseconds
        rest = profile["wall_ms"] - sum(profile["operators"].values())
        groups.setdefault(OUTSIDE, [0.0, 0.0])[place] = max(0.0, rest)

    def sorted_rows(table: Mapping[str, list[float]], count: int) -> list[list[Any]]:
        rows = sorted(table.items(), key=lambda item: item[1][0] - item[1][1])
        return [[name, round(base, 3), round(mine, 3)] for name, (base, mine) in rows[:count]]

    return {"groups": sorted_rows(groups, len(groups)), "operators": sorted_rows(operators, top),
            "wall_ms": [round(plain["wall_ms"], 3), round(arm["wall_ms"], 3)]}  # fmt: skip
