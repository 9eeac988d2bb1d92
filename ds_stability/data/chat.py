"""Chats through the tokenizer's chat template, with the tokens that the assistant wrote marked."""

import re
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from .spec import Document

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


def encode_chat(document: Document, tokenizer: Any, assistant_only_loss: bool) -> tuple[list[int], list[bool] | None]:
    """Token ids of a rendered chat; and, if `assistant_only_loss`, which tokens the assistant wrote.

    With `{% generation %}` marks in the template, these marks decide. Without them the chat is rendered up to and with
    each assistant turn: what that turn added, end-of-turn token included, is the assistant's. A template that changes
    earlier turns when later ones follow cannot be read that way and is refused.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{document.where}: has chat messages, but the tokenizer has no chat template; use the tokenizer "
                        "of a chat model (--tokenizer_name) or a text field (--text_field)")
    text = _render(document, tokenizer, document.messages)
    if not assistant_only_loss:
        return _tokenize(tokenizer, text)["input_ids"], None
    if not tokenizer.is_fast:
        raise UserError("--assistant_only_loss needs a fast tokenizer, which knows each token's characters; "
                        f"{type(tokenizer).__name__} is not one")
    if _GENERATION.search(tokenizer.get_chat_template()):
        spans = _marked_spans(document, tokenizer)
    else:
        spans = assistant_spans(document, tokenizer, text)
    encoded = _tokenize(tokenizer, text, return_offsets_mapping=True)
    supervised = inside(encoded["offset_mapping"], spans)
    if not any(supervised) and any(message["role"] == "assistant" for message in document.messages):
        raise UserError(f"{document.where}: the chat template marks no token of the assistant's turns; drop "
                        "--assistant_only_loss or mend the template")
    return encoded["input_ids"], supervised


def assistant_spans(document: Document, tokenizer: Any, text: str) -> list[Span]:
    """Character spans of the assistant's turns in the rendered `text`, without the whitespace that ends a turn."""
    spans = []
    for number, message in enumerate(document.messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(document, tokenizer, document.messages[:number], add_generation_prompt=True) if number else ""
        turn = _render(document, tokenizer, document.messages[: number + 1])
        if not (turn.startswith(prompt) and text.startswith(turn)):
            raise UserError(f"{document.where}: the chat template renders turn {number + 1} differently when it stands "
                            "alone, so the assistant's tokens cannot be told; drop --assistant_only_loss or put "
                            "{% generation %} marks into the template")
        spans.append((len(prompt), len(turn.rstrip())))
    return spans


def _marked_spans(document: Document, tokenizer: Any) -> list[Span]:
    """Character spans between the `{% generation %}` marks.

    Not apply_chat_template(return_assistant_tokens_mask=True): it loses a turn whose first character belongs to a token
    with trimmed offsets, and fails on an empty span.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{key: value for key, value in message.items() if value is not None} for message in document.messages]
    _, spans = _guarded(document, lambda: render_jinja_template(
        [messages], chat_template=tokenizer.get_chat_template(), return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map))
    return spans[0]


def inside(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Whether each token begins in one of the `spans`; both in rising order."""
    marks = [False] * len(offsets)
    position = 0
    for start, end in spans:
        while position < len(offsets) and offsets[position][0] < start:
            position += 1
        while position < len(offsets) and offsets[position][0] < end:
            marks[position] = True
            position += 1
    return marks


def _render(document: Document, tokenizer: Any, messages: list[dict], add_generation_prompt: bool = False) -> str:
    return _guarded(document, lambda: tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt))


def _guarded(document: Document, call: Callable[[], Any]) -> Any:
    import jinja2

    try:
        return call()
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{document.where}: the chat template refuses the messages ({reason}); mend the record") from error


def _tokenize(tokenizer: Any, text: str, **options: Any) -> Any:
    # The template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)
