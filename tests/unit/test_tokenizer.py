"""Tokenizers for fresh models, their identity, and chats through templates."""

import subprocess
import sys

import pytest

from ds_stability.data import Document
from ds_stability.data.builtin import prose_documents
from ds_stability.data.chat import encode_chat
from ds_stability.data.tokenizer import prompt_ids, special_token_ids, tokenizer_hash, train_bpe
from ds_stability.data.tokens import encode_documents
from ds_stability.errors import UserError

PLAIN = ("{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|eos|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}")
MARKED = ("{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' %}"
          "{% generation %}{{ m['content'] + '<|eos|>' }}{% endgeneration %}{{ '\n' }}"
          "{% else %}{{ m['content'] + '<|eos|>\n' }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}")
REWRITING = ("{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['role'] + m['content'] }}"
             "{% else %}{{ m['role'] }}{% endif %}{% endfor %}")
CHAT = [{"role": "user", "content": "What is é, please?"}, {"role": "assistant", "content": " a letter of\n French"},
        {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "welcome"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(prose_documents()[:30], 600)


def test_round_trip_and_special_tokens(tokenizer):
    text = "Hello  world, é 漢字\n\n\ttabs 🙂"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 600 and len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert special_token_ids(tokenizer) == [0, 1, 2]


def test_a_prompt_has_one_beginning_and_no_end(tokenizer):
    from tokenizers import processors

    ending = train_bpe(["a letter"], 300)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)])
    for made in (tokenizer, ending):
        ids = made("a letter", add_special_tokens=False)["input_ids"]
        assert prompt_ids("a letter", made) == [0, *ids]
        assert prompt_ids("<|bos|>a letter", made) == [0, *ids]  # rendered by a chat template, say
        assert prompt_ids("<|bos|>a letter<|eos|>", made) == [0, *ids, 1]


def test_training_is_deterministic_across_processes(tokenizer):
    code = ("from ds_stability.data.builtin import prose_documents; from ds_stability.data.tokenizer import *;"
            "print(tokenizer_hash(train_bpe(prose_documents()[:30], 600)))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == tokenizer_hash(tokenizer)


def test_hash_survives_saving_and_padding_and_tells_tokenizers_apart(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    before = tokenizer_hash(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == before
    tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(train_bpe(prose_documents()[:30], 601)) != before


def test_documents_and_chats_can_be_trained_on():
    trained = train_bpe([Document(text="aa aa"), Document(messages=[{"role": "user", "content": "bb bb"}])], 300)
    assert "aa" in trained.get_vocab() and "bb" in trained.get_vocab()


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "generation marks"])
def test_only_assistant_tokens_are_supervised(tokenizer, template):
    tokenizer.chat_template = template
    ids, supervised = encode_chat(Document(messages=CHAT), tokenizer, assistant_only_loss=True)
    kept = [token for token, mark in zip(ids, supervised) if mark]
    assert tokenizer.decode(kept) == " a letter of\n French<|eos|>welcome<|eos|>"
    assert tokenizer.decode(ids) == "".join(f"[{m['role']}]{m['content']}<|eos|>\n" for m in CHAT)
    assert encode_chat(Document(messages=CHAT), tokenizer, assistant_only_loss=False) == (ids, None)
    encoded = list(encode_documents([Document(text="x"), Document(messages=CHAT), Document(text="y")], tokenizer, True))
    assert encoded[1].ids == ids and encoded[1].supervised == supervised and len(encoded) == 3


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "generation marks"])
def test_trimmed_offsets_and_empty_turns_lose_nothing(tokenizer, template):
    from tokenizers import processors

    trimming = train_bpe(["a letter of French"], 300)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming.chat_template = template
    messages = [{"role": "assistant", "content": ""}, *CHAT, {"role": "assistant", "content": ""}]
    ids, supervised = encode_chat(Document(messages=messages), trimming, True)
    text = trimming.decode([token for token, mark in zip(ids, supervised) if mark])
    assert text == "<|eos|> a letter of\n French<|eos|>welcome<|eos|><|eos|>"


def test_a_chat_that_opens_with_the_assistant_or_lacks_it(tokenizer):
    tokenizer.chat_template = PLAIN
    ids, supervised = encode_chat(Document(messages=CHAT[1:2]), tokenizer, True)
    kept = [token for token, mark in zip(ids, supervised) if mark]
    assert tokenizer.decode(kept) == " a letter of\n French<|eos|>"
    assert not any(encode_chat(Document(messages=CHAT[:1]), tokenizer, True)[1])


@pytest.mark.parametrize("template, message", [
    (None, "no chat template"),
    (REWRITING, "does not print turn 2"),
    ("{{ raise_exception('roles must alternate') }}", r"refuses the messages \(roles must alternate\)"),
    ("{% generation %}{% endgeneration %}{{ messages[0]['content'] }}", "marks no token of the assistant"),
])
def test_templates_that_cannot_serve(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as caught:
        encode_chat(Document(messages=CHAT, where="a.jsonl line 3"), tokenizer, assistant_only_loss=True)
    assert str(caught.value).startswith("a.jsonl line 3: ") and "\n" not in str(caught.value)
