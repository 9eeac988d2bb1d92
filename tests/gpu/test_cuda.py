"""On one CUDA device: the same numbers as on the CPU, in bf16, with NCCL. Skipped where there is none."""

import pytest
import torch

from ds_stability.controller import Setting
from ds_stability.fused_head import FusedHead
from ds_stability.linear_loss import linear_loss
from ds_stability.linear_spec import LossSpec
from ds_stability.loss import StabilityLoss, TokenAccumulator, token_statistics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def make_loss(device, chunk_size=None):
    from transformers.loss.loss_utils import ForCausalLMLoss

    module = torch.nn.Linear(1, 1).train()
    loss = StabilityLoss(module, ForCausalLMLoss, chunked=True, device=device, chunk_size=chunk_size)
    loss.setting = Setting(gain=0.7, mu=5.0, sigma=2.0, mean_weight=1.2)
    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_gradient_and_sums_equal_the_cpu(dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 33, 1000, dtype=dtype) * 3, torch.randint(0, 1000, (4, 33))
    labels[0, :9] = -100
    out = {}
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        loss = make_loss(device)
        value = loss(leaf, labels.to(device))
        value.backward()
        out[device] = (value.detach().cpu(), leaf.grad.float().cpu(), loss.train.vector().cpu())
    torch.testing.assert_close(out["cuda"][0], out["cpu"][0], rtol=1e-5, atol=1e-6)
    tolerance = 1e-7 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(out["cuda"][1], out["cpu"][1], rtol=1e-2, atol=tolerance)
    torch.testing.assert_close(out["cuda"][2], out["cpu"][2], rtol=1e-5, atol=1e-3)


def test_no_host_synchronization_in_forward_and_backward():
    loss = make_loss("cuda")
    logits = torch.randn(2, 65, 5000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 5000, (2, 65), device="cuda")
    loss(logits, labels).backward()  # first call: lazy initialization may synchronize
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(logits, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.grad.isfinite().all()


def make_head(dtype, tokens, vocab, hidden, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, hidden, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.2 * torch.randn(vocab, hidden, generator=generator)).to(device, dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::7] = -100
    return rows, weight, targets.to(device)


SPEC = LossSpec(Setting(gain=0.7, mu=5.0, sigma=2.0, mean_weight=1.2), entropy_coefficient=-0.2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6), (torch.float16, 2**-8)])
def test_linear_loss_against_fp64(dtype, tolerance):
    """torch.mm in fp32 is exact fp32 unless TF32 is allowed, as it would then be for the model's own head."""
    assert not torch.backends.cuda.matmul.allow_tf32
    rows, weight, targets = make_head(dtype, 700, 5003, 64)
    exact = [t.detach().cpu().double().requires_grad_() for t in (rows, weight)]
    loss, _, tokens = linear_loss(rows, weight, None, targets, SPEC)
    found = [loss, *torch.autograd.grad(loss, (rows, weight)), tokens["entropy"][tokens.mask_N]]
    loss, _, tokens = linear_loss(*exact, None, targets.cpu(), SPEC)
    wanted = [loss, *torch.autograd.grad(loss, exact), tokens["entropy"]]
    for mine, theirs in zip(found, wanted, strict=True):
        top = float(theirs.detach().abs().max())
        torch.testing.assert_close(mine.detach().cpu().double(), theirs.detach(), rtol=tolerance, atol=tolerance * top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_loss_never_waits_for_the_device(dtype):
    rows, weight, targets = make_head(dtype, 700, 5003, 64)
    linear_loss(rows, weight, None, targets, SPEC)[0].backward()  # first call: lazy initialization may synchronize
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_loss(rows, weight, None, targets, SPEC)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.grad.isfinite().all()


def test_a_model_with_a_fused_head_never_waits_for_the_device():
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_outputs import BaseModelOutputWithPast

    config = LlamaConfig(vocab_size=997, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
    model.config.use_cache = False
    loss = StabilityLoss(model, model.loss_function, chunked=True, device="cuda")
    loss.setting, loss.head, model.loss_function = SPEC.setting, FusedHead(model, loss), loss
    ids = torch.randint(0, 997, (2, 65), device="cuda")
    hidden = model.model(input_ids=ids).last_hidden_state.detach()  # the backbone's own synchronizations are not ours
    model.model.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden.requires_grad_())
    model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=ids, labels=ids).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.lm_head.weight.grad.isfinite().all() and (loss.calls.begun, loss.backwards) == (2, 2)


def test_linear_loss_makes_no_tensor_of_tokens_times_vocabulary():
    rows, weight, targets = make_head(torch.bfloat16, 4096, 50_000, 256)
    linear_loss(rows, weight, None, targets, SPEC)[0].backward()
    rows.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_loss(rows, weight, None, targets, SPEC)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 4096 * 50_000 * 2  # less than the logits alone, in bf16


def test_the_same_bits_twice():
    def run():
        torch.manual_seed(0)
        accumulator = TokenAccumulator("cuda")
        loss = make_loss("cuda", chunk_size=50)
        logits = torch.randn(4, 257, 3000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        loss(logits, torch.randint(0, 3000, (4, 257), device="cuda")).backward()
        return loss.train.vector(), logits.grad, accumulator.vector()

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_no_fp32_tensor_of_tokens_times_vocabulary_is_kept():
    tokens, vocabulary = 4096, 50_000
    loss = make_loss("cuda", chunk_size=256)
    logits = torch.randn(1, tokens, vocabulary, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(logits, labels).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.25 * logits.numel() * 2 + 6 * 256 * vocabulary * 4  # the gradient in bf16, and a few chunks in fp32


def test_entropy_of_extreme_logits():
    logits = torch.tensor([[30.0, 0.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0, 0.0]], device="cuda")
    _, entropy, _, _, _ = token_statistics(logits, torch.tensor([0, 1], device="cuda"), None)
    exact = torch.distributions.Categorical(logits=logits[:, :2].double()[:1]).entropy()
    torch.testing.assert_close(entropy[0].double(), exact[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(entropy[1].double(), torch.tensor(4.0, device="cuda").double().log())
