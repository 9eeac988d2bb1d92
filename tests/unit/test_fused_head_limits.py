"""Models and uses that the fused head has to refuse, or to survive."""

import copy
import types

import pytest
import torch
from tiny_heads import SETTING, gradients, install, make_ids, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from ds_stability.config import StabilityConfig
from ds_stability.fused_head import FusedHead, NoLogits, UnknownHead, find_transform
from ds_stability.loss import StabilityLoss
from ds_stability.same_block import require_same_block


def with_forward(finish):
    """A model whose forward ends in `finish(model, loss, logits)`."""
    model = make_model("llama")

    class Changed(type(model)):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=131, **kwargs) if labels is not None else None
            return finish(self, loss, logits)

    model.__class__ = Changed
    return model


@pytest.mark.parametrize(
    "finish, reason",
    [
        (lambda m, loss, z: (loss + 1e-4 * z.logsumexp(-1).pow(2).mean(), z), "changes its loss"),  # as Bamba's z-loss
        (lambda m, loss, z: (loss.add_(1.0), z), "changes its loss"),
        (lambda m, loss, z: (z, loss), "changes its loss"),
        (lambda m, loss, z: {"loss": loss, "logits": z}, "returns a dict"),
    ],
)
def test_a_forward_that_goes_on_after_its_loss_is_not_fused(finish, reason):
    with pytest.raises(UnknownHead, match=reason):
        install(with_forward(finish), True)


def test_a_parameter_of_the_models_own_is_not_fused():
    """It could be a scale of the logits: a constant to recognition, trained afterwards."""
    model = make_model("llama")
    model.logit_scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(UnknownHead, match=r"a parameter of its own beside its parts .logit_scale."):
        find_transform(model)


def test_a_hook_on_the_head_from_before_sees_logits():
    model, seen = make_model("llama"), []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    install(model, True)
    ids, labels = make_ids()
    assert model(input_ids=ids, labels=labels).logits.shape == (2, 9, 131) and seen == [(2, 9, 131)]
    hook.remove()
    assert isinstance(model(input_ids=ids, labels=labels).logits, NoLogits)


def test_the_engines_own_hooks_mind_no_carrier_also_when_they_are_put_back():
    model = make_model("llama")
    loss = install(model, False)
    first = model.lm_head.register_forward_hook(lambda module, args, out: None)
    loss.head = FusedHead(model, loss, engine_hooks=frozenset([first.id]))
    first.remove()
    model.lm_head.register_forward_hook(lambda module, args, out: None)
    ids, labels = make_ids()
    assert isinstance(model(input_ids=ids, labels=labels).logits, NoLogits)


