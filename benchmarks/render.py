"""Render docs/results.md, docs/governor.md, a part of docs/evaluation.md, and their figures from docs/results/*.json; no figure is typed by hand.

    python benchmarks/render.py [--results docs/results] [--page docs/results.md docs/governor.md ...] [--check]

The results files are those that the other scripts here write (`cp runs/demo/demo.json docs/results/`). In the
page, what stands between `<!-- generated: NAME -->` and `<!-- end -->` is made from NAME.json; the rest is written by hand.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import common
import cures
import cures_figure
import demo
import downstream
import figures
import generation
import governor
import headline
import interval_coverage
import load_once
import metric_speed
import million
import smollm2
import sweep_cost

from ds_stability.run_dir import write_atomic

DOCS = common.REPOSITORY / "docs"
PAGES = ("results.md", "governor.md", "evaluation.md")
SAMPLE_CHARACTERS = 400
_MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=str(DOCS / "results"), help="folder of the results files")
    parser.add_argument("--page", nargs="+", default=[str(DOCS / name) for name in PAGES],
                        help="pages with the marks; figures go beside the first")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the page is out of date")
    arguments = parser.parse_args()
    pages, stale = [Path(page) for page in arguments.page], 0
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = filled(before, Path(arguments.results))
        if not arguments.check:
            write_atomic(page, after)
        elif after != before:
            print(f"error: {page.name} is out of date; run python benchmarks/render.py", file=sys.stderr)
            stale = 1
    if not arguments.check:
        for path in draw(Path(arguments.results), pages[0].parent / "figures"):
            print(path)
    return stale


def filled(text: str, results: Path) -> str:
    """`text` with every generated part made anew.

    Raises:
        KeyError: a mark with a name that is not in SECTIONS.
    """
    return _MARKED.sub(lambda match: f"{match[1]}\n{section(match[2], results)}\n\n{match[3]}", text)


def section(name: str, results: Path) -> str:
    """The Markdown of one results file."""
    body = SECTIONS[name]
    file = SAME_FILE.get(name, name)
    result = load(file, results)
    if result is None:
        return f"Not measured yet: there is no `{file}.json` among the results files."
    return body(result) if name in SAME_FILE else f"{common.provenance(result)}\n\n{body(result)}"


def load(name: str, results: Path) -> dict[str, Any] | None:
    """A results file, or None if there is none.

    Raises:
        ValueError: the file is of another kind.
    """
    path = results / f"{name}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("kind") != name:
        raise ValueError(f"{path}: holds results of kind {result.get('kind')!r}")
    return result


def demo_section(result: dict[str, Any]) -> str:
    rows = result["rows"]
    return "\n\n".join([
        common.markdown_table(*demo.outcome_table(rows)),
        "![Dose-response of the demo](figures/demo.png)",
        "How stable the training was, measured apart from the law, at the last step:",
        common.markdown_table(*demo.stability_table(rows)),
    ])  # fmt: skip


def smollm2_section(result: dict[str, Any]) -> str:
    trained = [row for row in result["rows"] if row["level"] is not None]
    return "\n\n".join([
        common.markdown_table(*smollm2.outcome_table(result["rows"])),
        "![Dose-response of the pretrained model](figures/smollm2.png)",
        "How stable the training was, measured apart from the law, at the last step:",
        common.markdown_table(*demo.stability_table(trained)),
        "The same prompts continued by each model, sampled at temperature 1 with the same random numbers:",
        *(f"{row['name']}:\n\n```text\n{samples(row)}\n```" for row in result["rows"]),
    ])  # fmt: skip


def samples(row: dict[str, Any]) -> str:
    """One line a sample: prompt | continuation."""
    lines = []
    for sample in row["samples"]:
        prompt, text = (" ".join(sample[key].split()).replace("```", "'''") for key in ("prompt", "completion"))
        lines.append(f"{prompt} | {text[:SAMPLE_CHARACTERS]}{'...' if len(text) > SAMPLE_CHARACTERS else ''}")
    return "\n".join(lines)


def headline_section(result: dict[str, Any]) -> str:
    times = result["times"]
    took = (f"Training took {times['seconds'] / 60:.0f} minutes ({times['attempts']} runs, median {times['median']:.0f} s, {times['shortest']:.0f} to "
            f"{times['longest']:.0f} s), evaluation {result['evaluation_seconds'] / 60:.0f}. The runs were made at commit "
            f"{', '.join(_revision(name, result) for name in result['revisions'])}.")  # fmt: skip
    return "\n\n".join([
        took,
        "**Verdict.** " + " ".join(result["sentences"]),
        common.markdown_table(*headline.predictions_table(result)),
        "![Dose-response of the headline measures in three architectures](figures/headline.png)",
        *(f"{architecture}:\n\n{common.markdown_table(*table)}" for architecture, table in headline.dose_tables(result).items()),
        headline.TRENDS,
        common.markdown_table(*headline.trends_table(result)),
    ])  # fmt: skip


def _revision(name: str, result: dict[str, Any]) -> str:
    return f"`{name[:12]}`{' with uncommitted changes' if name in result.get('dirty_revisions', ()) else ''}"


def arms_section(result: dict[str, Any]) -> str:
    return "\n\n".join([common.markdown_table(*headline.arms_table(result)), "![Arms against no feedback](figures/arms.png)"])


def pretrained_section(result: dict[str, Any]) -> str:
    return "\n\n".join([
        common.markdown_table(*headline.pretrained_table(result)), "![Dose-response of the pretrained model](figures/pretrained.png)",
    ])  # fmt: skip


def generation_section(result: dict[str, Any]) -> str:
    return f"{generation.title(result)}:\n\n{common.markdown_table(*generation.generation_table(result))}"


def million_section(result: dict[str, Any]) -> str:
    return f"{common.markdown_table(*million.million_table(result))}\n\n{million.growth(result)}"


def load_once_section(result: dict[str, Any]) -> str:
    return f"{result['model']}:\n\n{common.markdown_table(*load_once.load_table(result))}"


def sweep_cost_section(result: dict[str, Any]) -> str:
    return common.markdown_table(*sweep_cost.sweep_table(result))


def metric_speed_section(result: dict[str, Any]) -> str:
    whole, settings = result["all"], result["settings"]
    return (f"All {whole['metrics']} metrics of samples with their intervals, {settings['texts']} texts of {settings['tokens']} tokens: "
            f"{whole['processor_seconds']:.1f} s of one core.\n\n{common.markdown_table(*metric_speed.speed_table(result))}")  # fmt: skip


def governor_section(result: dict[str, Any]) -> str:
    return f"{common.markdown_table(*governor.governor_table(result['rows']))}\n\n" + governor.verdict(result["rows"]).replace("\n", "  \n")


def cures_section(result: dict[str, Any]) -> str:
    """Quality and diversity, then tasks, then the figure."""
    return "\n\n".join([
        common.markdown_table(*cures.cures_table(result, cures.DIVERSITY)), common.markdown_table(*cures.cures_table(result, cures.TASKS)),
        cures.sentences(result), "![Quality against diversity, an arm a number](figures/cures.png)",
    ])  # fmt: skip


def downstream_section(result: dict[str, Any]) -> str:
    return f"{common.markdown_table(*downstream.skills_table(result))}\n\n{downstream.summary(result)}"


def coverage_section(result: dict[str, Any]) -> str:
    return "\n\n".join(f"{title}:\n\n{common.markdown_table(*table)}" for title, table in interval_coverage.tables(result).items())


def faults_section(result: dict[str, Any]) -> str:
    """One row a phase: how many kills, how many inside the phase, and what came of them."""
    header = ["killed while", "kills (of rank 0)", "inside the phase", "all processes ended", "seconds: median, longest",
              "lost rank named", "same bytes after restart"]  # fmt: skip
    rows = []
    for row in result["phases"]:
        seconds = f"{common.number(row['median_seconds'], 1)}, {common.number(row['longest_seconds'], 1)}"
        rows.append([row["phase"], f"{row['trials']} ({row['rank_0']})", str(row["inside"]), str(row["ended"]), seconds,
                     str(row["named"]), str(row["same"])])  # fmt: skip
    failed = [f"Trial {row['trial']} failed: {row['phase']}, rank {row['rank']} at {row['moment']}." for row in result["failed"]]
    return "\n\n".join([common.markdown_table(header, rows), *failed])


SECTIONS = {"demo": demo_section, "smollm2": smollm2_section, "headline": headline_section,
            "arms": arms_section, "pretrained": pretrained_section, "generation": generation_section,
            "million": million_section, "load_once": load_once_section, "sweep_cost": sweep_cost_section,
            "metric_speed": metric_speed_section, "faults": faults_section, "governor": governor_section, "cures": cures_section,
            "downstream": downstream_section, "coverage": coverage_section}  # fmt: skip
SAME_FILE = {"arms": "headline"}  # sections that show another part of a results file
DRAWN_ELSEWHERE = ("headline", "arms", "pretrained", "generation", "metric_speed", "faults", "million", "load_once", "sweep_cost",
                   "governor", "cures", "downstream", "coverage")  # fmt: skip


def draw(results: Path, folder: Path) -> list[Path]:
    """Write the figure of every results file that there is; the paths."""
    written = []
    for name in SECTIONS.keys() - DRAWN_ELSEWHERE:
        result = load(name, results)
        if result is None:
            continue
        path = folder / f"{name}.png"
        rows = [row for row in result["rows"] if row["level"] is not None]
        untouched = next((row for row in result["rows"] if row["level"] is None), None)
        figures.dose_response(rows, path, TITLES[name], baseline=untouched)
        written.append(path)
    result = load("cures", results)
    if result is not None:
        cures_figure.pareto(result, folder / "cures.png", cures.TITLE)
        written.append(folder / "cures.png")
    return written


TITLES = {
    "demo": demo.TITLE,
    "smollm2": "A pretrained 135M-parameter model fine-tuned on novels, one seed a level",
}

if __name__ == "__main__":
    sys.exit(main())
