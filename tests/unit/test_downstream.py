"""The lm-eval adapter against one-by-one scoring, its journal, and our own tasks, offline and from any directory."""

import importlib.util
import json
import math
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from ds_stability.data.tokenizer import train_bpe
from ds_stability.errors import UserError
from ds_stability.eval.downstream import TASKS, check_downstream, local_tasks, run_lm_eval
from ds_stability.eval.downstream_batches import BatchRunner, Journal, Request, fixed_batches

CONTEXT = 48
with_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat and the dog ran over the bridge to the sea " * 4], 290)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2,
                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def harness(model, tokenizer, folder, batch_size=3, **options):
    from ds_stability.eval.downstream_model import HarnessModel

    return HarnessModel(model, tokenizer, BatchRunner(Journal(folder, 0), batch_size), **options)


def instances(kind, arguments, task="t", repeats=1):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, 0, (task, number, repeats)) for number, given in enumerate(arguments)]


def one_by_one(model, context, ids):
    """Sum of log-probabilities and whether each is the likeliest, a token a time, without batch or padding."""
    total, greedy, context = 0.0, True, list(context)
    for token in ids:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context[-CONTEXT:]])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[token])
        greedy &= int(logits.argmax()) == token
        context.append(token)
    return total, greedy


# Batches and journal: no lm_eval needed.


@given(st.permutations(range(23)), st.integers(1, 7))
def test_batches_do_not_depend_on_the_order_or_on_repetitions(order, size):
    requests = [Request(f"k{n:02d}", f"g{n % 3}", n % 5, n) for n in range(23)]
    expected = fixed_batches(requests, size)
    assert fixed_batches([requests[n] for n in order] + requests[:4], size) == expected
    assert all(len({one.group for one in batch}) == 1 and len(batch) <= size for batch in expected)
    assert Counter(one.key for batch in expected for one in batch) == Counter(one.key for one in requests)


def test_journal_drops_what_was_cut(tmp_path):
    journal = Journal(tmp_path, 3)
    journal.append("a", [[-1.25, True], None])
    journal.append("b", ["text\nof two lines"])
    with open(journal.path, "ab") as file:
        file.write('{"batch": "c", "answers": ["é'.encode()[:-1])
    Path(tmp_path / "rank-00007.jsonl").write_bytes(b'{"batch"\n{"batch": "d", "answers": [1]}\n{"bat')
    assert Journal(tmp_path, 3).read() == {"a": [[-1.25, True], None], "b": ["text\nof two lines"], "d": [1]}
    assert journal.path.read_bytes().endswith(b"\n")


def test_a_killed_run_redoes_the_torn_batch_only(tmp_path):
    requests = [Request(f"{n}", "g", 1, n) for n in range(10)]
    done = []

    def compute(batch):
        done.append([one.payload for one in batch])
        return [one.payload * 0.1 for one in batch]

    first = BatchRunner(Journal(tmp_path, 0), 4).run(requests, compute)
    assert len(done) == 3
    path = tmp_path / "rank-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    again = BatchRunner(Journal(tmp_path, 0), 4).run(requests, compute)
    assert again == first and len(done) == 4 and done[3] == done[2]
    BatchRunner(Journal(tmp_path, 1), 4).run(requests, compute)  # another rank reads what rank 0 did
    assert len(done) == 4


# Errors.


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"ds_stability\[lm-eval\]") as error:
        check_downstream(["ds_cloze"])
    assert "\n" not in str(error.value)


def test_no_task_needs_no_lm_eval(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_lm_eval(None, None, {"tasks": []}, tmp_path) == []


@with_lm_eval
def test_unknown_task_names_near_ones(monkeypatch):
    from lm_eval.tasks import TaskManager

    whole = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **kw: whole(self, **{**kw, "include_defaults": False}))
    with pytest.raises(UserError, match=r"unknown task 'ds_clozes'; near ones: ds_cloze") as error:
        check_downstream(["ds_facts", "ds_clozes"])
    assert "\n" not in str(error.value)


