"""What collapse costs on tasks: each skill of evaluated models against the level that they were trained at.

    python benchmarks/downstream.py --evaluation evals/smollm2

Reads what `ds-stability eval --suite pretrained` (or full) wrote of models trained at several levels. Three kinds of skills: choosing
between given answers (minimal pairs by family, facts, cloze), writing a short answer (exact match, by kind), and writing text.
A skill falls where its difference to level 0, paired by unit, lies on the worse side with a p below 0.05, adjusted by Holm's method
for all skills at all levels. Writes OUTPUT/downstream.json.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import headline
import numpy as np

from ds_stability.errors import UserError
from ds_stability.eval.aggregate import group_rows, groups_of
from ds_stability.eval.contrasts import holm
from ds_stability.eval.records import Measured
from ds_stability.eval.report_cells import Cell, Key, read_evaluation
from ds_stability.eval.spread import ALPHA
from ds_stability.run_dir import write_json_atomic

CHOOSING, ANSWERING, WRITING = "choosing between given answers", "a short answer, sampled", "running text"
#: Families of minimal pairs: what the phenomena's names begin with.
PAIRS = {
    "agreement": ("agreement_",), "reflexives and reciprocals": ("reflexive_", "reciprocal"),
    "noun phrases": ("determiner_", "quantifier", "article", "adjective_", "comparative", "existential_", "noun_"),
    "verb forms": ("do_support", "past_", "participle_", "passive_", "modal_", "infinitive_", "progressive_", "pronoun_", "transitivity"),
    "negative polarity": ("npi_",), "questions and islands": ("question_", "filler_", "adjunct_", "coordination_"),
}  # fmt: skip


class Skill(NamedTuple):
    kind: str
    name: str
    key: Key
    better: int  # 1: more is better, -1: less
    chance: float | None = None


SKILLS = (
    *(Skill(CHOOSING, f"minimal pairs: {family}", Key(f"pairs {family}"), 1, 0.5) for family in PAIRS),
    Skill(CHOOSING, "facts", Key("ds_facts_acc"), 1, 0.25), Skill(CHOOSING, "cloze", Key("ds_cloze_acc"), 1, 0.25),
    *(Skill(ANSWERING, f"{kind}, pass@1", Key(f"exact_match_{kind}_pass_1", "sample"), 1, 0.0)
      for kind in ("addition", "copying", "counting", "opposites")),
    Skill(ANSWERING, "all four, pass@8", Key("exact_match_pass_8", "sample"), 1, 0.0),
    Skill(WRITING, "bits per byte, held-out", Key("bits_per_byte", None, "held_out"), -1),
    Skill(WRITING, "generation entropy, T = 1", Key("generation_entropy", "sample"), 1),
    Skill(WRITING, "distinct-2, T = 1", Key("distinct_2", "sample"), 1),
    Skill(WRITING, "self-BLEU-4, T = 1", Key("self_bleu_4", "sample"), -1),
    Skill(WRITING, "seq-rep-4, T = 1", Key("seq_rep_4", "sample"), -1),
    Skill(WRITING, "seq-rep-4, greedy", Key("seq_rep_4", "greedy"), -1),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", required=True, help="evals/NAME")
    parser.add_argument("--output", default=str(common.REPOSITORY / "docs" / "results"))
    arguments = parser.parse_args()
    try:
        cells = read_evaluation(Path(arguments.evaluation)).cells
    except UserError as error:
        parser.error(str(error))
    if not any(cell.level == 0 for cell in cells):
        parser.error(f"--evaluation {arguments.evaluation}: no model trained at level 0 in it, which the others are compared to")
    seeds = {"training": sorted({cell.seed for cell in cells if cell.seed is not None})}
    result = common.describe_measurement("downstream", seeds, {"models": len(cells), "suite": cells[0].meta["suite"]["name"]})
    result |= {"seconds": sum(sum(cell.meta["seconds"].values()) for cell in cells), "rows": skill_rows(cells)}
    write_json_atomic(Path(arguments.output) / "downstream.json", result)
    print(common.text_table(*skills_table(result)))
    return 0


def skill_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row a skill: a figure for each level (null: the untouched model), with its difference to level 0."""
    for cell in cells:
        for family, beginnings in PAIRS.items():
            pool(cell, family, beginnings)
    groups, rows = groups_of(cells), []
    for skill in SKILLS:
        found = group_rows(groups, skill.key)
        figures = [{"level": row["level"], **{name: row[name] for name in headline.FIGURES}} for row in found]
        if any(figure["value"] is not None for figure in figures):
            rows.append({"kind": skill.kind, "skill": skill.name, "better": skill.better, "chance": skill.chance, "figures": figures})
    mark_falls(rows)
    return rows


def mark_falls(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write into every figure whether it falls against level 0: None for level 0 itself, and without an interval."""
    figures = [(figure, row["better"]) for row in rows for figure in row["figures"]]
    for (figure, better), p in zip(figures, holm([figure["difference_p"] for figure, _ in figures]), strict=True):
        figure["adjusted_p"], figure["falls"] = p, None if p is None else p < ALPHA and figure["difference"] * better < 0


def pool(cell: Cell, family: str, beginnings: Sequence[str]) -> None:
    """Give a cell the pairs of a family's phenomena as one figure, a unit a pair."""
    keys = [key for key in cell.measured if key.metric.removeprefix("minimal_pairs_").startswith(tuple(beginnings))
            and key.metric.startswith("minimal_pairs_")]  # fmt: skip
    if not keys:
        return
    parts = [cell.measured[key] for key in keys]
    units = [f"{key.metric}/{unit}" for key, part in zip(keys, parts, strict=True) for unit in part.units]
    key = Key(f"pairs {family}")
    measured = Measured(key.metric, units, np.concatenate([part.totals for part in parts]), np.concatenate([part.counts for part in parts]))
    cell.measured[key], cell.rows[key] = measured, {"metric": key.metric, "value": measured.value, "n": len(units), "unit": "share"}


def skills_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a star marks a loss against level 0."""
    levels = list(dict.fromkeys(figure["level"] for row in result["rows"] for figure in row["figures"]))
    levels.sort(key=lambda level: -1.0 if level is None else level)
    rows = []
    for row in result["rows"]:
        by_level = {figure["level"]: figure for figure in row["figures"]}
        values = [headline.interval(by_level.get(level)) + (" *" if by_level.get(level, {}).get("falls") else "") for level in levels]
        chance = "-" if row["chance"] is None else f"{row['chance']:g}"
        rows.append([row["kind"], row["skill"], *values, chance])
    return ["kind", "skill", *("untouched" if level is None else f"level {level:g}" for level in levels), "chance"], rows


def summary(result: Mapping[str, Any]) -> str:
    """At each level above 0: how many skills of each kind fall."""
    levels = sorted({figure["level"] for row in result["rows"] for figure in row["figures"] if figure["level"]})
    lines = []
    for level in levels:
        parts = []
        for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
            known = [figure["falls"] for row in result["rows"] if row["kind"] == kind for figure in row["figures"]
                     if figure["level"] == level and figure["falls"] is not None]  # fmt: skip
            parts.append(f"{kind} {sum(known)} of {len(known)}")
        lines.append(f"- level {level:g}: measures that are worse than at level 0: {'; '.join(parts)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
