"""Sentence lengths and punctuation by hand, against scipy, and on texts without any of it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from ds_stability.eval.records import Sample, ScoringContext
from ds_stability.eval.results import samples_measured
from ds_stability.eval.segments import UNSPACED_NOTE
from ds_stability.eval.structure import (
    LONGEST,
    Structure,
    punctuation_counts,
    sentence_lengths,
    structure_scores,
    total_variation,
    wasserstein,
)

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=30)


def figures_of(texts, references, **arguments):
    return {measured.metric: measured for measured in structure_scores(texts, references, **arguments)}


@pytest.mark.parametrize(
    ("text", "lengths", "loose"),
    [
        ("The cat sat. It slept!", [3, 2], 0),
        ('"Is it so?" she asked. (Yes, it is.) And then', [5, 3], 2),
        ("no end at all", [], 4),
        ("", [], 0),
        ("... !!! ?", [], 0),
        ("It cost 3.50 at example.com today.", [6], 0),
        ("Wait... what?! Don't well-known things - count - once?", [2, 6], 0),
        ("A TITLE\n\nIt began here.\nIt ended\nhere.", [3, 3], 2),
        ("One sentence.\n\nand a fragment", [2], 3),
        ("He said \u201cgo.\u201d She went\u2026", [3, 2], 0),
    ],
)
def test_sentence_lengths_by_hand(text, lengths, loose):
    assert sentence_lengths(text) == (lengths, loose)


def test_punctuation_by_hand():
    assert punctuation_counts("\u201cYes,\u201d he said \u2014 don't go; well-known: #1!") == Counter(
        {'"': 2, ",": 1, "-": 1, ";": 1, ":": 1, "!": 1, "other": 1})  # fmt: skip
    assert punctuation_counts("[a] 'b' words only") == Counter({"(": 1, ")": 1, "'": 2})
    assert punctuation_counts("no marks") == Counter()
    assert punctuation_counts('צה"ל ג׳ירפה "לא" Hawai‘i x² ½') == Counter('""')
    assert punctuation_counts("हिन्दी भाषा e\u0301te\u0301 3.5 1,000 e.g. می\u200cخواهم") == Counter(".")
    assert punctuation_counts("यह है। هل؟ 「好，」。«Bon»") == Counter({".": 2, "?": 1, '"': 4, ",": 1})


@given(LENGTHS, LENGTHS)
def test_wasserstein_is_that_of_scipy(first, second):
    assert wasserstein(Counter(first), Counter(second)) == pytest.approx(wasserstein_distance(first, second), abs=1e-12)


@given(LENGTHS, LENGTHS)
def test_total_variation_by_brute_force(first, second):
    """The largest difference in probability over all events: the one that holds exactly the outcomes where p > q."""
    value = total_variation(Counter(first), Counter(second))
    p, q = ({x: sample.count(x) / len(sample) for x in first + second} for sample in (first, second))
    assert value == pytest.approx(sum(max(0.0, p[x] - q[x]) for x in p), abs=1e-12)
    assert 0 <= value <= 1 and total_variation(Counter(first), Counter(first)) == 0


def test_figures_by_hand():
    texts = ["One two. Three four five six.", "One two three four!", "nothing here ends"]
    figures = figures_of(texts, ["A b. C d e f."], group_texts=1, decoding="greedy")
    assert figures["sentence_length"].value == pytest.approx(10 / 3)
    assert figures["words_per_sentence_end"].value == pytest.approx(13 / 3)
    assert figures["texts_without_sentence_end"].value == pytest.approx(1 / 3)
    # Samples: lengths 2, 4, 4; reference: 2, 4.
    assert figures["sentence_length_wasserstein"].value == pytest.approx(2 * (1 / 2 - 1 / 3))
    assert figures["sentence_length_total_variation"].value == pytest.approx(1 / 2 - 1 / 3)
    assert figures["punctuation_per_word"].value == pytest.approx(3 / 13)
    assert figures["punctuation_total_variation"].value == pytest.approx(1 / 3)  # "." 2/3 and "!" 1/3 against "." 1
    assert all(measured.decoding == "greedy" and len(measured.units) == 3 for measured in figures.values())


def test_jackknife_units_are_those_of_leaving_groups_out():
    generator = np.random.default_rng(0)
    texts = [" ".join(["w"] * n) + "." for n in generator.integers(1, 20, size=12)]
    reference = [" ".join(["w"] * n) + "." for n in generator.integers(5, 30, size=30)]
    measured = figures_of(texts, reference, group_texts=4)["sentence_length_wasserstein"]
    lengths, other = ([len(text.split()) for text in sample] for sample in (texts, reference))
    value = wasserstein_distance(lengths, other)
    without = [wasserstein_distance(lengths[:i] + lengths[i + 4 :], other) for i in (0, 4, 8)]
    pseudo = np.array([3 * value - 2 * left for left in without])  # four sentences a group: equal weights
    assert measured.value == pytest.approx(value) and measured.counts.tolist() == [4, 4, 4]
    assert (measured.totals / measured.counts).std() == pytest.approx(pseudo.std())


@pytest.mark.parametrize("texts", [["no end here", "nor here"], ["", ""], ["\n\n\n", '"""'], []])
def test_texts_without_sentences_give_nulls_and_no_wrong_numbers(texts):
    figures = figures_of(texts, ["A sentence. Another one."])
    for name in ("sentence_length", "words_per_sentence_end", "sentence_length_wasserstein", "sentence_length_total_variation"):
        assert figures[name].value is None and figures[name].note, name
    if texts:
        assert figures["texts_without_sentence_end"].value == 1
    assert figures_of(["A sentence."], [])["sentence_length_wasserstein"].value is None
    assert "references" in figures_of(["A sentence."], [])["sentence_length_wasserstein"].note


