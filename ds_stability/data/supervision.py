"""Whether there is something to learn from: supervised tokens at all, and few chats without any."""

import logging
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..console import global_rank
from ..errors import UserError
from .spec import DataSpec, Document
from .tokens import TokenStore, encode_documents

logger = logging.getLogger(__name__)
IGNORE = -100
SHARE = 0.05  # of chats without a supervised token, above which it is said
STREAM_BLOCKS = 1000  # blocks of a stream, of which one must have a supervised token
STREAM_CHATS = 500  # chats of a stream that are counted


def require_supervised(blocks: Iterable[dict[str, Any]], what: str, limit: int | None = None) -> None:
    """UserError unless one of the first `limit` blocks (None: of all) has a supervised token."""
    number = 0
    for number, block in enumerate(blocks, 1):
        if (np.asarray(block["labels"]) != IGNORE).any():
            return
        if number == limit:
            break
    raise UserError(f"{what} (of {number} blocks) has no supervised token, so that nothing would be learned; check the roles and "
                    "weights of its turns, and look at it with `ds-stability inspect --data`")


def check_store(spec: DataSpec, train: Dataset, evaluation: Dataset | None, store: TokenStore) -> dict[str, int]:
    """Refuse blocks without a supervised token, say how many chats have none, and return that number for the manifest."""
    if not spec.assistant_only_loss:
        return {}
    require_supervised((train[index] for index in range(len(train))), "the training data")
    if evaluation is not None:
        require_supervised((evaluation[index] for index in range(len(evaluation))), "the held-out data")
    silent = count_silent(store)
    _say(silent, store.num_documents, "chats")
    return {"chats_without_supervised_tokens": silent}


def check_stream(spec: DataSpec, train: Iterable, evaluation: Dataset | None, documents: Callable[[], Iterable[Document]],
                 tokenizer: Any) -> dict[str, int]:  # fmt: skip
    """As `check_store`, of a stream's beginning: its first STREAM_BLOCKS blocks, its first STREAM_CHATS chats."""
    if not spec.assistant_only_loss:
        return {}
    require_supervised(train, "the beginning of the stream", STREAM_BLOCKS)
    if evaluation is not None:
        require_supervised((evaluation[index] for index in range(len(evaluation))), "the held-out data")
    first = [any(encoded.supervised) for encoded in encode_documents(islice(documents(), STREAM_CHATS), tokenizer, True)]
    silent = len(first) - sum(first)
    _say(silent, len(first), "chats at the beginning of the stream")
    return {"chats_without_supervised_tokens": silent}


def count_silent(store: TokenStore) -> int:
    """How many documents of a store have no supervised token."""
    if store.supervised is None or not store.num_documents:
        return 0
    return int((~np.logical_or.reduceat(store.supervised, store.starts[:-1])).sum())


def _say(silent: int, total: int, what: str) -> None:
    if silent > SHARE * total and global_rank() == 0:
        logger.warning(f"warning: {silent:,} of {total:,} {what} ({silent / total:.0%}) have no supervised token: no turn of the "
                       "assistant, or a weight of 0 on each; they cost time and teach nothing")
