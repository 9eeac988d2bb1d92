"""A generative task scored by exact match: pass@k over the samples of each item.

An item is a prompt with examples and the answer that should follow. The answer is looked for in the first line of what the
model writes (leading blank space aside). Where the right answer is a number, it is the first number of that line, compared
by value; else it is the whole line.

A number has digits with an optional sign (U+2212 and dashes too), decimals ("3.0" is 3, "3.5" is not; "3." ends a sentence),
groups of thousands ("1,000" is 1000; "1,2" is a list that begins with 1) and an exponent ("1e3"). Brackets, currency and
percent signs around it do not count. Part of something else is no number: "x3", "3rd", "3km", "3/4", "5^2", "3:30", "3.5.1".

Texts are compared in NFKC (ligatures, full-width digits), without case, with plain quotes and dashes, without punctuation or
blank space around them, and with single spaces inside. Unlike SQuAD's and lm-eval's `ignore_punctuation`, articles and
punctuation inside count. A model that writes nothing, or never a number, is wrong, and its score is 0.

pass@k is the chance that at least one of k samples is right, by the unbiased estimator of Chen et al. 2021 ("Evaluating
Large Language Models Trained on Code"): 1 - C(n - c, k) / C(n, k) for c right ones of n samples, averaged over items.
"""

import os
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from math import comb
from pathlib import Path
from typing import Any
from unicodedata import normalize

import regex

from ds_stability.data.text_files import iter_lines
from ds_stability.errors import UserError
from ds_stability.safe_read import is_text, parse_json

from .decoding import DEFAULT_DECODINGS, Decoding, sample_key
from .prompts import MAX_CHARACTERS
from .records import Measured
from .segments import plain

TASKS = Path(__file__).parent / "suites" / "tasks"
MAX_NEW_TOKENS = 16
SAMPLES = 8
PASS_AT = (1, 8)
CHANCE = 0.0  # of a text that must match
_PLAIN = str.maketrans({
    **dict.fromkeys("“”„‟«»", '"'), **dict.fromkeys("‘’‚‛‹›`´", "'"), **dict.fromkeys("‐‑‒–—―−", "-"), "\u200b": " ", "٫": ".", "٬": ",", "⁄": "/"})  # fmt: skip
_KEPT = rf"[^\p{{P}}\s{regex.escape(string.punctuation)}]"
_FIRST_KEPT, _LAST_KEPT = regex.compile(_KEPT), regex.compile(rf"(?r){_KEPT}")
# Nothing may adjoin that makes it part of a name, ordinal, unit, power, fraction, time or version; ++ keeps digits together.
_NUMBER = regex.compile(
    r"(?<![\p{Ll}\d_^]|\d[.:/]|(?<!\.)\.)"
    r"(?P<sign>(?<!\w)[-+])?(?:\p{Sc}\s?)?"
    r"(?P<digits>\d{1,3}(?:,\d{3})++(?!,?\d)(?:\.\d++)?|\d++(?:\.\d++)?|(?<![\w.])\.\d++)"
    r"(?P<exponent>e[+-]?\d{1,3}(?!\d))?"
    r"(?![\p{Ll}\d_^]|[.:/]\d)")  # fmt: skip
_NOT_IN_NUMBERS = regex.compile("[²³¹⁰⁴-⁻₀-₋]+"), regex.compile("[—―]")  # exponents; dashes that are no sign


@dataclass(frozen=True)
class Item:
    prompt: str
    answer: str
    kind: str = ""


def load_items(task: str, limit: int | None = None) -> list[Item]:
    """Items of a file, or of eval/suites/tasks/NAME.jsonl: {"prompt", "answer"} a line, and what else it likes.

    Raises:
        UserError: no such file or name, not UTF-8, a line that is no such object, no item.
    """
    path = TASKS / f"{task}.jsonl" if task in generative_tasks() else Path(task)
    if not os.path.isfile(path):
        raise UserError(f"exact_match.task {task}: No such file; give a file of {{\"prompt\", \"answer\"}} lines, or one of "
                        f"{', '.join(generative_tasks())}")  # fmt: skip
    items = [_item(line, f"{path} line {number}") for number, line in iter_lines(str(path)) if line.strip()]
    if not items:
        raise UserError(f"exact_match.task {path}: holds no item")
    return items[:limit]


