"""The bands of the reference text, each row of the decision table, and the patience of the warnings."""

import dataclasses
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_stability import probe as probe_module
from ds_stability.alarm import CAUSES, MIN_PIECES, Band, Bands, Reading, Watch, decide, reference_bands
from ds_stability.alarm_config import AlarmConfig
from ds_stability.config import StabilityConfig
from ds_stability.data.packing import IGNORE
from ds_stability.errors import AlarmStoppedError, StabilityConfigError, StoppedError, UserError
from ds_stability.integrations import alarm as alarm_module
from ds_stability.integrations.alarm import Alarm, Piece, blocks_of_file, cut_pieces
from ds_stability.launchers import setup_run
from ds_stability.same_block import training_part
from ds_stability.tags import TAGS

CONFIG = AlarmConfig()
BANDS = Bands(repetition=Band(-0.05, 0.1), high_frequency=Band(0.4, 0.6), end_rate=Band(0.0, 0.25), end_share=0.002, texts=16)
HEALTHY = Reading(entropy=4.0, cross_entropy=4.1, repetition=0.02, high_frequency=0.5, end_rate=0.1, end_inputs=200, inputs=100_000,
                  end_labels=200, labels=99_000)  # fmt: skip


def found(**changes):
    """The causes whose sentences are not empty."""
    sentences = decide(dataclasses.replace(HEALTHY, **changes), BANDS, CONFIG)
    assert list(sentences) == [*CAUSES[:3], "collapse", "spread"]
    return {cause: text for cause, text in sentences.items() if text}


def test_a_healthy_run_says_nothing():
    assert found() == {} and set(decide(HEALTHY, BANDS, CONFIG).values()) == {""}


CAPPED = {"end_rate": 0.0}
ROWS = [
    ({"entropy": 3.0}, {"collapse"}, "generation entropy 3 nats is below the band 3.07 to 5.12"),
    ({"entropy": 5.3}, {"spread"}, "generation entropy 5.3 nats is above"),
    ({"repetition": 0.6}, {"collapse"}, "seq-rep-4 of the samples 0.6 is above the band -0.05 to 0.1"),
    ({"high_frequency": 0.9}, {"collapse"}, "high-frequency share of the samples 0.9 is above the band 0.4 to 0.6"),
    ({"high_frequency": 0.2}, {"spread"}, "high-frequency share of the samples 0.2 is below"),
    # Texts that never end where the end token is never a label: a mistake of masking, which explains their repetition.
    ({**CAPPED, "end_labels": 0}, {"eos_masked"}, "none of the 200 end tokens trained on was a label"),
    ({**CAPPED, "end_labels": 0, "repetition": 0.6, "high_frequency": 0.9}, {"eos_masked"}, "all 16 samples"),
    # But not an entropy that is too low: that is a collapse besides.
    ({**CAPPED, "end_labels": 0, "repetition": 0.6, "entropy": 0.5}, {"eos_masked", "collapse"}, "collapse"),
    # End tokens are labels, and still no text ends: that alone is no cause (long documents), nor does it excuse repetition.
    (CAPPED, set(), ""),
    ({**CAPPED, "repetition": 0.6}, {"collapse"}, "seq-rep-4"),
    # A text that does end speaks against a masked end token.
    ({"end_labels": 0}, set(), ""),
    ({**CAPPED, "end_inputs": 0, "end_labels": 0}, {"no_document_ends"}, "hold no end token where the reference text has 200"),
    ({**CAPPED, "end_inputs": 0, "end_labels": 0, "repetition": 0.6}, {"no_document_ends"}, ""),
    ({**CAPPED, "end_inputs": 0, "end_labels": 0, "inputs": 4000, "labels": 4000}, set(), ""),  # 8 were due: too early to say
    ({"end_rate": 0.9, "end_labels": 20_000}, {"padding_supervised"}, "90% of the samples end, against at most 25%"),
    ({"end_rate": 0.9}, set(), ""),  # short texts, without too many end labels
    ({"end_rate": 0.1, "end_labels": 20_000}, set(), ""),
]  # fmt: skip


