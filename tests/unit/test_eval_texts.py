"""Texts of a cell: held-out documents are those the run did not train on; prompts, references, counts, and bad files."""

import dataclasses
import json
import random
from collections import Counter

import numpy as np
import pytest

from ds_stability.data import DataSpec, load_blocks
from ds_stability.data.tokenizer import special_token_ids, train_bpe
from ds_stability.errors import UserError
from ds_stability.eval.prompts import cut_prompts, prompts_from_file
from ds_stability.eval.records import Prompt
from ds_stability.eval.suite import Suite
from ds_stability.eval.texts import TextSource, check_context, high_frequency_words, make_texts, run_documents

WORDS = "the quick brown fox jumps over a lazy dog while seven bright stars shine on cold water near old stone walls".split()


def prose(words, seed):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([prose(2000, 0)], 320)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(prose(60 + number, number) for number in range(80)))
    return path


def spec_of(path, **values):
    return DataSpec(**{"train_files": (str(path),), "text_document": "paragraph", "validation_split_percentage": 20.0, **values})


def manifest_of(spec, tokenizer, block_size=64):
    facts = load_blocks(spec, tokenizer, block_size)[2]
    return {"data": facts, "working_directory": "/"}, facts


SUITE = {"name": "t", "prompts": {"count": 10, "tokens": 6}, "max_new_tokens": 12, "text": {"window": 16}}


def suite_of(**values):
    return Suite.parse({**SUITE, **values})


@pytest.mark.parametrize("values", [{}, {"text_document": "file"}, {"seed": 5}, {"streaming": True, "max_train_samples": 4}])
def test_documents_are_those_of_the_run(corpus, tokenizer, values):
    """The same documents and tokens on each side as load_blocks counted; no held-out text was trained on."""
    if values.get("text_document") == "file":
        corpus.write_text("\n\n".join(prose(200, number) for number in range(120)))  # one long document: its tail is held out
    spec = spec_of(corpus, **values)
    held_out, train = run_documents(spec)
    facts = load_blocks(spec, tokenizer, 64)[2]
    if not spec.streaming:
        assert (len(held_out), len(train)) == (facts["validation"]["documents"], facts["train"]["documents"])
    trained = " ".join(document.text for document in train)
    assert held_out and all(document.text not in trained for document in held_out)
    whole = corpus.read_text()
    assert sum(len(document.text.split()) for document in held_out + train) == len(whole.split())


