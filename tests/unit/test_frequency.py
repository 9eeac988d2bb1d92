"""The high-frequency set against counting by hand."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.data import Document
from ds_stability.data.frequency import HighFrequencySet, count_tokens, high_frequency_set, make_high_frequency_set
from ds_stability.data.packing import PackedBlocks
from ds_stability.data.tokenizer import tokenizer_hash, word_tokenizer
from ds_stability.data.tokens import build_store
from ds_stability.errors import UserError


def block(labels):
    return {"labels": torch.tensor(labels)}


def test_only_supervised_ordinary_tokens_are_counted():
    counts = count_tokens([block([-100, 3, 3, 0]), block([-100, 1, 4, -100])], vocab_size=6, special_ids=[0, 1])
    assert counts.tolist() == [0, 0, 0, 2, 1, 0]


def test_counting_stops_at_the_limit_within_a_block():
    counts = count_tokens([block([-100, 0, 3, 4]), block([-100, 4, 5, 5])], vocab_size=6, max_tokens=4, special_ids=[0])
    assert counts.tolist() == [0, 0, 0, 1, 2, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any), st.floats(0.01, 1.0))
def test_smallest_prefix_by_count_that_reaches_the_coverage(counts, coverage):
    ids, reached = high_frequency_set(np.array(counts), coverage)
    order = [index for index, _ in sorted(enumerate(counts), key=lambda item: (-item[1], item[0]))]
    assert ids == order[: len(ids)]
    assert reached == pytest.approx(sum(counts[index] for index in ids) / sum(counts))
    assert reached >= coverage - 1e-8
    assert sum(counts[index] for index in ids[:-1]) < coverage * sum(counts)
    assert all(counts[index] > 0 for index in ids)


def test_ties_go_to_the_smaller_id_and_exact_halves_are_enough():
    assert high_frequency_set(np.array([1, 5, 5, 5, 4]), 0.5) == ([1, 2], 0.5)
    assert high_frequency_set(np.array([1] * 10), 0.3) == ([0, 1, 2], 0.3)


@pytest.fixture()
def made():
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    texts = ["a a a b", "b a c d a a a"]
    blocks = PackedBlocks(build_store([Document(text=text) for text in texts], tokenizer), 5, 2, drop_remainder=False)
    return tokenizer, blocks, make_high_frequency_set(blocks, tokenizer, 16, coverage=0.8, corpus_fingerprint="f")


def test_from_blocks(made):
    tokenizer, blocks, result = made
    counts = Counter(int(label) for item in blocks for label in item["labels"] if label > 3)
    assert result.tokens == sum(counts.values()) and result.vocab_size == 16
    best = counts.most_common(2)
    assert result.token_ids == tuple(index for index, _ in best)
    assert result.coverage_reached == pytest.approx(sum(count for _, count in best) / result.tokens)
    assert result.tokenizer_hash == tokenizer_hash(tokenizer) and result.corpus_fingerprint == "f"


def test_file_round_trip_and_checks(made, tmp_path):
    tokenizer, _, result = made
    path = str(tmp_path / "high_frequency.json")
    result.save(path)
    assert json.load(open(path))["token_ids"] == list(result.token_ids)
    assert HighFrequencySet.load(path) == HighFrequencySet.load(path, 16, tokenizer_hash(tokenizer)) == result
    with pytest.raises(UserError, match="another tokenizer"):
        HighFrequencySet.load(path, tokenizer_hash=tokenizer_hash(word_tokenizer(["x"])))
    with pytest.raises(UserError, match="not in the model's vocabulary of 4"):
        HighFrequencySet.load(path, vocab_size=4)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"token_ids": []}', '{"token_ids": ["a"], "tokens": 5}', "\x00"])
def test_wrong_files(tmp_path, content):
    path = tmp_path / "h.json"
    path.write_text(content)
    with pytest.raises(UserError, match="h.json: is not a high-frequency set"):
        HighFrequencySet.load(str(path))


def test_wrong_ids_missing_file_and_no_tokens(tmp_path):
    values = dict(token_ids=[], coverage=0.5, coverage_reached=0.5, tokens=1, vocab_size=3)
    path = tmp_path / "h.json"
    for token_ids in ([], [1.5], [-1], [True]):
        path.write_text(json.dumps(values | {"token_ids": token_ids}))
        with pytest.raises(UserError, match="token_ids"):
            HighFrequencySet.load(str(path))
    with pytest.raises(UserError, match="No such file"):
        HighFrequencySet.load(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="no supervised token"):
        high_frequency_set(np.zeros(5, int), 0.5)
    with pytest.raises(UserError, match="above 0 and up to 1"):
        high_frequency_set(np.ones(5, int), 0.0)