@pytest.mark.parametrize("changes, causes, part", ROWS)
def test_each_row_of_the_decision_table(changes, causes, part):
    sentences = found(**changes)
    assert set(sentences) == causes and part in " ".join(sentences.values())
    assert all("\n" not in text and any(c.isdigit() for c in text) for text in sentences.values())


def test_what_is_unknown_speaks_neither_for_nor_against():
    for value in (None, math.nan, math.inf):
        assert found(entropy=value) == {}
        assert decide(dataclasses.replace(HEALTHY, end_rate=value), BANDS, CONFIG)["eos_masked"] is None
    nothing = dataclasses.replace(HEALTHY, entropy=None, repetition=None, high_frequency=None)
    assert decide(nothing, BANDS, CONFIG)["collapse"] is None and decide(nothing, BANDS, CONFIG)["spread"] is None
    assert decide(dataclasses.replace(HEALTHY, cross_entropy=None), BANDS, CONFIG)["collapse"] == ""
    no_set = dataclasses.replace(BANDS, high_frequency=None)
    assert decide(dataclasses.replace(HEALTHY, high_frequency=0.9), no_set, CONFIG)["collapse"] == ""


def test_tolerances_widen_the_bands():
    wide = AlarmConfig(entropy_tolerance=0.5)
    assert decide(dataclasses.replace(HEALTHY, entropy=2.1), BANDS, wide)["collapse"] == ""
    pieces = [([1, 2, 3, 4, 5], False)] * 4
    for tolerance in (0.0, 0.2):
        band = reference_bands(pieces, 8, {1}, (), tolerance).high_frequency
        assert (band.low, band.high) == pytest.approx((0.2 - tolerance, 0.2 + tolerance))


# ---- bands ----------------------------------------------------------------------------------------------------------


def test_bands_are_quantiles_of_groups_as_large_as_the_probe():
    """Against a bootstrap written out group by group; the high-frequency share pools tokens, repetition averages texts."""
    generator = np.random.default_rng(0)
    pieces = [(generator.integers(0, 4, size=int(length)).tolist(), bool(length % 2)) for length in generator.integers(2, 30, size=40)]
    bands = reference_bands(pieces, 6, {0, 1}, {3}, 0.0, seed=5)
    chosen = np.random.default_rng(5).integers(40, size=(2000, 6))
    repetition, share, ends = [], [], []
    for group in chosen:
        texts = [pieces[i][0] for i in group]
        values = []
        for text in texts:
            grams = [tuple(text[i : i + 4]) for i in range(len(text) - 3)]
            values += [1 - len(set(grams)) / len(grams)] if grams else []
        repetition.append(np.mean(values))
        words = [token for text in texts for token in text if token != 3]
        share.append(np.mean([token in (0, 1) for token in words]))
        ends.append(np.mean([pieces[i][1] for i in group]))
    for band, values in ((bands.repetition, repetition), (bands.high_frequency, share), (bands.end_rate, ends)):
        assert (band.low, band.high) == pytest.approx(tuple(np.nanquantile(values, [0.005, 0.995])))
    tokens = sum(len(ids) + end for ids, end in pieces)
    assert bands.end_share == pytest.approx(sum(end for _, end in pieces) / tokens) and bands.texts == 6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_groups_of_the_text_itself_are_rarely_outside(seed):
    generator = np.random.default_rng(seed)
    pieces = [(generator.integers(0, 50, size=40).tolist(), False) for _ in range(100)]
    band = reference_bands(pieces, 16, set(range(25)), (), 0.0).high_frequency
    shares = [np.mean([token < 25 for i in generator.integers(100, size=16) for token in pieces[i][0]]) for _ in range(100)]
    assert np.mean([band.low <= share <= band.high for share in shares]) >= 0.93