def test_rows_of_words_say_where_words_are_characters():
    chinese, reference = ["你好。再见。", "好。"], ["A sentence."]
    for texts, noted in ((chinese, True), (["A word. “Or” two 好."], False), (["ภาษาไทย ผมชอบ"], True)):
        for group_texts in (1, 8):
            figures = figures_of(texts, reference, group_texts=group_texts)
            for name in ("sentence_length", "words_per_sentence_end", "punctuation_per_word", "sentence_length_wasserstein",
                         "sentence_length_total_variation"):  # fmt: skip
                assert (UNSPACED_NOTE in (figures[name].note or "")) == noted, name
            assert UNSPACED_NOTE not in (figures["texts_without_sentence_end"].note or "")


def test_one_group_has_a_value_and_no_spread():
    measured = figures_of(["One two. Three."], ["One. Two."], group_texts=8)["sentence_length_wasserstein"]
    assert measured.value == pytest.approx(0.5) and len(measured.units) == 1
    # The only group with a sentence cannot be left out.
    lone = figures_of(["One two. Three.", "none"], ["One. Two."], group_texts=1)["sentence_length_wasserstein"]
    assert lone.value == pytest.approx(0.5) and len(lone.units) == 1


def test_structures_add_up_and_long_sentences_share_a_cell():
    texts = ["A b c. D e!", "f g", "h."]
    assert Structure.of(texts) == Structure.of(texts[:1]) + Structure.of(texts[1:])
    long = [" ".join(["w"] * n) + "." for n in (LONGEST, LONGEST + 50)]
    assert figures_of(long[:1], long[1:])["sentence_length_total_variation"].value == 0
    assert figures_of(long[:1], long[1:])["sentence_length_wasserstein"].value == 50


def test_a_text_that_failed_keeps_its_place_in_the_groups():
    """Units are paired between models: what one model could not write must not shift the groups of the others."""
    texts = ["One two three.", "Four five.", "Six.", "Seven eight nine ten."]
    whole = figures_of(texts, texts, group_texts=2)["sentence_length"]
    failed = figures_of([None, *texts[1:]], texts, group_texts=2)["sentence_length"]
    assert failed.totals.tolist() == [2.0, whole.totals[1]] and failed.counts.tolist() == [1.0, whole.counts[1]]
    assert figures_of([None, None], texts)["texts_without_sentence_end"].value is None


@pytest.mark.parametrize(("each", "size"), [(1, 8), (3, 6), (4, 8), (9, 9)])
def test_groups_do_not_part_the_samples_of_a_prompt(each, size):
    samples = [Sample(prompt, "sample", number, 0, [1], "A b. C.", "eos") for prompt in range(20) for number in range(each)]
    figure = next(one for one in samples_measured(samples, ScoringContext(9), None) if one.metric == "sentence_length")
    assert figure.settings["group_texts"] == size and figure.counts.tolist()[:-1] == [2 * size] * (len(figure.units) - 1)
