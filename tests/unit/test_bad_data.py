"""Bad data: each case ends in one line that says what was given, where, and what to change."""

import gzip
import json
import os

import pytest

from ds_stability.data import DataSpec, load_blocks
from ds_stability.data.packing import check_block_size, check_vocabulary
from ds_stability.data.tokenizer import train_bpe, word_tokenizer
from ds_stability.errors import UserError

GOOD = '{"text": "a b c d e f"}\n'
DEEP = "[" * 100_000
ALL_OF_IT = {"validation_split_percentage": 0}

FILES = {  # name: (content, options of DataSpec, words of the message)
    "empty.txt": (b"", {}, ["--train_file", "empty (0 bytes)"]),
    "blank.txt": (b" \n\t\n \r\n", {}, ["no document with any text"]),
    "blank.jsonl": (b"\n\n", {}, ["no document with any text"]),
    "empty_texts.jsonl": (b'{"text": ""}\n{"text": null}\n', {}, ["no document with any text"]),
    "bom_only.txt": (b"\xef\xbb\xbf", {}, ["no document with any text"]),
    "latin.txt": ("abc\ncafé".encode("latin-1"), {}, ["byte 7 (0xe9) is not UTF-8", "iconv"]),
    "bom_latin.txt": (b"\xef\xbb\xbfab\xff", {}, ["byte 5 (0xff) is not UTF-8"]),
    "cut.txt": ("abc é".encode()[:-1], {}, ["byte 4 (0xc3) is not UTF-8"]),
    "utf16.txt": ("hello".encode("utf-16"), {}, ["is UTF-16", "iconv"]),
    "nul.txt": (b"one\ntwo \x00 three", {}, ["NUL byte at byte 8"]),
    "latin.jsonl": (GOOD.encode() + '{"text": "é"}'.encode("latin-1"), {}, ["byte 34 (0xe9)"]),
    "broken.jsonl": ((GOOD + "\n" + '{"text": "b"\n' + GOOD).encode(), {}, ["line 3", "not valid JSON", "delimiter at"]),
    "trailing.jsonl": (b'{"text": "a"} {"text": "b"}\n', {}, ["line 1", "Extra data at column 15"]),
    "array.jsonl": (b'["a", "b"]\n', {}, ["line 1", "an array", "JSON object"]),
    "string.jsonl": ((GOOD + '"just text"\n').encode(), {}, ["line 2", "a string"]),
    "number.jsonl": (b"3\n", {}, ["line 1", "a number"]),
    "deep.jsonl": (DEEP.encode(), {}, ["line 1", "cannot be read"]),
    "digits.jsonl": (('{"text": ' + "9" * 5000 + "}").encode(), {}, ["line 1", "cannot be read"]),
    "no_field.jsonl": (b'{"body": "a", "title": "b"}\n', {},
                       ["line 1", "no field 'text' or 'messages'", "'body', 'title'", "--text_field"]),
    "no_fields.jsonl": (b"{}\n", {}, ["no field at all"]),
    "other_field.jsonl": (GOOD.encode(), {"text_field": "body"}, ["no field 'body'", "found 'text'"]),
    "not_text.jsonl": ((GOOD + '{"text": 3}').encode(), {}, ["line 2", "field 'text' is a number"]),
    "surrogate.jsonl": (b'{"text": "a \\ud800"}', {}, ["line 1", "surrogate", "character 2"]),
    "chat_text.jsonl": (b'{"messages": "hello"}', {}, ["'messages' is a string", "--messages_field"]),
    "chat_role.jsonl": (b'{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}', {},
                        ["line 1", "message 2"]),
    "no_template.jsonl": (b'{"messages": [{"role": "user", "content": "a"}]}', ALL_OF_IT,
                          ["line 1", "no chat template", "--tokenizer_name"]),
    "only_text.jsonl": (GOOD.encode(), {"assistant_only_loss": True}, ["--assistant_only_loss needs chat messages"]),
    "text_only.txt": (b"hello", {"assistant_only_loss": True}, ["plain text has no assistant turns"]),
    "array.json": (b'[{"text": "a"}, 3]', {}, ["item 2", "a number"]),
    "broken.json": (b'[{"text": "a"},\n {"text" "b"}]', {}, ["not valid JSON", "line 2 column"]),
    "not.parquet": (b"PAR1 this is not a table", {}, ["not a readable Parquet file"]),
    "not.txt.gz": (b"plain", {}, ["not a complete gzip file"]),
    "cut.txt.gz": (gzip.compress(os.urandom(5000).hex().encode())[:1000], {}, ["not a complete gzip file"]),
    "table.csv": (b"a,b\n", {}, ["unknown file extension", ".jsonl", ".parquet"]),
    "none": (b"text", {}, ["unknown file extension"]),
    "one.txt": (b"one short text", {}, ["one short document", "--validation_file"]),
    "short.txt": (b"a few words", ALL_OF_IT, ["tokens make 0 blocks of --block_size 64", "2 ranks", "128 tokens"]),
    "one_block.txt": (b"a few words " * 40, {**ALL_OF_IT, "max_train_samples": 1}, ["2 ranks"]),
    "stream.jsonl": (GOOD.encode(), {**ALL_OF_IT, "streaming": True}, ["tokens make 0 blocks"]),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a few words of text " * 20], 280)


def assert_one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, tokenizer, name):
    content, options, words = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(load_blocks(DataSpec(train_files=(str(path),), **options), tokenizer, 64, world_size=2)[0])
    where = [] if "tokens make" in str(caught.value) or "one short" in str(caught.value) else [name]
    assert_one_line(caught, *words, *where)


