"""Packed blocks: every token once and in order, no attention across documents, the stream equal to the stored form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ds_stability.data import DataSpec, Document, load_blocks
from ds_stability.data.packing import PackedBlocks, StreamingBlocks, pad_to_multiple
from ds_stability.data.tokenizer import word_tokenizer
from ds_stability.data.tokens import Encoded, TokenStore, TokenStoreBuilder, build_store, encode_documents

PAD = 2
WORDS = [f"w{number}" for number in range(40)]
BASE = dict(vocab_size=50, bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


def make_store(documents, marks=None):
    builder = TokenStoreBuilder()
    for index, ids in enumerate(documents):
        builder.add(Encoded(ids, marks[index] if marks else None))
    return builder.finish()


@st.composite
def corpora(draw):
    documents = draw(st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=12), min_size=1, max_size=12))
    marks = [draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))) for ids in documents]
    return documents, marks if draw(st.booleans()) else None, draw(st.integers(2, 9))


@settings(max_examples=150, deadline=None)
@given(corpora())
def test_every_token_once_in_order_with_its_position_and_label(corpus):
    documents, marks, size = corpus
    blocks = PackedBlocks(make_store(documents, marks), size, PAD, drop_remainder=False)
    expected = []  # (token, position, label): position counts from the later of document start and block start
    for index, ids in enumerate(documents):
        for offset, token in enumerate(ids):
            at = len(expected)
            position = min(offset, at % size)
            supervised = position > 0 and (marks is None or marks[index][offset])
            expected.append((token, position, token if supervised else -100))
    padding = -len(expected) % size
    expected += [(PAD, position, -100) for position in range(padding)]
    found = [(int(a), int(b), int(c)) for block in blocks
             for a, b, c in zip(block["input_ids"], block["position_ids"], block["labels"])]
    assert found == expected
    assert len(PackedBlocks(make_store(documents), size, PAD)) == sum(map(len, documents)) // size


@settings(max_examples=100, deadline=None)
@given(corpora())
def test_supervised_tokens_are_the_same_with_and_without_the_shift(corpus):
    documents, marks, size = corpus
    for block in PackedBlocks(make_store(documents, marks), size, PAD, drop_remainder=False):
        assert (block["labels"] != -100).sum() == (block["labels"][1:] != -100).sum()
        assert block["labels"].dtype == block["input_ids"].dtype == block["position_ids"].dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=12), min_size=1, max_size=15), size=st.integers(2, 9),
       skip=st.integers(0, 4))
def test_stream_equals_store(tokenizer, texts, size, skip):
    documents = [Document(text=" ".join(words)) for words in texts]
    stored = PackedBlocks(build_store(documents, tokenizer), size, PAD)
    stream = StreamingBlocks(lambda: documents, tokenizer, size, PAD, min_blocks=0, skip_blocks=skip)
    for expected in (list(stored)[skip:], list(stored)):  # only the first pass skips
        found = list(stream)
        assert len(found) == len(expected)
        assert all(torch.equal(a[key], b[key]) for a, b in zip(found, expected) for key in a)


def stream_of(count, **options):
    tokenizer = word_tokenizer(WORDS)
    documents = [Document(text=" ".join(WORDS[(7 * i + j) % 40] for j in range(6))) for i in range(count)]
    return StreamingBlocks(lambda: documents, tokenizer, 8, PAD, **options)


def rows(blocks):
    return [tuple(block["input_ids"].tolist()) for block in blocks]


def test_shuffled_stream_is_a_permutation_that_epoch_and_seed_decide():
    plain, stream = rows(stream_of(40)), stream_of(40, shuffle_buffer=8, seed=1)
    first = rows(stream)
    assert sorted(first) == sorted(plain) and first != plain and rows(stream) == first
    stream.set_epoch(1)
    assert sorted(rows(stream)) == sorted(plain) and rows(stream) != first
    assert rows(stream_of(40, shuffle_buffer=8, seed=1, skip_blocks=5)) == first[5:]


def test_loader_workers_share_the_stream():
    whole = rows(stream_of(20, max_blocks=9))
    shared = rows(DataLoader(stream_of(20, max_blocks=9), batch_size=None, num_workers=2))
    assert len(whole) == 9 and shared == whole


def test_text_gets_bos_and_eos_once(tokenizer):
    texts = ["w0 w1", "<|bos|> w0 <|eos|>", "w1 <|eos|> w2"]
    encoded = [list(item.ids) for item in encode_documents([Document(text=text) for text in texts], tokenizer)]
    assert encoded == [[0, 4, 5, 1], [0, 4, 1], [0, 5, 1, 6, 1]]


def test_store_on_disk(tmp_path):
    store = make_store([[3, 4, 5], [6]], [[True, False, True], [True]])
    store.save(str(tmp_path / "deep" / "store"))
    store.save(str(tmp_path / "deep" / "store"))  # whoever comes second keeps the first
    loaded = TokenStore.load(str(tmp_path / "deep" / "store"))
    assert isinstance(loaded.ids, np.memmap) and loaded.fingerprint() == store.fingerprint()
    assert loaded.fingerprint() != make_store([[3, 4, 5], [6]]).fingerprint()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["store"]


def test_pad_to_multiple():
    blocks = PackedBlocks(make_store([[3] * 20]), 4, PAD)
    padded = pad_to_multiple(blocks, 4)
    assert len(padded) == 8 and len(list(padded)) == 8 and pad_to_multiple(blocks, 5) is blocks
    assert sum(int((block["labels"] != -100).sum()) for block in padded) == 5 * 3
    assert all(bool((padded[index]["labels"] == -100).all()) for index in (5, 6, 7))


def tiny_model(kind, attention):
    import transformers

    config = {
        "llama": lambda: transformers.LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                                  num_attention_heads=2, **BASE),
        "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **BASE),
    }[kind]()
    torch.manual_seed(0)
    config.use_cache = False
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_attention_across_documents(kind, attention):
    model = tiny_model(kind, attention)
    model.config.use_cache = False
    second = [9, 8, 7, 6, 5]
    blocks = [PackedBlocks(make_store([first, second]), 9, PAD)[0] for first in ([11, 12, 13, 14], [21, 22, 23, 24])]
    alone = PackedBlocks(make_store([second]), 5, PAD)[0]
    with torch.no_grad():
        a, b, c = (model(**{key: value[None] for key, value in block.items()}) for block in (*blocks, alone))
    assert torch.equal(a.logits[:, 4:], b.logits[:, 4:])
    torch.testing.assert_close(a.logits[:, 4:], c.logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a.logits[:, :4], b.logits[:, :4])


def test_padding_yields_finite_logits_and_no_loss():
    model = tiny_model("llama", "sdpa")
    model.config.use_cache = False
    padded = PackedBlocks(make_store([[9, 8, 7]]), 6, PAD, drop_remainder=False)[0]
    exact = PackedBlocks(make_store([[9, 8, 7]]), 3, PAD)[0]
    with torch.no_grad():
        a, b = (model(**{key: value[None] for key, value in block.items()}) for block in (padded, exact))
    assert torch.isfinite(a.logits).all()
    torch.testing.assert_close(a.loss, b.loss)


@pytest.mark.parametrize("streaming", [False, True])
def test_load_blocks_of_the_synthetic_language(streaming):
    from ds_stability.data.synthetic import SyntheticLanguage

    spec = DataSpec(dataset_name="builtin:synthetic", synthetic_tokens=3000, validation_split_percentage=10,
                    max_eval_samples=4, streaming=streaming)
    tokenizer = SyntheticLanguage().tokenizer()
    train, evaluation, info = load_blocks(spec, tokenizer, 32, world_size=2)
    assert len(list(train)) > 90 and len(list(evaluation)) == len(evaluation) == 4 and info["held_out"] == "sample"
    assert not any((block["input_ids"] == tokenizer.unk_token_id).any() for block in train)
    assert all(key in info for key in ("corpus_fingerprint", "tokenizer_hash", "validation"))


def test_load_blocks_cache_gives_the_same_blocks(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(" ".join(WORDS[(i + j) % 40] for j in range(9)) for i in range(60)))
    cache = str(tmp_path / "c")
    for percentage in (10.0, 0.0):
        spec = DataSpec(train_files=(str(tmp_path / "a.txt"),), text_document="line",
                        validation_split_percentage=percentage)
        results = [load_blocks(spec, tokenizer, 16, cache_dir=folder) for folder in (None, cache, cache)]
        assert results[0][2] == results[1][2] == results[2][2]
        assert rows(results[0][0]) == rows(results[1][0]) == rows(results[2][0])
        assert (results[0][1] is None) == (percentage == 0)
    assert isinstance(results[2][0].store.ids, np.memmap)
