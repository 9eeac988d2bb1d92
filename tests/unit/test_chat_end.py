"""Where generation stops: the token that a chat template writes behind an answer, found by rendering."""

import pytest

from ds_stability.data.chat_end import end_ids, turn_end_id
from ds_stability.data.tokenizer import train_bpe

TURNS = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}HEAD{% endif %}"
TEMPLATES = {
    "chatml": ("<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n", "<|im_end|>"),
    "llama3": ("<|start|>{{ m['role'] }}<|header|>\n\n{{ m['content'] | trim }}<|eot_id|>", "<|eot_id|>"),
    "phi3": ("<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n", "<|end|>"),
    "spaced": ("{{ m['role'] }}: {{ m['content'] }} <|im_end|>", "<|im_end|>"),
    "glm": ("<|{{ m['role'] }}|>\n{{ m['content'] }}", None),
    "words": ("{{ m['role'] }}: {{ m['content'] }}\n### End\n", None),
    "raises": ("{{ raise_exception('tools only') }}", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog " * 8] * 3, 270)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|header|>"]})
    tokenizer.add_tokens(["<|end|>"])  # an added token that is not special
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_is_asked(tokenizer, name):
    body, end = TEMPLATES[name]
    tokenizer.chat_template = TURNS.replace("BODY", body).replace("HEAD", "<|im_start|>assistant\n")
    assert turn_end_id(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_the_end_of_the_text_after_the_last_turn_is_found_too(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}"
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id


def test_declared_ends_stay_first_and_none_is_named_twice(tokenizer):
    tokenizer.chat_template = TURNS.replace("BODY", TEMPLATES["chatml"][0])
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    assert end_ids(None, tokenizer) == end_ids(eos, tokenizer) == [eos, end]
    assert end_ids([end, 7], tokenizer) == [end, 7, eos]
    tokenizer.chat_template = None
    assert turn_end_id(tokenizer) is None and end_ids(None, tokenizer) == end_ids(eos, tokenizer) == eos
