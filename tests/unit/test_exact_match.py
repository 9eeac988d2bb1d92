"""pass@k against counting, the rule for answers, and the task with a real generator of a tiny model."""

import itertools
import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from ds_stability.data.tokenizer import train_bpe
from ds_stability.errors import UserError
from ds_stability.eval.decoding import DEFAULT_DECODINGS
from ds_stability.eval.exact_match import (
    ExactMatchTask,
    Item,
    extracted,
    generative_tasks,
    is_correct,
    load_items,
    normalized,
    pass_at_k,
)
from ds_stability.eval.generation import Generated, Generator


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_subsets(samples, data):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_by_hand():
    assert pass_at_k(8, 2, 1) == 0.25 and pass_at_k(8, 1, 8) == 1.0 and pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    for samples, correct, k in ((8, 1, 9), (8, 1, 0), (8, 9, 1), (8, -1, 1)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(samples, correct, k)


@pytest.mark.parametrize(
    ("text", "answer", "found", "right"),
    [
        (" 8\n3 + 3 = 6", "8", "8", True),
        ("\n\n 8.", "8", "8", True),
        (" It is 08 apples", "8", "8", True),
        (" 18", "8", "18", False),
        (" -8", "8", "-8", False),
        (" 7, not 8", "8", "7", False),
        ("eight\n8", "8", "", False),
        ("", "8", "", False),
        ("", "cold", "", False),
        ("  COLD!\nThe opposite", "cold", "cold", True),
        (' "very   cold". ', "Very cold", "very cold", True),
        (" cold water", "cold", "cold water", False),
        ("\n", "cold", "", False),
        ("...", "cold", "", False),
    ],
)
def test_answers_are_found_by_the_rule(text, answer, found, right):
    assert extracted(text, answer) == found and is_correct(text, answer) == right


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3.5", "3", False), ("3.", "3", True), ("3.0", "3", True), ("3.5.", "3.50", True), (".5", "0.5", True),
        ("1,000", "1000", True), ("1000", "1,000", True), ("1,000", "1", False), ("12,345.60", "12345.6", True),
        ("4,5,6", "4", True), ("1,0000", "10000", False), ("1 000", "1000", False),
        ("3/4", "3", False), ("3/4", "4", False), ("3/4", "3/4", True), ("½", "1/2", True), ("3½", "31", False), ("½", "1", False),
        ("3rd", "3", False), ("x3", "3", False), ("3km", "3", False), ("3 km", "3", True), ("x3 = 5", "5", True), ("8个苹果", "8", True),
        ("1e3", "1000", True), ("1e3", "1", False), ("5^2", "5", False), ("5²", "5", False), ("5²", "52", False), ("10⁻³", "10", False),
        ("3.5.1", "3.5", False), ("10:30", "10", False), ("3_4", "3", False),
        ("−8", "-8", True), ("–8", "-8", True), ("—8", "8", True), ("+8", "8", True), ("8-3", "8", True), ("-0", "0", True),
        ("$3.00", "3", True), ("-$3", "-3", True), ("3%", "3", True), ("8 €", "8", True), ("(8)", "8", True), ("= 8", "8", True),
        ("...8", "8", True), ("…8", "8", True), ("３", "3", True), ("१२", "12", True), ("٣٫٥", "3.5", True),
        ("9" * 5000, "9" * 5000, True), ("9" * 5000, "9" * 4999, False), ("3", "3 apples", False),
        ("“cold”", "cold", True), ("don’t", "don't", True), ("don't", "dont", False), ("ice–cold", "ice-cold", True), ("ﬁne", "FINE", True),
        ("ＣＯＬＤ。", "cold", True), ("STRASSE", "straße", True), ("e\u0301te\u0301", "été", True), ("\ufeff\nco\xadld", "cold", True),
        ("the cold", "cold", False), ("colder", "cold", False), ("\u200bcold", "cold", True), ("हिन्दी।", "हिन्दी", True), ("हिन्द", "हिन्दी", False), ("\ud800", "cold", False),
    ],
)  # fmt: skip
def test_numbers_count_by_value_and_texts_by_what_they_say(text, answer, right):
    assert is_correct(text, answer) == right


