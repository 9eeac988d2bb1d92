"""Prompts: windows of human text with the way it went on, or the lines of a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_stability.data.spec import Document, check_file
from ds_stability.data.text_files import iter_lines
from ds_stability.data.tokenizer import prompt_ids
from ds_stability.data.tokens import encode_documents, leading_ids
from ds_stability.errors import UserError
from ds_stability.safe_read import parse_json

from .records import Prompt

MAX_CHARACTERS = 1_000_000  # of a prompt: a tokenizer takes a gigabyte for a word of ten million letters
SLACK = 8  # tokens that a window may start later, to start with a word


@dataclass(frozen=True)
class Cut:
    """Prompts cut from text, and as many further windows, disjoint from them, as there are."""

    prompts: list[Prompt]
    others: list[Prompt]


def cut_prompts(texts: Sequence[str], tokenizer: Any, count: int, tokens: int, continuation: int) -> Cut:
    """`count` prompts of `tokens` tokens, spread evenly over `texts`, with up to `continuation` tokens that followed.

    Texts are cut into windows that do not overlap; every second one of 2 * count windows becomes a prompt and the others
    are left for comparison. With fewer windows than that, prompts come first. A text shorter than a window is one window,
    with a shorter continuation. A BOS that the tokenizer writes by itself stands before each prompt.

    Raises:
        UserError: `tokens` is 0 and the tokenizer writes no BOS: there is nothing to start from.
    """
    prefix = leading_ids(tokenizer)
    if tokens == 0 and not prefix:
        raise UserError("prompts.tokens is 0, but this tokenizer puts no BOS before a text, so that the prompts would be "
                        "empty; give prompts.tokens from 1")  # fmt: skip
    bodies = [_body(encoded.ids, prefix, tokenizer) for encoded in encode_documents(map(_document, texts), tokenizer)]
    windows = [(body, start, end) for body in bodies for start, end in _windows(len(body), tokens, continuation)]
    chosen = _evenly(len(windows), 2 * count)
    first = chosen[::2] if len(chosen) == 2 * count else _evenly(len(windows), count)
    rest = [index for index in chosen if index not in set(first)]
    make = [_cut(index, *windows[number], tokens, continuation, prefix, tokenizer)
            for index, number in enumerate([*first, *rest])]  # fmt: skip
    return Cut(make[: len(first)], make[len(first) :])


def _document(text: str) -> Document:
    return Document(text=text)


def _body(ids: Sequence[int], prefix: list[int], tokenizer: Any) -> list[int]:
    """The ids of a text without the BOS and the EOS that stand around it."""
    ids = list(ids)
    start = len(prefix) if ids[: len(prefix)] == prefix else 0
    return ids[start : -1 if ids and ids[-1] == tokenizer.eos_token_id else None]


def _windows(length: int, tokens: int, continuation: int) -> list[tuple[int, int]]:
    """(start, end) of the windows of a text of `length` tokens: room for slack, prompt and continuation."""
    size = tokens + continuation + SLACK
    if length <= tokens:
        return []
    return [(start, start + size) for start in range(0, length - size + 1, size)] or [(0, length)]


def _evenly(total: int, count: int) -> list[int]:
    """`count` of `total` indices, evenly spaced; all if there are no more."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)] if total > count else list(range(total))


def _cut(index: int, body: list[int], start: int, end: int, tokens: int, continuation: int, prefix: list[int],
         tokenizer: Any) -> Prompt:  # fmt: skip
    if end - start == tokens + continuation + SLACK and start > 0:
        start = next((s for s in range(start, start + SLACK + 1) if _starts_word(body[s], tokenizer)), start)
    prompt, reference = body[start : start + tokens], body[start + tokens : min(end, start + tokens + continuation)]
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    return Prompt(index, text, (*prefix, *prompt), tuple(reference), tokenizer.decode(reference, skip_special_tokens=True))


def _starts_word(token: int, tokenizer: Any) -> bool:
    return tokenizer.decode([token])[:1].isspace()


def prompts_from_file(path: str, tokenizer: Any, count: int | None = None, continuation: int | None = None) -> list[Prompt]:
    """The first `count` prompts of a file, with up to `continuation` tokens of their references.

    .jsonl: objects with "prompt" and optionally "reference"; anything else: a prompt a line, blank lines left out.

    Raises:
        UserError: not readable, not UTF-8, without a prompt, or with an empty one (the line is named).
    """
    check_file(path, "prompts.file")
    rows = []
    for number, line in iter_lines(path):
        if len(line) > MAX_CHARACTERS:
            raise UserError(f"prompts.file {path} line {number}: has {len(line)} characters, at most {MAX_CHARACTERS} are allowed")
        if line.strip():
            rows.append((f"prompts.file {path} line {number}", line.rstrip("\n")))
        if count is not None and len(rows) == count:
            break
    if not rows:
        raise UserError(f"prompts.file {path}: holds no prompt; write one a line")
    is_json = path.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json"))
    pairs = [_row(line, where) if is_json else (line, None) for where, line in rows]
    return [_prompt(index, text, reference, where, tokenizer, continuation)
            for index, ((where, _), (text, reference)) in enumerate(zip(rows, pairs, strict=True))]  # fmt: skip


def _row(line: str, where: str) -> tuple[str, str | None]:
    try:
        row = parse_json(line)
    except ValueError:
        raise UserError(f"{where}: is no JSON; write {{\"prompt\": \"...\"}}") from None
    text, reference = (row.get("prompt"), row.get("reference")) if isinstance(row, dict) else (None, None)
    if not isinstance(text, str) or not isinstance(reference, str | None):
        raise UserError(f"{where}: needs {{\"prompt\": \"...\"}}, and \"reference\" as a text where there is one")
    if not text.strip():
        raise UserError(f"{where}: the prompt is empty")
    if any("\ud800" <= c <= "\udfff" for c in text + (reference or "")):
        raise UserError(f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text; mend the escape")
    return text, reference or None


def _prompt(index: int, text: str, reference: str | None, where: str, tokenizer: Any, continuation: int | None) -> Prompt:
    ids = prompt_ids(text, tokenizer)
    if not ids:
        raise UserError(f"{where}: the prompt has no token")
    if reference is None:
        return Prompt(index, text, tuple(ids))
    following = tokenizer(reference, add_special_tokens=False, verbose=False)["input_ids"]
    if continuation is not None and len(following) > continuation:
        following = following[:continuation]
        reference = tokenizer.decode(following, skip_special_tokens=True)
    return Prompt(index, text, tuple(ids), tuple(following), reference)
