"""Blocks of a fixed length, packed from documents without attention across their borders.

Every block is dict(input_ids, labels, position_ids), int64 [block_size]. position_ids restart at 0 with every document
and with every block: transformers 5 reads document borders from them, provided that no attention_mask and no cache is
passed (`border_probe` tells whether a model does so). Labels are not shifted; -100 stands at the first token of every document and of every
block, so that the number of labels other than -100 is the number of supervised tokens with and without the shift.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..errors import UserError
from .long_documents import PACK, Plan, Planner, Rules, plan_store, planned_stream, truncation_line
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
    """Blocks of a token store: block i holds the tokens [i * block_size, (i + 1) * block_size) where all documents are texts that
    may be cut, else those of a plan (long_documents.py).

    The remainder of texts that does not fill a block is dropped, or padded and kept with drop_remainder=False.
    """

    def __init__(self, store: TokenStore, block_size: int, pad_id: int, drop_remainder: bool = True, rules: Rules = PACK) -> None:
        self.store = store
        self.block_size = block_size
        self.pad_id = pad_id
        self.rules = rules
        self.plan: Plan | None = None
        if store.chats is None and rules.flows(chat=False):
            full, rest = divmod(store.num_tokens, block_size)
            self._length = full + bool(rest and not drop_remainder)
        else:
            self.plan = plan_store(store, block_size, rules, not drop_remainder)
            self._length = len(self.plan.offsets) - 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self._length <= index < self._length:
            raise IndexError(f"block {index} of {self._length}")
        return _block(self._parts(index % self._length), self.block_size, self.pad_id, self.rules)

    def _parts(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(ids, document starts, supervised marks) of a block."""
        if self.plan is None:
            first = index * self.block_size
            last = min(first + self.block_size, self.store.num_tokens)
            low, high = np.searchsorted(self.store.starts[:-1], (first, last))
            places, starts = slice(first, last), self.store.starts[low:high] - first
        else:
            pieces = slice(*self.plan.offsets[index : index + 2])
            firsts, lasts = self.plan.first[pieces], self.plan.last[pieces]
            places = np.concatenate([np.arange(first, last) for first, last in zip(firsts, lasts, strict=True)])
            starts = np.cumsum(lasts - firsts) - (lasts - firsts)
        return self.store.ids[places], starts, None if self.store.supervised is None else self.store.supervised[places]


def _block(parts: tuple, block_size: int, pad_id: int, rules: Rules) -> dict[str, torch.Tensor]:
    block = make_block(*parts, block_size, pad_id)
    return block if rules.positions else {name: value for name, value in block.items() if name != "position_ids"}


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
        max_blocks: int | None = None, min_blocks: int = 1, rules: Rules = PACK,
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
        self.rules = rules
        self.planner = Planner(block_size, rules)  # of the newest pass; its counts are of what was read so far
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
        return _block(parts, self.block_size, self.pad_id, self.rules)

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, document starts, supervised marks) of each block."""
        count, planner = 0, Planner(self.block_size, self.rules)
        self.planner = planner
        documents = encode_documents(self.documents(), self.tokenizer, self.assistant_only_loss)
        for parts in planned_stream(documents, planner):
            if count == self.max_blocks:
                return
            yield parts
            count += 1
        if count < self.min_blocks:
            require_documents(count, planner.counts, self.block_size, self.rules)
            tokens = count * self.block_size + self.block_size - planner.flow.free
            check_enough_blocks(count, self.min_blocks, tokens, self.block_size)

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


def require_documents(blocks: int, counts: Counter, block_size: int, rules: Rules) -> None:
    """Raise UserError if there is no block because all documents are longer than one."""
    line = truncation_line(counts, block_size, rules)
    if not blocks and line is not None:
        raise UserError(f"no block is left: {line}; give a larger --block_size, or --truncation keep_start, keep_end or split")


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
