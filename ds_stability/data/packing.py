"""Blocks of a fixed length, packed from documents without attention across their borders.

Every block is dict(input_ids, labels, position_ids), int64 [block_size]. position_ids restart at 0 with every document
and with every block: transformers 5 reads document borders from them, provided that no attention_mask and no cache is
passed (`packing_problem` tells). Labels are not shifted; -100 stands at the first token of every document and of every
block, so that the number of labels other than -100 is the number of supervised tokens with and without the shift.
"""

import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..errors import UserError
from .spec import Document
from .tokens import TokenStore, encode_documents

IGNORE = -100
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def make_block(
    ids: np.ndarray, starts: np.ndarray, supervised: np.ndarray | None, block_size: int, pad_id: int
) -> dict[str, torch.Tensor]:
    """One block from its token ids [L <= block_size]; `starts` are the positions in it at which documents begin.

    What is missing to block_size is padded with `pad_id`, labels of -100 and positions that restart at 0.
    """
    length = len(ids)
    input_ids = np.full(block_size, pad_id, dtype=np.int64)
    input_ids[:length] = ids
    labels = np.full(block_size, IGNORE, dtype=np.int64)
    labels[:length] = ids if supervised is None else np.where(supervised, ids, IGNORE)
    labels[:1] = IGNORE
    labels[starts] = IGNORE
    origin = np.zeros(block_size, dtype=np.int64)
    origin[starts] = starts
    if length < block_size:
        origin[length] = length
    position_ids = np.arange(block_size) - np.maximum.accumulate(origin)
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids)}


class PackedBlocks(Dataset):
    """Blocks of a token store: block i holds the tokens [i * block_size, (i + 1) * block_size).

    The remainder that does not fill a block is dropped, or padded and kept with drop_remainder=False.
    """

    def __init__(self, store: TokenStore, block_size: int, pad_id: int, drop_remainder: bool = True) -> None:
        self.store = store
        self.block_size = block_size
        self.pad_id = pad_id
        full, rest = divmod(store.num_tokens, block_size)
        self._length = full + bool(rest and not drop_remainder)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self._length <= index < self._length:
            raise IndexError(f"block {index} of {self._length}")
        first = (index % self._length) * self.block_size
        last = min(first + self.block_size, self.store.num_tokens)
        low, high = np.searchsorted(self.store.starts[:-1], (first, last))
        supervised = None if self.store.supervised is None else self.store.supervised[first:last]
        starts = self.store.starts[low:high] - first
        return make_block(self.store.ids[first:last], starts, supervised, self.block_size, self.pad_id)


class PaddedBlocks(Dataset):
    """`blocks`, then copies of the first one with every label masked, up to a length that `multiple` divides."""

    def __init__(self, blocks: Dataset, multiple: int) -> None:
        self.blocks = blocks
        self._length = -(-len(blocks) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"block {index} of {self._length}")
        if index < len(self.blocks):
            return self.blocks[index]
        block = self.blocks[0]
        return {**block, "labels": torch.full_like(block["labels"], IGNORE)}


def pad_to_multiple(dataset: Dataset, multiple: int) -> Dataset:
    """Add blocks without a supervised token, so that `multiple` ranks (times batch size) get equally many.

    A mean over such a block is 0/0: sum losses and count tokens, and divide at the end.
    """
    return dataset if len(dataset) % multiple == 0 else PaddedBlocks(dataset, multiple)


