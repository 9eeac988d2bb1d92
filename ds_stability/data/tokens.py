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
from .windows import WINDOW_CHARACTERS, encode_text

BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document, its end-of-document token included; `supervised` is None where all of them are.

    chat: whether it is a chat, which is not cut at the end of a block.
    """

    ids: Sequence[int]
    supervised: Sequence[bool] | None = None
    chat: bool = False


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
            yield Encoded(*encode_chat(batch[0], tokenizer, assistant_only_loss), chat=True)
            continue
        if len(batch[0].text) > WINDOW_CHARACTERS:
            rows = [encode_text(batch[0].text, tokenizer)]
        else:
            rows = tokenizer([document.text for document in batch], add_special_tokens=False, return_attention_mask=False,
                             verbose=False)["input_ids"]  # fmt: skip
        for row in rows:
            ids = array("i", row)
            if not ids:
                continue
            if ids[: len(prefix)].tolist() != prefix:
                ids = array("i", prefix) + ids
            if ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
            yield Encoded(ids)


def leading_ids(tokenizer: Any) -> list[int]:
    """[bos] if the tokenizer puts its BOS before a text by itself, else []."""
    ids = tokenizer("", verbose=False)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of texts of about BATCH_CHARACTERS; a chat and a long text are batches of their own."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        alone = document.messages is not None or len(document.text) > WINDOW_CHARACTERS
        if batch and (alone or size >= BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        if alone:
            yield [document]
        else:
            batch.append(document)
            size += len(document.text)
    if batch:
        yield batch


@dataclass(frozen=True)
class TokenStore:
    """All tokens of a corpus, one after another.

    ids int32 [N]; starts int64 [D + 1], the first token of each document and N at the end; supervised bool [N], or None
    where every token is; chats bool [D], or None where no document is a chat. The arrays may be memory-mapped.
    """

    ids: np.ndarray
    starts: np.ndarray
    supervised: np.ndarray | None = None
    chats: np.ndarray | None = None

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
            arrays |= {name: values for name, values in (("supervised", self.supervised), ("chats", self.chats)) if values is not None}
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
        self._chats = bytearray()

    def add(self, encoded: Encoded) -> None:
        before = len(self._ids)
        self._ids.extend(encoded.ids)
        self._starts.append(len(self._ids))
        self._chats.append(encoded.chat)
        if encoded.supervised is not None and self._supervised is None:
            self._supervised = bytearray(b"\1") * before
        if self._supervised is not None:
            self._supervised.extend(encoded.supervised if encoded.supervised is not None else b"\1" * len(encoded.ids))

    def finish(self) -> TokenStore:
        supervised = np.frombuffer(self._supervised, dtype=np.bool_) if self._supervised is not None else None
        ids = np.frombuffer(self._ids, dtype=np.int32) if self._ids else np.zeros(0, np.int32)
        chats = np.frombuffer(self._chats, dtype=np.bool_) if any(self._chats) else None
        return TokenStore(ids, np.frombuffer(self._starts, dtype=np.int64), supervised, chats)


def build_store(documents: Iterable[Document], tokenizer: Any, assistant_only_loss: bool = False) -> TokenStore:
    """Tokenize `documents` into one store."""
    builder = TokenStoreBuilder()
    for encoded in encode_documents(documents, tokenizer, assistant_only_loss):
        builder.add(encoded)
    return builder.finish()
