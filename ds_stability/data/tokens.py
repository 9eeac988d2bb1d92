"""From documents to token ids: encoding, the token store and its form on disk."""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .chat import encode_chat
from .spec import Document

PIECE_CHARACTERS = 1 << 16
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document, its end-of-document token included; `supervised` is None where all of them are."""

    ids: Sequence[int]
    supervised: Sequence[bool] | None = None


def encode_documents(
    documents: Iterable[Document], tokenizer: Any, assistant_only_loss: bool = False
) -> Iterator[Encoded]:
    """Tokenize in order, many at a time.

    A text gets the tokenizer's BOS in front if the tokenizer writes one by itself, and EOS at the end unless it is there.
    Special tokens written out in a text are read as such (texts are often chats rendered beforehand). A rendered chat
    stands as the template wrote it. UserError if the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, which must stand between documents; set eos_token "
                        "in its tokenizer_config.json or choose another (--tokenizer_name)")
    prefix = leading_ids(tokenizer)
    for batch in _batches(documents):
        if batch[0].messages is not None:
            yield Encoded(*encode_chat(batch[0], tokenizer, assistant_only_loss))
            continue
        pieces = [list(split_pieces(document.text)) for document in batch]
        rows = _encode_pieces([piece for document in pieces for piece in document], tokenizer)
        for document in pieces:
            ids = array("i", (token for _ in document for token in next(rows)))
            if not ids:
                continue
            if ids[: len(prefix)].tolist() != prefix:
                ids = array("i", prefix) + ids
            if ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
            yield Encoded(ids)


def _encode_pieces(pieces: list[str], tokenizer: Any) -> Iterator[list[int]]:
    """The ids of each piece; some pieces at a time, so that a huge document needs no huge encoding."""
    first = 0
    while first < len(pieces):
        last, size = first, 0
        while last < len(pieces) and size < BATCH_CHARACTERS:
            size += len(pieces[last])
            last += 1
        group = pieces[first:last]
        yield from tokenizer(group, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        first = last


def leading_ids(tokenizer: Any) -> list[int]:
    """[bos] if the tokenizer puts its BOS before a text by itself, else []."""
    ids = tokenizer("", verbose=False)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of texts of about BATCH_CHARACTERS; a chat is a batch of its own."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        chat = document.messages is not None
        if batch and (chat or size >= BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        if chat:
            yield [document]
        else:
            batch.append(document)
            size += len(document.text)
    if batch:
        yield batch


def split_pieces(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long text before whitespace into pieces of at most `limit` characters.

    Pieces are encoded in parallel, in bounded memory. A cut changes a token at most where a tokenizer merges across
    the whitespace.
    """
    start = 0
    while len(text) - start > limit:
        cut = max(text.rfind("\n", start + 1, start + limit), text.rfind(" ", start + 1, start + limit))
        cut = cut if cut > start else start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]


@dataclass(frozen=True)
class TokenStore:
    """All tokens of a corpus, one after another.

    ids int32 [N]; starts int64 [D + 1], the first token of each document and N at the end; supervised bool [N], or None
    where every token is. The arrays may be memory-mapped.
    """

    ids: np.ndarray
    starts: np.ndarray
    supervised: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    def fingerprint(self) -> str:
        """sha256 of the tokens, the document borders and the supervision."""
        digest = hashlib.sha256()
        for values in (self.ids, self.starts) + ((self.supervised,) if self.supervised is not None else ()):
            for start in range(0, len(values), 1 << 22):
                digest.update(np.ascontiguousarray(values[start : start + (1 << 22)]).tobytes())
        return digest.hexdigest()

    def save(self, directory: str) -> None:
        """Write to `directory` at once: a reader sees all of it or nothing. Whoever comes second keeps the first's."""
        parent = os.path.dirname(os.path.abspath(directory))
        os.makedirs(parent, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".tokens-", dir=parent)
        try:
            arrays = {"ids": self.ids, "starts": self.starts}
            if self.supervised is not None:
                arrays["supervised"] = self.supervised
            for name, values in arrays.items():
                with open(os.path.join(temporary, name + ".npy"), "wb") as file:
                    np.save(file, values, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            with open(os.path.join(temporary, "arrays.json"), "w") as file:
                json.dump(sorted(arrays), file)
            os.chmod(temporary, 0o755)
            os.rename(temporary, directory)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not os.path.exists(os.path.join(directory, "arrays.json")):
                raise

    @classmethod
    def load(cls, directory: str) -> "TokenStore":
        """Memory-map what `save` wrote."""
        with open(os.path.join(directory, "arrays.json")) as file:
            names = json.load(file)
        return cls(**{name: np.load(os.path.join(directory, name + ".npy"), mmap_mode="r") for name in names})


class TokenStoreBuilder:
    """Collects encoded documents into a TokenStore."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._starts = array("q", [0])
        self._supervised: bytearray | None = None

    def add(self, encoded: Encoded) -> None:
        before = len(self._ids)
        self._ids.extend(encoded.ids)
        self._starts.append(len(self._ids))
        if encoded.supervised is not None and self._supervised is None:
            self._supervised = bytearray(b"\1") * before
        if self._supervised is not None:
            self._supervised.extend(encoded.supervised if encoded.supervised is not None else b"\1" * len(encoded.ids))

    def finish(self) -> TokenStore:
        supervised = np.frombuffer(self._supervised, dtype=np.bool_) if self._supervised is not None else None
        ids = np.frombuffer(self._ids, dtype=np.int32) if self._ids else np.zeros(0, np.int32)
        return TokenStore(ids, np.frombuffer(self._starts, dtype=np.int64), supervised)


def build_store(documents: Iterable[Document], tokenizer: Any, assistant_only_loss: bool = False) -> TokenStore:
    """Tokenize `documents` into one store."""
    builder = TokenStoreBuilder()
    for encoded in encode_documents(documents, tokenizer, assistant_only_loss):
        builder.add(encoded)
    return builder.finish()
