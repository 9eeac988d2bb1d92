"""The tables of docs/performance.md, from docs/results/performance.json and performance_cuda.json."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import performance_cases as plan
import performance_figures
import performance_stats as stats

from ds_stability.run_dir import write_atomic

Result = Mapping[str, Any]
PAGE = common.REPOSITORY / "docs" / "performance.md"
STEMS = ("performance", "performance_cuda")  # on CPUs, on a GPU
_MARKED = re.compile(r"(<!-- generated: (performance(?:_cuda)?)_([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write(docs: Path) -> list[Path]:
    """Fill in `docs`/performance.md (a new one starts as a copy of the repository's) and draw the figures; the paths."""
    page = docs / "performance.md"
    write_atomic(page, filled((page if page.exists() else PAGE).read_text(encoding="utf-8"), docs / "results"))
    written = [page]
    for stem in STEMS:
        result = load(stem, docs / "results")
        if result is not None:
            written += performance_figures.draw(result, stem, docs / "figures")
    return written


def check(docs: Path) -> int:
    text = (docs / "performance.md").read_text(encoding="utf-8")
    if filled(text, docs / "results") == text:
        return 0
    print("error: performance.md is out of date; run python benchmarks/performance.py --render", file=sys.stderr)
    return 1


def load(stem: str, results: Path) -> Result | None:
    """A results file, or None where there is none.

    Raises:
        ValueError: it is of another kind.
    """
    path = results / f"{stem}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("kind") != "performance":
        raise ValueError(f"{path}: holds results of kind {result.get('kind')!r}")
    return result


def filled(text: str, results: Path) -> str:
    """The page with every generated part made anew."""

    def made(match: re.Match) -> str:
        result = load(match[2], results)
        body = (
            f"Not measured yet: there is no `{match[2]}.json` among the results files."
            if result is None
            else SECTIONS[match[3]](result, match[2])
        )
        return f"{match[1]}\n{body}\n\n{match[4]}"

    return _MARKED.sub(made, text)


# ---- text -----------------------------------------------------------------------------------------------------------


def total_seconds(result: Result) -> float:
    """Wall time of all parts; the axes of growth are measured together."""
    parts = {
        (one["measured"]["finished_at"], one["measured"]["seconds"])
        for one in [*result["cases"].values(), *result["growth"].values()]
    }
    return round(sum(seconds for _, seconds in parts), 1)


def provenance_section(result: Result, stem: str) -> str:
    quick = (
        "A smoke test of tiny models and few steps: its figures mean nothing." if result["settings"]["quick"] else ""
    )
    others = []
    growth = {f"growth with {plan.AXES[axis]}": part for axis, part in result["growth"].items()}
    for name, part in [*result["cases"].items(), *growth.items()]:
        git = part["measured"]["git"]
        if git != result["git"]:
            others.append(f"`{name}` at " + ("an unknown commit" if git is None else common.commits({"git": git})))
    merged = f"Measured by other runs of the same command: {', '.join(others)}." if others else ""
    return "\n\n".join(filter(None, [common.provenance(dict(result)), merged, quick]))


def interval_text(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return common.number(value) if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def targets_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """(header, rows): one row a target."""
    rows = [
        [
            case["title"],
            row["arm"],
            row["quantity"],
            f"<= {row['limit']:.2f}",
            interval_text(row["value"], row["interval"]),
            row["verdict"],
        ]
        for case in result["cases"].values()
        for row in case["verdicts"]
    ]
    return ["case", "engine", "quantity, relative to plain DeepSpeed", "target", "measured [95 %]", "verdict"], rows


def targets_section(result: Result, stem: str) -> str:
    missed = sum(row["verdict"].startswith("missed") for case in result["cases"].values() for row in case["verdicts"])
    count = sum(len(case["verdicts"]) for case in result["cases"].values())
    head = f"{count - missed} of {count} targets met." if count else "No case measured."
    return "\n\n".join(
        [
            head,
            common.markdown_table(*targets_table(result)),
            f"![Step time and memory of every case](figures/{stem}.png)",
        ]
    )


def cases_section(result: Result, stem: str) -> str:
    parts = []
    for case in result["cases"].values():
        tokens = case["batch_size"] * case["block_size"]
        parts += [
            f"### {case['title'][0].upper()}{case['title'][1:]}",
            f"{case['world_size']} ranks of {tokens} tokens ({case['batch_size']} x {case['block_size']}), "
            f"{plan.parameters(case['model']) / 1e6:.1f} million parameters, {case['model']['num_hidden_layers']} layers of width "
            f"{case['model']['hidden_size']}; {case['rounds']} rounds, each a turn of {case['steps']} step{'s' if case['steps'] > 1 else ''} of every engine."
            + "".join(f" `{key}` is {value}." for key, value in case.get("zero", {}).items()),  # not in older results
            common.markdown_table(*time_table(case)),
            common.markdown_table(*memory_table(case)),
        ]
    return "\n\n".join(parts)


def time_table(case: Result) -> tuple[list[str], list[list[str]]]:
    header = [
        "engine",
        "loss path",
        "step (ms)",
        "/ plain [95 %]",
        "/ TRL [95 %]",
        "/ Liger [95 %]",
        "collectives a step",
        "more than plain",
    ]
    rows = []
    for name, arm in case["arms"].items():
        if name == plan.HEADLESS:  # not a training that could take turns with the others
            continue
        if "seconds" not in arm:
            rows.append([name, "not run: " + arm.get("not_run", "not asked for"), *["-"] * 6])
            continue
        compared = [arm["against"].get(other, {}) for other in (plan.PLAIN, *plan.REFERENCES)]
        milliseconds = sorted(arm["seconds"])[len(arm["seconds"]) // 2] * 1000
        rows.append(
            [
                name,
                arm["loss_path"] or "-",
                common.number(milliseconds, 1),
                *(interval_text(one.get("ratio"), one.get("interval")) for one in compared),
                str(arm["messages"]["calls"]),
                extra_text(arm["messages"]["extra"]),
            ]
        )
    return header, rows


def extra_text(extra: Sequence[Sequence[Any]]) -> str:
    if not extra:
        return "none"
    if len(extra) > 3:
        return f"{sum(calls for _, _, calls in extra):+d} in {len(extra)} kinds"
    return ", ".join(f"{calls:+d} {operation} of {size} bytes" for operation, size, calls in extra)


def memory_table(case: Result) -> tuple[list[str], list[list[str]]]:
    on_gpu = not any(arm.get("memory", {}).get("resident_activation") for arm in case["arms"].values())
    kinds = [("activation", "activation part"), ("peak", "whole peak")] + (
        [] if on_gpu else [("resident_activation", "resident activation part")]
    )
    header = ["engine"]
    for _, title in kinds:
        header += [f"{title} (MB)", "/ plain", "/ TRL"]
    rows = []
    for name, arm in case["arms"].items():
        if "memory" not in arm:
            continue
        cells = [name + (f" (with the copy of {arm['memory']['copy'] / 1e6:.1f} MB)" if arm["memory"]["copy"] else "")]
        for key, _ in kinds:
            compared = (arm["against"].get(other, {}).get("memory", {}).get(key) for other in (plan.PLAIN, plan.TRL))
            cells += [common.number(arm["memory"][key] / 1e6, 1), *map(common.number, compared)]
        rows.append(cells)
    return header, rows


def profile_section(result: Result, stem: str) -> str:
    """Of every arm that missed its step time: groups of operators, and the operators that differ most."""
    parts = []
    for case in result["cases"].values():
        for arm, profile in case["profiles"].items():
            plain, mine = profile["wall_ms"]
            parts += [
                f"{case['title']}, {arm}: a step of rank 0 under the profiler took {mine:.1f} ms against {plain:.1f} ms of plain DeepSpeed.",
                common.markdown_table(
                    ["self time by kind", "plain (ms)", "this engine (ms)", "more (ms)"],
                    difference_rows(profile["groups"]),
                ),
                common.markdown_table(
                    ["operators that differ most", "plain (ms)", "this engine (ms)", "more (ms)"],
                    difference_rows(profile["operators"]),
                ),
            ]
    return "\n\n".join(parts) if parts else "No target of the step time was missed."


def difference_rows(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [
        [f"{name}", common.number(base, 2), common.number(mine, 2), f"{mine - base:+.2f}"] for name, base, mine in rows
    ]


def growth_section(result: Result, stem: str) -> str:
    if not result["growth"]:
        return "No axis measured."
    header = ["ratio to plain DeepSpeed against", "engine", "range", "change for each doubling [95 %]", "verdict"]
    rows, parts = [], []
    for axis, found in sorted(result["growth"].items(), key=lambda item: list(plan.AXES).index(item[0])):
        first, last = found["points"][0]["x"], found["points"][-1]["x"]
        for arm, slope in found["slopes"].items():
            low, high = slope["interval"]
            rows.append(
                [
                    plan.AXES[axis],
                    arm,
                    f"{first:,.0f} to {last:,.0f}",
                    f"{slope['slope']:+.4f} [{low:+.4f}, {high:+.4f}]",
                    slope["verdict"],
                ]
            )
        parts.append(common.markdown_table(*growth_table(axis, found)))
    rule = (
        f"Rule: least squares of the median ratio over log2, 95 % bootstrap interval over rounds. Falling: the interval is below 0. Flat: its upper end is at most "
        f"{stats.FLAT:g} for each doubling. Growing: it is above 0 and not flat. Undecided: the rest."
    )
    return "\n\n".join(
        [rule, common.markdown_table(header, rows), f"![Step-time ratio over size](figures/{stem}_growth.png)", *parts]
    )


def growth_table(axis: str, found: Result) -> tuple[list[str], list[list[str]]]:
    arms = list(found["points"][0]["arms"])
    rows = []
    for point in found["points"]:
        milliseconds = sorted(point["seconds"])[len(point["seconds"]) // 2] * 1000
        rows.append([f"{point['x']:,.0f}", str(point["world_size"]), common.number(milliseconds, 1),
                     *(interval_text(point["arms"][arm]["ratio"], point["arms"][arm]["interval"]) for arm in arms)])  # fmt: skip
    return [plan.AXES[axis], "processes", "plain DeepSpeed (ms)", *(f"{arm} [95 %]" for arm in arms)], rows


Section = Callable[[Result, str], str]
SECTIONS: dict[str, Section] = {"provenance": provenance_section, "targets": targets_section, "cases": cases_section,
                                "profile": profile_section, "growth": growth_section}  # fmt: skip


def whole(result: Result, stem: str) -> str:
    """Every section after another: what a GPU measured stands in one place."""
    return "\n\n".join(section(result, stem) for name, section in SECTIONS.items() if name != "all")


SECTIONS["all"] = whole


def summary_lines(result: Result) -> list[str]:
    """For the terminal: the targets, and the verdicts of the axes."""
    lines = ["", common.text_table(*targets_table(result))] if result["cases"] else []
    for axis, found in result["growth"].items():
        lines += [
            f"{plan.AXES[axis]}: {arm} {slope['slope']:+.4f} for each doubling, {slope['verdict']}"
            for arm, slope in found["slopes"].items()
        ]
    return lines
