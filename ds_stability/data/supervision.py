"""Whether there is something to learn from: supervised tokens at all, and few chats without any."""

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..console import global_rank
from ..errors import UserError
from .long_documents import Rules, kept
from .packing import StreamingBlocks
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


def check_store(spec: DataSpec, train: Dataset, evaluation: Dataset | None, store: TokenStore, rules: Rules, size: int) -> dict[str, int]:
    """Refuse blocks without a supervised token, say how many chats have none, and return that number for the manifest."""
    if not spec.assistant_only_loss:
        return {}
    require_supervised((train[index] for index in range(len(train))), "the training data")
    if evaluation is not None:
        require_supervised((evaluation[index] for index in range(len(evaluation))), "the held-out data")
    marks = (store.supervised[first:last] for first, last in pairwise(store.starts.tolist()))
    silent = sum(not learned(row, rules, size) for row in marks)
    _say(silent, store.num_documents, "chats")
    return {"chats_without_supervised_tokens": silent}


def check_stream(spec: DataSpec, train: StreamingBlocks, evaluation: Dataset | None, documents: Callable[[], Iterable[Document]],
                 tokenizer: Any) -> dict[str, int]:  # fmt: skip
    """As `check_store`, of a stream's beginning: its first STREAM_BLOCKS blocks, its first STREAM_CHATS chats."""
    if not spec.assistant_only_loss:
        return {}
    require_supervised(train, "the beginning of the stream", STREAM_BLOCKS)
    if evaluation is not None:
        require_supervised((evaluation[index] for index in range(len(evaluation))), "the held-out data")
    first = [learned(encoded.supervised, train.rules, train.block_size)
             for encoded in encode_documents(islice(documents(), STREAM_CHATS), tokenizer, True)]
    silent = len(first) - sum(first)
    _say(silent, len(first), "chats at the beginning of the stream")
    return {"chats_without_supervised_tokens": silent}


def learned(supervised: Sequence[bool], rules: Rules, size: int) -> bool:
    """Whether truncation leaves a supervised token of a chat, or drops the chat, which is said elsewhere."""
    pieces = kept(len(supervised), size, rules.of(chat=True))
    return not pieces or any(np.any(supervised[first + 1 : last]) for first, last in pieces)  # a piece's first token has no label


def _say(silent: int, total: int, what: str) -> None:
    if silent > SHARE * total and global_rank() == 0:
        logger.warning(f"warning: {silent:,} of {total:,} {what} ({silent / total:.0%}) have no supervised token: no turn of the "
                       "assistant, a weight of 0 on each, or cut off by --truncation; they cost time and teach nothing")