def test_validation_files_are_the_held_out_text(corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else entirely\n\nand more of it")
    held_out, train = run_documents(spec_of(corpus, validation_files=(str(other),)))
    assert [document.text for document in held_out] == ["something else entirely", "and more of it"]
    assert len(train) == 80


def test_a_relative_path_in_a_manifest_is_the_trainings(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest, facts = manifest_of(spec_of("corpus.txt"), tokenizer)
    monkeypatch.chdir("/")
    source = TextSource.of_run({**manifest, "working_directory": str(tmp_path)}, "runs/a")
    assert source.spec.train_files == (str(corpus),)
    assert len(source.documents()[0]) == facts["validation"]["documents"]
    assert len(source.fingerprint()) == 64


def test_a_corpus_that_changed_is_refused(corpus, tokenizer):
    manifest, _ = manifest_of(spec_of(corpus), tokenizer)
    source = TextSource.of_run(manifest, "runs/a")
    before = source.fingerprint()
    assert source.fingerprint() == before
    corpus.write_text(corpus.read_text() + " more")
    with pytest.raises(UserError, match="runs/a: its training data has changed"):
        source.fingerprint()
    files = TextSource.of_run(manifest, "runs/a", [str(corpus)], [str(corpus)])
    assert files.fingerprint() != before  # own files: the run's are not looked at
    corpus.unlink()
    with pytest.raises(UserError, match=r"no longer there; give --held_out_file"):
        source.fingerprint()


def test_manifests_that_say_nothing():
    with pytest.raises(UserError, match=r"manifest\.json does not say"):
        TextSource.of_run({"data": {}}, "runs/a")
    with pytest.raises(UserError, match=r"manifest\.json does not say"):
        TextSource.of_run({"data": {"spec": {"nonsense": 1}, "block_size": 3, "corpus_fingerprint": "x"}}, "runs/a")


def test_prompts_and_their_continuations_stand_in_the_text(tokenizer):
    texts = [prose(300, 1), prose(300, 2)]
    cut = cut_prompts(texts, tokenizer, 8, 6, 12)
    assert len(cut.prompts) == len(cut.others) == 8
    assert [prompt.index for prompt in cut.prompts] == list(range(8))
    for prompt in cut.prompts + cut.others:
        assert prompt.token_ids[0] == tokenizer.bos_token_id
        assert len(prompt.token_ids) == 7 and len(prompt.reference_ids) == 12
        assert any(prompt.text + prompt.reference_text in text for text in texts)
        assert tokenizer.decode(prompt.reference_ids) == prompt.reference_text
    # Spread over both documents, and no two windows overlap.
    assert all(sum(prompt.text in text for prompt in cut.prompts) >= 3 for text in texts)
    starts = sorted((number, text.index(p.text + p.reference_text), len(p.text + p.reference_text))
                    for p in cut.prompts + cut.others for number, text in enumerate(texts)
                    if p.text + p.reference_text in text)  # fmt: skip
    for (n, start, size), (m, following, _) in zip(starts, starts[1:]):
        assert n < m or start + size <= following


def test_windows_begin_with_a_word(tokenizer):
    cut = cut_prompts([prose(400, 3)], tokenizer, 10, 6, 12)
    assert all(prompt.text.strip().split()[0] in WORDS for prompt in cut.prompts)


def test_short_documents_give_shorter_continuations(tokenizer):
    cut = cut_prompts(["the quick brown fox", "dog", "a lazy dog near old stone walls"], tokenizer, 9, 1, 50)
    assert [prompt.text + prompt.reference_text for prompt in cut.prompts] == [
        "the quick brown fox", "dog", "a lazy dog near old stone walls"]
    assert not cut.others


def test_prompts_of_no_token_are_the_bos(tokenizer):
    cut = cut_prompts(["the quick fox", "a dog"], tokenizer, 2, 0, 8)
    assert [prompt.token_ids for prompt in cut.prompts] == [(tokenizer.bos_token_id,)] * 2
    assert [prompt.reference_text for prompt in cut.prompts] == ["the quick fox", "a dog"]


def test_make_texts_counts_what_was_trained_on(corpus, tokenizer):
    spec = spec_of(corpus)
    manifest, _ = manifest_of(spec, tokenizer)
    texts = make_texts(TextSource.of_run(manifest, "r"), suite_of(), tokenizer, 400, 64)
    blocks = load_blocks(spec, tokenizer, 64)[0]
    special = special_token_ids(tokenizer)
    counted = np.zeros(400, dtype=np.int64)
    for block in blocks:
        ids = block["input_ids"].numpy()
        counted += np.bincount(ids[~np.isin(ids, special)], minlength=400)
    assert texts.training_unigrams.shape == (400,)
    assert 0 <= (texts.training_unigrams - counted).sum() < 64  # the remainder that fills no block
    assert (texts.training_unigrams >= counted).all()
    assert len(texts.prompts) == 10 and len(texts.reference_ids) == 10
    assert texts.facts["references_disjoint_from_prompts"] is True
    assert not {p.reference_text for p in texts.prompts} & set(texts.reference_texts)


def test_only_the_blocks_that_were_trained_on_count(corpus, tokenizer):
    manifest, _ = manifest_of(spec_of(corpus, max_train_samples=3), tokenizer)
    texts = make_texts(TextSource.of_run(manifest, "r"), suite_of(), tokenizer, 400, 64)
    first = load_blocks(spec_of(corpus, max_train_samples=3), tokenizer, 64)[0]
    ids = np.concatenate([block["input_ids"].numpy() for block in first])
    ids = ids[~np.isin(ids, special_token_ids(tokenizer))]
    assert (texts.training_unigrams == np.bincount(ids, minlength=400)).all()
    assert "".join(texts.train).replace(" ", "") == tokenizer.decode(ids).replace(" ", "")


def test_few_windows_leave_the_prompts_own_continuations(tokenizer, tmp_path):
    path = tmp_path / "held.txt"
    path.write_text(prose(60, 4))
    source = TextSource.of_run(None, "m", [str(path)])
    texts = make_texts(source, suite_of(), tokenizer, 400, 64)
    assert 0 < len(texts.prompts) < 10
    assert texts.facts["references_disjoint_from_prompts"] is False
    assert texts.reference_texts == tuple(prompt.reference_text for prompt in texts.prompts)
    assert texts.training_unigrams is None and texts.high_frequency_words is None and texts.train == ()


def test_facts_tell_same_texts_from_others(tokenizer, tmp_path):
    def facts(text, suite=None):
        (tmp_path / "held.txt").write_text(text)
        return make_texts(TextSource.of_run(None, "m", [str(tmp_path / "held.txt")]), suite or suite_of(), tokenizer, 400, 64).facts

    first = facts(prose(60, 4))
    assert facts(prose(60, 4)) == first and len({first["prompts_sha"], first["held_out_sha"], first["train_sha"]}) == 3
    other = facts(prose(60, 5))
    assert other["held_out_sha"] != first["held_out_sha"] and other["prompts_sha"] != first["prompts_sha"]


def test_high_frequency_words_against_counting():
    text = "The the THE fox fox don't dog it's. Dog, stars"
    chosen = high_frequency_words([text])
    counts = Counter({"the": 3, "fox": 2, "dog": 2, "don't": 1, "it's": 1, "stars": 1})
    assert chosen == ("the", "dog")  # 3 + 2 of 10 words; a tie goes by spelling
    assert sum(counts[word] for word in chosen) >= 5


def test_no_held_out_text_says_what_to_give(corpus, tokenizer):
    with pytest.raises(UserError, match=r"m is no run of ours .* --held_out_file FILE"):
        make_texts(TextSource.of_run(None, "m"), suite_of(), tokenizer, 400, 64)
    manifest, _ = manifest_of(spec_of(corpus, validation_split_percentage=0.0), tokenizer)
    with pytest.raises(UserError, match="trained without held-out data"):
        make_texts(TextSource.of_run(manifest, "r"), suite_of(), tokenizer, 400, 64)


def test_room_in_the_context():
    prompts = [Prompt(0, "a", (1,) * 20), Prompt(1, "b", (1,) * 31)]
    check_context(prompts, suite_of(), 43)
    check_context(prompts, suite_of(), None)
    with pytest.raises(UserError, match=r"prompt 2 has 31 tokens .*max_new_tokens 12.* context is 42"):
        check_context(prompts, suite_of(), 42)
    with pytest.raises(UserError, match="there is no prompt"):
        check_context([], suite_of(), 42)


def test_prompts_of_a_text_file(tmp_path, tokenizer):
    path = tmp_path / "p.txt"
    path.write_text("the quick\n\n  \na lazy dog\nfox\n")
    prompts = prompts_from_file(str(path), tokenizer)
    assert [prompt.text for prompt in prompts] == ["the quick", "a lazy dog", "fox"]
    assert [prompt.index for prompt in prompts] == [0, 1, 2]
    assert list(prompts[1].token_ids) == tokenizer("a lazy dog")["input_ids"]
    assert prompts[0].reference_ids is None
    assert len(prompts_from_file(str(path), tokenizer, 2)) == 2


def test_prompts_of_a_jsonl_file(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "the quick", "reference": " brown fox"}\n{"prompt": "a dog"}\n')
    with_reference, without = prompts_from_file(str(path), tokenizer)
    assert tokenizer.decode(with_reference.reference_ids) == " brown fox" == with_reference.reference_text
    assert without.reference_ids is None
    cut = prompts_from_file(str(path), tokenizer, None, 2)[0]
    assert cut.reference_ids == with_reference.reference_ids[:2] and " brown fox".startswith(cut.reference_text)


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b"\n  \n", "holds no prompt"),
        ("p.txt", b"good\nbad \xff\n", "is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: is no JSON"),
        ("p.jsonl", b'{"prompt": "  "}\n', "line 1: the prompt is empty"),
        ("p.jsonl", b'{"text": "a"}\n', "line 1: needs"),
        ("p.jsonl", b'"a"\n', "line 1: needs"),
        ("p.jsonl", b'{"prompt": "a", "reference": 3}\n', "line 1: needs"),
    ],
)
def test_bad_prompt_files(tmp_path, tokenizer, name, content, part):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        prompts_from_file(str(path), tokenizer)
    assert part in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompts_file_needs_no_held_out_text(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "the quick", "reference": " brown fox"}))
    suite = suite_of(prompts={"source": "file", "file": str(path)}, text={"held_out_windows": 0, "train_windows": 0})
    texts = make_texts(TextSource.of_run(None, "m"), suite, tokenizer, 400, 64)
    assert texts.prompts[0].text == "the quick" and texts.reference_texts == (" brown fox",)


