"""Samples on the disk: the same samples, the same figures whatever the size of a part, and a few bytes of memory each."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability.eval import sample_table
from ds_stability.eval.metrics import layout as layout_module
from ds_stability.eval.metrics import pools
from ds_stability.eval.metrics.layout import Layout
from ds_stability.eval.records import FINISH_REASONS, Measured, Sample, ScoringContext
from ds_stability.eval.results import samples_measured
from ds_stability.eval.sample_table import tables_of

SUMS = st.none() | st.floats(-1e3, 1e3)
SAMPLES = st.lists(
    st.builds(Sample, st.integers(0, 2**40), st.sampled_from(["greedy", "sample"]), st.integers(0, 9), st.integers(0, 2**40),
              st.lists(st.integers(0, 2**31 - 1), max_size=9), st.text(st.characters(), max_size=9) | st.just("\ud800 lone"),
              st.sampled_from(FINISH_REASONS), SUMS, SUMS, st.integers(0, 99)), max_size=20)  # fmt: skip


@given(SAMPLES)
@settings(deadline=None)
def test_samples_come_back_as_they_were_by_sample_and_prompt(samples):
    tables = tables_of(iter(samples))
    assert list(tables) == list(dict.fromkeys(sample.decoding for sample in samples))
    for decoding, table in tables.items():
        expected = sorted((s for s in samples if s.decoding == decoding), key=lambda s: (s.sample, s.prompt))
        assert list(table) == expected and [table[i] for i in range(len(table))] == expected and table[-1] == expected[-1]
        order = np.random.default_rng(0).permutation(len(table))
        assert list(table.rows(order)) == [expected[i] for i in order]
        assert table.tokens(order).tolist() == [token for i in order for token in expected[i].token_ids]
        with pytest.raises(IndexError):
            table[len(table)]


def texts_of(seed, prompts=30, per_prompt=4):
    rng = np.random.default_rng(seed)
    for prompt in rng.permutation(prompts).tolist():
        for number in range(per_prompt):
            ids = (rng.zipf(1.3, rng.integers(0, 70)) % 200).tolist()
            text = " ".join(("the", "cat", "Sat.", "on", "mat!", "\n\n", '"', "it's")[i % 8] + str(i % 40) for i in ids)
            finish = FINISH_REASONS[rng.choice(3, p=(0.3, 0.65, 0.05))]
            yield Sample(prompt, "sample", number, 0, ids, text, finish, 1.7 * len(ids), -2.3 * len(ids), len(ids))


def figures(seed, monkeypatch, tokens, texts, piece):
    ids = [(np.random.default_rng([seed, i]).zipf(1.3, 24) % 200).tolist() for i in range(20)]
    context = ScoringContext(200, (0,), (1, 2, 3), ("the1", "cat1"), tuple(map(tuple, ids)), tuple(map(str, ids)),
                             np.arange(200)[::-1] + 1, group_texts=3)  # fmt: skip
    made = Layout.of
    with monkeypatch.context() as patch:
        patch.setattr(Layout, "of", lambda samples, context: made(samples, context, tokens))
        patch.setattr(layout_module, "PART_TEXTS", texts)
        patch.setattr(sample_table, "PART", texts)
        patch.setattr(pools, "PIECE", piece)
        return samples_measured(texts_of(seed), context, None)


def same(one: Measured, two: Measured) -> bool:
    """To the rounding of fp64 sums in another order; jackknife units are differences of large numbers."""
    return list(one.units) == list(two.units) and (one.note, one.settings, one.n, one.unit) == (two.note, two.settings, two.n, two.unit) and all(
        np.allclose(a, b, rtol=1e-11, atol=1e-11, equal_nan=True) for a, b in ((one.totals, two.totals), (one.counts, two.counts)))  # fmt: skip


@pytest.mark.parametrize(("seed", "tokens", "texts"), [(0, 1, 1), (1, 40, 7), (2, 300, 1000)])
def test_figures_do_not_depend_on_the_size_of_a_part(monkeypatch, seed, tokens, texts):
    whole = figures(seed, monkeypatch, 10**9, 10**6, 10**9)
    parts = figures(seed, monkeypatch, tokens, texts, 50)
    assert [one.metric for one in whole] == [one.metric for one in parts] and sum(one.value is not None for one in whole) > 35
    assert [one.metric for one, two in zip(whole, parts, strict=True) if not same(one, two)] == []


def test_memory_is_some_bytes_a_sample_whatever_its_length(tmp_path):
    text, ids, count = "word " * 400, list(range(400)), 3000

    def samples():
        return (Sample(i // 8, "sample", i % 8, 0, ids, text, "length", 1.0, 2.0, 400) for i in reversed(range(count)))

    tracemalloc.start()
    (table,) = tables_of(samples(), tmp_path).values()
    peak = tracemalloc.get_traced_memory()[1]
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # Beside what is held for each: parts of PART samples while they are laid down in order.
    assert peak < 2 * sample_table.PART * len(text) and held < 60 * count + 20_000, (peak, held)
    assert table[5].token_ids == ids and not list(tmp_path.iterdir())  # files without a name