def generative_tasks() -> list[str]:
    """Names of our own files of items."""
    return sorted(path.stem for path in TASKS.glob("*.jsonl") if not path.with_suffix(".yaml").exists())


def _item(line: str, where: str) -> Item:
    try:
        row = parse_json(line)
        prompt, answer, kind = row["prompt"], row["answer"], row.get("kind", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"exact_match.task {where}: is no JSON object with prompt and answer") from None
    if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt or not expected(answer):
        raise UserError(f"exact_match.task {where}: prompt and answer must be texts that are not empty")
    if not (is_text(prompt) and is_text(answer) and is_text(str(kind))) or len(line) > MAX_CHARACTERS:
        raise UserError(f"exact_match.task {where}: a NUL, half of a surrogate pair, or more than {MAX_CHARACTERS} characters")
    return Item(prompt, answer, str(kind))


def _folded(text: str) -> str:
    return normalize("NFKC", normalize("NFKC", plain(text)).translate(_PLAIN).casefold())


def normalized(text: str) -> str:
    """A text in the form that is compared (see the module); "" if it is no more than punctuation."""
    text = " ".join(_folded(text).split())
    first, last = _FIRST_KEPT.search(text), _LAST_KEPT.search(text)
    return text[first.start() : last.end()] if first else ""


def _number(text: str, whole: bool = False) -> str:
    """The value of the first number in a text, written in one way; "" if there is none, or with `whole` more than one word."""
    raised, dash = _NOT_IN_NUMBERS
    text = _folded(dash.sub(" ", raised.sub("^", text)))
    found = _NUMBER.search(text)
    if not found or (whole and regex.search(r"\w", text[: found.start()] + text[found.end() :])):
        return ""
    value = Decimal(found["digits"].replace(",", "") + (found["exponent"] or ""))
    digits = f"{value:f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"-{digits}" if found["sign"] == "-" and value else digits


def expected(answer: str) -> str:
    """The right answer in the form that is compared."""
    return _number(answer, whole=True) or normalized(answer)


def extracted(text: str, answer: str) -> str:
    """What a model answered, in the form that is compared; "" for nothing. The rule is the module's."""
    lines = plain(text).strip().splitlines()
    first = lines[0] if lines else ""
    return _number(first) if _number(answer, whole=True) else normalized(first)


def is_correct(text: str, answer: str) -> bool:
    return extracted(text, answer) == expected(answer)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chen et al. 2021, eq. 1: the share of k-subsets of the samples that hold a right one.

    Raises:
        ValueError: k is not within 1..samples, or correct not within 0..samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right ones among {samples} samples")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


