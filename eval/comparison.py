"""Models side by side: their headline figures, the difference of every pair, and which is the best where that can be told.

A difference is paired by prompt (window, item) where unit k of both models is the same text, which cell.json's hashes say: two
tokenizers cut other prompts from one text. What two models have no common measure for is not compared, and the reason is kept.
The best is marked only if its difference to every other model is decided: p below 0.05 after Holm's correction for all pairs of
that metric. Nearest to a human figure is decided only for two models on the same side of it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

from .contrasts import Estimate, difference_estimate, group_estimate, holm
from .measures import HUMAN, LOWER, SET, TOKENS, TRAIN, ZERO, measure_of
from .records import REFERENCE
from .report_cells import UNTOUCHED, Cell, Key
from .spread import ALPHA

MAX_RANKED = 12  # models; of more, only those that no run of ours made are compared with all
SIZES = ("group_tokens", "group_bytes", "group_texts", "window")  # settings without which a figure is another one
SAMPLED = ("high_frequency_share", "distinct_2", "seq_rep_4", "generation_entropy", "self_bleu_4", "eos_rate")
TEXT = ("bits_per_byte", "cross_entropy", "predictive_entropy", "calibration_gap")


@dataclass
class Model:
    """One column: a model, or the seeds of one group. `facts`: what must be equal for a comparison, by name."""

    name: str
    cells: list[Cell]
    trained: bool

    @cached_property
    def facts(self) -> dict[str, Any]:
        found = [_facts(cell) for cell in self.cells]
        return {name: sorted({json.dumps(item[name]) for item in found}) for name in found[0]}

    def settings(self, key: Key) -> Mapping[str, Any]:
        return next((cell.rows[key].get("settings") or {} for cell in self.cells if key in cell.rows), {})


@dataclass(frozen=True)
class Pair:
    """`one` minus `two` (places of models); p is Holm's within the metric. `why_not`: the reason where there is no difference."""

    key: Key
    one: int
    two: int
    estimate: Estimate | None
    p: float | None = None
    why_not: str = ""

    @property
    def decided(self) -> bool:
        return self.p is not None and self.p < ALPHA


class Line(NamedTuple):
    """One metric. `best`: place of the model, or None; `undecided`: why none is marked, where a metric has a direction.

    human: the human continuations' figure. chance: what guessing gives.
    """

    key: Key
    estimates: list[Estimate]
    human: float | None
    chance: float | None
    best: int | None
    undecided: str
    pairs: list[Pair]

    @property
    def measured(self) -> int:
        """Models that have a value: only they can be worse than the best."""
        return sum(estimate.value is not None for estimate in self.estimates)


@dataclass
class Comparison:
    models: list[Model]
    lines: list[Line]
    figures: int  # of the whole page, by which `lines` are a choice

    @property
    def pairs(self) -> list[Pair]:
        return [pair for line in self.lines for pair in line.pairs]


def compare(groups: Mapping[Any, list[Cell]]) -> Comparison:
    """The groups of an evaluation (aggregate.groups_of) as models, by the headline figures that any of them has."""
    models = named_models(groups)
    cells = [cell for model in models for cell in model.cells]
    keys = list(dict.fromkeys(key for cell in cells for key in cell.rows))
    return Comparison(models, [_line(models, key) for key in headline_keys(cells, keys)], len(keys))


def headline_keys(cells: Sequence[Cell], keys: Sequence[Key]) -> list[Key]:
    """Figures on held-out text, on samples of one decoding (plain sampling where it was used), and of tasks."""
    decodings = list(dict.fromkeys(key.decoding for key in keys if key.decoding not in (None, REFERENCE) and key.metric in SAMPLED))
    decoding = "sample" if "sample" in decodings else next(iter(decodings), None)
    wanted = [Key(name, None, "held_out") for name in TEXT] + [Key(name, decoding, None) for name in SAMPLED]
    wanted += [key for key in keys if key.metric == "minimal_pairs" or ("_pass_1" in key.metric and not key.split)]
    wanted += [key for key in keys if any(_is_task(cell.rows.get(key)) for cell in cells)]
    return [key for key in dict.fromkeys(wanted) if any(key in cell.rows for cell in cells)]


def _is_task(row: Mapping[str, Any] | None) -> bool:
    settings = (row or {}).get("settings") or {}
    return "task" in settings and isinstance(settings.get("higher_is_better"), bool)


def named_models(groups: Mapping[Any, list[Cell]]) -> list[Model]:
    """Those that no run of ours made last; each under the shortest name that is its own."""
    ordered = sorted(groups.items(), key=lambda item: (True, item[1][0].id) if item[0].arm.startswith(UNTOUCHED) else (False, ""))
    trained = [group for group, _ in ordered if not group.arm.startswith(UNTOUCHED)]
    names = []
    for group, cells in ordered:
        short = cells[0].id if len(cells) == 1 else _group_name(group, trained)
        names.append(_without_hash(short) if group.arm.startswith(UNTOUCHED) else short)
    ids = [cells[0].id if len(cells) == 1 else ", ".join(f"{part}" for part in group) for group, cells in ordered]
    own = [name if names.count(name) == 1 else full for name, full in zip(names, ids, strict=True)]
    return [Model(name, cells, not group.arm.startswith(UNTOUCHED)) for name, (group, cells) in zip(own, ordered, strict=True)]


