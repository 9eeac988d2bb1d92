"""Lines and documents of plain text files, with errors that name the file and the byte."""

import gzip
import re
import zlib
from collections.abc import Iterator

from ..errors import UserError
from .spec import Document

_UTF8_BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 2**28  # of a record or a line; a compressed file of a few MB can hold a line of gigabytes
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def iter_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its "\\n") of a UTF-8 file, gzipped if it ends in .gz; "\\r\\n" becomes "\\n".

    Only one line is in memory at a time, of at most MAX_LINE_BYTES. A NUL byte is an error: it means a binary file or
    UTF-16, never text.
    """
    offset = 0
    try:
        with gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                if len(raw) > MAX_LINE_BYTES:
                    raise UserError(f"{path} line {number}: is longer than {MAX_LINE_BYTES // 2**20} MiB; cut it into lines or "
                                    "records")
                if number == 1 and raw.startswith(_UTF16_BOMS):
                    raise UserError(f"{path}: is UTF-16, UTF-8 is needed; convert it: iconv -f UTF-16 -t UTF-8")
                start = len(_UTF8_BOM) if number == 1 and raw.startswith(_UTF8_BOM) else 0
                yield number, _decode(raw[start:], path, offset + start)
                offset += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is not a complete gzip file ({error}); compress it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # no name that a file can have; a UserError is one, too
        raise error if isinstance(error, UserError) else UserError(f"{path}: cannot be read ({error})") from error


def _decode(raw: bytes, path: str, offset: int) -> str:
    position = raw.find(b"\0")
    if position >= 0:
        raise UserError(f"{path}: NUL byte at byte {offset + position}; a UTF-8 text file is needed (is it binary or "
                        "UTF-16?)")
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise UserError(f"{path}: byte {offset + error.start} (0x{byte:02x}) is not UTF-8; convert the file, for "
                        "example: iconv -f LATIN1 -t UTF-8") from error
    return line[:-2] + "\n" if line.endswith("\r\n") else line


def unwrap_lines(text: str) -> str:
    """Join the hard-wrapped lines of each paragraph with a space; exactly one blank line stays between paragraphs."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n[^\S\n]*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def iter_text_documents(path: str, text_document: str, unwrap: bool) -> Iterator[Document]:
    """The non-empty documents of a text file: the whole file, or each paragraph (blank line between), or each line."""
    if text_document == "line":
        pieces = ((number, line) for number, line in iter_lines(path))
    elif text_document == "paragraph":
        pieces = _paragraphs(path)
    else:
        pieces = iter([(1, "".join(line for _, line in iter_lines(path)))])
    for number, piece in pieces:
        text = unwrap_lines(piece) if unwrap else piece.strip("\n")
        if text.strip():
            yield Document(text=text, where=f"{path} line {number}")


def _paragraphs(path: str) -> Iterator[tuple[int, str]]:
    lines: list[str] = []
    start = 1
    for number, line in iter_lines(path):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, "".join(lines)
            lines = []
    if lines:
        yield start, "".join(lines)
