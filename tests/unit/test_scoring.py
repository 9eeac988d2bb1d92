"""Teacher-forced scores against a plain loop over single, unpadded windows in fp64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ds_stability.data.tokenizer import train_bpe, word_tokenizer
from ds_stability.errors import UserError
from ds_stability.eval.scoring import (
    REPETITION_LENGTHS,
    ScoringTask,
    Window,
    cut_windows,
    encode_with_bytes,
    evenly_spaced,
    repetition_counts,
)

DOCUMENTS = ["the cat sat on the mat and the cat sat on the mat again. the end of the cat is near.", "a dog", "naïve café — 日本語 🙂\n",
             "one two three four five six seven eight nine ten one two three four five six seven eight"]  # fmt: skip
FREQUENT = (5, 7, 80, 81, 90)


def without_bos(tokenizer):
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    from tokenizers import processors

    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(DOCUMENTS * 3, 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=310, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def make_loaded(model, tokenizer, **changes):
    values = dict(model=model, tokenizer=tokenizer, pad_id=2, device=torch.device("cpu"), context_length=64, vocab_size=310, high_frequency=None)
    return SimpleNamespace(**{**values, **changes})


def run(task, folder):
    records = [record for unit in task.units() for record in task.run(unit, folder)]
    return records, {measured.metric: measured for measured in task.measure(records, folder)}


class Oracle:
    """Every figure of one window, by loops."""

    def __init__(self, model, window):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window.inputs])).logits[0].double()
        p = torch.softmax(logits, dim=-1).numpy()
        self.p, self.count = p, len(window.targets)
        self.nats = -sum(math.log(p[t][target]) for t, target in enumerate(window.targets))
        self.entropy = -sum(x * math.log(x) for row in p for x in row if x > 0)
        self.top1 = sum(max(row) for row in p)
        self.high = sum(row[i] for row in p for i in FREQUENT)
        self.rep, self.wrep = {}, {}
        for length in REPETITION_LENGTHS:
            self.rep[length] = self.wrep[length] = 0
            for t, row in enumerate(p):
                guess = int(np.argmax(row))
                before = [token for j, token in enumerate(window.inputs) if j >= window.text_start and t + 1 - length <= j <= t]
                self.rep[length] += guess in before
                self.wrep[length] += guess in before and guess != window.targets[t]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_figure_by_brute_force(model, tokenizer, tmp_path, batch_size):
    task = ScoringTask(make_loaded(model, tokenizer), DOCUMENTS, "held_out", 20, batch_size, high_frequency_ids=FREQUENT)
    windows = list(cut_windows(tokenizer, DOCUMENTS, 20))
    oracles = [Oracle(model, window) for window in windows]
    tokens = sum(oracle.count for oracle in oracles)
    assert task.units() == [f"{i:05d}" for i in range(math.ceil(len(windows) / batch_size))]
    records, figures = run(task, tmp_path)
    nats, entropy = (sum(getattr(oracle, name) for oracle in oracles) for name in ("nats", "entropy"))
    expected = {
        "cross_entropy": nats / tokens, "predictive_entropy": entropy / tokens, "calibration_gap": (entropy - nats) / tokens,
        "top1_mass": sum(oracle.top1 for oracle in oracles) / tokens, "high_frequency_mass": sum(oracle.high for oracle in oracles) / tokens,
        "bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in DOCUMENTS), "non_finite_windows": 0.0,
    }  # fmt: skip
    for length in REPETITION_LENGTHS:
        expected[f"rep_l_{length}"] = sum(oracle.rep[length] for oracle in oracles) / tokens
        expected[f"wrep_l_{length}"] = sum(oracle.wrep[length] for oracle in oracles) / tokens
    mean = np.concatenate([oracle.p for oracle in oracles]).mean(axis=0)
    expected["context_information"] = -sum(x * math.log(x) for x in mean) - entropy / tokens
    assert set(figures) == set(expected)
    for metric, value in expected.items():
        assert figures[metric].value == pytest.approx(value, rel=1e-5, abs=1e-6), metric
        assert figures[metric].split == "held_out" and figures[metric].note is None
    assert list(figures["cross_entropy"].units) == [window.unit for window in windows]
    assert figures["cross_entropy"].totals == pytest.approx([oracle.nats for oracle in oracles], rel=1e-5)
    # Batches in up to 8 parts: one batch that holds everything still has a spread.
    sizes = [len(windows[i : i + batch_size]) for i in range(0, len(windows), batch_size)]
    part_of = [(batch, place * min(size, 8) // size) for batch, size in enumerate(sizes) for place in range(size)]
    parts = sorted(set(part_of))
    assert len(figures["context_information"].units) == len(parts) > 1
    if batch_size != 1:
        kept = [np.concatenate([oracle.p for i, oracle in enumerate(oracles) if part_of[i] != part]) for part in parts]
        left = [-sum(x * math.log(x) for x in p.mean(axis=0)) + (p * np.log(p)).sum() / len(p) for p in kept]
        sizes = np.array([tokens - len(p) for p in kept])
        pseudo = [tokens / size * expected["context_information"] - (tokens / size - 1) * value for size, value in zip(sizes, left, strict=True)]
        units = figures["context_information"]
        assert units.counts == pytest.approx(sizes)
        assert np.ptp(units.totals / units.counts - pseudo) < 1e-3 * np.ptp(pseudo)  # the same but for the shift
    assert figures["rep_l_128"].value > 0  # the comparison is not between zeros


@pytest.mark.parametrize("kind", ["bos", "no bos", "words"])
@example(text="a  b \n", window=1)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40), window=st.integers(1, 7))
def test_bytes_of_windows_sum_to_the_bytes_of_the_text(tokenizer, kind, text, window):
    text = text.replace("<|", "")  # a special token spelled out is read as one
    tool = {"bos": tokenizer, "no bos": without_bos(tokenizer), "words": word_tokenizer(["a", "b"])}[kind]
    ids, sizes = encode_with_bytes(tool, text)
    assert sum(sizes) == (len(text.encode()) if ids else 0) and min(sizes, default=0) >= 0 and len(sizes) == len(ids)
    windows = list(cut_windows(tool, [text], window))
    scored = ids[1:] if kind == "no bos" else ids
    assert [target for w in windows for target in w.targets] == scored
    assert sum(w.num_bytes for w in windows) == sum(sizes) - (sizes[0] if kind == "no bos" and sizes else 0)
    assert all(1 <= len(w.targets) == len(w.inputs) <= window for w in windows)


def test_windows_continue_each_other(tokenizer):
    first, second, *_ = windows = list(cut_windows(tokenizer, [DOCUMENTS[0], "", DOCUMENTS[1]], 5))
    assert first.inputs[0] == tokenizer.bos_token_id and first.text_start == 1 and first.unit == "0/0"
    assert second.inputs[0] == first.targets[-1] and second.text_start == 0 and second.inputs[1:] == second.targets[:-1]
    assert {window.unit.split("/")[0] for window in windows} == {"0", "2"}  # an empty document has no window


def test_rep_and_wrep_by_hand():
    window = Window("0/0", (0, 7, 8, 9, 7), (7, 8, 9, 7, 8), None, 1)
    # Guesses: BOS (not text), 7 (just before, wrong), 8 (before, wrong), 7 (3 before, right), 3 (never seen).
    counts = repetition_counts(window, [0, 7, 8, 7, 3])
    assert counts["rep_l_16"] == counts["rep_l_128"] == 3 and counts["wrep_l_16"] == 2
    far = Window("0/0", tuple(range(40)), tuple(range(1, 41)), None, 0)
    counts = repetition_counts(far, [0] * 40)  # token 0 stands 1, 2, ... 40 before the target
    assert [counts[f"rep_l_{length}"] for length in REPETITION_LENGTHS] == [16, 32, 40]


class Fixed:
    """A model whose logits follow from the token read; token 6 gives NaN."""

    def __init__(self, logits):
        self.table = torch.tensor(logits)

    def __call__(self, input_ids, attention_mask, use_cache):
        logits = self.table[input_ids].clone()
        logits[input_ids == 6] = torch.nan
        return SimpleNamespace(logits=logits)


def test_context_information_by_hand(tmp_path):
    tool = word_tokenizer(["a", "b", "c"])  # 4, 5, 6
    logits = np.full((7, 7), -np.inf, dtype=np.float32)
    logits[0, 4] = logits[4, 5] = logits[5, 4] = 0.0  # sure of everything: a after the start, then b, a, b, ...
    task = ScoringTask(make_loaded(Fixed(logits), tool), ["a b a b", "a b"], "train", 8, 1)
    records, figures = run(task, tmp_path)
    assert figures["predictive_entropy"].value == 0 and figures["cross_entropy"].value == 0 and figures["top1_mass"].value == 1
    assert figures["context_information"].value == pytest.approx(math.log(2))
    assert figures["high_frequency_mass"].value is None and "no high-frequency set" in figures["high_frequency_mass"].note


def test_nan_makes_its_window_null_and_leaves_the_others(tmp_path):
    tool = word_tokenizer(["a", "b", "c"])
    logits = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    texts = ["a b a", "a c b", "b b"]
    records, figures = run(ScoringTask(make_loaded(Fixed(logits), tool), texts, "train", 8, 2), tmp_path / "x")
    _, clean = run(ScoringTask(make_loaded(Fixed(logits), tool), [texts[0], texts[2]], "train", 8, 1), tmp_path / "y")
    assert [record["finite"] for record in records] == [True, False, True]
    assert records[1]["nats"] is None and records[1]["rep_l_16"] is None
    for metric, measured in clean.items():
        if metric == "non_finite_windows":
            assert figures[metric].value == pytest.approx(1 / 3)
        else:
            assert figures[metric].value == pytest.approx(measured.value, rel=1e-6) if measured.value is not None else True
            assert metric == "high_frequency_mass" or "1 of 3 windows" in figures[metric].note
    _, lost = run(ScoringTask(make_loaded(Fixed(logits * np.nan), tool), texts, "train", 8, 2), tmp_path / "z")
    assert lost["cross_entropy"].value is None and lost["context_information"].value is None and lost["non_finite_windows"].value == 1


def test_an_impossible_target_is_not_finite(tmp_path):
    logits = np.zeros((7, 7), dtype=np.float32)
    logits[:, 5] = -np.inf
    records, figures = run(ScoringTask(make_loaded(Fixed(logits), word_tokenizer(["a", "b", "c"])), ["a b"], "train", 8, 2), tmp_path)
    assert figures["cross_entropy"].value is None and not records[0]["finite"]


def test_slow_tokenizers_have_no_bits_per_byte(tmp_path):
    class Slow:
        is_fast, bos_token_id = False, None

        def __call__(self, text, **kwargs):
            return {"input_ids": [3 + len(word) for word in text.split()]}

        def get_vocab(self):
            return {"a": 4, "bb": 5}

    _, figures = run(ScoringTask(make_loaded(Fixed(np.zeros((7, 7), dtype=np.float32)), Slow()), ["a bb a"], "train", 8, 2), tmp_path)
    assert figures["bits_per_byte"].value is None and "offsets" in figures["bits_per_byte"].note
    assert figures["cross_entropy"].value == pytest.approx(math.log(7)) and figures["cross_entropy"].counts.sum() == 2


def test_windows_are_chosen_evenly_and_must_fit(model, tokenizer):
    loaded = make_loaded(model, tokenizer)
    every = ScoringTask(loaded, DOCUMENTS, "train", 4, 2).windows
    assert ScoringTask(loaded, DOCUMENTS, "train", 4, 2, max_windows=3).windows == [every[0], every[round((len(every) - 1) / 2)], every[-1]]
    assert evenly_spaced(3, 5) == [0, 1, 2] and evenly_spaced(10, 1) == [0]
    with pytest.raises(UserError, match="context is 64 tokens; lower text.window"):
        ScoringTask(loaded, DOCUMENTS, "train", 65, 2)


def test_the_set_of_the_folder_counts_unless_another_is_given(model, tokenizer):
    loaded = make_loaded(model, tokenizer, high_frequency=SimpleNamespace(token_ids=(4, 5)))
    assert ScoringTask(loaded, DOCUMENTS, "train", 8, 2).high_frequency_ids == (4, 5)
    assert ScoringTask(loaded, DOCUMENTS, "train", 8, 2, high_frequency_ids=(9,)).high_frequency_ids == (9,)


def test_nothing_to_score_is_null(model, tokenizer, tmp_path):
    _, figures = run(ScoringTask(make_loaded(model, tokenizer), ["", ""], "train", 8, 2), tmp_path)
    assert all(measured.value is None for measured in figures.values())
    assert figures["cross_entropy"].note == "no text to score"
