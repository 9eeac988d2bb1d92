"""From a DataSpec to blocks for training and evaluation."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from ..errors import UserError
from .fingerprint import corpus_fingerprint
from .long_documents import Rules, truncation_line
from .packing import PackedBlocks, StreamingBlocks, check_enough_blocks, require_documents
from .readers import read_documents
from .spec import DataSpec, Document
from .splitting import is_held_out, split_stream
from .supervision import check_store, check_stream
from .tokenizer import tokenizer_hash
from .tokens import TokenStore, TokenStoreBuilder, build_store, encode_documents

STREAMING_EVAL_BLOCKS = 128
ENCODING = 4  # raised when the same documents become other tokens: caches of before are not read


def load_blocks(
    spec: DataSpec, tokenizer: Any, block_size: int, world_size: int = 1, cache_dir: str | None = None,
    positions: bool = True,
) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    """(training blocks, evaluation blocks or None, facts for the manifest).

    Training blocks are PackedBlocks (StreamingBlocks if spec.streaming), the remainder of texts dropped; evaluation blocks keep
    theirs, padded. With `positions` False, blocks have no position_ids, for a model that takes none (spec.packing "pad"). With
    `cache_dir`, tokens are kept there and memory-mapped: let one process of a host go first. All ranks get the same blocks, or
    the same UserError.
    """
    spec.check()
    info = {"corpus_fingerprint": corpus_fingerprint(spec), "tokenizer_hash": tokenizer_hash(tokenizer),
            "block_size": block_size, "spec": spec.to_dict()}
    rules = Rules(spec.truncation, spec.packing == "pad", positions)
    if spec.streaming:
        return _load_streaming(spec, tokenizer, block_size, world_size, info, rules)
    train_store, eval_store, info["held_out"] = _cached_stores(spec, tokenizer, cache_dir, info)
    pad_id = pad_token_id(tokenizer)
    packed = PackedBlocks(train_store, block_size, pad_id, rules=rules)
    train: Dataset = packed
    if packed.plan is not None:
        require_documents(len(packed), packed.plan.counts, block_size, rules)
    check_enough_blocks(len(train), world_size, train_store.num_tokens, block_size)
    if spec.max_train_samples is not None and spec.max_train_samples < len(train):
        train = Subset(train, range(spec.max_train_samples))
        check_enough_blocks(len(train), world_size, len(train) * block_size, block_size)
    evaluation = _eval_blocks(eval_store, block_size, pad_id, spec, rules) if info["held_out"] != "none" else None
    info |= {"train": _facts(train_store, train), "token_fingerprint": train_store.fingerprint()}
    info["train"] |= _plan_facts(packed)
    info["train"] |= check_store(spec, train, evaluation, train_store, rules, block_size)
    info["validation"] = _facts(eval_store, evaluation) if evaluation is not None else None
    return train, evaluation, info


def pad_token_id(tokenizer: Any) -> int:
    """The padding token, or EOS where there is none (padding is never attended to from text, nor trained on)."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _facts(store: TokenStore, blocks: Dataset) -> dict[str, int]:
    return {"documents": store.num_documents, "tokens": store.num_tokens, "blocks": len(blocks)}


def _plan_facts(blocks: PackedBlocks) -> dict[str, Any]:
    """What became of the documents' tokens: dropped, and the padding beside the others."""
    used = len(blocks) * blocks.block_size
    if blocks.plan is None:
        return {"dropped_tokens": blocks.store.num_tokens - used}
    counts, padding = blocks.plan.counts, blocks.plan.counts["padding"]
    return {"dropped_tokens": blocks.store.num_tokens - used + padding, "padding_share": round(padding / max(used, 1), 4),
            "longer_than_block": {"chats": counts["long_chats"], "texts": counts["long_texts"], "tokens_left_out": counts["cut_tokens"]},
            "truncation": truncation_line(counts, blocks.block_size, blocks.rules)}  # fmt: skip


def _eval_blocks(store: TokenStore, block_size: int, pad_id: int, spec: DataSpec, rules: Rules) -> Dataset:
    blocks = PackedBlocks(store, block_size, pad_id, drop_remainder=False, rules=rules)
    if blocks.plan is not None:
        require_documents(len(blocks), blocks.plan.counts, block_size, rules)
    if store.num_tokens < 2:
        raise UserError("the held-out data has no token to predict; pass --validation_file, a larger "
                        "--validation_split_percentage, or 0 for none")
    if spec.max_eval_samples is None or spec.max_eval_samples >= len(blocks):
        return blocks
    # Evenly spaced: the first ones may all come from one file.
    return Subset(blocks, np.linspace(0, len(blocks) - 1, spec.max_eval_samples).round().astype(int).tolist())


