"""Chats stay whole in their blocks, documents longer than a block are treated as asked, and both are counted."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.data import DataSpec, Document, load_blocks
from ds_stability.data.long_documents import OPEN_BLOCKS, PACK, Planner, Rules, planned_stream, truncation_line
from ds_stability.data.packing import IGNORE, PackedBlocks, StreamingBlocks, make_block
from ds_stability.data.tokenizer import word_tokenizer
from ds_stability.data.tokens import Encoded, TokenStore, TokenStoreBuilder
from ds_stability.errors import UserError

PAD = -1  # no token's id
TRUNCATION = ("auto", "split", "drop", "keep_start", "keep_end")


def store_of(documents):
    builder = TokenStoreBuilder()
    for document in documents:
        builder.add(document)
    return builder.finish()


@st.composite
def corpora(draw):
    """Documents whose tokens are all different, so that a token tells where it comes from."""
    documents, token = [], 1
    for _ in range(draw(st.integers(1, 14))):
        length = draw(st.integers(1, 13))
        marks = draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length))
        documents.append(Encoded(list(range(token, token + length)), marks, draw(st.booleans())))
        token += length
    return documents, draw(st.integers(2, 9)), Rules(draw(st.sampled_from(TRUNCATION)), draw(st.booleans()))


def kept(document, size, rules):
    """The runs of tokens that must stand together, as the words of the flags say."""
    rule = rules.truncation if rules.truncation != "auto" else "drop" if document.chat else "split"
    ids = list(document.ids)
    if len(ids) <= size:
        return [ids]
    return {"split": [ids[first : first + size] for first in range(0, len(ids), size)], "drop": [], "keep_start": [ids[:size]],
            "keep_end": [ids[-size:]]}[rule]  # fmt: skip


def segments(block):
    """The runs of a block's tokens whose positions rise by one; padding left out."""
    runs = []
    for token, position in zip(block["input_ids"].tolist(), block["position_ids"].tolist(), strict=True):
        if position == 0:
            runs.append([])
        runs[-1].append(token)
    return [run for run in runs if run[0] != PAD]


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a)


@settings(max_examples=200, deadline=None)
@given(corpora())
def test_what_must_stand_together_does_and_texts_flow_as_ever(corpus):
    documents, size, rules = corpus
    blocks = list(PackedBlocks(store_of(documents), size, PAD, rules=rules))
    flowing = [document for document in documents if rules.flows(document.chat)]
    texts = list(PackedBlocks(store_of(flowing), size, PAD)) if flowing else []
    whole = sorted(run for document in documents if document not in flowing for run in kept(document, size, rules))
    of_texts = {token for document in flowing for token in document.ids}
    found = [run for block in blocks for run in segments(block) if run[0] not in of_texts]
    assert sorted(found) == whole
    assert equal([block for block in blocks if int(block["input_ids"][0]) in of_texts], texts)
    if rules.alone:
        assert all(len(segments(block)) == 1 for block in blocks)
    supervised = {token for document in documents for token, mark in zip(document.ids, document.supervised or [True] * len(document.ids)) if mark}
    for block in blocks:
        for token, label, position in zip(*(block[key].tolist() for key in ("input_ids", "labels", "position_ids")), strict=True):
            assert label == (token if position > 0 and token in supervised else IGNORE)


@settings(max_examples=150, deadline=None)
@given(corpora())
def test_a_stream_is_packed_as_a_store_is_and_both_count_alike(corpus):
    documents, size, rules = corpus
    stored = PackedBlocks(store_of(documents), size, PAD, rules=rules)
    planner = Planner(size, rules)
    assert equal([make_block(*parts, size, PAD) for parts in planned_stream(documents, planner)], list(stored))
    padding = sum(size - sum(map(len, segments(block))) for block in stored)
    cut = sum(len(d.ids) - sum(map(len, kept(d, size, rules))) for d in documents)
    assert (planner.counts["padding"], planner.counts["cut_tokens"]) == (padding, cut)
    assert stored.plan is None or stored.plan.counts == planner.counts
    assert planner.counts["long_chats"] == sum(d.chat and len(d.ids) > size for d in documents)
    if stored.plan is not None:
        kept_all = PackedBlocks(store_of(documents), size, PAD, drop_remainder=False, rules=rules)
        total = sum(len(run) for block in kept_all for run in segments(block))
        assert total == sum(len(d.ids) for d in documents) - cut


