"""The law of the linear loss on full fp64 logits with plain autograd, and what to hold against it."""

import torch
import torch.nn.functional as F

from ds_stability.controller import Setting
from ds_stability.linear_loss import linear_loss
from ds_stability.linear_spec import LogitTransform
from ds_stability.loss import cross_entropy
from ds_stability.objectives.token import focal
from ds_stability.stabilizers.regularization import label_smoothing_objective, z_loss_objective

TOKENS, HIDDEN, VOCAB = 23, 12, 37
SETTING = Setting(gain=1.3, mu=3.0, sigma=0.9, mean_weight=1.7)
OBJECTIVES = {"cross_entropy": cross_entropy, "z_loss": z_loss_objective(0.3), "smoothing": label_smoothing_objective(0.2),
              "both": z_loss_objective(0.3, label_smoothing_objective(0.2)), "focal": focal(2.0)}  # fmt: skip
TRANSFORMS = {"plain": LogitTransform(), "scaled": LogitTransform(0.125), "capped": LogitTransform(1.0, 3.0),
              "both": LogitTransform(0.5, 2.0)}  # fmt: skip
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_head(seed=0, dtype=torch.float32, bias=True, supervised=0.7, scale=1.0, tokens=TOKENS):
    rng = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(tokens, HIDDEN, generator=rng)).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(VOCAB, HIDDEN, generator=rng)).to(dtype).requires_grad_()
    extra = torch.randn(VOCAB, generator=rng).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(VOCAB, (tokens,), generator=rng)
    targets[torch.rand(tokens, generator=rng) >= supervised] = -100
    if tokens:
        targets[0] = 3
    return hidden, weight, extra, targets


def transformed(transform, logits):
    logits = logits * transform.scale
    return logits if transform.softcap is None else torch.tanh(logits / transform.softcap) * transform.softcap


def oracle(hidden, weight, bias, targets, spec, detach_logits=None):
    """(loss, gradients, statistics by name) from full fp64 logits; only supervised tokens."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    raw = F.linear(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    mask = targets != -100
    logits, labels = transformed(spec.transform, raw)[mask], targets[mask]
    log_p = logits.log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    surprisal = -log_p.gather(1, labels[:, None])[:, 0]
    s = spec.setting
    weights = torch.exp(-s.gain * ((surprisal.detach() - s.mu) / s.sigma).clamp(-3, 3))
    value = spec.objective(logits, labels) + spec.entropy_coefficient * entropy
    loss = (weights / s.mean_weight * value).sum()
    high = log_p.exp() @ spec.high_frequency_V.double() if spec.high_frequency_V is not None else torch.zeros(len(labels))
    statistics = {"surprisal": surprisal, "entropy": entropy, "top1_mass": log_p.exp().amax(-1), "weight": weights,
                  "log_partition": logits.logsumexp(-1), "high_frequency_mass": high, "objective": value}  # fmt: skip
    gradients = torch.autograd.grad(loss, leaves)
    return loss.detach(), gradients, {name: found.detach() for name, found in statistics.items()}


def close(found, wanted, tolerance, name=""):
    top = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance * top + 1e-12,
                               msg=lambda text: f"{name}: {text}")  # fmt: skip


def check(spec, seed=0, tolerance=None, upstream=1.0, **kinds):
    hidden, weight, bias, targets = make_head(seed, **kinds)
    loss, _, tokens = linear_loss(hidden, weight, bias, targets, spec)
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    gradients = torch.autograd.grad(loss * upstream, leaves)
    wanted_loss, wanted_gradients, statistics = oracle(hidden, weight, bias, targets, spec)
    tolerance = tolerance or ROUNDING[hidden.dtype]
    close(loss, wanted_loss, tolerance, "loss")
    for name, wanted in statistics.items():
        found = tokens[name][tokens.mask_N]
        assert found.dtype == torch.float32
        # Half-precision logits are rounded by the head's own product: an absolute error in nats.
        close(found, wanted, tolerance if hidden.dtype == torch.float32 else 8 * tolerance, name)
    for leaf, found, wanted in zip(leaves, gradients, wanted_gradients, strict=True):
        assert found.dtype == leaf.dtype and found.shape == leaf.shape
        close(found, wanted * upstream, tolerance if hidden.dtype == torch.float32 else 4 * tolerance, "gradient")
