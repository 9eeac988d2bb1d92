"""`StabilityLoss` where a step is not ordinary: nothing supervised, bad numbers, evaluation, wrong use, a real model."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.utils.checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from ds_stability.controller import Setting
from ds_stability.errors import StabilityConfigError
from ds_stability.loss import StabilityLoss
from ds_stability.stabilizers.regularization import z_loss_objective

SETTING = Setting(gain=1.3, mu=2.6, sigma=0.9, mean_weight=1.7)
VOCAB = 11


def make_loss(chunked=True, setting=SETTING):
    loss = StabilityLoss(torch.nn.Linear(1, 1), ForCausalLMLoss, chunked, "cpu")
    loss.setting = setting
    return loss


def make_batch(seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    logits = (2.0 * torch.randn(2, 5, VOCAB, generator=rng)).to(dtype).requires_grad_()
    return logits, torch.randint(VOCAB, (2, 5), generator=rng)


# ---- nothing supervised ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 12, torch.tensor(12), torch.tensor(0)])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("objective", [None, z_loss_objective(0.1)])
def test_a_micro_batch_without_supervised_tokens_gives_zero_on_the_graph(chunked, items, objective):
    """Items 0: the whole accumulated batch has no supervised token, and Trainer still passes the count."""
    logits, labels = make_batch()
    weight = torch.nn.Parameter(torch.ones(VOCAB))
    loss = make_loss(chunked)
    loss.objective = objective or loss.objective
    value = loss(logits * weight, torch.full_like(labels, -100), vocab_size=VOCAB, num_items_in_batch=items)
    assert value.requires_grad and float(value.detach()) == 0.0
    value.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits)) and torch.equal(weight.grad, torch.zeros(VOCAB))
    assert loss.train.vector().abs().sum() == 0
    loss.require_used()  # such a micro-batch is no sign of a loss computed elsewhere


@pytest.mark.parametrize("chunked", [True, False])
def test_masked_tokens_with_bad_logits_leave_no_trace_in_the_sums(chunked):
    logits, labels = make_batch(1)
    labels[0, 2] = -100
    reference, loss = make_loss(chunked), make_loss(chunked)
    expected = reference(logits, labels, vocab_size=VOCAB)
    bad = logits.detach().clone()
    bad[0, 1] = math.nan  # scored against label 2
    value = loss(bad.requires_grad_(), labels, vocab_size=VOCAB)
    value.backward()
    expected.backward()
    assert torch.equal(loss.train.vector(), reference.train.vector()) and torch.equal(value, expected)


# ---- bad numbers ----------------------------------------------------------------------------------------------------


def poison(logits, labels, kind):
    bad = logits.detach().clone()
    if kind == "label at -inf":
        bad[1, 1, labels[1, 2]] = -math.inf
    else:
        bad[1, 1, 4] = {"nan": math.nan, "inf": math.inf}[kind]
    return bad.requires_grad_()


@pytest.mark.parametrize("kind", ["nan", "inf", "label at -inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_logits_reach_the_sums_and_the_gradient(kind, dtype):
    """`label at -inf`: the surprisal is infinite, though the softmax gradient alone would look fine."""
    logits, labels = make_batch(2, dtype)
    bad = poison(logits, labels, kind)
    loss = make_loss()
    value = loss(bad, labels)
    value.backward()
    assert not loss.train.vector().isfinite().all() and not value.isfinite()
    assert bad.grad.isnan().any()
    loss.train.reset()
    loss(logits, labels)
    assert loss.train.vector().isfinite().all()  # the next step starts clean


@pytest.mark.parametrize("kind", ["nan", "inf", "label at -inf"])
def test_bad_logits_reach_the_sums_of_the_stock_path(kind):
    logits, labels = make_batch(2)
    loss = make_loss(chunked=False)
    value = loss(poison(logits, labels, kind), labels, vocab_size=VOCAB)
    value.backward()
    assert not loss.train.vector().isfinite().all() and not value.isfinite()


@pytest.mark.parametrize("chunked", [True, False])
def test_a_label_that_is_no_token_id_is_an_error(chunked):
    """-1 is not the ignore index: taking it for token 0 would train on garbage without a word."""
    logits, labels = make_batch(3)
    for wrong in (-1, VOCAB):
        labels[0, 2] = wrong
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            make_loss(chunked)(logits, labels, vocab_size=VOCAB)


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("how", ["eval", "no_grad", "detached logits"])
def test_evaluation_is_the_stock_loss_and_never_enters_training_statistics(chunked, how):
    logits, labels = make_batch(4)
    loss = make_loss(chunked)
    loss.module.train(how in ("no_grad", "detached logits"))
    with torch.set_grad_enabled(how != "no_grad" and how != "eval"):
        value = loss(logits.detach() if how == "detached logits" else logits, labels, vocab_size=VOCAB)
    assert torch.equal(value, ForCausalLMLoss(logits, labels, VOCAB))
    assert loss.train.vector().abs().sum() == 0 and (loss.calls.begun, loss.backwards) == (0, 0)
    assert loss.evaluation.sums_K[0] == 8 and loss.evaluation.sums_K[3] == 8  # weights are 1


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_differentiated_is_training_whatever_the_mode(chunked, training):
    """Of two forwards one has a backward: it is the step's; the other is an evaluation in eval mode, else nothing."""
    (logits, labels), (other, other_labels) = make_batch(4), make_batch(5)
    other_labels[0] = -100
    loss = make_loss(chunked)
    loss.module.train(training)
    value = loss(logits, labels, vocab_size=VOCAB)
    again = loss(other, other_labels, vocab_size=VOCAB)
    again.backward()
    assert loss.train.sums_K[0] == 4 and (loss.calls.begun, loss.backwards) == (2, 1)
    assert loss.close_step()[0] == 4 and loss.evaluated()[0] == (0 if training else 8)
    assert loss.evaluated().abs().sum() == loss.close_step().abs().sum() == 0
    value.backward()  # of a step that has ended, and a second backward counts nothing
    assert loss.train.sums_K[0] == 8