def _group_name(group: Any, trained: Sequence[Any]) -> str:
    parts = [group.architecture] if len({other.architecture for other in trained}) > 1 else []
    parts += [group.arm] if len({other.arm for other in trained}) > 1 else []
    parts += [f"level {group.level:g}"] if group.level is not None else []
    return ", ".join(parts) or group.architecture


def _without_hash(name: str) -> str:
    """`NAME` of `NAME-1a2b3c4d` (cell.cell_ids)."""
    start, _, end = name.rpartition("-")
    return start if start and len(end) == 8 and set(end) <= set("0123456789abcdef") else name


def _facts(cell: Cell) -> dict[str, Any]:
    """Hashes of what the cell was measured on; cells of an earlier version have what stands for them."""
    texts, identity, suite = (cell.meta.get(name) if isinstance(cell.meta.get(name), dict) else {} for name in ("texts", "identity", "suite"))
    frequent = cell.meta.get("high_frequency")
    prompts = texts.get("prompts_sha") or _prompts_sha(cell)
    known = [identity.get("texts"), texts.get("held_out_characters"), texts.get("train_characters")]
    cut = isinstance(suite.get("prompts"), dict) and suite["prompts"].get("source") == "held_out"
    return {
        "suite": cell.meta.get("suite_fingerprint"), "version": identity.get("scores_version"), "prompts": prompts, "held_out": texts.get("held_out_sha") or known,
        TRAIN: texts.get("train_sha") or known, TOKENS: texts.get("tokenizer") or (["prompts", prompts] if cut else None),
        SET: frequent.get("sha") if isinstance(frequent, dict) else None, "task_files": identity.get("task_files"),
    }  # fmt: skip


def _prompts_sha(cell: Cell) -> str | None:
    path = cell.folder / "prompts.jsonl"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def comparable(one: Model, two: Model, key: Key) -> tuple[str, str]:
    """(why the two cannot be compared by this figure, why they are compared unpaired); "" for neither."""
    same = {name: one.facts[name] == two.facts[name] for name in one.facts}
    needs = measure_of(key, one.settings(key)).needs
    sampled = key.decoding is not None and "_pass_" not in key.metric
    if not same["suite"] or not same["task_files"]:
        return "evaluated under other suites", ""
    if not same["version"]:
        return "scored by other versions of the metrics", ""
    if TOKENS in needs and not same[TOKENS]:
        return "other tokenizers: their tokens are not the same amount of text", ""
    if SET in needs and not same[SET]:
        return "other high-frequency sets", ""
    on_train = TRAIN in needs or key.split == "train" or key.metric == "memorization_gap"
    if on_train and not same[TRAIN]:
        return "other training texts", ""
    on_held_out = key.split == "held_out" or key.metric == "memorization_gap"
    if (on_held_out or (sampled and not same["prompts"])) and not same["held_out"]:
        return "other held-out texts", ""
    for name in SIZES:
        sizes = [model.settings(key).get(name) for model in (one, two)]
        if sizes[0] != sizes[1]:
            return f"other sizes ({name.replace('_', ' ')} {sizes[0]} and {sizes[1]})", ""
    if sampled and not same["prompts"]:
        return "", "their tokenizers cut other prompts from the text"
    if (key.split or key.metric == "memorization_gap") and not same[TOKENS]:
        return "", "their tokenizers cut other windows from the text"
    return "", ""


def difference(one: Sequence[Cell], two: Sequence[Cell], key: Key, unpaired: str = "") -> Estimate:
    """`one` minus `two`. Single models are paired by their units, whatever seeds they were trained from."""
    if len(one) == len(two) == 1:
        one, two = ([replace(cell, seed=None) for cell in side] for side in (one, two))
    estimate = difference_estimate(one, two, key, paired=not unpaired)
    return replace(estimate, note="; ".join(filter(None, [unpaired, estimate.note])))


def _line(models: Sequence[Model], key: Key) -> Line:
    estimates = [_own(model, key) for model in models]
    human = [model.cells[0].value(_human(key)) for model in models] if key.decoding else []
    known = [value for value in human if value is not None]
    chance = next((value for model in models if isinstance(value := model.settings(key).get("chance"), (int, float))), None)
    pairs = _pairs(models, key, estimates)
    best, undecided = _best(models, key, estimates, pairs)
    # Prompts of other tokenizers have other continuations: no one figure stands for them.
    shown = known[0] if known and max(known) - min(known) <= 1e-9 * max(1.0, abs(known[0])) else None
    return Line(key, estimates, shown, chance, best, undecided, pairs)


