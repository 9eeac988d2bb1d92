"""Documents from files, data sets and built-in corpora, and the rendering of chats."""

import gzip
import json
import subprocess
import sys

import pytest

from ds_stability.data import DataSpec, Document
from ds_stability.data.builtin import clean_paragraphs, prose_documents, prose_fingerprint
from ds_stability.data.fingerprint import corpus_fingerprint, file_fingerprint
from ds_stability.data.readers import read_documents
from ds_stability.data.splitting import is_held_out, split_documents, split_stream
from ds_stability.data.text_files import unwrap_lines

WRAPPED = "It was a fine\nmorning, and\nEmma went out.\n\n\n  Then she\ncame back.\n"


def texts(spec, split="train"):
    return [document.text for document in read_documents(spec, split)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


@pytest.mark.parametrize("text_document, unwrap, expected", [
    ("file", False, [WRAPPED.strip("\n")]),
    ("file", True, ["It was a fine morning, and Emma went out.\n\nThen she came back."]),
    ("paragraph", False, ["It was a fine\nmorning, and\nEmma went out.", "  Then she\ncame back."]),
    ("paragraph", True, ["It was a fine morning, and Emma went out.", "Then she came back."]),
    ("line", False, ["It was a fine", "morning, and", "Emma went out.", "  Then she", "came back."]),
])
def test_text_documents(tmp_path, text_document, unwrap, expected):
    path = write(tmp_path / "a.txt", WRAPPED)
    assert texts(DataSpec(train_files=(path,), text_document=text_document, unwrap=unwrap)) == expected


def test_unwrap_keeps_exactly_one_blank_line():
    assert unwrap_lines("a\nb\n \t\n\n\nc") == "a b\n\nc"
    assert unwrap_lines(" \n\n") == ""


def test_byte_order_mark_windows_lines_and_gzip(tmp_path):
    plain = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo \xc3\xa9\r\n")
    packed = write(tmp_path / "b.txt.gz", gzip.compress(b"three\n"))
    assert texts(DataSpec(train_files=(plain, packed))) == ["one\ntwo é", "three"]


def test_jsonl_text_chats_and_empty_records(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"text": "a", "n": 1}, {"text": " \n"}, {"text": None}, {"messages": messages}, {"messages": []}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    documents = list(read_documents(DataSpec(train_files=(path,))))
    assert [(document.text, document.messages) for document in documents] == [("a", None), (None, messages)]
    assert documents[1].where == f"{path} line 4"


def test_text_field_wins_unless_only_assistants_are_trained_on(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "a.jsonl", json.dumps({"body": "t", "chat": messages}))
    spec = DataSpec(train_files=(path,), text_field="body", messages_field="chat")
    assert next(read_documents(spec)).text == "t"
    only = DataSpec(train_files=(path,), text_field="body", messages_field="chat", assistant_only_loss=True)
    assert next(read_documents(only)).messages == messages


def test_json_array_is_read_as_records(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert texts(DataSpec(train_files=(path,))) == ["a", "b"]


def test_parquet_text_and_messages(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"], "x": [1, 2, 3, 4]}), path)
    assert texts(DataSpec(train_files=(path,))) == ["a", "b"]
    messages = [[{"role": "user", "content": "hi"}]]
    parquet.write_table(pyarrow.table({"messages": messages}), path)
    assert next(read_documents(DataSpec(train_files=(path,)))).messages == messages[0]


def test_line_of_100_mb(tmp_path):
    path = tmp_path / "a.jsonl"
    size = 100_000_000
    with open(path, "w") as file:
        file.write('{"text": "' + "word " * (size // 5) + '"}\n{"text": "b"}\n')
    lengths = [len(document.text) for document in read_documents(DataSpec(train_files=(str(path),)))]
    assert lengths == [size, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_folder(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", '{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    write(tmp_path / "set" / "validation.jsonl", '{"text": "c"}\n')
    spec = DataSpec(dataset_name=str(tmp_path / "set"), dataset_validation_split="validation", streaming=streaming)
    assert texts(spec) == ["a", "b"]
    assert texts(spec, "validation") == ["c"]


def test_prose_is_prose():
    documents = prose_documents()
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n\n")]
    assert len(documents) > 100 and sum(map(len, documents)) > 150_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert not any(mark in document for document in documents for mark in ("::=", ">>>", "****", "+---"))
    assert all("\n" not in paragraph for paragraph in paragraphs)
    assert prose_fingerprint() == prose_fingerprint()


def test_clean_paragraphs_drops_code_tables_and_titles():
    source = ("Title\n*****\n\nThe *first* paragraph is long enough to be kept\nas prose, it is [1].\n\n"
              "   >>> x = 1\n   >>> y\n\nShort one.\n\n* The bullet has enough words in it to stand by itself.\n\n"
              "+---+---+\n| a | b |\n+---+---+\n")
    assert list(clean_paragraphs(source)) == [
        "The first paragraph is long enough to be kept as prose, it is.",
        "The bullet has enough words in it to stand by itself."]


def test_synthetic_held_out_is_a_sample_of_its_own():
    spec = DataSpec(dataset_name="builtin:synthetic", synthetic_tokens=4000, validation_split_percentage=25)
    train, held_out = texts(spec), texts(spec, "validation")
    count = [sum(len(text.split()) + 1 for text in split) for split in (train, held_out)]
    assert 4000 <= count[0] < 4040 and 1000 <= count[1] < 1040
    assert train[: len(held_out)] != held_out and train == texts(spec)


def test_split_of_many_documents_is_by_content():
    documents = [Document(text=f"document {number}") for number in range(2000)]
    train, held_out = split_documents(documents, 0.1, seed=3)
    assert sorted(d.text for d in train + held_out) == sorted(d.text for d in documents)
    assert 140 < len(held_out) < 260  # binomial, 200 +- 4.5 sd
    again = split_documents(documents[::-1], 0.1, seed=3)[1]
    assert {d.text for d in again} == {d.text for d in held_out}
    assert all(is_held_out(d, 0.1, 3) for d in held_out)
    assert {d.text for d in split_documents(documents, 0.1, seed=4)[1]} != {d.text for d in held_out}


def test_split_of_few_short_documents_is_exact():
    documents = [Document(text=f"document {number}") for number in range(20)]
    assert [len(part) for part in split_documents(documents, 0.1)] == [18, 2]
    assert [len(part) for part in split_documents(documents[:2], 0.05)] == [1, 1]
    assert [len(part) for part in split_documents([Document(text="same")] * 10, 0.3)] == [7, 3]


def test_split_of_few_long_documents_takes_their_tails():
    text = "\n\n".join(f"Paragraph {number} says something." * 10 for number in range(300))
    mode, _ = split_stream([Document(text=text)], 0.05)
    train, held_out = split_documents([Document(text=text)], 0.05)
    assert mode == "tails"
    assert train[0].text + "\n\n" + held_out[0].text == text
    assert 0.045 < len(held_out[0].text) / len(text) < 0.06


def test_fingerprint_depends_on_bytes_and_options_only(tmp_path):
    one, other = write(tmp_path / "a.txt", "x" * 100), write(tmp_path / "b.txt", "x" * 100)
    same = [corpus_fingerprint(DataSpec(train_files=(path,))) for path in (one, other)]
    assert same[0] == same[1] and len(same[0]) == 64
    assert corpus_fingerprint(DataSpec(train_files=(one,), unwrap=True)) != same[0]
    write(tmp_path / "b.txt", "x" * 99 + "y")
    assert corpus_fingerprint(DataSpec(train_files=(other,))) != same[0]
    assert file_fingerprint(one) == file_fingerprint(one, sampled=True)


def test_importing_the_package_is_cheap():
    code = ("import sys; before = set(sys.modules); import ds_stability.data;"
            "print(sorted({'datasets', 'transformers', 'pyarrow', 'tokenizers'} & (set(sys.modules) - before)))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
