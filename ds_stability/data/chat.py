"""Chats through the tokenizer's chat template, with the tokens that the assistant wrote marked."""

import re
from typing import Any

from ..errors import UserError
from .spec import Document

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(document: Document, tokenizer: Any, assistant_only_loss: bool) -> tuple[list[int], list[bool] | None]:
    """Token ids of a rendered chat; and, if `assistant_only_loss`, which tokens the assistant wrote.

    With `{% generation %}` marks in the template, these marks decide. Without them the chat is rendered up to and with
    each assistant turn: what that turn added, end-of-turn token included, is the assistant's. A template that changes
    earlier turns when later ones follow cannot be read that way and is refused.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{document.where}: has chat messages, but the tokenizer has no chat template; use the tokenizer of "
                        "a chat model (--tokenizer_name) or a text field (--text_field)")
    if assistant_only_loss and not any(message["role"] == "assistant" for message in document.messages):
        ids = _tokenize(tokenizer, _render(document, tokenizer, document.messages))["input_ids"]
        return ids, [False] * len(ids)
    if assistant_only_loss and _GENERATION.search(tokenizer.get_chat_template()):
        out = _apply_template(document, tokenizer, document.messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, supervised = out["input_ids"], [bool(mark) for mark in out["assistant_masks"]]
    else:
        text = _render(document, tokenizer, document.messages)
        encoded = _tokenize(tokenizer, text, offsets=assistant_only_loss)
        ids = encoded["input_ids"]
        if not assistant_only_loss:
            return ids, None
        supervised = _inside(encoded["offset_mapping"], assistant_spans(document, tokenizer, text))
    if not any(supervised):
        raise UserError(f"{document.where}: the chat template marks no token of the assistant's turns; drop "
                        "--assistant_only_loss or mend the template")
    return ids, supervised


def assistant_spans(document: Document, tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns in the rendered `text`, without the whitespace that ends a turn."""
    spans = []
    for number, message in enumerate(document.messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(document, tokenizer, document.messages[:number], add_generation_prompt=True) if number else ""
        turn = _render(document, tokenizer, document.messages[: number + 1])
        if not (turn.startswith(prompt) and text.startswith(turn)):
            raise UserError(f"{document.where}: the chat template renders turn {number + 1} differently when it stands alone, "
                            "so the assistant's tokens cannot be told; drop --assistant_only_loss or put "
                            "{% generation %} marks into the template")
        spans.append((len(prompt), len(turn.rstrip())))
    return spans


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token lies in a span. Tokens without characters never do."""
    marks = [False] * len(offsets)
    position = 0
    for start, end in spans:
        while position < len(offsets) and offsets[position][0] < start:
            position += 1
        while position < len(offsets) and offsets[position][0] < end:
            marks[position] = offsets[position][1] > offsets[position][0]
            position += 1
    return marks


def _render(document: Document, tokenizer: Any, messages: list[dict], add_generation_prompt: bool = False) -> str:
    return _apply_template(document, tokenizer, messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _apply_template(document: Document, tokenizer: Any, messages: list[dict], **options: Any) -> Any:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{document.where}: the chat template refuses the messages ({reason}); mend the record") from error


def _tokenize(tokenizer: Any, text: str, offsets: bool = False) -> Any:
    if offsets and not tokenizer.is_fast:
        raise UserError("--assistant_only_loss needs a fast tokenizer, which knows each token's characters; "
                        f"{type(tokenizer).__name__} is not one")
    # The template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False)
