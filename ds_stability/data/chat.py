"""Chats through the tokenizer's chat template, with the tokens that the assistant wrote marked."""

import re
from typing import Any

from ..errors import UserError
from .rendering import Rendering
from .spec import Document

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


def encode_chat(document: Document, tokenizer: Any, assistant_only_loss: bool) -> tuple[list[int], list[bool] | None]:
    """Token ids of a rendered chat; and, if `assistant_only_loss`, which tokens the assistant wrote.

    A turn's end token is the assistant's as well. Where the template ends the last turn without one, the end of text is
    appended: a model that never saw an end never stops. Turns in `document.masked` are not supervised.
    """
    chat = Rendering.of(document, tokenizer)
    text = _ended(chat)
    if not assistant_only_loss:
        if document.masked:
            raise UserError(f"{document.where}: message {document.masked[0] + 1} has a weight of 0, which means something with "
                            "--assistant_only_loss alone; give it, or remove the weights")
        return _tokenize(tokenizer, text)["input_ids"], None
    if not tokenizer.is_fast:
        raise UserError("--assistant_only_loss needs a fast tokenizer, which knows each token's characters; "
                        f"{type(tokenizer).__name__} is not one")
    spans = assistant_spans(chat, text)
    encoded = _tokenize(tokenizer, text, return_offsets_mapping=True)
    supervised = inside(encoded["offset_mapping"], spans)
    if not any(supervised) and set(chat.assistants) - set(document.masked):
        raise UserError(f"{document.where}: the chat template marks no token of the assistant's turns; drop "
                        "--assistant_only_loss or mend the template")
    return encoded["input_ids"], supervised


def render_chat(document: Document, tokenizer: Any) -> str:
    """The text of a chat as it is trained on."""
    return _ended(Rendering.of(document, tokenizer))


def assistant_spans(chat: Rendering, text: str) -> list[Span]:
    """Character spans of what the assistant wrote in `text` (see `_ended`), end tokens included.

    `{% generation %}` marks in the template decide, if it has them; but the token that ends a turn belongs to it.
    """
    turns = [number for number in chat.assistants if number not in chat.document.masked]
    if not turns:
        return []
    if not _GENERATION.search(chat.tokenizer.get_chat_template(tools=chat.document.tools)):
        return Turns(chat, text).spans(turns)
    spans = _with_end_tokens(chat, text, chat.marked_spans(chat.messages))
    masked = [Turns(chat, text).region(number) for number in chat.document.masked if number in chat.assistants]
    return [span for span in spans if not any(span[0] <= end and start <= span[1] for start, end in masked)]


