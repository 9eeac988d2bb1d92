"""The token that ends an assistant's turn: what a chat template writes behind the answer."""

from typing import Any

ANSWER = "qzanswerzq"  # no template writes it, and none changes it


def turn_end_id(tokenizer: Any) -> int | None:
    """Id of the special or added token that the tokenizer's chat template puts right behind an assistant's last turn.

    The template is asked by rendering a chat. None without a template, if it cannot render one of a question and an answer, or
    if it ends the turn with ordinary text or nothing.
    """
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    try:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template may raise whatever it likes: it has other roles, or wants tools
        return None
    behind = rendered.rpartition(ANSWER)[2].lstrip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in marks else None


def end_ids(declared: int | list[int] | None, tokenizer: Any) -> int | list[int] | None:
    """What generation should stop at: the declared ids first, then the tokenizer's end of text and its template's end of a turn."""
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    ids = list(dict.fromkeys([*ids, *(i for i in (tokenizer.eos_token_id, turn_end_id(tokenizer)) if i is not None)]))
    return ids[0] if len(ids) == 1 else ids or None