def _own(model: Model, key: Key) -> Estimate:
    """The model's figure; its note holds the estimate's, and what the cells say of the measurement."""
    estimate = group_estimate(model.cells, key)
    noted = [str(row["note"]) for cell in model.cells if (row := cell.rows.get(key)) and row.get("note")]
    if estimate.value is None:
        broken = any(cell.rows[key].get("value") is not None for cell in model.cells if key in cell.rows)
        return replace(estimate, note="; ".join(dict.fromkeys(noted)) or ("not a finite number" if broken else "not measured"))
    of_cells = [part for note in noted for part in note.split("; ") if "interval" not in part]  # those are of a cell's own interval
    return replace(estimate, note="; ".join(dict.fromkeys([*filter(None, estimate.note.split("; ")), *of_cells])))


def _pairs(models: Sequence[Model], key: Key, estimates: Sequence[Estimate]) -> list[Pair]:
    found = []
    for i, j in combinations(range(len(models)), 2):
        one, two = models[i], models[j]
        if estimates[i].value is None or estimates[j].value is None or (len(models) > MAX_RANKED and one.trained and two.trained):
            continue
        why_not, unpaired = comparable(one, two, key)
        found.append(Pair(key, i, j, None if why_not else difference(one.cells, two.cells, key, unpaired), None, why_not))
    adjusted = holm([pair.estimate.p if pair.estimate else None for pair in found])
    return [replace(pair, p=p) for pair, p in zip(found, adjusted, strict=True)]


def _best(models: Sequence[Model], key: Key, estimates: Sequence[Estimate], pairs: Sequence[Pair]) -> tuple[int | None, str]:
    """(place of the model that is better than every other one, why there is none)."""
    direction = measure_of(key, models[0].settings(key)).best
    values = {place: estimate.value for place, estimate in enumerate(estimates) if estimate.value is not None}
    if direction is None or len(values) < 2:
        return None, ""
    toward = {place: _target(models[place], key, direction) for place in values}
    if None in toward.values():
        return None, "no human text to compare with"
    if direction == HUMAN and len({json.dumps(models[place].facts["prompts"]) for place in values}) > 1:
        return None, "other prompts have other human continuations"
    distance = {place: (value if direction == LOWER else -value if toward[place] is True else abs(value - toward[place]))
                for place, value in values.items()}  # fmt: skip
    place = min(distance, key=lambda item: distance[item])
    own = {pair.two if pair.one == place else pair.one: pair for pair in pairs if place in (pair.one, pair.two)}
    for other in values.keys() - {place}:
        pair = own.get(other)
        if pair is None or pair.why_not:
            return None, pair.why_not if pair else f"of more than {MAX_RANKED} models, not every pair is compared"
        if not pair.decided:
            return None, "not decidable"
        if direction in (HUMAN, ZERO) and not _same_side(models, place, other, key, direction):
            return None, f"not decidable: on both sides of {'human text' if direction == HUMAN else '0'}, or too near to it"
    return place, ""


def _target(model: Model, key: Key, direction: str) -> float | bool | None:
    """What a value should be near to; True where only its order counts."""
    if direction == ZERO:
        return 0.0
    return model.cells[0].value(_human(key)) if direction == HUMAN else True


def _human(key: Key) -> Key:
    return Key(key.metric, REFERENCE, None)


def _same_side(models: Sequence[Model], near: int, far: int, key: Key, direction: str) -> bool:
    """Whether the middle between two values lies beyond the target, by the wider interval that correlation may give it.

    |far - target| > |near - target| says that (near + far) / 2 - target has the sign of far - near.
    """
    apart = [_apart(models[place], key, direction) for place in (near, far)]
    if any(item.value is None or item.low is None for item in apart):
        return False
    middle = (apart[0].value + apart[1].value) / 2
    # A standard deviation of a sum is at most the sum of those of its parts, so half-widths add at worst.
    half = sum((item.high - item.low) / 2 for item in apart) / 2
    return abs(middle) > half and (apart[1].value - apart[0].value > 0) == (middle > 0)


def _apart(model: Model, key: Key, direction: str) -> Estimate:
    """The model's figure minus its target's."""
    if direction == ZERO:
        return group_estimate(model.cells, key)
    humans = [replace(cell, rows={**cell.rows, key: cell.rows[_human(key)]},
                      measured={**cell.measured, **({key: cell.measured[_human(key)]} if _human(key) in cell.measured else {})})
              for cell in model.cells if _human(key) in cell.rows]  # fmt: skip
    return difference_estimate(model.cells, humans, key)


def parts_of(estimate: Estimate) -> list[str]:
    """The single notes of an estimate."""
    return [part for part in estimate.note.split("; ") if part] if estimate.value is not None else [estimate.note]


def undecided(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines in which no model is marked although one could be, by the reason."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line.undecided:
            found.setdefault(line.undecided, []).append(line)
    return found


def common_notes(estimates: Iterable[Estimate]) -> list[str]:
    """Notes that every figure with a value has, where there are several: told once for all."""
    noted = [parts_of(estimate) for estimate in estimates if estimate.value is not None]
    return [note for note in noted[0] if all(note in notes for notes in noted)] if len(noted) > 1 else []