def test_parquet_without_the_field(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(UserError) as caught:
        load_blocks(DataSpec(train_files=(path,)), tokenizer, 64)
    assert_one_line(caught, "no field 'text'", "'body', 'id'")
    with pytest.raises(UserError) as caught:
        load_blocks(DataSpec(train_files=(path,), text_field="id"), tokenizer, 64)
    assert_one_line(caught, "row 1", "is a number")


SPECS = [
    (dict(), ["no training data", "--train_file", "builtin:prose"]),
    (dict(train_files=("/nowhere/a.txt",)), ["--train_file /nowhere/a.txt: no such file"]),
    (dict(train_files=(os.path.dirname(__file__),)), ["is a directory"]),
    (dict(train_files=(__file__,)), ["unknown file extension"]),
    (dict(dataset_name="builtin:prose", validation_files=("/nowhere/b.txt",)),
     ["--validation_file /nowhere/b.txt: no such file"]),
    (dict(train_files=("a.txt",), dataset_name="c"), ["both --train_file", "drop one"]),
    (dict(dataset_name="builtin:proze"), ["builtin:proze", "builtin:prose, builtin:synthetic"]),
    (dict(dataset_name="builtin:prose", assistant_only_loss=True), ["no assistant turns"]),
    (dict(dataset_name="builtin:prose", dataset_validation_split="test"), ["--dataset_validation_split"]),
    (dict(dataset_name="builtin:prose", text_document="chapter"), ["'chapter'", "file, paragraph, line"]),
    (dict(dataset_name="builtin:prose", text_document="line", unwrap=True), ["--unwrap"]),
    (dict(dataset_name="builtin:prose", validation_split_percentage=100), ["--validation_split_percentage 100"]),
    (dict(dataset_name="builtin:prose", validation_split_percentage=-1), ["--validation_split_percentage -1"]),
    (dict(dataset_name="builtin:prose", validation_split_percentage=float("nan")), ["--validation_split_percentage nan"]),
    (dict(dataset_name="builtin:prose", max_train_samples=0), ["--max_train_samples 0"]),
    (dict(dataset_name="builtin:prose", max_eval_samples=-2), ["--max_eval_samples -2"]),
    (dict(dataset_name="builtin:prose", shuffle_buffer=-1), ["--shuffle_buffer -1"]),
    (dict(dataset_name="builtin:synthetic", synthetic_tokens=0), ["--synthetic_tokens 0"]),
]


@pytest.mark.parametrize("options, words", SPECS)
def test_specs_are_refused_before_anything_is_read(options, words):
    with pytest.raises(UserError) as caught:
        DataSpec(**options).check()
    assert_one_line(caught, *words)


def test_data_sets_that_cannot_be_loaded(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(GOOD)
    for options, words in [
        (dict(dataset_name=str(tmp_path / "none")), ["cannot be loaded", "split train"]),
        (dict(dataset_name=str(tmp_path / "set"), dataset_split="tset"), ["cannot be loaded", "tset"]),
        (dict(dataset_name=str(tmp_path / "set"), text_field="body"), ["row 1", "no field 'body'", "'text'"]),
    ]:
        with pytest.raises(UserError) as caught:
            load_blocks(DataSpec(**options), tokenizer, 64)
        assert_one_line(caught, *words)


def test_tokenizer_without_eos(tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError) as caught:
        load_blocks(DataSpec(dataset_name="builtin:prose"), bare, 64)
    assert_one_line(caught, "no end-of-sequence token", "--tokenizer_name")


def test_small_bpe_vocabulary():
    with pytest.raises(UserError) as caught:
        train_bpe(["a"], 100)
    assert_one_line(caught, "100", "from 259")


def test_block_size_and_vocabulary_against_the_model(tokenizer):
    import transformers

    config = transformers.GPT2Config(n_positions=128, vocab_size=300, bos_token_id=0, eos_token_id=1)
    check_block_size(128, config)
    check_block_size(10**6, transformers.BloomConfig())  # positions without a bound
    for block_size, words in [(129, ["--block_size 129", "128"]), (1, ["--block_size 1:"]), (-5, ["--block_size -5"])]:
        with pytest.raises(UserError) as caught:
            check_block_size(block_size, config)
        assert_one_line(caught, *words)
    check_vocabulary(tokenizer, config)  # a padded embedding is fine
    large = word_tokenizer([f"w{number}" for number in range(400)])
    with pytest.raises(UserError) as caught:
        check_vocabulary(large, config)
    assert_one_line(caught, "403", "300", "--tokenizer_name")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(UserError) as caught:
        DataSpec(train_files=(str(path),)).check()
    assert_one_line(caught, "may not be read")


def test_nothing_is_written_beside_the_data(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 400 + json.dumps({"text": 1}))
    with pytest.raises(UserError):
        load_blocks(DataSpec(train_files=(str(path),)), tokenizer, 16, cache_dir=str(tmp_path / "cache"))
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]