class ExactMatchTask:
    """Task protocol: a unit is a batch of (item, sample) pairs whose members and padding the suite fixes.

    Args:
        generator: generation.Generator of the model.
        tokenizer: a prompt longer than the model's context loses its beginning, as in lm-eval.
        items: see `load_items`.
        seeds: sampling seeds; each draws `samples` texts of an item.
        samples: under each seed; 1 where the decoding is not random.
        decoding: how; by default the untruncated distribution at temperature 1.
        context_length: positions of the model; None: it names no limit.

    Raises:
        UserError: the context has no room for `max_new_tokens` and a prompt.
    """

    name = "exact_match"

    def __init__(
        self, generator: Any, tokenizer: Any, items: Sequence[Item], seeds: Sequence[int], *, samples: int = SAMPLES,
        decoding: Decoding = DEFAULT_DECODINGS["sample"], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 32,
        context_length: int | None = None, source: str = "",
    ):  # fmt: skip
        if context_length is not None and context_length <= max_new_tokens:
            raise UserError(f"exact_match.max_new_tokens {max_new_tokens}: leaves no room for a prompt in the model's context "
                            f"of {context_length}; lower it")  # fmt: skip
        self.generator, self.tokenizer, self.items, self.seeds = generator, tokenizer, list(items), list(seeds)
        self.decoding, self.max_new_tokens, self.batch_size, self.source = decoding, max_new_tokens, batch_size, source
        self.samples = samples if decoding.sampled else 1
        if not decoding.sampled:
            self.seeds = self.seeds[:1]
        room = None if context_length is None else context_length - max_new_tokens
        prompts = [_prompt_ids(tokenizer, item.prompt) for item in self.items]
        self.prompts = prompts if room is None else [ids[-room:] for ids in prompts]
        self.cut = sum(len(whole) > len(kept) for whole, kept in zip(prompts, self.prompts, strict=True))
        self.rows = [
            (index, place * self.samples + draw, seed, draw)
            for index in range(len(self.items))
            for place, seed in enumerate(self.seeds)
            for draw in range(self.samples)
        ]

    def units(self) -> list[str]:
        return [f"{start:07d}" for start in range(0, len(self.rows), self.batch_size)]

    def run(self, unit: str, scratch: Path) -> list[dict[str, Any]]:
        """Records of a batch: prompt, sample, seed, decoding, text, answer, correct (null where the text is not finite)."""
        rows = self.rows[int(unit) : int(unit) + self.batch_size]
        # Named apart from the samples task, whose prompts have the same numbers.
        keys = [sample_key(seed, f"{self.name}:{self.decoding.name}", index, draw) for index, _, seed, draw in rows]
        texts = self.generator.generate_keyed(
            [self.prompts[index] for index, *_ in rows], self.decoding, keys, self.max_new_tokens
        )
        return [self._record(row, generated) for row, generated in zip(rows, texts, strict=True)]

    def _record(self, row: tuple[int, int, int, int], generated: Any) -> dict[str, Any]:
        index, sample, seed, _ = row
        item, text = self.items[index], self.tokenizer.decode(generated.token_ids, skip_special_tokens=True)
        finite = generated.finish != "non_finite"
        return {
            "prompt": index, "sample": sample, "seed": seed, "decoding": self.decoding.name, "text": text,
            "finish": generated.finish, "answer": extracted(text, item.answer) if finite else None,
            "correct": is_correct(text, item.answer) if finite else None,
        }  # fmt: skip

    def measure(self, records: list[dict[str, Any]], scratch: Path) -> list[Measured]:
        """pass@1 and pass@8 (where there are so many samples), items as units; and pass@1 of each kind of item."""
        verdicts: dict[int, list[bool | None]] = {}
        for record in records:
            verdicts.setdefault(record["prompt"], []).append(record["correct"])
        kinds = sorted({item.kind for item in self.items if item.kind})
        measures = [self._measured(f"{self.name}_pass_{k}", k, verdicts) for k in PASS_AT]
        for kind in kinds if len(kinds) > 1 else []:
            of_kind = {index: found for index, found in verdicts.items() if self.items[index].kind == kind}
            measures.append(self._measured(f"{self.name}_{kind}_pass_1", 1, of_kind))
        return measures

    def _measured(self, metric: str, k: int, verdicts: dict[int, list[bool | None]]) -> Measured:
        where = {"decoding": self.decoding.name, "settings": self._settings(k)}
        samples = self.samples * len(self.seeds)
        broken = sum(None in found for found in verdicts.values())
        if broken:  # to leave them out would be to score a choice of items
            return Measured.null(metric, f"{broken} of {len(verdicts)} items have a text that is not finite", **where)
        if samples < k:
            return Measured.null(metric, f"pass@{k} needs {k} samples of an item; there are {samples}", **where)
        note = f"{self.cut} of {len(self.items)} prompts lost their beginning to fit into the model" if self.cut else None
        totals = [pass_at_k(len(found), sum(found), k) for found in verdicts.values()]
        return Measured(metric, list(verdicts), totals, [1.0] * len(totals), note=note, **where)

    def _settings(self, k: int) -> dict[str, Any]:
        decoding = {key: value for key, value in asdict(self.decoding).items() if key != "name"}
        return {
            "task": self.source or self.name, "k": k, "samples": self.samples * len(self.seeds), "chance": CHANCE,
            "max_new_tokens": self.max_new_tokens, "decoding": decoding, "estimator": "unbiased, Chen et al. 2021",
        }  # fmt: skip


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids with the BOS that the tokenizer writes by itself, without an end token: the text goes on."""
    ids = tokenizer.encode(prompt)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
