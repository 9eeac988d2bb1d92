"""The figures of docs/performance.md: every round of every case with its targets, and the ratios over size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import figures
import performance_cases as plan
import performance_stats as stats

Result = Mapping[str, Any]
COLORS = {plan.LEVEL_0: figures.BLUE, plan.LEVEL_5: figures.ORANGE, plan.ALL_FOUR: figures.GREEN}
SHORT = {plan.PLAIN: "plain", plan.LEVEL_0: "level 0", plan.INTERVAL_10: "level 0,\ninterval 10", plan.LEVEL_5: "level .5",
         plan.CHUNKED: "level .5,\nchunked", plan.ALL_FOUR: "all four", plan.TRITON: "level .5,\ntriton", plan.TRL: "TRL",
         plan.LIGER: "Liger", plan.HEADLESS: "no loss",
         plan.AGAIN: "plain again"}  # fmt: skip


CASES_TITLE = "Relative to plain DeepSpeed ZeRO-3: every round and the median; short lines are the targets"
GROWTH_TITLE = "Step time relative to plain DeepSpeed ZeRO-3: median and 95 % interval"


def draw(result: Result, stem: str, folder: Path) -> list[Path]:
    """Write the figures of a results file that has cases or growth; the paths."""
    written = []
    place = " (smoke test)" if result["settings"]["quick"] else ""
    for key, name, title, draw_one in (
        ("cases", stem, CASES_TITLE, draw_cases),
        ("growth", f"{stem}_growth", GROWTH_TITLE, draw_growth),
    ):
        if result[key]:
            written.append(folder / f"{name}.png")
            draw_one(result, written[-1], title + place)
    return written


def draw_cases(result: Result, path: Path, title: str) -> None:
    """Two panels a case: step time of each round, and the activation part of the memory."""
    cases = list(result["cases"].values())
    figure, axes = figures._grid(2 * len(cases), columns=2, size=(5.2, 2.6))
    for row, case in enumerate(cases):
        arms = {name: arm for name, arm in case["arms"].items() if name != plan.PLAIN}
        _draw_times(axes[2 * row], case, {name: arm for name, arm in arms.items() if "seconds" in arm})
        _draw_memory(axes[2 * row + 1], case, {name: arm for name, arm in arms.items() if arm.get("memory")})
    figures._finish(figure, path, title)


def _draw_times(axis, case: Result, arms: Result) -> None:
    for position, (name, arm) in enumerate(arms.items()):
        color = COLORS.get(name, figures.GRAY)
        spread = [position + 0.2 * (i / max(1, len(arm["ratios"]) - 1) - 0.5) for i in range(len(arm["ratios"]))]
        axis.plot(spread, arm["ratios"], "o", color=color, markersize=3.5, alpha=0.6, markeredgewidth=0)
        axis.plot([position - 0.25, position + 0.25], [arm["ratio"]] * 2, color=color, linewidth=2.5)
    _targets(axis, case, arms, "time")
    axis.set_title(f"{case['title']}: step time", fontsize=9, loc="left")


def _draw_memory(axis, case: Result, arms: Result) -> None:
    plain = case["arms"][plan.PLAIN]
    for position, (name, arm) in enumerate(arms.items()):
        color = COLORS.get(name, figures.GRAY)
        axis.bar(position, stats.activation_ratio(arm, plain), width=0.5, color=color, alpha=0.35)
        axis.bar(position, stats.activation_ratio(arm, plain, without_copy=True), width=0.5, color=color, alpha=0.8)
    _targets(axis, case, arms, "activation")
    copied = any(arm["memory"]["copy"] for arm in arms.values())
    axis.set_title("activation memory" + (" (light: the stated copy)" if copied else ""), fontsize=9, loc="left")
    axis.set_ylim(bottom=0)


def _targets(axis, case: Result, arms: Result, key: str) -> None:
    for position, name in enumerate(arms):
        limit = case["targets"].get(name, {}).get(key)
        if limit is not None:
            axis.plot(
                [position - 0.38, position + 0.38], [limit] * 2, color="black", linewidth=1.3, linestyle=(0, (3, 1.5))
            )
    axis.axhline(1.0, color=figures.GRAY, linewidth=1, linestyle=":")
    axis.set_xticks(range(len(arms)), [SHORT[name] for name in arms], fontsize=8)
    axis.set_xlim(-0.6, max(0.6, len(arms) - 0.4))


def draw_growth(result: Result, path: Path, title: str) -> None:
    """A panel an axis: median ratio and interval of every point, over a logarithmic axis."""
    axes_found = [(axis, result["growth"][axis]) for axis in plan.AXES if axis in result["growth"]]
    figure, axes = figures._grid(len(axes_found), columns=min(4, len(axes_found)), size=(3.3, 2.8))
    for axis, (name, found) in zip(axes, axes_found, strict=True):
        for arm in found["points"][0]["arms"]:
            points = [(point["x"], point["arms"][arm]) for point in found["points"]]
            medians = [one["ratio"] for _, one in points]
            below, above = ([abs(one["interval"][end] - one["ratio"]) for _, one in points] for end in (0, 1))
            verdict = found["slopes"].get(arm, {}).get("verdict", "one point")
            axis.errorbar(
                [x for x, _ in points],
                medians,
                yerr=[below, above],
                color=COLORS.get(arm, figures.GRAY),
                marker="o",
                markersize=4,
                capsize=2.5,
                linewidth=1.4,
                label=f"{arm}: {verdict}",
            )
        axis.axhline(1.0, color=figures.GRAY, linewidth=1, linestyle=":")
        axis.set_xscale("log", base=2)
        places = [point["x"] for point in found["points"]]
        axis.set_xticks(places, [_tick(x) for x in places])
        axis.set_title(plan.AXES[name], fontsize=9, loc="left")
        axis.legend(fontsize=7, edgecolor="none", framealpha=0.85)
    figures._finish(figure, path, title)


def _tick(x: float) -> str:
    if x >= 10**6:
        return f"{x / 1e6:.1f}M"
    return f"{x / 1024:.0f}k" if x >= 2048 else f"{x:.0f}"
