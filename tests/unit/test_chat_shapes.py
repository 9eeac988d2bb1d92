"""What is supervised of a chat, turn by turn, under templates of the shapes that public models have (chat_shapes.yaml)."""

import random
from itertools import groupby
from pathlib import Path

import pytest
import yaml

from ds_stability.data import DataSpec
from ds_stability.data.chat import encode_chat
from ds_stability.data.readers import document_from_row
from ds_stability.data.tokenizer import train_bpe
from ds_stability.errors import UserError

SHAPES = yaml.safe_load((Path(__file__).parent / "chat_shapes.yaml").read_text(encoding="utf-8"))
SPEC = DataSpec(train_files=("a.jsonl",), assistant_only_loss=True)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ASKED = turn("user", "Which is the capital?")
PARIS = turn("assistant", "It is Paris.")
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
TURNS = [ASKED, PARIS, turn("user", "And the river?"), turn("assistant", "The Seine, of course.")]
THOUGHT = [ASKED, PARIS | {"reasoning_content": "Cities."}, TURNS[2], turn("assistant", "The Seine.", reasoning_content="Rivers.")]
CALLED = [turn("user", "Weather?"), {"role": "assistant", "tool_calls": [call("get_weather", {"city": "Paris"})]}, turn("tool", "sunny"),
          turn("assistant", "It is sunny.")]  # fmt: skip
CHATS = {
    "turns": TURNS,
    "turns_with_tools": TURNS,
    "first": [turn("assistant", "welcome"), ASKED, PARIS],
    "twice": [ASKED, PARIS, turn("assistant", "In France.")],
    "user_last": TURNS[:3],
    "system": [turn("system", "Be short."), ASKED, PARIS],
    "empty": [ASKED, turn("assistant", ""), TURNS[2], turn("assistant", "The Seine.")],
    "blanks": [ASKED, turn("assistant", "  It is Paris. \n")],
    "weights": [ASKED, PARIS | {"weight": 0}, TURNS[2], TURNS[3] | {"weight": 1}],
    "parts": [turn("user", [{"type": "text", "text": "Which "}, {"type": "text", "text": "capital?"}]),
              turn("assistant", [{"type": "text", "text": "It is "}, {"type": "text", "text": "Paris."}])],
    "sharegpt": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "It is Paris."}],
    "think": THOUGHT,
    "think_inside": [ASKED, turn("assistant", "<think>\nCities.\n</think>\n\nIt is Paris."), TURNS[2],
                     turn("assistant", "<think>\nRivers.\n</think>\n\nThe Seine.")],
    "calls": CALLED,
    "call_last": CALLED[:2],
    "two_rounds": [*CALLED, turn("user", "And in Lyon?"), {"role": "assistant", "tool_calls": [call("get_weather", {"city": "Lyon"})]},
                   turn("tool", "sunny"), turn("assistant", "There, too.")],
    "calls_as_text": [CALLED[0], {"role": "assistant", "content": None, "tool_calls": [call("get_weather", '{"city": "Paris"}')]}, *CALLED[2:]],
    "two_calls": [CALLED[0], turn("assistant", "One moment.", tool_calls=[call("get_weather", {"city": "Paris", "a": None}), call("add", {"city": None, "a": 1})]),
                  *CALLED[2:]],
    "tools_alone": [ASKED, PARIS],
}  # fmt: skip
WITH_TOOLS = ("turns_with_tools", "two_rounds", "calls", "call_last", "calls_as_text", "two_calls", "tools_alone")
CASES = [(shape, chat) for shape, values in SHAPES.items() for chat in values["expect"]]
REFUSED = [(shape, chat) for shape, values in SHAPES.items() for chat in values.get("refused", ())]


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make_tokenizer(shape) for name, shape in SHAPES.items()}


def make_tokenizer(shape):
    """A small BPE whose tokens are words with the blank before them, with the special tokens of the shape."""
    texts = [message["content"] for chat in (TURNS, THOUGHT, CALLED) for message in chat if message.get("content")] * 4
    tokenizer = metaspace(texts) if shape.get("metaspace") else train_bpe(texts, 400)
    special = shape["special"]
    tokenizer.add_special_tokens({"eos_token": special[0], "additional_special_tokens": special[1:]})
    if shape.get("bos"):
        tokenizer.add_special_tokens({"bos_token": special[1]})
    tokenizer.add_tokens(shape.get("added", []))
    tokenizer.chat_template = shape["template"]
    return tokenizer


def metaspace(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    alphabet = sorted(set("".join(texts) + "[]/:<>{}\"\n.,?'" + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False)


def encode(tokenizer, name, assistant_only_loss=True):
    row = {"messages": CHATS[name], "tools": TOOLS if name in WITH_TOOLS else None}
    return encode_chat(document_from_row(row, SPEC, "row 1"), tokenizer, assistant_only_loss)


@pytest.mark.parametrize(("shape", "chat"), CASES, ids=[f"{shape}-{chat}" for shape, chat in CASES])
def test_what_is_supervised_turn_by_turn(tokenizers, shape, chat):
    tokenizer = tokenizers[shape]
    ids, marks = encode(tokenizer, chat)
    runs = [[token for token, _ in run] for kept, run in groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1]) if kept]
    assert [tokenizer.decode(run) for run in runs] == SHAPES[shape]["expect"][chat]
    text = tokenizer.decode(ids)
    assert SHAPES[shape].get("contains", {}).get(chat, "") in text
    if SHAPES[shape].get("bos") and shape != "llama2":
        assert text.count(tokenizer.bos_token) == 1  # not once more by the tokenizer
    if chat != "weights":
        assert encode(tokenizer, chat, assistant_only_loss=False) == (ids, None)


