"""One chat under one chat template: the form of its messages that the template prints whole, and its text."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ..errors import UserError
from .messages import Messages
from .spec import Document

Message = dict[str, Any]


@dataclass(frozen=True)
class Rendering:
    """A chat in the form that the tokenizer's template takes; `text` is all of it as the template writes it."""

    document: Document
    tokenizer: Any
    messages: Messages
    text: str = ""

    @classmethod
    def of(cls, document: Document, tokenizer: Any) -> "Rendering":
        """The first form of the messages of which the template loses nothing.

        Raises:
            UserError: no chat template, or one that refuses the messages or leaves out tools, calls or the last reasoning.
        """
        if tokenizer.chat_template is None:
            raise UserError(f"{document.where}: has chat messages, but the tokenizer has no chat template; use the tokenizer "
                            "of a chat model (--tokenizer_name) or a text field (--text_field)")
        failure, found = None, None
        for messages in _forms(document.messages, tokenizer):
            chat = cls(document, tokenizer, messages)
            try:
                chat = cls(document, tokenizer, messages, chat.render(messages))
                chat._require_calls()
            except UserError as error:
                failure = failure or error
                continue
            found = found or chat
            if chat._shows_contents():
                found = chat
                break
        if found is None:
            raise failure
        found._require_tools()
        found._require_reasoning()
        return found

    def render(self, messages: Messages, prompt: bool = False, tools: bool = True) -> str:
        """The text of `messages`, with the beginning of an assistant's turn at its end if `prompt`."""
        return self._template(messages, self.document.tools if tools else None, add_generation_prompt=prompt)[0]

    def marked_spans(self, messages: Messages) -> list[tuple[int, int]]:
        """Character spans between the template's `{% generation %}` marks in the text of `messages`.

        Not apply_chat_template(return_assistant_tokens_mask=True): it loses a turn whose first character belongs to a token
        with trimmed offsets, and fails on an empty span.
        """
        return self._template(messages, self.document.tools, return_assistant_tokens_mask=True)[1][0]

    def _template(self, messages: Messages, tools: Any, **options: bool) -> tuple[str, list[list[tuple[int, int]]]]:
        """(text, marked spans). Not through apply_chat_template, which takes out contents that are null: a form of its own."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            template = self.tokenizer.get_chat_template(tools=tools)
            texts, spans = render_jinja_template([messages], tools=tools, chat_template=template, **options, **self.tokenizer.special_tokens_map)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.document.where}: the chat template refuses the messages ({reason}); mend the record") from error
        return texts[0], spans

    @cached_property
    def mark(self) -> str:
        """A character of private use that stands nowhere in the text."""
        return next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in self.text)

    @cached_property
    def assistants(self) -> list[int]:
        """Numbers of the assistant's turns."""
        return [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def tokens(self) -> re.Pattern[str]:
        """Finds the tokens of chats: see `added_tokens`."""
        return added_tokens(self.tokenizer, len(self.tokenizer))

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes after an assistant's text at the end of a chat."""
        alone = self.render([*self.messages[: self.assistants[-1]], self.plain_turn(self.mark)])
        return alone.rpartition(self.mark)[2]

    def plain_turn(self, content: str) -> Message:
        """A turn of the assistant that says `content`, in the form of this rendering."""
        parts = any(isinstance(message.get("content"), list) for message in self.messages)
        return {"role": "assistant", "content": [{"type": "text", "text": content}] if parts else content}

    def _require_calls(self) -> None:
        calling = [number for number, message in enumerate(self.messages) if "tool_calls" in message]
        if not calling:
            return
        arguments = [call["function"]["arguments"] for number in calling for call in self.messages[number]["tool_calls"]]
        if any(isinstance(value, dict) and value and repr(value) in self.text for value in arguments):
            raise UserError(f"{self.document.where}: the chat template prints arguments of tool calls as Python, not as JSON")
        silent = [{key: value for key, value in message.items() if key != "tool_calls"} for message in self.messages]
        try:
            lost = self.render(silent) == self.text
        except UserError:  # the template cannot do without them
            lost = False
        if lost:
            raise UserError(f"{self.document.where}: the chat template does not print the tool calls of turn {calling[0] + 1}; use "
                            "the tokenizer of a model that calls tools (--tokenizer_name), or remove the record")

    def _shows_contents(self) -> bool:
        contents = [message["content"] for message in self.messages if message["content"]]
        return not contents or _text_of(contents[-1]).strip() in self.text

    def _require_tools(self) -> None:
        if self.document.tools and self.render(self.messages, tools=False) == self.text:
            raise UserError(f"{self.document.where}: the chat template does not print the field 'tools', so that the model would "
                            "call tools that it was never told of; use a tokenizer whose template does, or remove the field")

    def _require_reasoning(self) -> None:
        last = self.messages[-1]
        reasoning = last.get("reasoning_content") or (_text_of(last["content"] or "").rpartition("</think>")[0]
                                                      if last["role"] == "assistant" else "")
        if reasoning.removeprefix("<think>").strip() not in self.text:
            raise UserError(f"{self.document.where}: the chat template leaves out the reasoning of the last turn, which would not be "
                            "trained on; use a template that prints it, or remove the reasoning from the record")


def _forms(messages: Messages, tokenizer: Any) -> Iterator[Messages]:
    """`messages` in the forms that templates are written for, the most usual first.

    Arguments of a tool call are an object for some templates and JSON text for others; a turn that is a call alone has the
    content "" or null; some take contents as lists of parts only.
    """
    role = _tool_role(tokenizer) if any(message["role"] == "tool" for message in messages) else "tool"
    usual = [{**message, "role": role} if message["role"] == "tool" else message for message in messages]
    yield usual
    if any("tool_calls" in message for message in messages):
        textual = [_with_text_arguments(message) for message in usual]
        yield textual
        yield [_with_null(message) for message in usual]
        yield [_with_null(message) for message in textual]
    yield [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in usual]


def _tool_role(tokenizer: Any) -> str:
    """GLM-4's template writes roles as they come, and its token for a tool's result is <|observation|>."""
    names_it = re.search(r"""["']tool["']""", tokenizer.get_chat_template(tools=[{}]))
    known = added_tokens(tokenizer, len(tokenizer)).fullmatch("<|observation|>")
    return "observation" if known and not names_it else "tool"


@lru_cache(maxsize=8)
def added_tokens(tokenizer: Any, size: int) -> re.Pattern[str]:
    """Finds the tokens that were added to a vocabulary of text, special or not, and the end of text. `size` is len(tokenizer)."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()} | {tokenizer.eos_token}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [{**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
             for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _with_null(message: Message) -> Message:
    return {**message, "content": None} if "tool_calls" in message and not message["content"] else message


def _text_of(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else content[0]["text"]
