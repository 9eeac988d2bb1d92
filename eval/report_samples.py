"""Generated texts for the report: the same prompts from every cell, within a budget, made safe to look at.

Model output is data. Escaping it is the page's business; here control characters are made visible, so that no text can
move the cursor of a terminal, end a string early or turn the direction of what is written around it.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from .report_cells import Cell, Evaluation

BUDGET_CHARACTERS = 3_000_000
TEXT_CHARACTERS = 700
MAX_PROMPTS = 24

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\N{SYMBOL FOR DELETE}"}
_HIDDEN = [*range(0x80, 0xA0), 0xAD, *range(0x200B, 0x2010), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2060, 0x2070),
           0xFEFF, *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080)]  # fmt: skip
_VISIBLE = _PICTURES | {code: f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{code:04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}" for code in _HIDDEN}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")  # lone surrogates are not UTF-8


def visible(text: str) -> str:
    """`text` with control, invisible and direction-changing characters shown; newlines and tabs stay."""
    return text.translate(_VISIBLE)


def clean(value: Any) -> Any:
    """`visible` on every string in a JSON value."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_lines(cell: Cell, problems: list[str]) -> Iterable[dict[str, Any]]:
    """Records of samples.jsonl; lines that are cut off or broken are named in `problems` and left out."""
    if not cell.samples.exists():
        return
    broken = 0
    with open(cell.samples, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line.decode("utf-8", errors="replace"))
                (record["decoding"], record["text"])
                record["prompt"], record["sample"] = int(record["prompt"]), int(record["sample"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                broken += 1
                if broken == 1:  # the first one tells where to look; a file of noise must not fill the page
                    cut = "cut off" if not line.endswith(b"\n") else "broken"
                    problems.append(f"cell {cell.id}: {cell.samples} line {number} is {cut}: that sample is left out")
                continue
            yield record
    if broken > 1:
        problems.append(f"cell {cell.id}: {cell.samples} has {broken} broken lines in all")


def collect(evaluation: Evaluation, models: Mapping[str, str] | None = None) -> dict[str, Any]:
    """{"prompts": [{index: text}], "human": [{index: text}], "cells": [...], "texts": [[cell, decoding, prompt, text, finish]]}.

    The first sample of each prompt and decoding; as many prompts, evenly spread, as the budget allows for all cells. Prompts and
    human texts are a dictionary for each set of prompts: a cell's `prompts` says which is its own.

    Args:
        models: names by cell id of those that stand beside each other for themselves, not by level.
    """
    chosen = _choose(_lengths(cell, evaluation.problems) for cell in evaluation.cells)
    texts, cells, sets = [], [], []
    for place, cell in enumerate(evaluation.cells):
        # Its broken lines were named when it was read for the first time.
        own = {(str(record["decoding"]), record["prompt"]): record
               for record in read_lines(cell, []) if record["sample"] == 0 and record["prompt"] in chosen}  # fmt: skip
        texts += [[place, decoding, prompt, _shown(_cut(record["text"])), _cut(record.get("finish"))]
                  for (decoding, prompt), record in own.items()]  # fmt: skip
        read = _prompts(cell, chosen)
        if read not in sets and (read[0] or not sets):
            sets.append(read)
        cells.append({"id": cell.id, "architecture": cell.architecture, "arm": cell.arm, "level": cell.level, "seed": cell.seed,
                      "model": (models or {}).get(cell.id), "prompts": sets.index(read) if read in sets else 0})  # fmt: skip
    prompts, human = ([{str(index): _shown(text) for index, text in read[side].items()} for read in sets or [({}, {})]] for side in (0, 1))
    return {"prompts": prompts, "human": human, "cells": cells, "texts": texts}


def _cut(text: Any) -> str | None:
    """One character more than is shown, which says that there is more: a cell may hold texts of any length."""
    return None if text is None else str(text)[: TEXT_CHARACTERS + 1]


def _shown(text: Any) -> str:
    shown = visible(str(text)[: TEXT_CHARACTERS + 1])
    return shown if len(shown) <= TEXT_CHARACTERS else shown[:TEXT_CHARACTERS] + "\N{HORIZONTAL ELLIPSIS}"


def _lengths(cell: Cell, problems: list[str]) -> dict[str, dict[int, int]]:
    """Characters that the first sample of each prompt would take on the page, by decoding."""
    lengths: dict[str, dict[int, int]] = {}
    for record in read_lines(cell, problems):
        if record["sample"] == 0:
            lengths.setdefault(str(record["decoding"]), {})[record["prompt"]] = min(TEXT_CHARACTERS, len(str(_cut(record["text"])))) + 40
    return lengths


def _choose(cells: Iterable[dict[str, dict[int, int]]]) -> set[int]:
    """Prompts that fit the budget, evenly spread over all."""
    seen: set[int] = set()
    characters = 0
    for lengths in cells:
        for own in lengths.values():
            seen.update(own)
            characters += sum(own.values())
    if not seen:
        return set()
    prompts, average = sorted(seen), characters / len(seen)
    count = max(1, min(MAX_PROMPTS, len(prompts), int(BUDGET_CHARACTERS / average)))
    return {prompts[place * len(prompts) // count] for place in range(count)}


def _prompts(cell: Cell, chosen: set[int]) -> tuple[dict[int, str], dict[int, str]]:
    """Text of the chosen prompts of a cell, and how a human went on."""
    path = cell.folder / "prompts.jsonl"
    prompts: dict[int, str] = {}
    human: dict[int, str] = {}
    with path.open("rb") if path.exists() else nullcontext(()) as lines:
        for line in lines:
            try:
                record = json.loads(line.decode("utf-8", errors="replace"))
                index = int(record["index"])
                if index in chosen:
                    prompts[index] = str(record["text"])
                    if record.get("reference_text"):
                        human[index] = str(record["reference_text"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue  # a prompt that cannot be shown; its continuations still are
    return prompts, human
