"""Data without a supervised token is refused before training, data with few of them is counted; whatever other files are given."""

import json

import pytest

from ds_stability.data import DataSpec, load_blocks
from ds_stability.data.supervision import STREAM_BLOCKS, require_supervised
from ds_stability.data.tokenizer import train_bpe
from ds_stability.errors import UserError

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|eos|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_bpe(["words of small chats"], 300)
    tokenizer.chat_template = CHATML
    return tokenizer


def chats(path, *kinds):
    """A file of chats: "good", "user" (no answer) or "masked" (an answer of weight 0)."""
    rows = []
    for number, kind in enumerate(kinds):
        answer = {"role": "assistant", "content": f"small words {number}"} | ({"weight": 0} if kind == "masked" else {})
        rows.append({"messages": [{"role": "user", "content": f"words {number}"}] + ([answer] if kind != "user" else [])})
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def load(path, tokenizer, **settings):
    spec = DataSpec(train_files=(path,), assistant_only_loss=True, **{"validation_split_percentage": 0, **settings})
    return load_blocks(spec, tokenizer, 64)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["user", "masked"])
def test_nothing_supervised_at_all_is_an_error(tmp_path, tokenizer, kind, streaming):
    path = chats(tmp_path / "a.jsonl", *[kind] * 20)
    with pytest.raises(UserError, match="has no supervised token, so that nothing would be learned"):
        load(path, tokenizer, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("silent", "share"), [(1, None), (2, None), (3, "8%"), (20, "50%")])
def test_chats_without_supervised_tokens_are_counted(tmp_path, tokenizer, caplog, streaming, silent, share):
    total = 40
    path = chats(tmp_path / "a.jsonl", *["masked"] * (silent // 2), *["user"] * (silent - silent // 2), *["good"] * (total - silent))
    _, _, facts = load(path, tokenizer, streaming=streaming)
    assert facts["train"]["chats_without_supervised_tokens"] == silent
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (share is not None)
    assert not said or (f"{silent} of {total} chats" in said[0] and f"({share})" in said[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_that_truncation_cuts_off_is_no_answer(tmp_path, tokenizer, caplog, streaming):
    long = [{"role": "user", "content": "why " * 200}, {"role": "assistant", "content": "because"}]
    path = tmp_path / "a.jsonl"
    chats(path, *["good"] * 20)
    path.write_text(path.read_text() + "\n" + "\n".join([json.dumps({"messages": long})] * 20))
    counts = {how: load(str(path), tokenizer, streaming=streaming, truncation=how)[2]["train"]["chats_without_supervised_tokens"]
              for how in ("drop", "keep_start", "keep_end", "split")}  # fmt: skip
    assert counts == {"drop": 0, "keep_start": 20, "keep_end": 0, "split": 0}
    assert "cut off by --truncation" in caplog.text


def test_held_out_data_without_a_supervised_token_is_an_error(tmp_path, tokenizer):
    path = chats(tmp_path / "a.jsonl", *["good"] * 20)
    with pytest.raises(UserError, match="the held-out data .* has no supervised token"):
        load(path, tokenizer, validation_files=(chats(tmp_path / "b.jsonl", *["user"] * 20),))


def test_all_tokens_are_supervised_without_the_flag(tmp_path, tokenizer):
    spec = DataSpec(train_files=(chats(tmp_path / "a.jsonl", *["user"] * 20),), validation_split_percentage=0)
    assert "chats_without_supervised_tokens" not in load_blocks(spec, tokenizer, 64)[2]["train"]


def test_an_endless_stream_is_looked_into_up_to_a_stated_number_of_blocks():
    def endless():
        while True:
            yield {"labels": [-100, -100]}

    with pytest.raises(UserError, match=f"of {STREAM_BLOCKS} blocks"):
        require_supervised(endless(), "the beginning of the stream", STREAM_BLOCKS)