def test_eval_mode_shows_the_cross_entropy_and_gives_the_gradient_of_training():
    (logits, labels), setting = make_batch(9), Setting(1.5, 3.0, 0.7, 1.3)
    found = []
    for training in (True, False):
        loss = make_loss(setting=setting)
        loss.module.train(training)
        value = loss(logits, labels, vocab_size=VOCAB)
        found.append((float(value.detach()), torch.autograd.grad(value, logits)[0]))
    plain = float(ForCausalLMLoss(logits, labels, VOCAB).detach())
    assert torch.equal(found[0][1], found[1][1]) and found[1][0] == pytest.approx(plain, rel=1e-6)
    assert abs(found[0][0] - plain) > 0.1


def test_a_repeated_forward_of_checkpointing_counts_once():
    logits, labels = make_batch(3)
    for reentrant in (True, False):
        loss = make_loss()
        run = lambda tensor: loss(tensor * 1.0, labels, vocab_size=VOCAB)  # noqa: E731, B023
        torch.utils.checkpoint.checkpoint(run, logits, use_reentrant=reentrant).backward()
        assert loss.train.sums_K[0] == 8 and loss.backwards == 1


def test_a_checkpoint_around_model_and_loss_is_no_forward_in_between():
    """Its repeated forward comes after the backward has begun."""
    logits, labels = make_batch(3)
    loss = make_loss()
    loss.interleaved = True
    run = lambda tensor: loss(tensor * 1.0, labels, vocab_size=VOCAB)  # noqa: E731
    torch.utils.checkpoint.checkpoint(run, logits, use_reentrant=False).backward()
    assert loss.train.sums_K[0] == 8 and loss.backwards == 1


def test_a_gradient_of_the_gradient_is_refused():
    logits, labels = make_batch(3)
    for chunked in (False, True):
        value = make_loss(chunked)(logits, labels, vocab_size=VOCAB)
        with pytest.raises(RuntimeError, match="differentiated again") if chunked else nullcontext():
            torch.autograd.grad(value, logits, create_graph=True)[0].square().sum().backward()