class StreamingBlocks(IterableDataset):
    """The blocks of PackedBlocks, in the same order, packed while documents are read; nothing is kept.

    `documents` is called anew for each pass. Every rank sees every block: the loader (Accelerate's) deals them out.
    `skip_blocks` resumes: that many blocks of the first pass are packed but not yielded (loader workers are copies: with
    them, set it back to 0 after that pass). With `shuffle_buffer` > 0, blocks leave a buffer of that many in an order
    drawn from (seed, epoch). Worker w of n yields the blocks w, w + n, ... A pass of fewer than `min_blocks` blocks
    raises UserError.
    """

    def __init__(
        self, documents: Callable[[], Iterable[Document]], tokenizer: Any, block_size: int, pad_id: int, *,
        assistant_only_loss: bool = False, shuffle_buffer: int = 0, seed: int = 0, skip_blocks: int = 0,
        max_blocks: int | None = None, min_blocks: int = 1,
    ) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.pad_id = pad_id
        self.assistant_only_loss = assistant_only_loss
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.skip_blocks = skip_blocks
        self.max_blocks = max_blocks
        self.min_blocks = min_blocks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass (only with a shuffle buffer)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        skip, self.skip_blocks = self.skip_blocks, 0
        for index, parts in enumerate(self.parts(self.epoch)):
            if index >= skip and index % step == first:
                yield self.block(parts)

    def parts(self, epoch: int) -> Iterator[tuple]:
        """What the blocks of pass `epoch` are made of, in its order, for `block`; not shared out over loader workers."""
        return self._shuffled(self._parts(), epoch)

    def block(self, parts: tuple) -> dict[str, torch.Tensor]:
        return make_block(*parts, self.block_size, self.pad_id)

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, starts, supervised) of each full block."""
        ids: list[int] = []
        supervised: list[bool] = []
        starts: list[int] = []
        size, count = self.block_size, 0
        for encoded in encode_documents(self.documents(), self.tokenizer, self.assistant_only_loss):
            starts.append(len(ids))
            ids.extend(encoded.ids)
            supervised.extend(encoded.supervised or [encoded.supervised is None] * len(encoded.ids))
            offset = 0
            while len(ids) - offset >= size:
                if count == self.max_blocks:
                    return
                end = offset + size
                inside = [start - offset for start in starts if offset <= start < end]
                marks = np.array(supervised[offset:end], np.bool_)
                yield np.array(ids[offset:end]), np.array(inside, np.int64), marks
                count, offset = count + 1, end
            if offset:
                ids, supervised = ids[offset:], supervised[offset:]
                starts = [start - offset for start in starts if start >= offset]
        if count < self.min_blocks:
            check_enough_blocks(count, self.min_blocks, count * size + len(ids), size)

    def _shuffled(self, parts: Iterator[tuple], epoch: int) -> Iterator[tuple]:
        if not self.shuffle_buffer:
            yield from parts
            return
        generator = random.Random(f"{self.seed} {epoch}")
        buffer: list[tuple] = []
        for part in parts:
            if len(buffer) < self.shuffle_buffer:
                buffer.append(part)
                continue
            index = generator.randrange(len(buffer))
            yield buffer[index]
            buffer[index] = part
        generator.shuffle(buffer)
        yield from buffer


def check_enough_blocks(blocks: int, world_size: int, tokens: int, block_size: int) -> None:
    """Raise UserError if a rank would be left without a block."""
    if blocks < world_size:
        raise UserError(f"{tokens} training tokens make {blocks} blocks of --block_size {block_size}, but {world_size} "
                        f"ranks need one each ({world_size * block_size} tokens); give more text, a smaller --block_size "
                        "or fewer ranks")


def check_block_size(block_size: int, model_config: Any) -> None:
    """Raise UserError if a block is shorter than two tokens or longer than the model's context."""
    if block_size < 2:
        raise UserError(f"--block_size {block_size}: allowed is a number of tokens from 2")
    values = model_config.get_text_config().to_dict()
    limits = [values[key] for key in _CONTEXT_KEYS if isinstance(values.get(key), int) and values[key] > 0]
    if limits and block_size > limits[0]:
        raise UserError(f"--block_size {block_size} is larger than the model's context of {limits[0]} tokens; "
                        f"allowed is 2 to {limits[0]}")


def check_vocabulary(tokenizer: Any, model_config: Any) -> None:
    """Raise UserError if the tokenizer can yield an id that the model's embedding lacks; a padded embedding is fine."""
    largest = max(tokenizer.get_vocab().values())
    vocab_size = model_config.get_text_config().vocab_size
    if largest >= vocab_size:
        raise UserError(f"the tokenizer's largest token id is {largest} ({len(tokenizer)} tokens), but the model's "
                        f"vocabulary has {vocab_size} entries; pass the model's own tokenizer (--tokenizer_name)")


def packing_problem(model: torch.nn.Module) -> str | None:
    """Why attention would leak between the documents of a block in this model, as one sentence; None if it does not."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes no position_ids: the documents of a block attend to each other"
    if model.config.get_text_config().use_cache:
        return ("model.config.use_cache is True: transformers ignores document borders when it keeps a cache; set it to "
                "False")
    return None