def test_too_little_text_is_an_error_and_texts_too_short_have_no_band():
    with pytest.raises(ValueError, match=f"at least {MIN_PIECES}"):
        reference_bands([([1], False)] * (MIN_PIECES - 1), 4, None, (), 0.0)
    bands = reference_bands([([1, 2], True)] * MIN_PIECES, 4, None, (), 0.1)
    assert bands.repetition is None and bands.high_frequency is None and bands.end_rate == Band(1.0, 1.0)


def test_pieces_have_a_context_and_end_at_the_first_end_token():
    block = [1, 2, 3, 9, 5, 6, 7, 8, 1, 2, 3]  # 9 ends a text
    assert cut_pieces([block, [1, 2]], 2, 3, {9}) == [Piece([1, 2], [3], True), Piece([6, 7], [8, 1, 2], False)]
    assert len(cut_pieces([[1] * 10_000], 1, 1, set())) == 512


# ---- warnings -------------------------------------------------------------------------------------------------------


def verdict(*causes, unknown=()):
    return {cause: None if cause in unknown else "here" if cause in causes else "" for cause in CAUSES}


def test_a_cause_is_said_once_after_its_patience_and_again_only_after_it_was_gone():
    watch = Watch(2)
    assert watch.update(verdict("collapse")) == []
    assert watch.update(verdict("collapse", "spread")) == ["collapse"] and watch.active == {"collapse"}
    assert watch.update(verdict("collapse", "spread")) == ["spread"]
    assert watch.update(verdict("collapse")) == []
    assert watch.update(verdict()) == [] and watch.active == {"collapse"}  # spread was gone twice, collapse once
    assert watch.update(verdict("collapse")) == [] and watch.update(verdict()) == []  # a flicker starts the count anew
    assert watch.update(verdict()) == [] and watch.active == set()
    assert watch.update(verdict("collapse")) == [] and watch.update(verdict("collapse")) == ["collapse"]


def test_an_unknown_check_changes_nothing():
    watch = Watch(2)
    watch.update(verdict("collapse"))
    assert watch.update(verdict(unknown=("collapse",))) == [] and watch.update(verdict("collapse")) == ["collapse"]
    assert watch.update(verdict(unknown=CAUSES)) == [] and watch.active == {"collapse"}


# ---- around it ------------------------------------------------------------------------------------------------------


def test_every_cause_has_a_tag():
    assert {f"alarm/{cause}" for cause in CAUSES} <= set(TAGS)


def test_the_block_says_what_is_wrong():
    with pytest.raises(StabilityConfigError, match="stability.probe.interval: 0 is not allowed"):
        StabilityConfig.parse({"alarm": {"action": "warn"}})
    with pytest.raises(StabilityConfigError, match='stability.alarm.action: "halt" is not allowed'):
        StabilityConfig.parse({"alarm": {"action": "halt"}, "probe": {"interval": 5}})
    with pytest.raises(StabilityConfigError, match="stability.alarm.entropy_tolerance: 0"):
        StabilityConfig.parse({"alarm": {"entropy_tolerance": 0}})


def test_a_stop_by_the_alarm_has_a_code_of_its_own():
    assert issubclass(AlarmStoppedError, StoppedError) and AlarmStoppedError.exit_code == 4 != StoppedError.exit_code


GOVERN = {"alarm": {"action": "govern"}, "controller": {"mode": "governor", "start": "alarm", "warmup_steps": 100}}


def make_alarm(blocks, block=None, state=None, oversize=""):
    block = {"alarm": {"action": "warn"}} if block is None else block
    alarm_config = StabilityConfig.parse({**block, "probe": {"interval": 5}}).resolve(pretrained=False)
    started = []
    stability = SimpleNamespace(config=alarm_config, alarm_state=state, start_governor=lambda: started.append(1), started=started)
    engine = SimpleNamespace(stability=stability, device="cpu", seq_data_parallel_group=None, train_micro_batch_size_per_gpu=lambda: 3)
    probe = SimpleNamespace(engine=engine, oversize=oversize, config=SimpleNamespace(max_new_tokens=4), end_ids=[9], prompts=[[1]] * 3,
                            high_frequency_ids=None, tokenizer=SimpleNamespace(all_special_ids=[9]))  # fmt: skip
    return Alarm(probe, blocks, 2)