def test_a_loss_that_is_made_of_the_logits_is_measured_at_level_0():
    logits, labels = make_batch(6)
    loss = make_loss(chunked=False)
    loss(logits, labels, vocab_size=VOCAB)
    logits.square().sum().backward()
    assert loss.train.sums_K[0] == 8 and loss.backwards == 1


def test_measure_false_skips_only_the_statistics_of_the_stock_path():
    logits, labels = make_batch(5)
    for chunked, tokens in ((False, 0), (True, 8)):
        loss = make_loss(chunked)
        loss.measure = False
        value = loss(logits, labels, vocab_size=VOCAB)
        value.backward()
        assert loss.train.sums_K[0] == tokens
        assert chunked or torch.equal(value, ForCausalLMLoss(logits, labels, VOCAB))
        with torch.no_grad():
            loss(logits, labels, vocab_size=VOCAB)
        assert loss.evaluation.sums_K[0] == 8


# ---- use and misuse -------------------------------------------------------------------------------------------------


def test_a_backward_after_the_next_forward_is_refused_where_gradients_would_be_lost():
    logits, labels = make_batch(6)
    loss = make_loss()
    loss.interleaved = True
    first = loss(logits, labels)
    with torch.no_grad():
        loss(logits, labels)  # evaluation in between is fine
    first.backward()
    first, second = loss(logits, labels), loss(logits, labels)
    second.backward()  # the first may be an evaluation without no_grad
    with pytest.raises(StabilityConfigError, match="after which there was another one"):
        first.backward()
    with pytest.raises(StabilityConfigError, match="after which there was another one"):
        (loss(logits, labels) + loss(logits, labels)).backward()
    loss = make_loss()
    loss.interleaved = True
    for _ in range(3):
        loss(logits, labels).backward()
    loss = make_loss()
    (loss(logits, labels) + loss(logits, labels)).backward()
    assert (loss.calls.begun, loss.backwards) == (2, 2)


def test_require_used():
    logits, labels = make_batch(7)
    loss = make_loss()
    with pytest.raises(StabilityConfigError, match="did not pass through"):
        loss.require_used()
    value = loss(logits, labels)
    with pytest.raises(StabilityConfigError):
        loss.require_used()  # called, but something else was differentiated
    value.backward()
    loss.require_used()
    loss.close_step()
    with pytest.raises(StabilityConfigError):
        loss.require_used()  # counted per step
    late = loss(logits, labels)
    loss.close_step()
    late.backward()
    loss.require_used()  # a forward before the last step
    make_loss(chunked=False).require_used()  # level 0 watches, and needs nothing


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("items", [None, 20])
def test_on_backward_is_told_the_incoming_gradient(chunked, items):
    logits, labels = make_batch(8)
    labels[0] = -100
    loss, told = make_loss(chunked), []
    loss.on_backward = lambda *args: told.append([float(x) for x in args])
    value = loss(logits, labels, vocab_size=VOCAB, num_items_in_batch=items)
    assert told == []
    (value * 96.0 / 4).backward()
    assert told == [[24.0, items or 4.0, 4.0]]


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=2))  # fmt: skip


@pytest.mark.parametrize("chunked", [True, False])
def test_in_a_transformers_model(llama, chunked):
    model = copy.deepcopy(llama).train()
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = model(input_ids=ids, labels=ids).loss
    plain.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model.loss_function = StabilityLoss(model, model.loss_function, chunked, "cpu", 5)
    value = model(input_ids=ids, labels=ids).loss
    value.backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if chunked else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(value, plain, **tolerance)
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted, **tolerance)
    assert loss.train.sums_K[0] == 16
    # A reference model copied from this one neither weights nor counts.
    twin = copy.deepcopy(model)
    assert twin.loss_function is ForCausalLMLoss and isinstance(model.loss_function, StabilityLoss)
    loss.setting = SETTING
    assert torch.equal(twin(input_ids=ids, labels=ids).loss, plain) and loss.train.sums_K[0] == 16
