"""The formulas of docs/scale.md: a model worked through by hand, limits, what was counted, and the page."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))  # plain scripts: their folder is where they import from

import scale  # noqa: E402
import scale_formulas as formulas  # noqa: E402
import scale_page  # noqa: E402
from scale_formulas import Run, Shape  # noqa: E402

from ds_stability.loss import CHUNK_ELEMENTS_DEFAULT  # noqa: E402

# One layer of width 4 (two heads, one of keys), an MLP of 6, seven words. By hand, in the order of forward:
# embedding 28 | norm 4, q 16, k 8, v 8, o 16, norm 4, gate 24, up 24, down 24 | norm 4, head 28: 188 in all.
SMALL = Shape(layers=1, hidden=4, intermediate=6, heads=2, kv_heads=1, vocabulary=7)
RUN = Run(ranks=3, ranks_per_node=2, tokens=10, checkpointing=False, reduce_bucket=50, persistence_threshold=4, max_reuse_distance=0,
          sub_group_size=40, vector_bytes=1704)  # fmt: skip
# A third of each, rounded up: 10 | 2 6 3 3 6 2 8 8 8 | 2 10: 68.
SHARE = 68


def test_memory_by_hand():
    assert SMALL.weights() == [28, 4, 16, 8, 8, 16, 4, 24, 24, 24, 4, 28] and SMALL.parameters == 188
    assert formulas.held(SMALL, RUN) == {
        "weights": 2 * SHARE, "gradients": 2 * SHARE, "master": 4 * SHARE, "moments": 8 * SHARE, "averaging": 4 * SHARE, "init_decay": 0,
        "persistent": 2 * 12, "bucket": 100, "high_frequency": 28,
    }  # fmt: skip
    fp32 = formulas.held(SMALL, replace(RUN, weight_bytes=4, averaging=False, init_decay=True))
    assert (fp32["weights"], fp32["averaging"], fp32["init_decay"], fp32["persistent"]) == (272, 0, 272, 48)
    # The module lists a layer's norms last. Sub-groups of at least 40: 10 6 3 3 6 8 8 = 44 | 8 2 2 2 10 = 24, never full.
    assert SMALL.registered() == [28, 16, 8, 8, 16, 24, 24, 24, 4, 4, 4, 28]
    assert formulas.in_step(SMALL, RUN) == {"fp32 gradient": 176, "update meter": 176}
    assert formulas.largest_sub_group(SMALL, replace(RUN, sub_group_size=10**9)) == SHARE


def test_activations_by_hand():
    # A token and layer: 20 x 4 + 4 x 2 + 8 x 6 + 4 x 2 + 8 = 152. The end: 8 x 4 + 4, logits 2 x 7, loss 12.
    assert formulas.activations(SMALL, RUN) == {"layers": 1520, "layer recomputed": 0, "last norm and head": 360, "logits": 140, "loss": 120}
    checkpointed = formulas.activations(SMALL, replace(RUN, checkpointing=True))
    assert (checkpointed["layers"], checkpointed["layer recomputed"]) == (80, 1520)
    with pytest.raises(ValueError, match="bf16"):
        formulas.activations(SMALL, replace(RUN, weight_bytes=4))


def test_traffic_by_hand():
    # Without reuse every weight above 4 elements is gathered twice, padded to thirds: 30 + 18 + 9 + 9 + 18 + 3 x 24 + 30 = 186.
    assert formulas.gathered(SMALL, RUN) == (2 * 186, 30)
    assert formulas.messages(SMALL, replace(RUN, accumulation=5)) == {
        "gathers": 5 * 2 * 372, "reduce-scatters": 5 * 2 * 3 * SHARE, "persistent": 2 * 3 * 6, "ds_stability": 1704,
    }  # fmt: skip
    sent = formulas.sent_by_rank(SMALL, RUN)
    assert sent["gathers"] == pytest.approx(744 * 2 / 3) and sent["ds_stability"] == pytest.approx(2 * 1704 * 2 / 3)
    assert formulas.sent_with_gloo(SMALL, RUN) == pytest.approx(sum(sent.values()) + 2 * 3 * SHARE * 2 / 3)
    assert formulas.sent_by_node(SMALL, RUN) == pytest.approx(sum(sent.values())) and RUN.nodes == 2
    assert formulas.sent_by_node(SMALL, replace(RUN, ranks=2)) == 0
    assert sum(formulas.sent_by_rank(SMALL, replace(RUN, ranks=1)).values()) == 0
    assert formulas.flops(SMALL, RUN) == 6 * 160 * 10 and formulas.flops(SMALL, replace(RUN, checkpointing=True)) == 8 * 160 * 10


def test_reuse_by_hand():
    # Recomputed: 28 once more than the layer, the head twice, the layer three times.
    again = replace(RUN, checkpointing=True)
    assert formulas.gathered(SMALL, again)[0] == 2 * 30 + 2 * 30 + 3 * 126
    # A distance of 1 keeps what is used twice in a row: the head at the turn (norm 4 between is not gathered), and `down`.
    assert formulas.gathered(SMALL, replace(again, max_reuse_distance=1))[0] == 2 * 30 + 30 + 3 * 126 - 24
    # Far enough, everything stays from its first use to its last.
    assert formulas.gathered(SMALL, replace(again, max_reuse_distance=10**9)) == (186, 186)


def test_stored_by_hand():
    assert formulas.stored(SMALL, RUN) == {"optimizer": 12 * 204, "ds_stability": 4 * 204, "weights beside it": 376, "export": 376}
    assert formulas.stored(SMALL, replace(RUN, averaging=False))["ds_stability"] == 0


def test_growth():
    shape, run = scale_page.EXAMPLES["70B on 64 GPUs"]
    state = [sum(formulas.held(shape, replace(run, ranks=ranks)).values()) - formulas.held(shape, run)["bucket"] for ranks in (64, 128)]
    assert state[1] == pytest.approx(state[0] / 2, rel=0.01)
    sent = [sum(formulas.sent_by_rank(shape, replace(run, ranks=ranks)).values()) for ranks in (64, 1024)]
    assert sent[1] == pytest.approx(sent[0], rel=0.02)
    assert formulas.CHUNK_ELEMENTS == CHUNK_ELEMENTS_DEFAULT
    assert shape.parameters == pytest.approx(70.55e9, rel=1e-3)  # as that family of models is known


@pytest.fixture(scope="module")
def result():
    return json.loads((scale.RESULTS / "scale.json").read_text(encoding="utf-8"))


def test_what_was_counted_is_what_the_formulas_say(result):
    assert {(row["name"], row["world_size"]) for row in result["rows"]} == {
        (name, ranks) for name, (_, _, sizes) in scale.cases().items() for ranks in sizes
    }
    for row in result["rows"]:
        shape, run = scale_page.of_row(row)
        held, extra = sum(formulas.held(shape, run).values()), sum(formulas.in_step(shape, run).values())
        assert row["numels"] == shape.registered() and max(row["sub_groups"]) == formulas.largest_sub_group(shape, run)
        assert row["memory"]["held"] == pytest.approx(held, rel=0.005), row["name"]
        assert row["memory"]["inside_step"] == pytest.approx(held + extra, rel=0.005), row["name"]
        if run.ranks > 1:
            parts = formulas.messages(shape, run)
            assert scale_page.gathered_bytes(row) == parts["gathers"] + parts["persistent"], row["name"]
            if row["loopback_per_rank"] is not None:  # headers come on top: of small messages more
                assert 1 < row["loopback_per_rank"] / formulas.sent_with_gloo(shape, run) < 1.05
            assert scale_page.scattered_bytes(row) == pytest.approx(parts["reduce-scatters"], rel=0.001), row["name"]
        files = row["stored"]["checkpoint"]
        assert sum(size for name, size in files.items() if name.endswith("optim_states.pt")) == pytest.approx(
            formulas.stored(shape, run)["optimizer"], rel=0.01)  # fmt: skip
        assert str(result["settings"]["vector_bytes"]) in row["messages"]["all_reduce"]


def test_the_estimator_brackets_the_formula(result):
    assert {row["name"] for row in result["estimator"]} >= set(scale_page.EXAMPLES)
    for row in result["estimator"]:
        if row["name"] not in scale_page.EXAMPLES:
            continue
        shape, run = scale_page.EXAMPLES[row["name"]]
        parts = formulas.held(shape, run)
        state = sum(parts[name] for name in ("weights", "gradients", "master", "moments"))
        assert state < row["bytes"] - row["largest_layer"] < 1.01 * (state + 4 * shape.parameters / run.ranks)


def test_the_page_is_made_from_the_results():
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale_page.filled(page, scale.RESULTS) == page, "run python benchmarks/scale.py --render"
    for kind, tables in scale_page.TABLES.items():
        assert all(f"<!-- generated: {kind}_{name} -->" in page for name in tables)


def test_sizes_are_told_in_fitting_units():
    assert [scale_page.size(value) for value in (12, 1704, 3.9e6, 19.23e9, 6.49e12)] == ["12 B", "1.7 kB", "3.9 MB", "19.2 GB", "6.49 TB"]
