"""The forms that records have their chats in, and what is no chat to train on."""

import json

import pytest

from ds_stability.data import DataSpec
from ds_stability.data.messages import ROLES, without_nulls
from ds_stability.data.readers import document_from_row, read_documents
from ds_stability.errors import UserError

SPEC = DataSpec(train_files=("a.jsonl",), assistant_only_loss=True)
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(messages, **fields):
    return document_from_row({"messages": messages, **fields}, SPEC, "row 1")


def one(message):
    return read([USER, message]).messages[1]


@pytest.mark.parametrize(("given", "expected"), [
    ({"role": "gpt", "content": "a"}, ANSWER),
    ({"from": "gpt", "value": "a"}, ANSWER),
    ({"from": "gpt", "value": "a", "role": None, "content": None}, ANSWER),  # Arrow pads both kinds of keys
    ({"role": " Model ", "content": "a"}, ANSWER),
    ({"role": "human", "content": "a"}, {"role": "user", "content": "a"}),
    ({"role": "observation", "content": "a"}, {"role": "tool", "content": "a"}),
    ({"role": "developer", "content": "a"}, {"role": "developer", "content": "a"}),
    ({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}, "c"]},
     {"role": "assistant", "content": "abc"}),
    ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
    ({"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
    ({"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
     {"role": "assistant", "content": "", "tool_calls": [CALL]}),
    ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {"x": 1, "y": None}}},
     {"role": "assistant", "content": "", "tool_calls": [CALL]}),
    ({"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
    ({"role": "assistant", "content": "a", "tool_calls": []}, ANSWER),
    ({"role": "assistant", "content": "a", "reasoning": "r", "thinking": ""}, ANSWER | {"reasoning_content": "r"}),
    ({"role": "assistant", "content": "", "name": "n"}, {"role": "assistant", "content": "", "name": "n"}),
    # What a call's JSON text says stays as it is: a null there is meant.
    ({"role": "assistant", "tool_calls": [{"id": "1", **CALL, "function": {"name": "f", "arguments": '{"y": null}'}}]},
     {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"y": None}}}]}),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
     {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}),
])  # fmt: skip
def test_a_turn_in_its_form(given, expected):
    assert one(given) == expected


@pytest.mark.parametrize("role", ROLES)
def test_every_alias_is_a_role_of_templates(role):
    content = '{"name": "f"}' if role in ("function_call", "tool_call") else "a"
    assert one({"role": role, "content": content})["role"] in ("user", "assistant", "system", "developer", "tool")


@pytest.mark.parametrize(("message", "words"), [
    ({"role": "critic", "content": "a"}, ["message 2: unknown role 'critic'", "gpt", "human"]),
    ({"role": 3, "content": "a"}, ["message 2 is not an object"]),
    ({"role": "assistant"}, ["content is missing or null"]),
    ({"role": "assistant", "content": None, "tool_calls": []}, ["content is missing or null"]),
    ({"role": "assistant", "content": 3}, ["content is of type int"]),
    ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "x.png"}]}, ["a part of type 'image'"]),
    ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, ["a part of type 'input_audio'"]),
    ({"role": "user", "content": [{"type": "image", "text": None}]}, ["a part of type 'image'"]),
    ({"role": "user", "content": "a", "tool_calls": [CALL]}, ["role 'user' has tool_calls"]),
    ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, ["tool call 1", "name"]),
    ({"role": "assistant", "tool_calls": [CALL, {"function": {"name": "f", "arguments": "{x}"}}]}, ["tool call 2", "no valid JSON"]),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}, ["arguments is no JSON object"]),
    ({"from": "function_call", "value": "f(1)"}, ["function_call", "no valid JSON"]),
    ({"role": "assistant", "content": "a", "weight": 0.5}, ["weight 0.5", "0 (the turn is not trained on) and 1"]),
    ({"role": "assistant", "content": "a", "loss_mask": "no"}, ["loss_mask 'no'"]),
    ({"role": "assistant", "content": "a", "weight": 1, "train": False}, ["weight and train contradict"]),
    ({"role": "assistant", "content": "a", "train_detail": [{"begin": 0}]}, ["train_detail"]),
    ({"role": "assistant", "content": "a", "reasoning": ["r"]}, ["reasoning is no text"]),
])  # fmt: skip
def test_what_is_no_turn_is_named(message, words):
    with pytest.raises(UserError) as caught:
        read([USER, message])
    assert all(word in str(caught.value) for word in ["row 1", *words]) and "\n" not in str(caught.value)


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"loss_mask": 0}, {"train": False}, {"weight": 0, "loss": False}])
def test_weights_mask_turns_and_are_printed_by_no_template(off):
    document = read([USER, ANSWER | off, USER | {"weight": None}, ANSWER | {"weight": 1}])
    assert document.masked == (1,) and document.messages == [USER, ANSWER, USER, ANSWER]


def test_tools_are_read_as_objects_or_json_text_without_the_padding_of_others():
    definition = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "number"}}}}}
    padded = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "number"}, "city": None}}}}
    for given in ([definition], [padded, None], json.dumps([definition]), [definition["function"]]):
        assert read([USER, ANSWER], tools=given).tools == [definition]
    for given in (None, [], "", "[]", [None]):
        assert read([USER, ANSWER], tools=given).tools is None
    deep = '[{"name": "f", "parameters": ' + '{"a": ' * 900 + "1" + "}" * 901 + "]"
    for given in ("f(x)", {"name": "f"}, ["f"], deep):
        with pytest.raises(UserError, match="field 'tools'"):
            read([USER, ANSWER], tools=given)


def test_the_system_prompt_beside_the_turns_of_sharegpt():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert read(turns, system="s").messages == [{"role": "system", "content": "s"}, USER, ANSWER]
    assert read([{"from": "system", "value": "t"}, *turns], system="s").messages[0]["content"] == "t"
    assert read([USER, ANSWER], system="s").messages == [USER, ANSWER]


def test_nulls_in_lists_are_kept():
    assert without_nulls({"a": None, "b": [None, {"c": None, "d": 1}]}) == {"b": [None, {"d": 1}]}


def test_arrow_pads_no_argument_of_a_call(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": name, "arguments": arguments}}]}],
             "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "string"} for key in arguments}}}}]}
            for name, arguments in (("weather", {"city": "Paris"}), ("add", {"a": 1, "b": 2}))]  # fmt: skip
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert '"a": null' in json.dumps(parquet.read_table(path).to_pylist())  # what the reader of tables gives
    documents = list(read_documents(DataSpec(train_files=(path,))))
    assert [document.messages for document in documents] == [row["messages"] for row in rows]
    assert [document.tools for document in documents] == [row["tools"] for row in rows]
