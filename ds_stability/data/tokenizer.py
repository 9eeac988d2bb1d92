"""Tokenizers for models that are trained from scratch, and the identity of any tokenizer."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ..errors import UserError

BOS, EOS, PAD, UNKNOWN = "<|bos|>", "<|eos|>", "<|pad|>", "<|unk|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
MIN_BPE_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_bpe(documents: Iterable[Any], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer on `documents` (texts, or Documents) and return a PreTrainedTokenizerFast.

    Ids 0, 1, 2 are <|bos|>, <|eos|>, <|pad|>; <|bos|> is put before every text, so that a model can start from nothing.
    The same documents give the same tokenizer. A small corpus may end with fewer than `vocab_size` tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_BPE_VOCABULARY:
        raise UserError(f"tokenizer vocabulary of {vocab_size}: allowed is a size from {MIN_BPE_VOCABULARY} (256 bytes "
                        f"and {len(SPECIAL_TOKENS)} special tokens); raise --vocab_size")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.train_from_iterator((text for document in documents for text in _texts(document)), trainer)
    return _wrap(backend)


def word_tokenizer(words: Iterable[str]) -> Any:
    """A tokenizer with one token per whitespace-separated word; ids 0..3 are <|bos|>, <|eos|>, <|pad|>, <|unk|>."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, UNKNOWN, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([*SPECIAL_TOKENS, UNKNOWN])
    return _wrap(backend, unk_token=UNKNOWN)


def load_pretrained(name: str, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or a hub name. UserError if there is none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the readers of a foreign folder raise whatever they stumble over
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name}: no tokenizer could be loaded ({reason}); pass --tokenizer_name") from None


def _wrap(backend: Any, **special: str) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False,
        **special)


def _texts(document: Any) -> list[str]:
    if isinstance(document, str):
        return [document]
    if document.messages is None:
        return [document.text]
    return [message["content"] for message in document.messages if isinstance(message["content"], str)]


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides the ids of a text: the serialized tokenizer, without truncation and padding settings."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prompt_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text that is to be continued: as the tokenizer writes it, but with one BOS if the text brings its own, and no end."""
    bos = tokenizer.bos_token
    options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    return without_end(tokenizer(text, verbose=False, **options)["input_ids"], text, tokenizer)


def without_end(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """The ids of a text without the end token that some tokenizers put after every text: it is to be continued."""
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        return ids[:-1]
    return ids


def special_token_ids(tokenizer: Any) -> list[int]:
    """Ids of all tokens that are marks rather than text: BOS, EOS, padding, unknown, turn marks; sorted."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(marked | set(tokenizer.all_special_ids))