def test_chats_are_read_as_the_template_writes_them(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "the quick brown fox jumps over"}]}))
    source = TextSource.of_run(None, "m", [str(path)])
    with pytest.raises(UserError, match="no chat template"):
        make_texts(source, suite_of(), tokenizer, 400, 64)
    chatty = train_bpe([prose(2000, 0)], 320)
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    suite = suite_of(prompts={"count": 1, "tokens": 2})
    assert make_texts(source, suite, chatty, 400, 64).held_out == ("[user] the quick brown fox jumps over\n",)


def test_reading_options_of_the_run_hold_for_own_files(corpus, tokenizer, tmp_path):
    manifest, _ = manifest_of(dataclasses.replace(spec_of(corpus), unwrap=True), tokenizer)
    own = tmp_path / "own.txt"
    own.write_text("one two\nthree\n\nfour\n")
    held_out, train = TextSource.of_run(manifest, "r", [str(own)]).documents()
    assert [document.text for document in held_out] == ["one two three", "four"]
    assert len(train) == load_blocks(spec_of(corpus), tokenizer, 64)[2]["train"]["documents"]


def test_half_a_surrogate_pair_is_named(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fox"}\n{"prompt": "fox \\ud800"}\n')
    with pytest.raises(UserError, match="line 2: holds half of a surrogate"):
        prompts_from_file(str(path), tokenizer)