def patched(model, change):
    """As TRL and Accelerate do: another forward in the instance, over the one of its class."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = change(self.lm_head(self.model(input_ids=input_ids).last_hidden_state))
        return (self.loss_function(logits=logits, labels=labels, vocab_size=131), logits)

    model.forward = types.MethodType(forward, model)


def test_a_patched_forward_that_changes_the_logits_is_an_error_at_the_first_step():
    model = make_model("llama")
    patched(model, lambda z: z / 2.0)
    install(model, True)
    ids, labels = make_ids()
    with pytest.raises(ValueError, match=r'patched forward.*set stability.loss_path to "chunked"') as caught:
        model(input_ids=ids, labels=labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_the_forward_that_was_recognized_passes_the_check_in_every_dtype(kind, dtype):
    model = make_model(kind).to(dtype)
    loss = install(model, True)
    if kind == "llama":
        patched(model, lambda z: z.float())  # patched, and the same
    ids, labels = make_ids()
    checks, check = [], loss.head._check
    loss.head._check = lambda carrier: checks.append(check(carrier))
    for _ in range(3):
        model(input_ids=ids, labels=labels)[0].backward()
    assert len(checks) == 1


def test_an_exception_or_a_forward_without_a_head_leaves_nothing_armed():
    model = make_model("llama")
    loss = install(model, True)
    ids, labels = make_ids()

    def broken(module, args):
        raise RuntimeError("out of memory")

    hook = model.model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(input_ids=ids, labels=labels)
    hook.remove()
    hidden = torch.randn(2, 9, 32)
    assert model.lm_head(hidden).shape == (2, 9, 131)  # somebody's own use of the head
    model.forward = lambda input_ids, labels: (model.model(input_ids=input_ids).last_hidden_state,)
    model(input_ids=ids, labels=labels)
    assert model.lm_head(hidden).shape == (2, 9, 131) and loss.calls.begun == 0
    del model.forward
    model.loss_function = broken  # after the head
    with pytest.raises(TypeError):
        model(input_ids=ids, labels=labels)
    head = loss.head
    assert head.targets is head.pending is head.labels is head.carrier_shape is None


def make_moe(router: bool):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "mixtral", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, vocab_size=131,
        intermediate_size=48, num_local_experts=2, num_experts_per_tok=1, output_router_logits=router, router_aux_loss_coef=0.5,
    )).train()  # fmt: skip


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_routers_loss_is_added_and_only_the_logits_are_hidden(return_dict):
    model = make_moe(router=True)
    twin = copy.deepcopy(model)
    ids, labels = make_ids()
    found = []
    for net, fused in ((model, True), (twin, False)):
        loss = StabilityLoss(net, net.loss_function, True, "cpu", 5)
        loss.setting, net.loss_function = SETTING, loss
        loss.head = FusedHead(net, loss) if fused else None
        output = net(input_ids=ids, labels=labels, return_dict=return_dict)
        value = output[0]
        value.backward()
        found.append((value.detach(), gradients(net), output))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, wanted in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-9)
    mine, theirs = (list(output.values()) if return_dict else output for output in (found[0][2], found[1][2]))
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        is_logits = torch.is_tensor(other) and other.shape == (2, 9, 131)
        assert isinstance(one, NoLogits) == is_logits and (is_logits or type(one) is type(other))


def test_a_model_may_work_on_its_logits_in_place():
    model = make_model("llama")

    class Changed(type(model)):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            logits.div_(2.0)
            return (self.loss_function(logits=logits, labels=labels, vocab_size=131), logits)

    model.__class__ = Changed
    loss = install(model, True)
    ids, labels = make_ids()
    model(input_ids=ids, labels=labels)[0].backward()
    assert loss.backwards == 1


def test_recognition_draws_no_random_number():
    model = make_model("gemma2")
    model.dropout = torch.nn.Dropout(0.5)
    cls = type(model)

    class Dropped(cls):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.dropout(self.model(input_ids=input_ids).last_hidden_state))
            return (self.loss_function(logits=logits, labels=labels, vocab_size=131), logits)

    before = torch.get_rng_state()
    find_transform(model)
    model.__class__ = Dropped
    find_transform(model)
    assert torch.equal(before, torch.get_rng_state())


def test_a_copy_of_a_fused_model_can_be_fused_again():
    model = make_model("llama")
    install(model, True)
    ids, labels = make_ids()
    expected = model(input_ids=ids, labels=labels).loss
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        loss = install(twin, True)
        assert len(twin._forward_hooks) == len(twin._forward_pre_hooks) == 1
        output = twin(input_ids=ids, labels=labels)
        output.loss.backward()
        assert isinstance(output.logits, NoLogits) and loss.backwards == 1
        torch.testing.assert_close(output.loss, expected)
    assert isinstance(model(input_ids=ids, labels=labels).logits, NoLogits)


def test_the_loss_path_is_advised_only_where_it_is_the_one_difference():
    one, other = (StabilityConfig.parse({"level": level, "loss_path": path}).resolve(pretrained=False).to_dict()
                  for level, path in ((0.5, "linear"), (0.3, "chunked")))  # fmt: skip
    with pytest.raises(ValueError, match="another stability block") as caught:
        require_same_block(one, other)
    assert "set stability.loss_path" not in str(caught.value)