@with_lm_eval
def test_a_task_without_its_data_is_one_line(tmp_path, model, tokenizer, fresh_cache):
    (tmp_path / "broken.yaml").write_text(
        f"task: broken\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/none.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    with pytest.raises(UserError, match="broken.yaml cannot be loaded") as error:
        run_lm_eval(model, tokenizer, {"tasks": [str(tmp_path / "broken.yaml")]}, tmp_path)
    assert "\n" not in str(error.value)


# Requests.

PAIRS = [
    ("the cat", " sat on the mat"), ("the cat ", "ran"), ("", "the dog ran"), ("over the bridge to the sea " * 12, "the mat"),
    ("the", " cat"), ("x" * 30, "y" * 40), ("the cat", " sat on the mat"),
]  # fmt: skip


@with_lm_eval
def test_log_likelihoods_equal_one_by_one(tmp_path, model, tokenizer):
    lm = harness(model, tokenizer, tmp_path)
    found = lm.loglikelihood(instances("loglikelihood", PAIRS))
    assert len(tokenizer.encode(PAIRS[3][0])) > CONTEXT  # the context is truncated there
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        if context:
            kept = len(context.rstrip())
            before, whole = tokenizer.encode(context[:kept]), tokenizer.encode(context + continuation)
            ids = whole[len(before) :]
        else:
            before, ids = [tokenizer.bos_token_id], tokenizer.encode(continuation, add_special_tokens=False)
        if len(before) + len(ids) > CONTEXT + 1:  # HFLM: one window, cut on the left
            before = (before + ids)[-(CONTEXT + 1) :][: -len(ids)]
        expected = one_by_one(model, before, ids)
        assert value == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]
    assert not lm.unanswered


@with_lm_eval
def test_requests_are_answered_as_by_lm_evals_own_adapter(tmp_path, model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    ours, theirs = harness(model, tokenizer, tmp_path), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    pairs = instances("loglikelihood", [pair for pair in PAIRS if len(pair[1]) < CONTEXT])
    found, expected = ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    rolling = instances("loglikelihood_rolling", [("the dog ran over the bridge " * 9,), ("cat",)])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-3)
    options = {"max_gen_toks": 8, "until": [" the"], "do_sample": False}
    texts = instances("generate_until", [("the cat", options), ("over the " * 30, options), ("sea", options)])
    assert ours.generate_until(texts) == theirs.generate_until(texts, disable_tqdm=True)


@with_lm_eval
def test_greedy_flag_is_true_for_the_greedy_continuation(tmp_path, model, tokenizer):
    lm = harness(model, tokenizer, tmp_path)
    before, ids = tokenizer.encode("the cat"), []
    for _ in range(3):
        ids.append(int(model(input_ids=torch.tensor([before + ids])).logits[0, -1].argmax()))
    answer = lm._loglikelihood_tokens([(None, before, ids), (None, before, [*ids[:2], (ids[2] + 1) % 200])])
    assert [greedy for _, greedy in answer] == [True, False]


@with_lm_eval
def test_rolling_predicts_every_token_once(tmp_path, model, tokenizer):
    lm = harness(model, tokenizer, tmp_path)
    texts = ["the cat sat", "the dog ran over the bridge to the sea and the cat sat on the mat " * 7, ""]
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    for text, value in zip(texts, found, strict=True):
        ids = tokenizer.encode(text)
        total = 0.0
        for start in range(0, len(ids), CONTEXT):  # windows of the model's length; the last one looks back farther
            part = ids[start : start + CONTEXT]
            end = start + len(part)
            window = [tokenizer.bos_token_id, *ids][max(0, end - CONTEXT) : end]
            with torch.no_grad():
                log_probs = torch.log_softmax(model(input_ids=torch.tensor([window])).logits[0].double(), -1)
            rows = range(len(window) - len(part), len(window))
            total += sum(float(log_probs[row, token]) for row, token in zip(rows, part, strict=True))
        assert value == pytest.approx(total, abs=2e-3)


def greedy_text(model, tokenizer, context, count):
    ids = tokenizer.encode(context)[-(CONTEXT - count) :]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@with_lm_eval
