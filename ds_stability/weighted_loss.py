"""The weighted loss of whole logits as one step of autograd, whose backward recomputes the softmax in chunks over tokens.

Shape suffixes: V vocabulary, N tokens of a micro-batch, C tokens of a chunk.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

#: Per-token objective: (logits_CV fp32, labels_C) -> loss_C. The weights multiply it.
Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class RowObjective:
    """The objective of one micro-batch of `count` tokens: `at(rows)` is that of the tokens `rows`, a slice or indices."""

    def __init__(self, at: Callable[..., Objective], count: int):
        self.at, self.count = at, count


def objective_at(objective: Objective | RowObjective, rows) -> Objective:
    """The function for the tokens `rows` (a slice or indices) of the micro-batch."""
    return objective.at(rows) if isinstance(objective, RowObjective) else objective


def cross_entropy(logits_CV: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label], nats, shape [C]."""
    return F.cross_entropy(logits_CV, labels_C, reduction="none")


def require_first_order() -> None:
    """Called in the backward of a loss whose gradient autograd cannot follow.

    Raises:
        RuntimeError: it would have to (create_graph); the gradient would pass for a constant, without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "above stability level 0 the gradient of the loss cannot be differentiated again (create_graph: gradient penalties, "
            "Hessians); set stability.level to 0"
        )


class WeightedLoss(torch.autograd.Function):
    """sum_i coefficient_i * objective(logits_i, label_i) for precomputed objective values and coefficients."""

    @staticmethod
    def forward(ctx, logits_NV, labels_N, coefficient_N, loss_sum, objective, bonus, chunk, on_backward):
        ctx.save_for_backward(logits_NV, labels_N, coefficient_N)
        ctx.objective, ctx.bonus, ctx.chunk, ctx.on_backward = objective, bonus, chunk, on_backward
        return loss_sum.clone()  # returned as it came it would be a view, which Trainer may not scale in place

    @staticmethod
    def backward(ctx, grad_output):
        require_first_order()
        ctx.on_backward(grad_output)  # first: the next line may run the model's forward again (activation checkpointing)
        logits_NV, labels_N, coefficient_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        scaled_N = coefficient_N * grad_output.float()
        for start in range(0, logits_NV.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            objective = objective_at(ctx.objective, rows)
            grad_NV[rows] = _chunk_gradient(logits_NV[rows], labels_N[rows], scaled_N[rows], objective, ctx.bonus)
        return grad_NV, None, None, None, None, None, None, None


def _chunk_gradient(logits_CV, labels_C, coefficient_C, objective, bonus):
    """d/d logits of sum_i coefficient_i * (objective_i - bonus * H_i), fp32 [C, V]."""
    if objective is cross_entropy:
        grad_CV, labels_C1 = torch.softmax(logits_CV, dim=-1, dtype=torch.float32), labels_C.unsqueeze(1)
        grad_CV.scatter_(1, labels_C1, grad_CV.gather(1, labels_C1) - 1.0)
        grad_CV.mul_(coefficient_C.unsqueeze(1))
    else:
        with torch.enable_grad():
            leaf_CV = logits_CV.detach().float().requires_grad_()
            (grad_CV,) = torch.autograd.grad(objective(leaf_CV, labels_C), leaf_CV, coefficient_C)
    return grad_CV if bonus == 0.0 else grad_CV.add_(_bonus_gradient(logits_CV, bonus * coefficient_C))


def _bonus_gradient(logits_CV, coefficient_C):
    """d/d logits of -sum_i coefficient_i H_i, fp32 [C, V]: dH / d logit = -p (log p + H)."""
    # Below -104 p is 0 in fp32, so the bound changes nothing but 0 * -inf (a padded vocabulary).
    log_p_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32).clamp_(min=-200.0)
    p_CV = log_p_CV.exp()
    entropy_C1 = -(p_CV * log_p_CV).sum(dim=-1, keepdim=True)
    return p_CV.mul_(log_p_CV.add_(entropy_C1)).mul_(coefficient_C.unsqueeze(1))
