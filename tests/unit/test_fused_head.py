"""The linear loss in transformers models: what is recognised, and that training is as with logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from host_syncs import HostSyncs
from tiny_heads import MODELS, SETTING, gradients, install, make_ids, make_model

from ds_stability import fused_head, linear_loss
from ds_stability.config import StabilityConfig
from ds_stability.controller import Setting
from ds_stability.fused_head import FusedHead, NoLogits, RoutedLinear, UnknownHead, find_transform, fuse_head
from ds_stability.noise import MicroGradientMeter
from ds_stability.same_block import require_same_block
from ds_stability.statistics import TOKEN_FIELDS


@pytest.mark.parametrize("items", [None, 50])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_trains_as_with_its_logits(kind, items):
    model = make_model(kind)
    twin = copy.deepcopy(model)
    found = find_transform(model)
    assert found.scale == pytest.approx(MODELS[kind][1].scale, rel=1e-9)
    cap = MODELS[kind][1].softcap
    assert found.softcap == (pytest.approx(cap, rel=1e-9) if cap else None)
    fused, plain = install(model, True), install(twin, False)
    ids, labels = make_ids()
    extra = {"num_items_in_batch": items} if items else {}
    for loss, net in ((fused, model), (plain, twin)):
        output = net(input_ids=ids, labels=labels, **extra)
        (output.loss * 3.0).backward()
        assert isinstance(output.logits, NoLogits) == (loss is fused)
        loss.value = float(output.loss.detach())
    assert isinstance(model.get_output_embeddings(), RoutedLinear)
    assert fused.value == pytest.approx(plain.value, rel=1e-5)
    torch.testing.assert_close(fused.train.vector(), plain.train.vector(), rtol=1e-5, atol=1e-6)
    mine, theirs = gradients(model), gradients(twin)
    assert mine.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(mine[name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-9)
    assert (fused.calls.begun, fused.backwards) == (plain.calls.begun, plain.backwards) == (1, 1)


def test_permuted_weights_are_those_of_the_logits_path():
    model = make_model("llama")
    twin = copy.deepcopy(model)
    losses = install(model, True), install(twin, False)
    ids, labels = make_ids(3)
    for loss, net in zip(losses, (model, twin), strict=True):
        loss.permutation_step, loss.rank = 7, 1
        loss.value = net(input_ids=ids, labels=labels).loss
        loss.value.backward()
    torch.testing.assert_close(losses[0].value, losses[1].value)
    torch.testing.assert_close(losses[0].train.vector(), losses[1].train.vector(), rtol=1e-5, atol=1e-6)
    plain = losses[0].train.sums_K[TOKEN_FIELDS.index("loss")]
    in_place = (losses[0].train.sums_K[TOKEN_FIELDS.index("weighted_surprisal")]) / SETTING.mean_weight
    assert abs(plain - in_place) > 1e-3 * abs(plain)  # the permutation did something
    for (name, mine), theirs in zip(gradients(model).items(), gradients(twin).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_where_there_is_no_training_loss():
    model = make_model("llama")
    install(model, True)
    ids, labels = make_ids()
    assert model(input_ids=ids).logits.shape == (2, 9, 131)  # no labels
    model.eval()
    assert model(input_ids=ids, labels=labels).logits.shape == (2, 9, 131)
    model.train()
    with torch.no_grad():
        assert model(input_ids=ids, labels=labels).logits.shape == (2, 9, 131)
    assert isinstance(model(ids, labels=labels).logits, NoLogits)
    loss, logits = model(input_ids=ids, labels=labels, return_dict=False)[:2]
    assert loss.ndim == 0 and isinstance(logits, NoLogits)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    again = model(input_ids=ids, labels=labels, shift_labels=shifted).loss
    torch.testing.assert_close(again, loss)
    assert model(input_ids=ids).logits.shape == (2, 9, 131)  # nothing of the last forward is left


@pytest.mark.parametrize(
    "use",
    [lambda z: z.float(), lambda z: z[:, :-1], lambda z: torch.logsumexp(z, -1), lambda z: z.shape,
     lambda z: F.cross_entropy(z, torch.zeros(1))],
)  # fmt: skip
def test_whoever_reads_the_logits_of_a_training_forward_is_told_what_to_do(use):
    model = make_model("llama")
    install(model, True)
    ids, labels = make_ids()
    logits = model(input_ids=ids, labels=labels).logits
    with pytest.raises(ValueError, match='stability.loss_path to "chunked"'):
        use(logits)
    assert not hasattr(logits, "detach") and copy.deepcopy(logits) is not None


def test_a_hook_on_the_head_sees_logits():
    model = make_model("llama")
    install(model, True)
    ids, labels = make_ids()
    expected = model(input_ids=ids, labels=labels).loss
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out * 2.0)
    doubled = model(input_ids=ids, labels=labels)
    assert doubled.logits.shape == (2, 9, 131) and abs(doubled.loss - expected) > 0.01
    hook.remove()
    again = model(input_ids=ids, labels=labels)
    assert isinstance(again.logits, NoLogits) and torch.equal(again.loss, expected)


def test_a_copied_model_has_a_plain_head():
    model = make_model("llama")
    install(model, True)
    ids, labels = make_ids()
    twin = copy.deepcopy(model)
    assert twin(input_ids=ids, labels=labels).logits.shape == (2, 9, 131)
    assert isinstance(model(input_ids=ids, labels=labels).logits, NoLogits)


def _with_forward(change):
    model = make_model("llama")

    class Changed(type(model)):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            logits, labels = change(self, logits, labels)
            return (self.loss_function(logits=logits, labels=labels, vocab_size=131, **kwargs), logits)

    model.__class__ = Changed
    return model


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m, z, y: (z[..., :100], y), "change shape"),
        (lambda m, z, y: (z.masked_fill(torch.arange(z.shape[-1]) == 5, -1e4), y), "more than a scale"),
        (lambda m, z, y: (z + 1.0, y), "more than a scale"),
        (lambda m, z, y: (z.relu(), y), "more than a scale"),
        (lambda m, z, y: (z * torch.tensor([1.0, 2.0] + [1.0] * (z.shape[1] - 2))[:, None], y), "change shape"),
        (lambda m, z, y: (z, y.clone()), "changes the labels"),
        (lambda m, z, y: (z / float(m.model.norm.weight.sum()), y), "more than its hidden states"),
        (lambda m, z, y: (z + m.lm_head(z), y), "calls its head 2 times"),
        (lambda m, z, y: (z.log_softmax(-1), y), r"more than a scale|infinite"),
    ],
)
def test_a_head_that_is_not_understood_is_left_alone(change, reason):
    model = _with_forward(change)
    with pytest.raises(UnknownHead, match=reason):
        install(model, True)
    assert type(model.lm_head) is torch.nn.Linear and not model._forward_hooks and not model._forward_pre_hooks


def test_falling_back_is_said_once_by_one_rank(capsys):
    for rank in (0, 1):
        model = _with_forward(lambda m, z, y: (z + 1.0, y))
        loss = install(model, False)
        loss.rank = rank
        fuse_head(model, loss, model)
        assert loss.head is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is computed from its logits (loss_path chunked): it changes its logits" in said
    ids, labels = make_ids()
    assert model(input_ids=ids, labels=labels)[1].shape == (2, 9, 131)  # and training goes on
    fuse_head(known := make_model("llama"), fused := install(known, False))
    assert fused.head is not None and capsys.readouterr().err == ""


@pytest.mark.parametrize(("old", "new"), [("chunked", None), ("linear", "chunked"), ("linear", "stock")])
def test_a_run_is_resumed_under_its_own_loss_path_only(old, new):
    level = 0.0 if new == "stock" else 0.5
    blocks = [StabilityConfig.parse({"level": level, "loss_path": path}).resolve(pretrained=False).to_dict() for path in (old, new)]
    with pytest.raises(ValueError, match=f'set stability.loss_path to "{old}" to resume') as caught:
        require_same_block(*blocks)
    assert "\n" not in str(caught.value)
    require_same_block(blocks[0], dict(blocks[0]))


def test_heads_that_are_no_plain_linear_are_left_alone():
    model = make_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UnknownHead, match="not a torch.nn.Linear"):
        find_transform(model)


def test_recognition_leaves_the_model_as_it_was():
    model = make_model("gemma2")
    before = dict(model.__dict__), dict(model._modules), {k: v.clone() for k, v in model.state_dict().items()}
    find_transform(model)
    assert model.__dict__.keys() == before[0].keys() and dict(model._modules) == before[1]
    assert all(torch.equal(value, before[2][key]) for key, value in model.state_dict().items())
    assert fused_head._PROBES[1] == fused_head.SLOPE_AT


def test_a_loss_function_with_other_labels_is_an_error():
    model = make_model("llama")
    install(model, True)
    ids, labels = make_ids()
    original = model.loss_function
    model.loss_function = lambda logits, labels, **kwargs: original(logits, labels.clone(), **kwargs)
    with pytest.raises(ValueError, match="other labels than it was given"):
        model(input_ids=ids, labels=labels)


def make_peft(config):
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    torch.manual_seed(3)
    net = peft.get_peft_model(model, config(peft))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    return net.train(), model


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_a_peft_model_trains_as_with_its_logits(kind):
    """LoRA calls the forward of its model without hooks; prompt tuning calls it with hooks and longer labels."""
    make = {
        "lora": lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
        "prompt": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]
    found = []
    for fused in (True, False):
        net, model = make_peft(make)
        loss = install(model, False)
        if fused:
            loss.head = FusedHead(model, loss, net)
        ids, labels = make_ids()
        output = net(input_ids=ids, labels=labels)
        assert isinstance(output.logits, NoLogits) == fused
        output.loss.backward()
        found.append((loss.train.vector(), gradients(net)))
        assert model.get_output_embeddings().weight.grad is None  # frozen: nothing is computed for it
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys() != set()
    for name, wanted in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-9)


def test_an_adapter_on_the_head_itself_falls_back():
    net, model = make_peft(lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
    with pytest.raises(UnknownHead, match="not a torch.nn.Linear"):
        FusedHead(model, install(model, False), net)


def test_release_gives_the_head_back_and_another_loss_can_take_it():
    model = make_model("llama")
    first = install(model, True)
    first.release()
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear and not hasattr(head, "fused")
    ids, labels = make_ids()
    assert model(input_ids=ids, labels=labels).logits is not None
    model.loss_function = first.stock
    second = install(model, True)
    model(input_ids=ids, labels=labels).loss.backward()
    assert (second.calls.begun, second.backwards) == (1, 1)


@pytest.mark.parametrize("items", [None, 0, 20])
def test_a_micro_batch_without_supervised_tokens_gives_zero_on_the_graph(items):
    model = make_model("llama")
    loss = install(model, True)
    told = []
    loss.on_backward = lambda grad, denominator, tokens: told.append((float(grad), int(tokens)))
    ids, labels = make_ids()
    extra = {} if items is None else {"num_items_in_batch": items}
    value = model(input_ids=ids, labels=torch.full_like(labels, -100), **extra).loss
    value.backward()
    assert float(value.detach()) == 0.0 and told == [(1.0, 0)]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(model).values())
    assert torch.equal(loss.train.vector(), torch.zeros_like(loss.train.vector()))


def test_a_non_finite_loss_reaches_every_gradient_and_the_sums():
    model = make_model("llama")
    loss = install(model, True)
    ids, labels = make_ids()
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out * torch.inf)
    value = model(input_ids=ids, labels=labels).loss
    value.backward()
    hook.remove()
    assert not value.isfinite() and not loss.train.sums_K.isfinite().all()
    assert model.get_output_embeddings().weight.grad.isnan().all()


def test_a_second_forward_before_the_backward_is_refused_where_zero3_would_lose_gradients():
    model = make_model("llama")
    loss = install(model, True)
    loss.interleaved = True
    ids, labels = make_ids()
    first = model(input_ids=ids, labels=labels).loss
    model(input_ids=ids, labels=labels).loss.backward()
    with pytest.raises(ValueError, match="after which there was another one"):
        first.backward()


@pytest.mark.parametrize("given", ["train", "eval"])
def test_in_the_mode_that_is_trained_in_there_are_no_logits_and_in_the_other_there_are(given):
    model = make_model("llama").train(given == "train")
    loss = install(model, True)
    ids, labels = make_ids()
    output = model(input_ids=ids, labels=labels)
    output.loss.backward()
    assert isinstance(output.logits, NoLogits) and loss.backwards == 1
    model.eval()
    output = model(input_ids=ids, labels=labels)  # an evaluation that forgot no_grad
    assert torch.is_tensor(output.logits) == (given == "train")
    assert loss.close_step()[0] == loss.evaluated()[0] > 0
    if given == "train":  # trained on after all
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        found = gradients(model)
        model.train().zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)
        assert loss.backwards == 2


def test_what_deepspeed_does_at_the_logits_is_done_at_the_loss_that_stands_in_for_them():
    """A direct loss.backward() with accumulation is divided at every output; see docs/footguns.md."""
    halved = {}
    for fused in (True, False):
        model = make_model("llama")
        loss = install(model, fused)
        loss.per_tensor = lambda: lambda grad: grad / 2
        ids, labels = make_ids()
        output = model(input_ids=ids, labels=labels)
        for value in output.values():
            if torch.is_tensor(value) and value.requires_grad:
                value.register_hook(lambda grad: grad / 2)
        output.loss.backward()
        halved[fused] = gradients(model)
    torch.testing.assert_close(halved[True], halved[False], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", ["stock", "chunked", "linear"])
def test_nothing_is_asked_of_the_device_in_forward_and_backward(monkeypatch, path):
    """As on an accelerator: on a CPU the linear loss leaves masked tokens out, whose number would be a synchronization."""
    monkeypatch.setattr(linear_loss, "_supervised_rows", lambda mask_N: None)
    model = make_model("gemma2")
    twin = copy.deepcopy(model)
    loss = install(model, path == "linear", setting=Setting(1.3, 3.0, 0.9, 1.7, entropy_bonus=0.4))
    loss.chunked = path != "stock"
    meter = MicroGradientMeter(model, torch.device("cpu"), 1)
    meter.listen(True)
    loss.on_backward = meter.start
    ids, labels = make_ids()
    places = []
    for net in (twin, model, model):
        with HostSyncs().watching() as syncs:
            net(input_ids=ids, labels=labels).loss.backward()
            meter.close()
        places.append(syncs.places)
    once = [name for name, _ in places[1]].count("aten.allclose.default")  # what runs is checked in the first forward only
    assert once == (path == "linear") and len(places[1]) <= len(places[0]) + once, places[1]
    assert len(places[2]) <= len(places[0]), places[2]
    assert (loss.calls.begun, loss.backwards) == (2, 2)


def test_an_entropy_bonus_is_taken_off_the_objective():
    model = make_model("llama")
    twin = copy.deepcopy(model)
    bonus = Setting(1.3, 3.0, 0.9, 1.7, entropy_bonus=0.4)
    loss = install(model, True, setting=bonus)
    ids, labels = make_ids()
    value = model(input_ids=ids, labels=labels).loss
    value.backward()
    logits, targets = twin(input_ids=ids).logits[:, :-1].reshape(-1, 131).double(), labels[:, 1:].reshape(-1)
    logits, targets = logits[targets != -100], targets[targets != -100]
    log_p = logits.log_softmax(-1)
    s, entropy = -log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    weights = torch.exp(-bonus.gain * ((s.detach() - bonus.mu) / bonus.sigma).clamp(-3, 3)) / bonus.mean_weight
    wanted = (weights * (s - 0.4 * entropy)).sum() / len(targets)
    wanted.backward()
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(loss.train.sums_K[TOKEN_FIELDS.index("loss")]) == pytest.approx(float(wanted.detach()) * len(targets), rel=1e-5)
    for name, theirs in gradients(twin).items():
        torch.testing.assert_close(gradients(model)[name], theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