@pytest.mark.parametrize(("shape", "chat"), REFUSED, ids=[f"{shape}-{chat}" for shape, chat in REFUSED])
def test_what_a_template_would_lose_is_refused(tokenizers, shape, chat):
    with pytest.raises(UserError, match=SHAPES[shape]["refused"][chat]) as caught:
        encode(tokenizers[shape], chat)
    assert str(caught.value).startswith("row 1: ") and "\n" not in str(caught.value)


def test_the_table_is_as_long_as_it_claims():
    assert len(SHAPES) >= 20 and all(values["expect"] for values in SHAPES.values())


def test_a_blank_of_the_prompt_in_the_first_token_of_an_answer():
    """A BPE has " no" as one token, which begins before the answer: it is the whole answer."""
    tokenizer = train_bpe(["### Assistant: no ### User: no"] * 9, 330)
    tokenizer.chat_template = ("{% for m in messages %}### {{ m.role | capitalize }}: {{ m.content }} {% endfor %}"
                               "{% if add_generation_prompt %}### Assistant: {% endif %}")  # fmt: skip
    assert " no" in {tokenizer.decode(index) for index in range(len(tokenizer))}
    row = {"messages": [turn("user", "no"), turn("assistant", "no"), turn("user", "no")]}
    ids, supervised = encode_chat(document_from_row(row, SPEC, "row"), tokenizer, True)
    assert tokenizer.decode([token for token, mark in zip(ids, supervised, strict=True) if mark]) == " no"


def test_a_weight_of_0_needs_the_loss_of_the_assistant_alone(tokenizers):
    with pytest.raises(UserError, match="row 1: message 2 has a weight of 0, which means something with --assistant_only_loss"):
        encode(tokenizers["chatml"], "weights", assistant_only_loss=False)


def test_a_slow_tokenizer_cannot_tell_characters(tokenizers, monkeypatch):
    monkeypatch.setattr(type(tokenizers["chatml"]), "is_fast", False)
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        encode(tokenizers["chatml"], "turns")


def test_long_chats_are_encoded_in_reasonable_time(tokenizers):
    """Every turn is rendered once more: 40 turns are some 50 renderings of 20 kB."""
    messages = [turn("user" if number % 2 == 0 else "assistant", f"Part {number}. " + "It is Paris. " * 40) for number in range(40)]
    ids, marks = encode_chat(document_from_row({"messages": messages}, SPEC, ""), tokenizers["chatml"], True)
    kept = tokenizers["chatml"].decode([token for token, kept in zip(ids, marks, strict=True) if kept])
    assert kept == "".join(message["content"] + "<|im_end|>" for message in messages[1::2])


def test_whatever_is_said_the_assistant_alone_is_supervised(tokenizers):
    """Texts that look like headers, ends and blanks: each answer is trained on, and no question is."""
    generator = random.Random(0)
    pieces = ["", " ", "\n\n", " x ", "Assistant:", " ASSISTANT: hi", "### Response:\n", "User: q", "<|im_end|>", "</s>", ".\n", "é 🙂", "[/INST]"]

    def said(tag):
        return generator.choice(pieces) + tag + "".join(generator.choice(pieces) for _ in range(generator.randrange(3)))

    for shape in [*SHAPES] * 4:
        turns = [(role, number) for number in range(generator.randrange(1, 4)) for role in ("user", "assistant")]
        turns += [("user", 9)] if generator.random() < 0.2 else []
        document = document_from_row({"messages": [turn(role, said(f"{role[0]}{number}z")) for role, number in turns]}, SPEC, "")
        ids, marks = encode_chat(document, tokenizers[shape], True)
        kept = tokenizers[shape].decode([token for token, kept in zip(ids, marks, strict=True) if kept])
        assert {tag for tag in (f"{role[0]}{number}z" for role, number in turns) if tag in kept} == {
            f"a{number}z" for role, number in turns if role == "assistant"}, shape  # fmt: skip


def test_templates_by_name_without_a_default_are_one_line(tokenizers):
    tokenizer = make_tokenizer(SHAPES["chatml"])
    tokenizer.chat_template = {"rag": "{{ messages }}"}
    with pytest.raises(UserError, match="row 1: the chat template refuses the messages"):
        encode(tokenizer, "turns")
    tokenizer.chat_template = {"default": SHAPES["chatml"]["template"], "tool_use": SHAPES["qwen2_5_tools"]["template"]}
    ids, marks = encode(tokenizer, "calls")
    assert "<tool_call>" in tokenizer.decode([token for token, kept in zip(ids, marks, strict=True) if kept])