def test_best_fit_leaves_little_padding():
    lengths = [17 + (37 * number) % 90 for number in range(2000)]
    blocks = PackedBlocks(store_of([Encoded([1] * length, None, True) for length in lengths]), 128, PAD)
    assert blocks.plan.counts["padding"] < 0.05 * len(blocks) * 128
    planner = Planner(128, PACK)
    for length in lengths:
        list(planner.add(None, length, True))
        assert len(planner._open) <= OPEN_BLOCKS


def test_a_store_of_chats_on_disk(tmp_path):
    documents = [Encoded([1, 2, 3], None, True), Encoded([4, 5], None, False)]
    store_of(documents).save(str(tmp_path / "store"))
    loaded = TokenStore.load(str(tmp_path / "store"))
    assert loaded.chats.tolist() == [True, False] and store_of(documents[1:]).chats is None


def test_one_line_says_what_was_left_out():
    planner = Planner(4, PACK)
    for length, chat in ((9, True), (3, True), (9, False), (2, True)):
        list(planner.add(0, length, chat))
    assert truncation_line(planner.counts, 4, PACK) == (
        "1 of 3 chats are longer than --block_size 4 and were dropped (--truncation auto; 9 tokens left out)")
    assert "split, and their answers trained without their questions" in truncation_line(planner.counts, 4, Rules("split"))
    planner = Planner(4, PACK)
    list(planner.add(0, 9, False))
    assert truncation_line(planner.counts, 4, PACK) is None


WORDS = [f"w{number}" for number in range(40)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} <|eos|> {% endfor %}"


@pytest.fixture
def chats(tmp_path):
    """(file, tokenizer): 30 chats, every third longer than 16 tokens."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": [{"role": "user", "content": " ".join(WORDS[:5])}, {"role": "assistant", "content": " ".join(WORDS[: 4 + 10 * (i % 3)])}]}
            for i in range(30)]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(tmp_path / "chats.jsonl"), tokenizer


def test_load_blocks_counts_long_chats(chats):
    file, tokenizer = chats
    for streaming in (False, True):
        spec = DataSpec(train_files=(file,), validation_split_percentage=0, streaming=streaming)
        train, _, info = load_blocks(spec, tokenizer, 16)
        blocks = list(train)
        counts = train.planner.counts if streaming else train.plan.counts
        assert (counts["long_chats"], counts["chats"]) == (20, 30) and len(blocks) == 10
    facts = load_blocks(DataSpec(train_files=(file,), validation_split_percentage=0), tokenizer, 16)[2]["train"]
    assert facts["longer_than_block"] == {"chats": 20, "texts": 0, "tokens_left_out": 10 * (21 + 31)}
    assert facts["padding_share"] == round(1 - 11 / 16, 4) and facts["truncation"].startswith("20 of 30 chats")


def test_no_block_left_is_an_error_that_says_why(chats):
    file, tokenizer = chats
    for options in ({"streaming": True}, {"validation_files": (file,)}, {}):
        spec = DataSpec(train_files=(file,), **{"validation_split_percentage": 0.0, **options})
        with pytest.raises(UserError, match="30 of 30 chats are longer than --block_size 8 and were dropped .*larger --block_size"):
            list(load_blocks(spec, tokenizer, 8)[0])


def test_positions_are_left_out_where_a_model_takes_none(chats):
    file, tokenizer = chats
    for streaming in (False, True):
        spec = DataSpec(train_files=(file,), validation_files=(file,), streaming=streaming, packing="pad")
        train, evaluation, _ = load_blocks(spec, tokenizer, 16, positions=False)
        assert all(set(block) == {"input_ids", "labels"} for blocks in (train, evaluation) for block in blocks)


def test_texts_of_a_model_that_leaks_get_rows_of_their_own():
    tokenizer = word_tokenizer(WORDS)
    documents = [Document(text=" ".join(WORDS[:n])) for n in (3, 20, 9)]
    stream = StreamingBlocks(lambda: documents, tokenizer, 8, PAD, rules=Rules(alone=True))
    assert [sum(map(len, segments(block))) for block in stream] == [5, 8, 8, 6, 8, 3]


@pytest.mark.parametrize("name", ["packing", "truncation"])
def test_other_words_are_refused(name):
    with pytest.raises(UserError, match=f"--{name} 'moon': allowed are auto"):
        DataSpec(dataset_name="builtin:prose", **{name: "moon"}).check()
