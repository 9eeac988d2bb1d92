"""How whole files are written: a reader sees the old file or the new one, never a part. Cheap to import."""

import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a whole file: temporary name in the same directory, fsync, rename, fsync of the directory.

    A reader sees the old file or the new one, never a part; text is UTF-8. The parent directory is made if absent.
    """
    write_atomic_parts(path, [content.encode("utf-8") if isinstance(content, str) else content])


def write_atomic_parts(path: str | os.PathLike, parts: Iterable[bytes]) -> None:
    """`write_atomic` of content that comes in parts, and need not fit into memory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """`write_atomic` of indented JSON. NaN and infinity are refused with ValueError: they are not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # an argument or a file name that is not UTF-8
        text = json.dumps(value, indent=2, allow_nan=False)
    write_atomic(path, text + "\n")


def sync_directory(path: str | os.PathLike) -> None:
    """fsync a directory, so that a rename in it outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
