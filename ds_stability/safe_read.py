"""JSON and YAML from files that anybody may have written: one kind of error, bounded work.

Python's readers raise more than their own errors (RecursionError for deep nesting, KeyError, AttributeError and ValueError
for odd YAML scalars), keep the last of two equal keys, and let aliases of a few lines stand for millions of values.
"""

import json
import os
from typing import Any

from ds_stability.errors import UserError
from ds_stability.safe_text import safe_line

MAX_YAML_BYTES = 2**18  # settings that a person writes; the reader takes two seconds for so much
MAX_JSON_BYTES = 2**28
MAX_DEPTH = 60  # of settings; the deepest of ours has 6
MAX_NODES = 100_000  # of settings, each alias counted as what it stands for
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def parse_json(text: str | bytes) -> Any:
    """`json.loads` of UTF-8, with or without a byte order mark.

    Raises:
        ValueError: whatever is wrong with it; nesting that is too deep and numbers of too many digits, too.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return json.loads(text.removeprefix(_BOM))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8 and given to the operating system: no half surrogate pair, no NUL."""
    return (value.isascii() and "\0" not in value) or not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)


def read_text(path: str | os.PathLike, limit: int = MAX_YAML_BYTES) -> str:
    """A UTF-8 file, without its byte order mark, its line ends as they are.

    Raises:
        OSError: it cannot be opened, or has no name that a file can have. ValueError: larger than `limit`, or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except ValueError as error:  # a NUL byte or half a surrogate pair in the name
        raise OSError(str(error)) from None
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit // 1024} KiB")
    try:
        return data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}) text") from None


def read_json(path: str | os.PathLike, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON in a file. OSError and ValueError as of `read_text` and `parse_json`."""
    return parse_json(read_text(path, limit))


def read_yaml(path: str | os.PathLike, what: str) -> Any:
    """The YAML in a file.

    Args:
        what: begins the message, such as "--suite my.yaml".

    Raises:
        UserError: one line; unreadable, no YAML, a key twice in one mapping, aliases without end, nesting too deep.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{what}: cannot be read ({error})") from None
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{what}: is no YAML ({error})") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, by the rules of YAML 1.2 (yaml_core.py).

    Raises:
        ValueError: whatever is wrong with it, with the line.
    """
    import yaml

    from ds_stability.yaml_core import CoreLoader

    try:
        loader = CoreLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check(loader).visit(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1 if mark else '?'}: {safe_line(error.problem or 'it cannot be parsed', 200)}") from None
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise ValueError(safe_line(str(error).partition("\n")[0], 200)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Check:
    """Refuses, before anything is built, what is too deep, too much with its aliases written out, or holds itself; a key
    that stands twice (YAML silently keeps the last); and scalars that make the library fail."""

    def __init__(self, loader: Any):
        self.loader = loader
        self.known: dict[int, tuple[int, int]] = {}  # node -> (values, depth)
        self.open: set[int] = set()

    def visit(self, node: Any) -> tuple[int, int]:
        """(values, depth) of a node. ValueError with the line."""
        import yaml

        if id(node) in self.known:
            return self.known[id(node)]
        line = node.start_mark.line + 1
        if id(node) in self.open:
            raise ValueError(f"line {line}: an alias in it stands for the whole")
        self.open.add(id(node))
        found = []
        if isinstance(node, yaml.ScalarNode):
            self._scalar(node)
        elif isinstance(node, yaml.SequenceNode):
            found = [self.visit(child) for child in node.value]
        else:
            self._refuse_duplicates(node)
            found = [self.visit(child) for _, child in node.value]
        self.open.discard(id(node))
        size, depth = 1 + sum(count for count, _ in found), 1 + max((level for _, level in found), default=0)
        if size > MAX_NODES or depth > MAX_DEPTH:
            much = f"more than {MAX_NODES} values, each alias counted as what it stands for" if size > MAX_NODES else f"nested more than {MAX_DEPTH} deep"
            raise ValueError(f"line {line}: {much}")
        self.known[id(node)] = size, depth
        return size, depth

    def _refuse_duplicates(self, node: Any) -> None:
        import yaml

        seen: set[Any] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {line}: a key that is no text or number")
            key = "<<" if key_node.tag.endswith(":merge") else self._scalar(key_node)
            if key in seen:
                raise ValueError(f"line {line}: the key {safe_line(key_node.value, 60)} stands twice")
            seen.add(key)

    def _scalar(self, node: Any) -> Any:
        """The value of a scalar. The library raises odd errors for a number of too many digits, and for a tag that does not
        fit (!!bool x, !!timestamp 2001-99-99)."""
        try:
            value = self.loader.construct_object(node)
            hash(value)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, IndexError):
            shown = safe_line(node.value, 40)
            raise ValueError(f"line {node.start_mark.line + 1}: the value {shown} cannot be read; put it in quotes") from None
        if isinstance(value, str) and not is_text(value):
            raise ValueError(f"line {node.start_mark.line + 1}: a NUL character, or half of a surrogate pair, which is no text")
        return value