@given(st.decimals(-(10**9), 10**9, places=3), st.sampled_from(["{:f}", "{:,f}", "{:+f}", "{:e}", "${:,f}.", " ({:f})\n"]))
def test_a_number_is_right_however_it_is_written(value, form):
    assert is_correct(form.format(value), f"{value:f}") and not is_correct(form.format(value), f"{value + 1:f}")


@given(st.text(st.characters(exclude_categories=()), max_size=40), st.text(st.characters(exclude_categories=()), min_size=1, max_size=20))
def test_any_text_has_an_answer(text, answer):
    assert is_correct(text, answer) in (True, False)
    assert normalized(normalized(text)) == normalized(text)


def test_our_items_are_sound():
    assert "arithmetic" in generative_tasks() and "ds_cloze" not in generative_tasks()
    items = load_items("arithmetic")
    kinds = Counter(item.kind for item in items)
    assert len(items) >= 50 and len({item.prompt for item in items}) == len(items) and min(kinds.values()) >= 10
    for item in items:
        examples = [line for line in item.prompt.splitlines() if line]
        assert len(examples) >= 3 and not item.prompt.endswith((" ", "\n")) and normalized(item.answer)
        if item.kind == "addition":
            left, right = item.prompt.splitlines()[-1].rstrip("=").split("+")
            assert int(left) + int(right) == int(item.answer)
            assert not any(line.startswith(item.prompt.splitlines()[-1]) for line in examples[:-1])
        if item.kind == "counting":
            assert int(item.answer) == int(item.prompt.splitlines()[-1].split(",")[-2]) + 1
    assert load_items("arithmetic", 7) == items[:7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "answer": "b"}\n{"prompt": "a"', "line 2: is no JSON object"),
        (b'["a"]\n', "line 1: is no JSON object"),
        (b'{"prompt": "a", "answer": 3}\n', "line 1: prompt and answer must be texts"),
        (b'{"prompt": "a", "answer": " . "}\n', "must be texts that are not empty"),
        (b"\xff\xfe\n", "UTF-8 is needed"), (b"\xff\n", "not UTF-8"),
        (b"\n", "holds no item"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, message):
    (tmp_path / "items.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_items(str(tmp_path / "items.jsonl"))
    assert "\n" not in str(error.value)


def test_unknown_task_names_ours():
    with pytest.raises(UserError, match="arithmetc: No such file.*one of arithmetic"):
        load_items("arithmetc")


class Scripted:
    """A generator that says what a function of (ids, key) says."""

    def __init__(self, tokenizer, says):
        self.tokenizer, self.says, self.batches = tokenizer, says, []

    def generate_keyed(self, prompts, decoding, keys, max_new_tokens):
        self.batches.append(list(keys))
        decoded = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
        texts = [self.says(prompt, key) for prompt, key in zip(decoded, keys, strict=True)]
        return [
            Generated([], "non_finite", None, None, 0) if text is None
            else Generated(self.tokenizer.encode(text, add_special_tokens=False), "length", 0.0, 0.0, 1)
            for text in texts
        ]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["one plus one is two and the opposite of hot is cold " * 4], 280)


ITEMS = [Item("1 + 1 =", "2", "sum"), Item("hot", "cold", "word"), Item("3 + 1 =", "4", "sum")]


def run_all(task, tmp_path):
    records = [record for unit in task.units() for record in task.run(unit, tmp_path)]
    json.dumps(records, allow_nan=False)
    return records, {measured.metric: measured for measured in task.measure(records, tmp_path)}


def test_scores_by_hand(tokenizer, tmp_path):
    def says(prompt, key):
        sample = int(key.split("/")[-1])
        return {"1": " 2\n", "h": " Cold.", "3": " 5"}[prompt[0]] if prompt[0] != "1" or sample % 4 == 0 else " 9"

    scripted = Scripted(tokenizer, says)
    task = ExactMatchTask(scripted, tokenizer, ITEMS, [0], batch_size=5)
    records, measures = run_all(task, tmp_path)
    assert [len(batch) for batch in scripted.batches] == [5, 5, 5, 5, 4] and len(task.units()) == 5
    assert [(r["prompt"], r["sample"]) for r in records] == [(i, s) for i in range(3) for s in range(8)]
    assert measures["exact_match_pass_1"].totals.tolist() == [0.25, 1.0, 0.0]
    assert measures["exact_match_pass_8"].totals.tolist() == [1.0, 1.0, 0.0]
    assert measures["exact_match_sum_pass_1"].value == pytest.approx(0.125)
    assert measures["exact_match_word_pass_1"].value == 1.0
    assert measures["exact_match_pass_8"].settings["chance"] == 0.0
    assert records[0]["text"] == " 2\n" and records[0]["answer"] == "2" and records[0]["correct"] is True


def test_all_wrong_is_zero_and_not_finite_is_null(tokenizer, tmp_path):
    _, wrong = run_all(ExactMatchTask(Scripted(tokenizer, lambda *_: ""), tokenizer, ITEMS, [0]), tmp_path)
    assert [m.value for m in wrong.values()] == [0.0] * 4 and wrong["exact_match_pass_1"].counts.sum() == 3
    broken = Scripted(tokenizer, lambda prompt, key: None if key.endswith("/3") and prompt == "hot" else " 2")
    records, measures = run_all(ExactMatchTask(broken, tokenizer, ITEMS, [0]), tmp_path)
    assert measures["exact_match_pass_1"].value is None and "1 of 3 items" in measures["exact_match_pass_1"].note
    assert [record["correct"] for record in records if record["finish"] == "non_finite"] == [None]


def test_seeds_add_samples_and_greedy_has_one(tokenizer, tmp_path):
    scripted = Scripted(tokenizer, lambda *_: " 2")
    task = ExactMatchTask(scripted, tokenizer, ITEMS, [5, 6], samples=4)
    records, measures = run_all(task, tmp_path)
    assert [(r["sample"], r["seed"]) for r in records[:8]] == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 6), (5, 6), (6, 6), (7, 6)]
    assert len({key for batch in scripted.batches for key in batch}) == 24
    assert measures["exact_match_pass_8"].value == pytest.approx(1 / 3)
    task = ExactMatchTask(scripted, tokenizer, ITEMS, [5, 6], decoding=DEFAULT_DECODINGS["greedy"])
    records, measures = run_all(task, tmp_path)
    assert len(records) == 3 and measures["exact_match_pass_1"].value == pytest.approx(1 / 3)
    assert measures["exact_match_pass_8"].value is None and "needs 8 samples" in measures["exact_match_pass_8"].note


