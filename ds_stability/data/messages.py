"""The messages of a chat in one form, whatever form a record has them in: roles, contents, tool calls, weights.

Afterwards a message has `role` (system, developer, user, assistant or tool) and `content` (a string); an assistant's may have
`tool_calls` and `reasoning_content`. No null is left: Arrow pads every object of a column with the keys of all others.
"""

import json
from typing import Any

from ..errors import UserError

ALIASES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard", "ai", "function_call", "tool_call"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
ROLES = {alias: role for role, aliases in ALIASES.items() for alias in aliases}
CALLS = ("function_call", "tool_call")  # ShareGPT: a turn that is a call, written as JSON
WEIGHTS = ("weight", "loss_mask", "loss_weight", "loss", "train", "train_on", "trainable")
REASONING = ("reasoning_content", "reasoning", "thinking")

Messages = list[dict[str, Any]]


def normal_messages(messages: list[Any], where: str) -> tuple[Messages, tuple[int, ...]]:
    """(messages in the form above, numbers of the turns from 0 that are not to be supervised).

    Raises:
        UserError: no object, an unknown role, a part that is no text, a weight other than 0 and 1, a call without a name.
    """
    normal, masked = [], []
    for number, given in enumerate(messages):
        place = f"{where}: message {number + 1}"
        message = without_nulls(given) if isinstance(given, dict) else {}
        if _trained(message, place) is False:
            masked.append(number)
        normal.append(_normal(message, place))
    return normal, tuple(masked)


def with_system(messages: list[Any], system: Any) -> list[Any]:
    """ShareGPT's records may have the system prompt in a field beside the turns; elsewhere such a field means nothing."""
    sharegpt = messages and isinstance(messages[0], dict) and messages[0].get("from") is not None
    if not sharegpt or not isinstance(system, str) or not system.strip() or messages[0]["from"] == "system":
        return messages
    return [{"from": "system", "value": system}, *messages]


def normal_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools of a record, as a list of {"type": "function", "function": {...}}; None without any. JSON text is read."""
    tools = _parsed(tools, f"{where}: field 'tools'") if isinstance(tools, str) and tools.strip() else tools or None
    if tools is None:
        return None
    try:
        tools = without_nulls([tool for tool in tools if tool is not None] if isinstance(tools, list) else tools)
    except RecursionError:
        raise UserError(f"{where}: field 'tools' is nested too deeply; mend the record") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: field 'tools' is no list of objects; write {{\"type\": \"function\", \"function\": ...}}")
    return [_wrapped(tool) for tool in tools] or None


def without_nulls(value: Any) -> Any:
    """`value` without the keys, at any depth, whose value is null. Items of a list stay where they are."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _trained(message: dict[str, Any], place: str) -> bool | None:
    """Whether the turn is to be supervised, as its weight says; None without one. The weight is taken out."""
    if message.get("train_detail"):
        raise UserError(f"{place}: has train_detail (a weight for each part), which is not read; give the turn a weight of 0 or 1")
    given = {key: message.pop(key) for key in WEIGHTS if key in message}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{place}: {key} {value!r}; allowed are 0 (the turn is not trained on) and 1")
    if len(set(map(bool, given.values()))) > 1:
        raise UserError(f"{place}: {' and '.join(given)} contradict each other; keep one of them")
    return bool(next(iter(given.values()))) if given else None


def _normal(message: dict[str, Any], place: str) -> dict[str, Any]:
    given = message.pop("role", None) or message.pop("from", None)
    if not isinstance(given, str):
        raise UserError(f'{place} is not an object with "role" and "content" (or "from" and "value")')
    name = given.strip().lower()
    if name not in ROLES:
        raise UserError(f"{place}: unknown role {given!r}; allowed are {', '.join(ROLES)}")
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    if name in CALLS and "tool_calls" not in message:
        message["tool_calls"], content = _parsed(content, f"{place} ({name})"), ""
    normal = {"role": ROLES[name], "content": "", **message}
    _read_calls(normal, place)
    _read_reasoning(normal, place)
    if content is None and not ("tool_calls" in normal or "reasoning_content" in normal):
        raise UserError(f'{place} is not an object with "role" and "content": its content is missing or null')
    normal["content"] = _joined(content, place)
    return normal


def _joined(content: Any, place: str) -> str:
    """Text, or the text parts of a list one after another."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise UserError(f"{place}: its content is of type {type(content).__name__}; allowed are text and a list of text parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{place}: has a part of type {kind!r}; a language model is trained on text parts alone: remove the record")
        texts.append(text)
    return "".join(texts)


def _read_reasoning(message: dict[str, Any], place: str) -> None:
    found = [message.pop(key) for key in REASONING if key in message]
    if not all(isinstance(text, str) for text in found):
        raise UserError(f"{place}: its reasoning is no text")
    if any(text.strip() for text in found):
        message["reasoning_content"] = next(text for text in found if text.strip())


def _read_calls(message: dict[str, Any], place: str) -> None:
    single = message.pop("function_call", None)  # OpenAI's older form
    calls = message.pop("tool_calls", None) or ([single] if single else [])
    calls = _parsed(calls, f"{place}: tool_calls") if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, dict) else calls
    if calls and message["role"] != "assistant":
        raise UserError(f"{place}: a turn of role {message['role']!r} has tool_calls; the assistant alone calls tools")
    if not isinstance(calls, list):
        raise UserError(f"{place}: tool_calls is no list")
    read = [_call(call, f"{place}: tool call {number}") for number, call in enumerate((c for c in calls if c is not None), 1)]
    if read:
        message["tool_calls"] = read


def _call(call: Any, place: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name": ..., "arguments": an object}}, with what else stood there."""
    call = _wrapped(call) if isinstance(call, dict) else {}
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(f'{place}: is not an object with "function": {{"name": ..., "arguments": ...}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise UserError(f"{place}: arguments is no JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def _wrapped(function: dict[str, Any]) -> dict[str, Any]:
    """A bare {"name": ...} in the wrapper that templates look into."""
    bare = "function" not in function and "name" in function and function.get("type", "function") == "function"
    if not bare:
        return function if "type" in function or "function" not in function else {"type": "function", **function}
    inner = {key: value for key, value in function.items() if key not in ("type", "id")}
    outer = {key: function[key] for key in ("id",) if key in function}
    return {**outer, "type": "function", "function": inner}


def _parsed(text: Any, place: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{place}: is no valid JSON; mend the record") from None
