"""A long text has the tokens of the uncut text, whatever the tokenizer writes in front, merges or normalizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ds_stability.data import Document
from ds_stability.data.tokens import encode_documents
from ds_stability.data.windows import WINDOW_CHARACTERS, encode_text

TEXT = " ".join(f"the cat {number} sat on\tthe naïve mat, e\u0301tude.\nabab aaaa 日本語 <x> cats" for number in range(60))
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(model, trainer, normalizer=None, before=None, decoder=None, **options):
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if before is not None:
        tokenizer.pre_tokenizer = before
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator([TEXT], trainer)
    if options.pop("writes_bos", False):
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   extra_special_tokens=["<x>"], **options)  # fmt: skip


def bpe(size=420, special=("<unk>", "<s>", "</s>")):
    return trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False)


def metaspace(scheme, split):
    back = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return trained(models.BPE(unk_token="<unk>", byte_fallback=True), bpe(special=("<unk>", "<s>", "</s>", *BYTES)),
                   before=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split), decoder=back)  # fmt: skip


TOKENIZERS = {
    "llama-2": lambda: trained(
        models.BPE(unk_token="<unk>", byte_fallback=True), bpe(special=("<unk>", "<s>", "</s>", *BYTES)),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), writes_bos=True,
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])),
    "metaspace": lambda: metaspace("always", False), "metaspace-first": lambda: metaspace("first", True),
    "bytes": lambda: trained(models.BPE(), bpe(), before=pre_tokenizers.ByteLevel(add_prefix_space=True), decoder=decoders.ByteLevel()),
    "nfc": lambda: trained(models.BPE(unk_token="<unk>"), bpe(), normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "bert": lambda: trained(models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"]),
                            normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "unigram": lambda: trained(models.Unigram(), trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"]),
                               before=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    "t5-like": lambda: trained(models.Unigram(), trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"]),
                               normalizers.Sequence([normalizers.Strip(), normalizers.Replace("  ", " ")]), pre_tokenizers.Metaspace(split=False)),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in TOKENIZERS.items()}


def uncut(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.sampled_from([*"ab \n\té日", "the ", "cat", "abab", "aaaa" * 9, "e\u0301", "<x>", "</s>", "   ", "naïve", "🙂"]), max_size=300))
def test_windows_give_the_tokens_of_the_whole(tokenizers, name, parts):
    text = "".join(parts)
    assert list(encode_text(text, tokenizers[name], size=128, overlap=32)) == uncut(tokenizers[name], text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_document_of_180_000_characters_without_a_blank_line(tokenizers, name):
    """Cut before a space at each 65,536th character, these tokenizers had a piece more at each cut."""
    tokenizer = tokenizers[name]
    text = " ".join(f"{(number * 7919) % 1000} cats" for number in range(30_000))[:180_000]
    assert len(text) > 2 * WINDOW_CHARACTERS
    (encoded,) = encode_documents([Document(text=text)], tokenizer)
    bos = [tokenizer.bos_token_id] if name == "llama-2" else []
    assert list(encoded.ids) == [*bos, *uncut(tokenizer, text), tokenizer.eos_token_id]
    if name in ("llama-2", "metaspace", "metaspace-first"):
        assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == text


def test_a_run_without_a_border_is_not_cut(tokenizers, monkeypatch):
    """Merges of "aaaa..." count from the run's first letter, however far away it is."""
    for text in ("b" + "a" * 501, "ab" * 700):
        assert list(encode_text(text, tokenizers["llama-2"], size=128, overlap=32)) == uncut(tokenizers["llama-2"], text)


def test_long_and_short_documents_in_turn(tokenizers):
    texts = ["the cat", "cats " * 20_000, "", "mat", "sat " * 30_000]
    found = [list(encoded.ids)[:-1] for encoded in encode_documents([Document(text=text) for text in texts], tokenizers["metaspace"])]
    assert found == [uncut(tokenizers["metaspace"], text) for text in texts if text]