def test_long_prompts_lose_their_beginning_and_say_so(tokenizer, tmp_path):
    seen = []
    scripted = Scripted(tokenizer, lambda prompt, key: seen.append(prompt) or " 2")
    items = [Item("one plus one is two " * 30 + "end =", "2"), Item("end =", "2")]
    task = ExactMatchTask(scripted, tokenizer, items, [0], samples=1, max_new_tokens=4, context_length=20)
    assert max(map(len, task.prompts)) == 16
    _, measures = run_all(task, tmp_path)
    assert all(prompt.endswith("end =") for prompt in seen)
    assert measures["exact_match_pass_1"].note.startswith("1 of 2 prompts lost")
    with pytest.raises(UserError, match="leaves no room"):
        ExactMatchTask(scripted, tokenizer, items, [0], max_new_tokens=20, context_length=20)


def test_with_a_real_generator(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=96, n_embd=16, n_layer=1, n_head=2,
                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    generator = Generator(GPT2LMHeadModel(config).eval(), [tokenizer.eos_token_id], tokenizer.pad_token_id)
    task = ExactMatchTask(generator, tokenizer, ITEMS, [0], batch_size=7, max_new_tokens=5)
    records, measures = run_all(task, tmp_path)
    backwards = [task.run(unit, tmp_path) for unit in reversed(task.units())]
    assert [record for unit in reversed(backwards) for record in unit] == records  # whoever runs them, and when
    assert len({record["text"] for record in records}) > 12 and 0 <= measures["exact_match_pass_1"].value <= 1
    _, other = run_all(ExactMatchTask(generator, tokenizer, ITEMS, [1], batch_size=7, max_new_tokens=5), tmp_path)
    assert other["exact_match_pass_1"].settings == measures["exact_match_pass_1"].settings