def test_greedy_generation_equals_a_plain_loop_and_stops(tmp_path, model, tokenizer):
    contexts = ["the cat", "the dog ran over the bridge", "mat " * 60, "sea"]
    lm = harness(model, tokenizer, tmp_path)
    plain = {"max_gen_toks": 10, "do_sample": False, "temperature": 0.0, "until": []}
    found = lm.generate_until(instances("generate_until", [(context, plain) for context in contexts]))
    expected = [greedy_text(model, tokenizer, context, 10) for context in contexts]
    assert found == expected
    stop = next(letter for letter in "".join(expected) if letter.isascii())
    stopped = lm.generate_until(instances("generate_until", [(context, {**plain, "until": [stop]}) for context in contexts]))
    assert stopped == [text.split(stop)[0] for text in expected] and stopped != expected


@with_lm_eval
def test_the_folders_generation_config_has_no_say(tmp_path, model, tokenizer):
    request = instances("generate_until", [("the cat", {"max_gen_toks": 12})])
    expected = harness(model, tokenizer, tmp_path / "a").generate_until(request)
    own = model.generation_config.repetition_penalty
    model.generation_config.repetition_penalty = 5.0
    try:
        assert harness(model, tokenizer, tmp_path / "b").generate_until(request) == expected
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config.repetition_penalty = own


@with_lm_eval
def test_sampled_repetitions_differ_and_are_the_same_again(tmp_path, model, tokenizer):
    options = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 50}
    (request,) = instances("generate_until", [("the cat", options)], repeats=4)
    lm = harness(model, tokenizer, tmp_path)
    found = lm.generate_until([request] * 4)
    assert len(set(found)) == 4
    assert harness(model, tokenizer, tmp_path).generate_until([request] * 4) == found  # from the journal
    assert harness(model, tokenizer, tmp_path / "b", batch_size=1).generate_until([request] * 4) == found
    # lm-eval's own padding over ranks asks for the last request again: no new sample, the first once more.
    assert harness(model, tokenizer, tmp_path / "c").generate_until([request] * 5) == [*found, found[0]]
    assert harness(model, tokenizer, tmp_path / "d", seed=1).generate_until([request] * 4) != found


@with_lm_eval
def test_sampling_with_what_it_cannot_do_is_refused(tmp_path, model, tokenizer):
    request = instances("generate_until", [("a", {"do_sample": True, "temperature": 0.5, "min_p": 0.1})])
    with pytest.raises(UserError, match="min_p with sampling"):
        harness(model, tokenizer, tmp_path).generate_until(request)


class Broken(GPT2LMHeadModel):
    """NaN wherever the last token is even."""

    def forward(self, input_ids=None, **options):
        output = super().forward(input_ids=input_ids, **options)
        output.logits = torch.where((input_ids[:, -1:] % 2 == 0)[..., None], torch.nan, output.logits)
        return output