def test_end_tokens_are_counted_among_inputs_and_labels():
    alarm = make_alarm([list(range(60))])
    assert alarm.start_step == 100  # after the warm-up of a fresh model
    ids = torch.tensor([[1, 9, 2, 9], [3, 4, 9, 9]])
    labels = torch.tensor([[-100, 9, 2, -100], [3, 4, 9, -100]])
    alarm.watch({"input_ids": ids, "labels": labels})()
    alarm.watch({"input_ids": ids, "labels": labels, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])})()
    alarm.watch({"input_ids": ids})()  # no labels: nothing is trained on
    alarm.watch({"input_ids": ids, "labels": labels})  # not differentiated
    assert alarm.counts.tolist() == [4 + 3, 8 + 7, 2 + 2, 5 + 5]


@pytest.fixture
def alone(monkeypatch):
    """A process group of one, and a model whose reference text is as it should be."""
    monkeypatch.setattr(alarm_module.dist, "all_reduce", lambda tensor, group=None: None)
    monkeypatch.setattr(alarm_module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(Alarm, "_score", lambda self: (4.0, 4.0))


COLLAPSED = {"probe/sample/entropy": 0.1, "probe/sample/seq_rep_4": 0.9, "probe/sample/high_frequency_share": 1.0, "probe/sample/end_rate": 0.5}


@pytest.mark.parametrize("block", [GOVERN, {"alarm": {"action": "stop"}}, {"alarm": {"action": "warn"}}])
def test_what_a_collapse_does(alone, block):
    alarm = make_alarm([list(range(60))], block)
    assert alarm.check(99, COLLAPSED) == {}  # in the warm-up
    for step in (100, 105, 110):
        done = (bool(alarm.engine.stability.started), alarm.stop)
        assert done == ((False, False) if step < 110 else (block is GOVERN, block["alarm"]["action"] == "stop"))
        alarm.check(step, COLLAPSED)
    assert alarm.said.startswith("step 105: collapse: ") and len(alarm.engine.stability.started) == (block is GOVERN)


def test_the_stop_names_the_collapse_and_not_what_came_beside_it(alone):
    alarm = make_alarm([list(range(60))], {"alarm": {"action": "stop"}})
    alarm.bands = dataclasses.replace(alarm.bands, high_frequency=Band(0.4, 0.6))
    for step in (100, 105):
        alarm.check(step, {**COLLAPSED, "probe/sample/high_frequency_share": 0.0})
    assert alarm.said.startswith("step 105: spread: ") and alarm.reason.startswith("step 105: collapse: ") and alarm.stop


def test_a_probe_that_would_be_skipped_is_one_line():
    with pytest.raises(UserError, match=r"alarm.action: warn needs the probe, which is skipped: 9 GiB.*raise stability.probe.max_gather_gib"):
        make_alarm([list(range(60))], oversize="9 GiB")


@pytest.mark.parametrize("partitioned", [True, False])
def test_the_probe_says_why_it_is_skipped(monkeypatch, partitioned):
    monkeypatch.setattr(probe_module, "weight_bytes", lambda engine: 3 * 2**30)
    monkeypatch.setattr(probe_module, "is_partitioned", lambda engine: partitioned)
    probe = object.__new__(probe_module.Probe)
    probe.engine, probe.config = None, SimpleNamespace(max_gather_gib=2.0)
    assert probe.oversize == ("the gathered weights take 3.0 GiB and probe.max_gather_gib is 2" if partitioned else "")


def score(monkeypatch, score_batch, others=()):
    """`Alarm._score` in a world of one, or of more whose failures are `others`."""

    def gather(into, mine):
        into[:] = [mine, *others]

    monkeypatch.setattr(alarm_module.dist, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(alarm_module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(alarm_module.dist, "all_reduce", lambda tensor, group=None: None)
    monkeypatch.setattr(alarm_module.torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(alarm_module, "standalone_module", lambda engine: nullcontext())
    monkeypatch.setattr(Alarm, "_score_batch", lambda self, module, pieces: score_batch(pieces))
    return make_alarm([list(range(60))])._score()


def test_scoring_takes_no_more_pieces_at_a_time_than_training_does(monkeypatch):
    sizes = []

    def count(pieces):
        sizes.append(len(pieces))
        return torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64) * len(pieces)

    assert score(monkeypatch, count) == (2.0, 3.0) and sizes == [3, 3, 3, 1]  # of 10 pieces, with a micro-batch of 3


def test_what_fails_on_one_rank_is_raised_on_all(monkeypatch):
    def fail(pieces):
        raise MemoryError("full")

    with pytest.raises(RuntimeError, match="alarm failed on rank 0: MemoryError"):
        score(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="alarm failed on rank 1: OutOfMemoryError"):
        score(monkeypatch, lambda pieces: torch.ones(3, dtype=torch.float64), ["OutOfMemoryError()"])


@pytest.mark.parametrize("pad", [0, 9])
def test_padding_is_no_reference_text(monkeypatch, pad):
    """Also where the end token (9) pads: pieces of padding would end at once, and widen every band."""
    text = torch.arange(10, 50)
    ids, labels = torch.cat([text, torch.full((40,), pad)]), torch.cat([text, torch.full((40,), IGNORE)])
    given = []
    monkeypatch.setattr(setup_run, "Alarm", lambda probe, blocks, context: given.extend(blocks))
    callback = object.__new__(setup_run.RunCallback)
    callback.command = SimpleNamespace(stability=StabilityConfig(), data=SimpleNamespace(block_size=80))
    callback.blocks = [{"input_ids": ids, "labels": labels}, {"input_ids": ids, "labels": torch.full((80,), IGNORE)}]
    callback._alarm(None)
    assert given == [text.tolist(), []]


def test_a_resumed_run_goes_on_counting(alone):
    alarm = make_alarm([list(range(60))], GOVERN)
    alarm.watch({"input_ids": torch.tensor([[1, 9]]), "labels": torch.tensor([[-100, 9]])})()
    alarm.check(100, COLLAPSED)
    resumed = make_alarm([list(range(60))], GOVERN, json.loads(json.dumps(alarm.state_dict())))
    assert resumed.counts.tolist() == alarm.counts.tolist() == [1, 2, 1, 1]
    assert resumed.check(105, COLLAPSED) == alarm.check(105, COLLAPSED)
    assert resumed.engine.stability.started == [1] and resumed.watch_state.active == {"collapse"}


def test_a_governor_is_started_only_where_one_waits():
    for controller in ({}, {"mode": "governor"}):
        with pytest.raises(StabilityConfigError, match=r'stability.alarm.action: "govern" is not allowed.*controller.start is "alarm"'):
            StabilityConfig.parse({"alarm": {"action": "govern"}, "controller": controller, "probe": {"interval": 5}})
    blocks = [StabilityConfig.parse({**GOVERN, "probe": {"interval": 5, "num_prompts": n}}).to_dict() for n in (4, 8)]
    assert training_part(blocks[0]) != training_part(blocks[1])  # the probe decides when it starts


def test_too_short_a_reference_text_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"gives only 1 pieces of 2 \+ 4 tokens, and 4 are needed"):
        make_alarm([list(range(7))])
    tokenizer = SimpleNamespace(eos_token_id=9, __call__=None)
    with pytest.raises(UserError, match="stability.alarm.reference_file .*nowhere.txt: No such file"):
        blocks_of_file(str(tmp_path / "nowhere.txt"), tokenizer, 8)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="not UTF-8"):
        blocks_of_file(str(tmp_path / "latin.txt"), tokenizer, 8)