class Turns:
    """Where each turn stands in the text of a chat, told by what changes when the turn is another one.

    Rendered with a single character in place of turn k, the text agrees with the whole text before and after that turn. This
    holds for templates that write earlier turns otherwise than the last one (without their reasoning, say), or that put tools
    before the last question, where rendering the turns up to k does not give the beginning of the text.
    """

    def __init__(self, chat: Rendering, text: str):
        self.chat, self.text = chat, text
        self.prompts: dict[str, str] = {}

    def spans(self, turns: list[int]) -> list[Span]:
        """Spans of these turns: from the end of the generation prompt to the end token."""
        spans, border = [], 0
        for number in turns:
            start, end = self.region(number)
            start = self._after_prompt(number, border, start, end)
            rest = self.text[end:]
            last = number == len(self.chat.messages) - 1
            tail = rest if last else self._whole_tokens(rest[: shared(self.chat.end_of_turn, rest)], rest)
            border = end + len(tail.rstrip())
            if start < (spans[-1][1] if spans else 0):
                raise self._cannot_tell(number)
            spans.append((start, border))
        return spans

    def region(self, number: int) -> Span:
        """Where the text of turn `number` begins and ends, without the frame that any turn of the assistant has."""
        messages = self.chat.messages
        try:
            other = self.chat.render([*messages[:number], self.chat.plain_turn(self.chat.mark), *messages[number + 1 :]])
        except UserError:  # the results of a tool may be refused without the call
            return self._region_by_prefix(number) or self._region_of_call(number)
        if self.chat.mark not in other:
            raise UserError(f"{self.chat.document.where}: the chat template does not print turn {number + 1}, so the assistant's "
                            "tokens cannot be told; drop --assistant_only_loss or put {% generation %} marks into the template")
        return self._snapped(shared(self.chat.text, other), len(self.chat.text) - shared(self.chat.text[::-1], other[::-1]))

    def _snapped(self, start: int, end: int) -> Span:
        """The same place without a part of a token at its borders: two tokens may begin or end alike."""
        for token in self.chat.tokens.finditer(self.chat.text):
            start = token.start() if token.start() < start < token.end() else start
            end = token.end() if token.start() < end < token.end() else end
        return start, max(start, end)

    def _region_by_prefix(self, number: int) -> Span | None:
        """Where the turn stands if the turns up to it are the beginning of the text, else None."""
        if not number:
            return None
        prompt = self.chat.render(self.chat.messages[:number], prompt=True)
        turn = self.chat.render(self.chat.messages[: number + 1]).rstrip()
        if not (turn.startswith(prompt) and self.chat.text.startswith(turn)):
            return None
        return len(prompt), len(turn)

    def _region_of_call(self, number: int) -> Span:
        """Where a turn that calls tools stands: its beginning told by an answer without them, its end by other arguments."""
        messages, mark = self.chat.messages, self.chat.mark
        call, end = messages[number], self.chat.tokens.search(self.chat.end_of_turn)
        if "tool_calls" not in call or end is None:
            raise self._cannot_tell(number)
        following = next((n for n in range(number + 1, len(messages)) if messages[n]["role"] == "user"), len(messages))
        plain = self.chat.render([*messages[:number], self.chat.plain_turn(mark), *messages[following:]])
        calls = [{**one, "function": {**one["function"], "arguments": mark if isinstance(one["function"]["arguments"], str) else {mark: mark}}}
                 for one in call["tool_calls"]]  # fmt: skip
        other = self.chat.render([*messages[:number], {**call, "tool_calls": calls}, *messages[number + 1 :]])
        start, inside = shared(self.chat.text, plain), len(self.chat.text) - shared(self.chat.text[::-1], other[::-1])
        last = self.chat.text.find(end.group(), inside)
        if mark not in plain or mark not in other or not start <= inside <= last:
            raise self._cannot_tell(number)
        return self._snapped(start, last)

    def _cannot_tell(self, number: int) -> UserError:
        return UserError(f"{self.chat.document.where}: the chat template renders turn {number + 1} differently when it stands alone, "
                         "so the assistant's tokens cannot be told; drop --assistant_only_loss or put {% generation %} marks into "
                         "the template")

    def _whole_tokens(self, tail: str, rest: str) -> str:
        """`tail`, the beginning of `rest`, without a special token that it has the beginning of."""
        for token in self.chat.tokens.finditer(rest):
            if token.start() < len(tail) < token.end():
                return tail[: token.start()]
        return tail

    def _after_prompt(self, number: int, border: int, start: int, end: int) -> int:
        """Where the model takes over: after the generation prompt, of which reasoning may follow before `start`."""
        prompt = self._prompt(number)
        found = self.text.rfind(prompt, border, start) if prompt else -1
        if found < 0 and prompt:
            found = self.text.find(prompt, start, end)
        if found >= 0:
            return found + len(prompt)
        return max(border, len(self.text[:start].rstrip(" ")))  # the blank before a word belongs to its token

    def _prompt(self, number: int) -> str:
        """The generation prompt after turn `number` - 1; after a question, if there is no such turn."""
        before = self.chat.messages[:number] or [self.chat.plain_turn(self.chat.mark) | {"role": "user"}]
        role = before[-1]["role"]
        if role not in self.prompts:
            try:
                closed, opened = self.chat.render(before), self.chat.render(before, prompt=True)
                self.prompts[role] = opened[shared(closed, opened) :]
            except UserError:
                self.prompts[role] = ""
        return self.prompts[role]


def _ended(chat: Rendering) -> str:
    """The chat's text; with the end of text appended, if it ends with an assistant's turn and the template ends none with a token."""
    text, end = chat.text.rstrip(), chat.tokenizer.eos_token
    if chat.messages[-1]["role"] != "assistant" or text.endswith(end) or chat.tokens.search(chat.end_of_turn):
        return chat.text
    return text + end


def _with_end_tokens(chat: Rendering, text: str, spans: list[Span]) -> list[Span]:
    """Marked spans, each with the end token, if it follows; the last one with the end of text that was appended."""
    after = re.match(rf"\s*(?:{chat.tokens.pattern})", chat.end_of_turn)
    ends = [end for end in (after.group() if after else "", chat.tokenizer.eos_token) if end]
    return [(start, stop + next((len(end) for end in ends if text.startswith(end, stop)), 0)) for start, stop in spans]


def shared(a: str, b: str) -> int:
    """How many characters two texts have in common from their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def inside(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Whether each token has a character of the `spans`; both in rising order.

    Where a prompt ends with a blank ("Assistant: "), many tokenizers put it into the answer's first token, which begins before
    its span; of an answer of one word it is all there is. A token without a character (a dummy prefix) belongs where it stands.
    """
    marks = [False] * len(offsets)
    position = 0
    for start, end in spans:
        while position < len(offsets) and offsets[position][1] <= start and offsets[position][0] < start:
            position += 1
        while position < len(offsets) and offsets[position][0] < end:
            marks[position] = True
            position += 1
    return marks


def _tokenize(tokenizer: Any, text: str, **options: Any) -> Any:
    # The template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)
