"""What the governor measures on: dealing sequences out to ranks, padding, modes, and overlap with the training text."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from ds_stability import collective
from ds_stability import held_out as held_out_module
from ds_stability.config import StabilityConfig
from ds_stability.config_controller import ControllerConfig
from ds_stability.data.overlap import WINDOW, _windows, overlapping_share
from ds_stability.errors import StabilityConfigError
from ds_stability.held_out import GovernorProbe, HeldOut, evaluating, first_rows
from ds_stability.launchers.setup_run import governor_sequences, warn_of_overlap
from ds_stability.loss import StabilityLoss
from ds_stability.stabilizers.governance import BONUS, Governance, check_target
from ds_stability.statistics import FIELDS, TOKEN_FIELDS, VECTOR_SIZE, StepSums


def rows_of(lengths, seed=0, vocab=50):
    rng = np.random.default_rng(seed)
    for length in lengths:
        ids = torch.from_numpy(rng.integers(0, vocab, length))
        yield {"input_ids": ids, "labels": ids.clone()}


def model_and_loss():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.5))  # fmt: skip
    loss = StabilityLoss(model, ForCausalLMLoss, True, "cpu")
    model.loss_function = loss
    return model.train(), loss


def engine_of(model):
    class Engine:
        module = model

        def __call__(self, **batch):
            return model(**batch)

    return Engine()


@pytest.mark.parametrize("lengths", [(9,) * 5, (9, 4, 7, 9, 3)])
def test_sums_do_not_depend_on_how_the_sequences_are_dealt(lengths):
    model, loss = model_and_loss()
    vectors = []
    for world, micro in ((1, 5), (1, 2), (2, 2), (3, 1)):
        parts = [HeldOut(rows_of(lengths), 5, micro, rank, world) for rank in range(world)]
        assert len({len(part.batches) for part in parts}) == 1  # as many forwards on every rank
        assert all(len(batch["labels"]) <= micro for part in parts for batch in part.batches)
        vectors.append(sum(part.sums(engine_of(model), loss, torch.device("cpu")) for part in parts))
    assert float(vectors[0][0]) == sum(length - 1 for length in lengths)
    for vector in vectors[1:]:
        torch.testing.assert_close(vector, vectors[0], rtol=1e-5, atol=1e-5)


def test_measuring_leaves_no_trace():
    model, loss = model_and_loss()
    model.model.layers[0].eval()
    modes, before, state = [part.training for part in model.modules()], loss.evaluation, torch.get_rng_state()
    HeldOut(rows_of((6, 6)), 2, 1, 0, 1).sums(engine_of(model), loss, torch.device("cpu"))
    assert [part.training for part in model.modules()] == modes and loss.evaluation is before
    assert torch.equal(torch.get_rng_state(), state)
    assert float(before.sums_K[0]) == 0.0 and float(loss.train.sums_K[0]) == 0.0
    assert loss.calls.begun == 0


def test_the_probe_computes_no_loss():
    model, loss = model_and_loss()
    held_out = HeldOut(rows_of((6, 6)), 2, 1, 0, 1)
    wanted = held_out.sums(engine_of(model), loss, torch.device("cpu"))
    stock, loss.stock = loss.stock, None  # calling it would fail
    assert torch.equal(held_out.sums(engine_of(model), loss, torch.device("cpu")), wanted)
    loss.stock = stock
    row = next(rows_of((6,)))
    with torch.no_grad():
        value = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
    assert value > 0  # evaluation by others does


@pytest.mark.parametrize("world", [1, 2])
def test_a_forward_of_the_probe_reads_one_sequence(monkeypatch, world):
    monkeypatch.setattr(held_out_module.dist, "get_world_size", lambda group=None: world)
    monkeypatch.setattr(held_out_module.dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(held_out_module, "require_equal", lambda *args: None)
    governance = Governance(control_of(target="initial"), 0.9)
    probe = GovernorProbe(SimpleNamespace(train_micro_batch_size_per_gpu=lambda: 8), None, governance, None, torch.device("cpu"))
    probe.set(rows_of((6,) * 5))
    assert [len(batch["labels"]) for batch in probe.held_out.batches] == [1] * (5 if world == 1 else 3)
    assert governance.held_out == probe.held_out.fingerprint


@pytest.mark.parametrize("load_first", [True, False])
@pytest.mark.parametrize("letter", ["b", "c"])
def test_a_resumed_run_needs_the_held_out_text_that_it_had(load_first, letter):
    governance = Governance(control_of(target="initial"), 0.9)
    governance.take_held_out("a" * 64)
    governance.take_held_out("b" * 64)  # nothing was measured yet
    governance.measure(sums_of())
    resumed, state = Governance(governance.control, 0.9), json.loads(json.dumps(governance.state_dict()))
    steps = [lambda: resumed.load_state_dict(state), lambda: resumed.take_held_out(letter * 64)]
    first, second = steps if load_first else steps[::-1]
    first()
    if letter == "b":
        second()
        assert resumed.held_out == letter * 64
    else:
        with pytest.raises(StabilityConfigError, match=r"held-out text \(sha256 cccccccccccc\) is not the one .* \(bbbbbbbbbbbb\)"):
            second()


def test_unequal_sequences_are_told_with_what_to_give(monkeypatch):
    def all_reduce(tensor, op=None, group=None):
        tensor += 1.0 if op == collective.dist.ReduceOp.MAX else 0.0

    monkeypatch.setattr(collective.dist, "all_reduce", all_reduce)
    with pytest.raises(StabilityConfigError, match="differs between ranks .*; give every rank the same config file"):
        collective.require_equal({}, torch.device("cpu"), None, "stability block")
    with pytest.raises(StabilityConfigError, match="differs between ranks .*; give it twice"):
        collective.require_equal({}, torch.device("cpu"), None, "held-out data", "give it twice")


def test_modes_come_back_after_an_error():
    model, _ = model_and_loss()
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training


def test_batches_are_taken_apart_and_cut_at_the_size():
    batch = {"input_ids": torch.arange(12).view(3, 4), "labels": torch.arange(12).view(3, 4), "extra": ["a"]}
    rows = first_rows([batch, batch], 5)
    assert [row["input_ids"].tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert set(rows[0]) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ([], "has no supervised token"),
        ([{"input_ids": torch.arange(4), "labels": torch.full((4,), -100)}], "has no supervised token"),
        ([{"input_ids": torch.arange(4)}], "needs input_ids and labels"),
        ([*rows_of((4,)), {"input_ids": torch.arange(4), "labels": torch.arange(4), "attention_mask": torch.ones(4)}], "different columns"),
    ],
)
def test_wrong_sequences_are_one_line(sequences, words):
    with pytest.raises(StabilityConfigError, match=words):
        HeldOut(sequences, 4, 2, 0, 1)


# ---- overlap ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 100))
def test_windows_are_equal_where_the_tokens_are(seed, length):
    ids = np.random.default_rng(seed).integers(0, 2, length)
    hashes = _windows(ids)
    assert len(hashes) == max(0, length - WINDOW + 1)
    texts = [ids[start : start + WINDOW].tobytes() for start in range(len(hashes))]
    for first in range(len(hashes)):
        for second in range(first):
            assert (hashes[first] == hashes[second]) == (texts[first] == texts[second])


def test_overlap_is_found_across_the_borders_of_blocks():
    training = list(rows_of((64,) * 20))
    stream = torch.cat([row["input_ids"] for row in training])
    shifted = [{"input_ids": stream[start : start + 64], "labels": stream[start : start + 64]} for start in (37, 512)]
    fresh = list(rows_of((64,) * 2, seed=9))
    assert overlapping_share(shifted, training) == 1.0
    assert overlapping_share(fresh, training) == 0.0
    assert overlapping_share([*fresh, *shifted], training) == 0.5
    assert overlapping_share([], training) == 0.0 and overlapping_share(shifted, []) == 0.0


def test_padding_and_short_sequences_do_not_overlap():
    padded = {"input_ids": torch.zeros(64, dtype=torch.long), "labels": torch.full((64,), -100)}
    short = next(rows_of((WINDOW - 1,)))
    assert overlapping_share([padded, short], [{"input_ids": torch.zeros(640, dtype=torch.long)}, short]) == 0.0


def test_governor_sequences_are_spread_evenly():
    blocks = list(rows_of((4,) * 10))
    assert [row["input_ids"] is blocks[place]["input_ids"] for row, place in zip(governor_sequences(blocks, 3), (0, 4, 9), strict=True)]
    assert len(governor_sequences(blocks, 99)) == 10


@pytest.mark.parametrize(("share", "mode", "told"), [(0.0, "governor", False), (1.0, "governor", True), (1.0, "level", False)])
def test_overlap_is_warned_of_in_one_line(capsys, monkeypatch, share, mode, told):
    training = list(rows_of((64,) * 20))
    held_out = list(rows_of((64,) * 2, seed=9)) if share == 0.0 else training[3:5]
    command = SimpleNamespace(stability=StabilityConfig.parse({"controller": {"mode": mode}}), data=SimpleNamespace(streaming=False))
    monkeypatch.setattr("ds_stability.launchers.setup_run.dist.get_rank", lambda: 0)
    warn_of_overlap(command, training, held_out)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == told and all(line.startswith("warning: 100% of the governor's held-out sequences") for line in lines)
    assert all(line.endswith("(the first 5,000,000 training tokens were searched)") for line in lines)


# ---- the stabilizer ---------------------------------------------------------------------------------------------------


def control_of(**values):
    return ControllerConfig.model_validate({"mode": "governor", "warmup_steps": 2, "setpoint_ramp_steps": 1, **values})


def sums_of(entropy=3.0, surprisal=4.0, tokens=100.0):
    vector = np.zeros(VECTOR_SIZE)
    for name, value in (("tokens", 1.0), ("surprisal", surprisal), ("surprisal_sq", surprisal**2 + 1.0), ("entropy", entropy),
                        ("weight", 1.0), ("weight_sq", 1.0)):  # fmt: skip
        vector[FIELDS.index(name)] = value * tokens
    vector[len(FIELDS) :].reshape(-1, 3)[10] = [tokens, tokens * surprisal, tokens * (surprisal**2 + 1.0)]
    return StepSums(vector)


def test_due_once_a_step_after_warm_up_and_first_of_all_for_initial():
    for target, first in (("initial", [0, 2, 5, 8]), (3.5, [2, 5, 8])):
        governance, due = Governance(control_of(target=target, probe_interval=3), 0.9), []
        for step in range(10):
            if governance.due():
                due.append(step)
                governance.measure(sums_of())
                assert not governance.due()  # nor again before a step that is run a second time
            governance.update(sums_of())
        assert due == first


def test_a_governor_that_waits_for_an_alarm_begins_when_told():
    governance, due = Governance(control_of(target="initial", probe_interval=3, start="alarm", setpoint_ramp_steps=0), 0.9), []
    for step in range(16):
        if step == 9:
            resumed = Governance(governance.control, 0.9)
            resumed.load_state_dict(governance.state_dict())
            governance = resumed
            governance.governor.start()
        if governance.due():
            due.append(step)
            governance.measure(sums_of(entropy=3.0 - 0.1 * step))
        governance.update(sums_of())
        assert (governance.setting.gain != 0.0) == (step >= 11)
    assert due == [0, 11, 14]


@pytest.mark.parametrize(("actuator", "gain_sign", "bonus_sign"), [("token_weight", -1, 0), ("entropy_bonus", 0, BONUS)])
def test_entropy_below_its_target_spreads(actuator, gain_sign, bonus_sign):
    governance, loss = Governance(control_of(target=3.5, actuator=actuator, probe_interval=0, setpoint_ramp_steps=0), 0.9), SimpleNamespace()
    for _ in range(10):
        governance.update(sums_of(entropy=3.0))
    governance.prepare(10, loss)
    output = governance.metrics()["stability/governor_output"]
    assert output > 0 and loss.setting.gain == gain_sign * output and loss.setting.entropy_bonus == bonus_sign * output
    assert (loss.setting.mean_weight != 1.0) == (gain_sign != 0) and loss.setting.mu == pytest.approx(4.0)


def test_data_follows_the_cross_entropy_of_the_probe():
    governance = Governance(control_of(target="data", warmup_steps=0), 0.9)
    governance.measure(sums_of(entropy=3.0, surprisal=3.25))
    assert governance.governor.state.target == 3.25


def test_an_untouched_model_without_a_finite_value_is_refused():
    with pytest.raises(StabilityConfigError, match="is not finite"):
        Governance(control_of(target="initial"), 0.9).measure(sums_of(entropy=float("nan")))
    with pytest.raises(StabilityConfigError, match="no supervised token"):
        Governance(control_of(target="initial"), 0.9).measure(sums_of(tokens=0.0))


def test_saturation_is_told_once():
    governance, warnings = Governance(control_of(target=9.0, probe_interval=0, output_limit=0.05), 0.9), []
    for _ in range(60):
        governance.update(sums_of())
        warnings += [governance.warning] if governance.warning else []
    assert len(warnings) == 1 and "saturated" in warnings[0] and "output_limit" in warnings[0] and "\n" not in warnings[0]
    assert governance.metrics()["stability/saturated"] == 1


def test_non_finite_sums_never_reach_the_governor():
    with pytest.raises(ValueError, match="non-finite"):
        Governance(control_of(probe_interval=0, target=3.0), 0.9).update(sums_of(entropy=float("inf")))


def test_targets_that_no_distribution_has():
    check_target(control_of(target=4.0), 55)  # ln 55 = 4.007
    check_target(control_of(target="initial"), 2)
    check_target(control_of(target=1.0, statistic="top1_mass"), 2)
    with pytest.raises(StabilityConfigError, match=r"target: 4.1 is not allowed; must be from 0 to 4.007 nats"):
        check_target(control_of(target=4.1), 55)


def test_fields_are_those_of_the_statistics():
    from ds_stability.governor import STATISTICS

    assert set(STATISTICS) <= set(TOKEN_FIELDS)