@with_lm_eval
def test_nan_is_null_and_never_the_first_choice(tmp_path, model, tokenizer, fresh_cache):
    broken = Broken(model.config).eval()
    lm = harness(broken, tokenizer, tmp_path / "a")
    texts = lm.generate_until(instances("generate_until", [("the cat", {"max_gen_toks": 30}), ("sea", {"max_gen_toks": 30})]))
    assert texts == ["", ""] and lm.unanswered == {("t", 0), ("t", 1)}
    for measured in run_lm_eval(broken, tokenizer, {"tasks": ["ds_cloze"], "limit": 12}, tmp_path / "b"):
        assert measured.value is None and "of 12 documents" in measured.note and measured.settings["chance"] == 0.25
    for path in tmp_path.glob("*/**/*.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())


@with_lm_eval
def test_what_does_not_fit_is_null(tmp_path, model, tokenizer):
    lm = harness(model, tokenizer, tmp_path)
    asked = instances("loglikelihood", [("a", "y" * 200), ("a", " the")])
    values = lm.loglikelihood(asked)
    assert math.isnan(values[0][0]) and math.isfinite(values[1][0]) and lm.unanswered == {("t", 0)}
    assert lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": CONTEXT})])) == [""]


# Whole tasks.


@pytest.mark.parametrize("name", ["ds_cloze", "ds_facts"])
def test_our_items_are_sound(name):
    items = [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(items) >= 100 and set(local_tasks()) >= {name}
    questions = [item["sentence" if name == "ds_cloze" else "statement"] for item in items]
    assert len(set(questions)) == len(items)
    assert all(len(set(item["choices"])) == 4 and all(map(str.strip, item["choices"])) for item in items)
    places = Counter(item["answer"] for item in items)
    assert set(places) == {0, 1, 2, 3} and max(places.values()) - min(places.values()) <= 1


@with_lm_eval
def test_cloze_equals_scoring_by_hand(tmp_path, monkeypatch, model, tokenizer, fresh_cache):
    monkeypatch.chdir(tmp_path)  # data files are found from anywhere
    state = torch.get_rng_state()
    measures = {m.metric: m for m in run_lm_eval(model, tokenizer, {"tasks": ["ds_cloze"], "limit": 10}, tmp_path / "cell")}
    assert torch.equal(state, torch.get_rng_state())
    items = [json.loads(line) for line in (TASKS / "ds_cloze.jsonl").read_text().splitlines()[:10]]
    right, right_by_length = [], []
    for item in items:
        before = tokenizer.encode(item["sentence"])
        scores = []
        for choice in item["choices"]:
            ids = tokenizer.encode(f"{item['sentence']} {choice}")[len(before) :]
            scores.append(one_by_one(model, before, ids)[0])
        by_length = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
        right.append(float(scores.index(max(scores)) == item["answer"]))
        right_by_length.append(float(by_length.index(max(by_length)) == item["answer"]))
    assert measures["ds_cloze_acc"].totals.tolist() == right
    assert measures["ds_cloze_acc_norm"].totals.tolist() == right_by_length
    acc = measures["ds_cloze_acc"]
    assert list(acc.units) == list(range(10)) and acc.settings["chance"] == 0.25 and acc.settings["documents"] == 10

    def no_more(*args, **kwargs):
        raise AssertionError("asked again")

    monkeypatch.setattr(model, "forward", no_more)
    again = run_lm_eval(model, tokenizer, {"tasks": ["ds_cloze"], "limit": 10}, tmp_path / "cell")
    assert [m.totals.tolist() for m in again] == [right, right_by_length]


ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
GENERATIVE = """
task: says
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: says
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


@with_lm_eval
def test_ratios_perplexities_and_texts(tmp_path, model, tokenizer, fresh_cache):
    texts = ["the cat sat on the mat", "a dog", "the sea and the bridge", "mat"]
    says = [greedy_text(model, tokenizer, text, 6).split("\n")[0] for text in texts[:2]] + ["no", "never"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": t, "says": s}) + "\n" for t, s in zip(texts, says, strict=True)))
    (tmp_path / "texts.yaml").write_text(ROLLING.format(data=data))
    (tmp_path / "says.yaml").write_text(GENERATIVE.format(data=data))
    names = [str(tmp_path / "texts.yaml"), str(tmp_path / "says.yaml")]
    measures = {m.metric: m for m in run_lm_eval(model, tokenizer, {"tasks": names}, tmp_path / "cell")}
    nats = [one_by_one(model, [tokenizer.bos_token_id], tokenizer.encode(text))[0] for text in texts]
    sizes, words = sum(len(text) for text in texts), sum(len(text.split()) for text in texts)
    assert measures["texts_bits_per_byte"].value == pytest.approx(-sum(nats) / math.log(2) / sizes, rel=1e-5)
    assert measures["texts_word_perplexity"].value == pytest.approx(math.exp(-sum(nats) / words), rel=1e-5)
    assert measures["texts_byte_perplexity"].settings["units"].startswith("jackknife over 4 blocks")
    match = measures["says_exact_match"]
    assert match.totals.tolist() == [1, 1, 0, 0] and match.settings["chance"] == 0.0
    assert measures["texts_bits_per_byte"].settings["chance"] is None
