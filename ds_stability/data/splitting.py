"""Held-out documents, chosen from the text alone: the same for every tokenizer, world size and order of reading."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from ..errors import UserError
from .spec import Document

FEW_HELD_OUT = 10  # below so many held-out documents on average, hashing alone would give an uneven share
MIN_TAIL_CHARACTERS = 1000
_CUT_WINDOW = 5000


def document_key(document: Document, seed: int = 0) -> int:
    """A uniform 64-bit number from the content of a document and `seed`. Equal documents fall on the same side."""
    content = document.text if document.text is not None else json.dumps(document.messages, sort_keys=True)
    salt = (seed % 2**64).to_bytes(8, "little")
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8, key=salt).digest()
    return int.from_bytes(digest, "little")


def is_held_out(document: Document, fraction: float, seed: int = 0) -> bool:
    """Whether a document belongs to the held-out `fraction` of a large corpus."""
    return document_key(document, seed) < fraction * 2**64


def split_stream(
    documents: Iterable[Document], fraction: float, seed: int = 0
) -> tuple[str, Iterator[tuple[Document, bool]]]:
    """How `documents` are split, and the stream of (document, held out?) in reading order.

    "documents": whole documents by key; of a small corpus exactly round(fraction * n), at least one.
    "tails": of few, long texts (novels, say) the last `fraction` of each, cut at a paragraph, line or word.
    "none": `fraction` is 0. UserError if one short document is all there is.
    """
    if fraction == 0:
        return "none", ((document, False) for document in documents)
    documents = iter(documents)
    few = math.ceil(FEW_HELD_OUT / fraction)
    head = list(islice(documents, few))
    if len(head) == few:
        return "documents", ((document, is_held_out(document, fraction, seed)) for document in chain(head, documents))
    characters = sum(len(document.text or "") for document in head)
    long = characters * fraction >= MIN_TAIL_CHARACTERS * len(head) > 0
    if long and all(document.text is not None for document in head):
        return "tails", chain.from_iterable(_cut_tail(document, fraction) for document in head)
    return "documents", iter(_smallest_keys(head, fraction, seed))


def _cut_tail(document: Document, fraction: float) -> list[tuple[Document, bool]]:
    text = document.text
    target = round(len(text) * (1 - fraction))
    cut = target
    for border in ("\n\n", "\n", " "):
        found = text.rfind(border, max(1, target - _CUT_WINDOW), target)
        if found > 0:
            cut = found
            break
    parts = ((text[:cut], False), (text[cut:].lstrip(), True))
    return [(Document(text=part, where=document.where), held_out) for part, held_out in parts if part.strip()]


def _smallest_keys(documents: list[Document], fraction: float, seed: int) -> list[tuple[Document, bool]]:
    if len(documents) < 2:
        raise UserError("one short document is too little to hold data out of; pass --validation_file, or "
                        "--validation_split_percentage 0 for none")
    order = sorted(range(len(documents)), key=lambda index: (document_key(documents[index], seed), index))
    chosen = set(order[: min(max(1, round(fraction * len(documents))), len(documents) - 1)])
    return [(document, index in chosen) for index, document in enumerate(documents)]


def split_documents(
    documents: Iterable[Document], fraction: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each in reading order; see `split_stream`."""
    train, held_out = [], []
    for document, is_eval in split_stream(documents, fraction, seed)[1]:
        (held_out if is_eval else train).append(document)
    return train, held_out
