"""Linear head, token-weighted loss and statistics in one pass over chunks of tokens: no [tokens, vocab] tensor exists.

Shape suffixes: N tokens of a micro-batch, V vocabulary, D hidden size.

The weights of the tokens are known once their surprisal is (gain, mu and sigma are fixed before the step), so a chunk's
logits give its statistics, its loss and its gradients with respect to hidden states, head weight and bias before they are
dropped: three matrix products, where recomputing the logits in backward takes four. What is kept from forward to
backward is [tokens, hidden] and [vocab, hidden], the latter in the head's own dtype.

Half precision makes the gradients in backward instead, from logits that were kept where they take no more memory than a chunk,
or from logits computed once more; `linear_pass.py` says when and why.

Memory beyond that: one chunk in the head's dtype and fp32 work buffers (one for an fp32 head, two in half precision, one more
with a soft-cap), of the chunk's size on an accelerator and of a fixed small one on a CPU, where what stays in the cache is twice
as fast. The Triton kernels (`triton_pass.py`) work in registers and need none of these buffers. Like Liger's fused linear
cross-entropy (arXiv 2410.10989) this divides nothing by the token count: `grad_output` alone scales. fp16 factors of a product are brought to a size that neither under- nor overflows (`linear_pass.FP16_BOOST`).

The products are torch.mm in the head's dtype, as the model's own head would be: in fp32 with full precision unless
torch.backends.cuda.matmul.allow_tf32 is set; in bf16 and fp16 with fp32 accumulation inside a product, up to
allow_bf16_reduced_precision_reduction.
"""

from collections.abc import Callable

import torch

from ds_stability.linear_pass import Pass
from ds_stability.linear_spec import LossSpec, Tokens
from ds_stability.objectives.token import closed_form
from ds_stability.weighted_loss import require_first_order

#: Unsupervised tokens are left out where no more than this share is supervised: matrix products like round numbers of rows.
WORTH = 0.9


def _supervised_rows(mask_N: torch.Tensor) -> torch.Tensor | None:
    """Indices of the supervised tokens where the others are worth leaving out: on an accelerator their number is a host sync."""
    if mask_N.device.type != "cpu":
        return None
    rows = mask_N.nonzero().squeeze(1)
    return rows if len(rows) <= WORTH * len(mask_N) else None


def _permute(permute: Callable, weight_M: torch.Tensor, mask_N: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """`permute` sees every position, so that its random order does not depend on what is left out."""
    if rows is None:
        return permute(weight_M, mask_N)
    weight_N = weight_M.new_zeros(mask_N.shape).index_copy_(0, rows, weight_M)
    return permute(weight_N, mask_N)[rows]


class _LinearLoss(torch.autograd.Function):
    """(hidden, weight, bias) -> weighted sum of the objective, carrier; all that takes whole logits is done when forward returns."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, mask_N, spec, results):
        needs = ctx.needs_input_grad[:3]
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (hidden_ND, weight_VD, bias_V))
        device = hidden_ND.device.type
        # Under autocast F.linear would cast; the statistics must not be cast, so the casting is done here instead.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        inputs = [_cast(t, dtype) for t in (hidden_ND, weight_VD, bias_V)]
        ctx.rows, ctx.shape, ctx.dtype = _supervised_rows(mask_N), hidden_ND.shape, dtype
        if ctx.rows is not None:
            inputs[0], targets_N = inputs[0][ctx.rows], targets_N[ctx.rows]
        used_N = mask_N if ctx.rows is None else torch.ones_like(targets_N, dtype=torch.bool)
        with torch.autocast(device, enabled=False):
            weight_N = None
            if spec.permute is not None:
                scout_N = _pass(*inputs, (False, False, False), spec).run(targets_N, used_N)["weight"]
                weight_N = _permute(spec.permute, scout_N, mask_N, ctx.rows)
            ctx.work = _pass(*inputs, needs, spec)
            tokens = ctx.work.run(targets_N, used_N, weight_N)
            terms_N = tokens["weight"].double() / spec.setting.mean_weight * tokens["objective"].double()
            loss = torch.where(used_N, terms_N, 0.0).sum().to(ctx.work.dtype)
        ctx.work.release_head()
        ctx.save_for_backward(weight_VD, bias_V)
        results.append(tokens)
        ctx.finite = loss.isfinite()
        ctx.set_materialize_grads(False)
        return loss, loss.new_zeros(()).to(hidden_ND.dtype)

    @staticmethod
    def backward(ctx, grad_output, _):
        require_first_order()
        if ctx.work is None:
            raise RuntimeError("the linear loss keeps its gradients for one backward pass; set loss_path to \"chunked\" "
                               "where a graph is walked twice (retain_graph)")  # fmt: skip
        work, ctx.work = ctx.work, None
        # A non-finite surprisal can still have a finite gradient; every rank has to see that this step is lost.
        scale = torch.where(ctx.finite, grad_output, torch.nan)
        with torch.autocast(grad_output.device.type, enabled=False):
            gradients = work.gradients(scale, *(_cast(t, ctx.dtype) for t in ctx.saved_tensors))
        found = [g.to(dtype) if g is not None else None for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        if ctx.rows is not None and found[0] is not None:
            found[0] = found[0].new_zeros(ctx.shape).index_copy_(0, ctx.rows, found[0])
        return *found, None, None, None, None


def _pass(hidden_ND, weight_VD, bias_V, needs, spec: LossSpec) -> Pass:
    """With triton's kernels where they are asked for and made for it: closed forms, and no fp64."""
    if spec.kernel != "triton" or hidden_ND.dtype == torch.float64 or closed_form(spec.objective) is None:
        return Pass(hidden_ND, weight_VD, bias_V, needs, spec)
    from ds_stability.triton_pass import TritonPass  # imports triton

    return TritonPass(hidden_ND, weight_VD, bias_V, needs, spec)


def _cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype)


def linear_loss(hidden_ND, weight_VD, bias_V, targets_N, spec: LossSpec, ignore_index: int = -100):
    """sum over supervised tokens of (weight_i / mean_weight) * objective_i, with the statistics of each token.

    Args:
        hidden_ND: inputs of the head, fp64, fp32, bf16 or fp16.
        weight_VD, bias_V: the head; bias may be None. Rows of a padded vocabulary count as the model's own logits do: a bias
            of -inf gives them probability 0, gradient 0, and nothing to the entropy.
        targets_N: next tokens, `ignore_index` where there is none.

    Returns:
        loss: scalar, fp32 (fp64 for fp64 inputs), not divided by anything. Its gradient can be taken once.
        carrier: scalar 0 whose backward comes before that of `loss`; for a module that must return something.
        tokens: `Tokens`, without gradient; on a CPU of the supervised tokens only.
    """
    results: list[Tokens] = []
    mask_N = targets_N != ignore_index
    loss, carrier = _LinearLoss.apply(hidden_ND, weight_VD, bias_V, targets_N, mask_N, spec, results)
    return loss, carrier, results[0]
