"""All metrics together: names, degenerate input, units that pair, and what must hold for any samples."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.errors import UserError
from ds_stability.eval.intervals import row
from ds_stability.eval.metrics import METRIC_NAMES
from ds_stability.eval.metrics.score_samples import score_samples
from ds_stability.eval.records import Sample, ScoringContext

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "\n", '"', "it's", "hat"]


def text_of(ids):
    return " ".join(WORDS[i % len(WORDS)] for i in ids)


def sample(prompt, ids, number=0, finish="length", decoding="sample", text=None):
    return Sample(prompt, decoding, number, 0, list(ids), text_of(ids) if text is None else text, finish, 2.0 * len(ids),
                  -3.0 * len(ids), len(ids))  # fmt: skip


def references(count=12, length=24, seed=99):
    return [np.random.default_rng([seed, i]).integers(1, 40, length).tolist() for i in range(count)]


def context(**changes):
    ids = references()
    full = dict(vocab_size=40, special_ids=(0,), high_frequency_ids=(1, 2, 3), high_frequency_words=("the", "a"),
                reference_ids=tuple(map(tuple, ids)), reference_texts=tuple(map(text_of, ids)),
                training_unigrams=np.arange(40)[::-1] + 1, group_texts=3)  # fmt: skip
    return ScoringContext(**(full | changes))


def scored(samples, metrics=None, **changes):
    return {measured.metric: measured for measured in score_samples(samples, context(**changes), metrics)}


def ordinary(seed=0, prompts=8, per_prompt=2, types=40):
    rng = np.random.default_rng(seed)
    return [sample(p, rng.integers(1, types, 24), j) for p in range(prompts) for j in range(per_prompt)]


def test_every_name_comes_once_in_order_with_its_settings():
    measured = score_samples(ordinary(), context(), None)
    assert [m.metric for m in measured] == list(METRIC_NAMES) and len(set(METRIC_NAMES)) == len(METRIC_NAMES)
    for m in measured:
        assert m.decoding == "sample"
        if m.metric not in ("zipf_exponent", "mtld", "hdd", "top_50_share", "top_100_share", "top_200_share", "top_1000_share"):
            assert m.value is not None, m
        assert (m.value is None) == (not len(m.units)) and (m.value is not None or m.note)


def test_only_what_is_asked_for():
    asked = ["mode_coverage", "seq_rep_2", "eos_rate"]
    assert list(scored(ordinary(), asked)) == ["eos_rate", "seq_rep_2", "mode_coverage"]
    everything = scored(ordinary())
    assert all(scored(ordinary(), [name])[name].value == everything[name].value for name in METRIC_NAMES)


def test_unknown_names_and_mixed_decodings_are_refused():
    with pytest.raises(UserError, match="'distinct_9'"):
        scored(ordinary(), ["distinct_9"])
    with pytest.raises(ValueError, match="one decoding"):
        scored([sample(0, [1]), sample(0, [1], decoding="greedy")])


def test_names_load_without_numpy():
    code = "import sys, ds_stability.eval.metrics; sys.exit(bool({'numpy', 'scipy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- degenerate input -----------------------------------------------------------------------------------------------

NOT_A_NUMBER = {
    "no samples": [],
    "all failed": [sample(p, [], finish="non_finite") for p in range(3)],
    "only eos": [sample(p, [], finish="eos", text="") for p in range(4)],
    "one empty text": [sample(0, [], finish="eos", text="")],
    "one text": [sample(0, [1, 2, 3, 4] * 6)],
    "one token": [sample(0, [1])],
    "no words": [sample(p, [8, 9] * 12, text='\n"\n') for p in range(4)],
    "constant": [sample(p, [5] * 24) for p in range(6)],
    "special only": [sample(p, [0] * 24, text="") for p in range(4)],
    "ids beyond the vocabulary": [sample(p, [900, 901 + p] * 12) for p in range(4)],
    "one prompt": [sample(0, [1, 2, 3, 4 + j] * 6, j) for j in range(4)],
    "mixed": [sample(0, []), sample(1, [1]), sample(2, [1, 2] * 12), sample(3, [3] * 24, finish="non_finite")],
}


@pytest.mark.parametrize("name", NOT_A_NUMBER)
@pytest.mark.parametrize("bare", [False, True], ids=["full", "bare"])
def test_degenerate_input_gives_nulls_with_notes_and_finite_rows(name, bare):
    given_context = ScoringContext(40) if bare else context()
    measured = score_samples(NOT_A_NUMBER[name], given_context, None)
    assert [m.metric for m in measured] == list(METRIC_NAMES)
    for m in measured:
        result = row(m)
        assert result["value"] is not None or result["note"], m
        for key in ("value", "stderr", "ci_low", "ci_high"):
            assert result[key] is None or np.isfinite(result[key])
        if result["value"] is not None and result["ci_low"] is None:
            assert "no interval" in result["note"]


def test_eos_only_model():
    measured = scored(NOT_A_NUMBER["only eos"])
    assert measured["eos_rate"].value == 1.0 and measured["no_words_rate"].value == 1.0
    assert measured["tokens_per_text"].value == 0.0
    for name in ("high_frequency_share", "high_frequency_word_share", "distinct_1", "self_bleu_4", "vendi_score", "mode_coverage",
                 "output_entropy_1", "compression_ratio", "seq_rep_1", "kl_unigram"):  # fmt: skip
        assert measured[name].value is None, name


def test_constant_model():
    measured = scored(NOT_A_NUMBER["constant"])
    assert measured["self_bleu_4"].value == pytest.approx(1.0) and measured["vendi_score"].value == pytest.approx(1.0)
    assert measured["output_entropy_1"].value == 0.0 and measured["distinct_1"].value == pytest.approx(1 / 72)
    for name in ("output_entropy_1", "seq_rep_1", "tail_loop_rate"):
        result = row(measured[name])
        assert "units are equal" in result["note"], name
        if measured[name].unit == "share":
            assert result["ci_low"] <= result["value"] <= result["ci_high"] > result["ci_low"]
        else:
            assert result["ci_low"] is None and result["stderr"] is None


def test_failed_samples_are_left_out_and_counted():
    good = ordinary()
    bad = [sample(p, [7] * 24, 5, finish="non_finite") for p in range(8)]
    with_bad, without = scored(good + bad), scored(good)
    assert with_bad["non_finite_rate"].value == pytest.approx(8 / 24) and with_bad["non_finite_rate"].settings["texts"] == 8
    for name in METRIC_NAMES:
        if name != "non_finite_rate":
            assert with_bad[name].value == without[name].value, name


def test_generation_entropy_and_surprisal_by_position():
    samples = [Sample(0, "s", 0, 0, [1, 2], "", "eos", 3.0, -4.0, 3), Sample(1, "s", 0, 0, [1], "", "eos", None, None, 2)]
    measured = scored(samples, ["generation_entropy", "generation_surprisal"])
    assert measured["generation_entropy"].value == 1.0 and measured["generation_surprisal"].value == pytest.approx(4 / 3)
    unknown = scored(samples[1:], ["generation_entropy"])["generation_entropy"]
    assert unknown.value is None and unknown.note


# ---- what holds for any samples -------------------------------------------------------------------------------------

SAMPLES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.lists(st.integers(0, 39), max_size=30),
                             st.sampled_from(["eos", "length", "non_finite"])), max_size=10, unique_by=lambda s: s[:2])  # fmt: skip


@given(SAMPLES, st.randoms())
@settings(deadline=None, max_examples=25)
def test_order_does_not_matter_and_shares_are_shares(items, random):
    samples = [sample(p, ids, j, finish) for p, j, ids, finish in items]
    shuffled = random.sample(samples, len(samples))
    first, second = scored(samples), scored(shuffled)
    for name in METRIC_NAMES:
        value = first[name].value
        assert value == second[name].value and first[name].units == second[name].units
        if value is not None and first[name].unit == "share":
            assert -1e-9 <= value <= 1 + 1e-9
        if value is not None and name.startswith(("kl_", "output_entropy", "vendi")):
            assert value >= -1e-9


def test_duplicates_lower_diversity():
    spread = ordinary()
    same = [sample(s.prompt, spread[s.prompt % 2].token_ids, s.sample) for s in spread]
    high, low = scored(spread), scored(same)
    for name in ("distinct_1", "distinct_2", "output_entropy_1", "output_entropy_2", "vendi_score", "mode_coverage"):
        assert low[name].value < high[name].value, name
    for name in ("self_bleu_4", "compression_ratio", "kl_bigram"):
        assert low[name].value > high[name].value, name


def test_units_of_two_models_pair():
    one, two = scored(ordinary(0)), scored(ordinary(1, types=20))
    for name in METRIC_NAMES:
        if one[name].value is not None and two[name].value is not None:
            assert list(one[name].units) == list(two[name].units), name
            assert len(one[name].units) > 1, name


def test_sizes_come_from_the_references_whatever_the_model_wrote():
    short = [sample(p, range(1, 11), j) for p in range(8) for j in range(3)]
    for name in ("distinct_1", "output_entropy_1", "compression_ratio"):
        settings = [scored(samples, [name])[name].settings for samples in (ordinary(), short)]
        sizes = [{k: v for k, v in s.items() if k in ("group_tokens", "tokens", "group_bytes")} for s in settings]
        assert sizes[0] == sizes[1] and settings[0]["size_from"] == "references"
    assert scored(short, ["distinct_1"], reference_ids=(), reference_texts=())["distinct_1"].settings["size_from"] == "the texts"