def _build_stores(spec: DataSpec, tokenizer: Any) -> tuple[TokenStore, TokenStore, str]:
    """(training store, held-out store, how they were split)."""
    separate = separate_validation(spec)
    mode, stream = split_stream(read_documents(spec), split_share(spec), spec.seed)
    held_out: list[Document] = []
    train = build_store(_keep_apart(stream, held_out), tokenizer, spec.assistant_only_loss)
    documents = read_documents(spec, "validation") if separate else held_out
    return train, build_store(documents, tokenizer, spec.assistant_only_loss), separate or mode


def _keep_apart(stream: Iterator[tuple[Document, bool]], held_out: list[Document]) -> Iterator[Document]:
    """The training documents of `stream`; the others are appended to `held_out` on the way."""
    for document, is_eval in stream:
        if is_eval:
            held_out.append(document)
        else:
            yield document


def separate_validation(spec: DataSpec) -> str | None:
    """The held-out source that is not cut from the training documents ("files", "split", "sample"), or None."""
    if spec.validation_files:
        return "files"
    if spec.dataset_validation_split:
        return "split"
    if spec.dataset_name == "builtin:synthetic" and spec.validation_split_percentage > 0:
        return "sample"
    return None


def split_share(spec: DataSpec) -> float:
    """The share of the training documents, from 0 to 1, that is cut off as held-out data."""
    return 0.0 if separate_validation(spec) else spec.validation_split_percentage / 100


def _cached_stores(
    spec: DataSpec, tokenizer: Any, cache_dir: str | None, info: dict[str, Any]
) -> tuple[TokenStore, TokenStore, str]:
    from_hub = spec.dataset_name is not None and not spec.dataset_name.startswith("builtin:")
    if cache_dir is None or (from_hub and spec.dataset_revision is None):  # an unpinned name may mean other data tomorrow
        return _build_stores(spec, tokenizer)
    identity = [ENCODING, info["corpus_fingerprint"], info["tokenizer_hash"], tokenizer.chat_template, tokenizer.eos_token_id]
    folder = os.path.join(cache_dir, "tokens-" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32])
    paths = [os.path.join(folder, name) for name in ("train", "validation")]
    mode_path = os.path.join(folder, "held_out.json")
    if not os.path.exists(mode_path):
        from ..run_dir import write_atomic

        *stores, mode = _build_stores(spec, tokenizer)
        try:
            for path, store in zip(paths, stores, strict=True):
                store.save(path)
            write_atomic(mode_path, json.dumps(mode) + "\n")
        except OSError as error:
            raise UserError(f"{folder}: the token cache cannot be written ({error.strerror}); choose another "
                            "place") from error
    with open(mode_path, encoding="utf-8") as file:
        return TokenStore.load(paths[0]), TokenStore.load(paths[1]), json.load(file)


def _streamed(spec: DataSpec, split_off: bool) -> Iterator[Document]:
    fraction = spec.validation_split_percentage / 100 if split_off else 0.0
    return (document for document in read_documents(spec) if not is_held_out(document, fraction, spec.seed))


def _load_streaming(
    spec: DataSpec, tokenizer: Any, block_size: int, world_size: int, info: dict[str, Any], rules: Rules
) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    separate = separate_validation(spec)
    split_off = separate is None and spec.validation_split_percentage > 0
    pad_id = pad_token_id(tokenizer)
    documents = functools.partial(_streamed, spec, split_off)
    train = StreamingBlocks(
        documents, tokenizer, block_size, pad_id,
        assistant_only_loss=spec.assistant_only_loss, shuffle_buffer=spec.shuffle_buffer, seed=spec.seed,
        max_blocks=spec.max_train_samples, min_blocks=world_size, rules=rules)
    info["held_out"] = separate or ("documents" if split_off else "none")
    if info["held_out"] == "none":
        return train, None, info | {"validation": None, "train": check_stream(spec, train, None, documents, tokenizer)}
    fraction = spec.validation_split_percentage / 100
    held_out = read_documents(spec, "validation") if separate else (
        document for document in read_documents(spec) if is_held_out(document, fraction, spec.seed))
    store = _first_tokens(held_out, tokenizer, spec, (spec.max_eval_samples or STREAMING_EVAL_BLOCKS) * block_size)
    evaluation = _eval_blocks(store, block_size, pad_id, spec, rules)
    checked = check_stream(spec, train, evaluation, documents, tokenizer)
    return train, evaluation, info | {"validation": _facts(store, evaluation), "train": checked}


def _first_tokens(documents: Iterator[Document], tokenizer: Any, spec: DataSpec, limit: int) -> TokenStore:
    """Whole documents until there are `limit` tokens."""
    builder, count = TokenStoreBuilder(), 0
    for encoded in encode_documents(documents, tokenizer, spec.assistant_only_loss):
        builder.add(encoded)
        count += len(encoded.ids)
        if count >= limit:
            break
    return builder.finish()
