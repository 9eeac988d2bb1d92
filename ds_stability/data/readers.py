"""Documents from files, hub data sets and built-in corpora. Nothing is tokenized here."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import UserError
from .messages import normal_messages, normal_tools, with_system
from .spec import DataSpec, Document, file_kind
from .text_files import iter_lines, iter_text_documents

_LONGEST_LIST = 12
_DEEPEST = 20  # levels of a chat message
_BESIDE_MESSAGES = ("tools", "system")  # fields of a row that belong to its chat


def read_documents(spec: DataSpec, split: str = "train") -> Iterator[Document]:
    """Yield the documents of `split` ("train" or "validation") in order; documents without a character are skipped.

    Raises UserError, while iterating, for the first thing that cannot be read, and for a source without any document.
    """
    files = spec.train_files if split == "train" else spec.validation_files
    if files:
        for path in files:
            yield from _non_empty(iter_file(path, spec), path)
    elif spec.dataset_name == "builtin:prose":
        from .builtin import prose_documents

        for number, text in enumerate(prose_documents(), 1):
            yield Document(text=text, where=f"builtin:prose document {number}")
    elif spec.dataset_name == "builtin:synthetic":
        yield from synthetic_documents(spec, split)
    else:
        name = spec.dataset_split if split == "train" else spec.dataset_validation_split
        yield from _non_empty(iter_hub(spec, name), f"{spec.dataset_name} (split {name})")


def _non_empty(documents: Iterable[Document | None], source: str) -> Iterator[Document]:
    found = False
    for document in documents:
        if document is not None:
            found = True
            yield document
    if not found:
        raise UserError(f"{source}: no document with any text in it; give a source that has some")


def iter_file(path: str, spec: DataSpec) -> Iterator[Document | None]:
    """The documents of one file, by its suffix; None for an empty record."""
    kind = file_kind(path)
    if kind == "text":
        return iter_text_documents(path, spec.text_document, spec.unwrap)
    return (iter_json if kind == "json" else iter_parquet)(path, spec)


def iter_json(path: str, spec: DataSpec) -> Iterator[Document | None]:
    """JSON Lines, blank lines skipped; a `.json` file may also be one array of objects, which is read whole."""
    may_be_array = path.lower().removesuffix(".gz").endswith(".json")
    for number, line in iter_lines(path):
        if not line.strip():
            continue
        if may_be_array and line.lstrip().startswith("["):
            yield from _json_array(path, spec)
            return
        may_be_array = False
        where = f"{path} line {number}"
        row = _parse(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: is {_kind(row)}; each line must be a JSON object such as "
                            f"{json.dumps({spec.text_field: '...'})}")
        yield document_from_row(row, spec, where)


def _json_array(path: str, spec: DataSpec) -> Iterator[Document | None]:
    rows = _parse("".join(line for _, line in iter_lines(path)), path)
    for number, row in enumerate(rows, 1):
        where = f"{path} item {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: is {_kind(row)}; each item of the array must be a JSON object")
        yield document_from_row(row, spec, where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        position = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({error.msg} at {position}); mend or remove the line") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: JSON that cannot be read ({type(error).__name__}); mend or remove the line") from error


def iter_parquet(path: str, spec: DataSpec) -> Iterator[Document | None]:
    """Parquet, a batch of rows at a time; only the columns that are used are read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            columns = [name for name in (spec.text_field, spec.messages_field) if name in names]
            if not columns:
                raise UserError(_no_field(path, spec, names))
            columns += [name for name in _BESIDE_MESSAGES if name in names and spec.messages_field in names and name not in columns]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield document_from_row(row, spec, f"{path} row {number}")
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)})") from error


def iter_hub(spec: DataSpec, split: str) -> Iterator[Document | None]:
    """A data set from the hub, or from a local data set folder, through `datasets.load_dataset`."""
    for number, row in enumerate(_hub_rows(spec, split), 1):
        yield document_from_row(row, spec, f"{spec.dataset_name} ({split}) row {number}")


def _hub_rows(spec: DataSpec, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    name = spec.dataset_name
    try:
        yield from datasets.load_dataset(
            name, spec.dataset_config, split=split, streaming=spec.streaming, revision=spec.dataset_revision)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise UserError(f"--dataset_name {name} (config {spec.dataset_config}, split {split}): cannot be loaded: "
                        f"{_first_line(error)}") from error


def synthetic_documents(spec: DataSpec, split: str) -> Iterator[Document]:
    """Sentences of the synthetic language. Held-out data is a sample of its own, so that both follow the language."""
    from .synthetic import SyntheticLanguage

    language = SyntheticLanguage(seed=spec.synthetic_seed)
    share = 1.0 if split == "train" else spec.validation_split_percentage / 100
    sample_seed = 2 * spec.seed + (split != "train")
    sentences = language.sample(n_tokens=max(1, round(share * spec.synthetic_tokens)), seed=sample_seed)
    for number, ids in enumerate(sentences, 1):
        yield Document(text=language.text(ids), where=f"builtin:synthetic {split} sentence {number}")


def document_from_row(row: dict[str, Any], spec: DataSpec, where: str) -> Document | None:
    """The document in one record; None if it is empty or null. The text field wins but with assistant_only_loss."""
    if spec.text_field in row and not spec.assistant_only_loss:
        return _text_document(row[spec.text_field], spec.text_field, where)
    if spec.messages_field in row:
        return _chat_document(row, spec.messages_field, where)
    raise UserError(_no_field(where, spec, list(row)))


def _text_document(text: Any, field: str, where: str) -> Document | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is {_kind(text)}; a string is needed (name another with --text_field)")
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} has half a surrogate pair at character {error.start}; mend the "
                        "record") from error
    return Document(text=text, where=where) if text.strip() else None


def _chat_document(row: dict[str, Any], field: str, where: str) -> Document | None:
    messages = row[field]
    if messages is None or messages == []:
        return None
    if not isinstance(messages, list):
        raise UserError(f"{where}: field {field!r} is {_kind(messages)}; a list of "
                        "{\"role\": ..., \"content\": ...} is needed (name another with --messages_field)")
    for number, message in enumerate(messages, 1):
        _check_message(message, f"{where}: message {number} of {field!r}")
    _check_message(row.get("tools"), f"{where}: field 'tools'")
    messages, masked = normal_messages(with_system(messages, row.get("system")), where)
    tools = normal_tools(row.get("tools"), where)
    _check_message([messages, tools], where, -2)  # JSON text in it is read now
    return Document(messages=messages, where=where, tools=tools, masked=masked)


def _check_message(value: Any, where: str, depth: int = 0) -> None:
    """Contents may be parts and tool calls; but text must be text, and a template is not to walk down a thousand levels."""
    if depth > _DEEPEST:
        raise UserError(f"{where}: is nested more than {_DEEPEST} deep; mend the record")
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{where}: has half a surrogate pair in it; mend the record")
    elif isinstance(value, dict | list):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        for item in items:
            _check_message(item, where, depth + 1)


def _no_field(where: str, spec: DataSpec, found: list[str]) -> str:
    names = ", ".join(map(repr, found[:_LONGEST_LIST])) + (", ..." if len(found) > _LONGEST_LIST else "")
    if spec.assistant_only_loss:
        return (f"{where}: no field {spec.messages_field!r}, found {names or 'no field at all'}; --assistant_only_loss "
                "needs chat messages (--messages_field)")
    return (f"{where}: no field {spec.text_field!r} or {spec.messages_field!r}, found {names or 'no field at all'}; set "
            "--text_field or --messages_field")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else f"of type {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
