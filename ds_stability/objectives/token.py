"""Objectives of one token's logits and label alone.

Every function here makes an objective: (logits_CV fp32, labels_C) -> loss_C, nats. Shape suffixes: C tokens, V vocabulary.
A logit of -inf (a padded vocabulary) is a probability of 0: it adds nothing, and nothing of it is NaN. A label of
probability 0 has an infinite loss, which the engine sees and skips.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ds_stability.weighted_loss import Objective, cross_entropy

TINY = 1e-30  # keeps the powers of 1 - p below 1 finite at p = 1, where what they multiply is 0


@dataclass(frozen=True)
class ClosedForm:
    """(1 - e) CE + e U + z (log Z)^2: the objectives whose gradient in the logits the linear loss writes down by itself.

    U is the mean over the possible tokens of -log p (label smoothing, Szegedy et al. 2016, arXiv 1512.00567, section 7), the last
    term PaLM's z-loss (arXiv 2204.02311, section 5). d / d logit_j = (1 + 2 z log Z) p_j - (1 - e) [j is the label] - e / possible
    tokens. Called, it is an objective like every other, which autograd differentiates.
    """

    smoothing: float = 0.0
    z: float = 0.0

    def __call__(self, logits_CV, labels_C):
        loss_C = smoothed(cross_entropy(logits_CV, labels_C), logits_CV, self.smoothing)
        return loss_C + self.z * torch.logsumexp(logits_CV, dim=-1).square() if self.z else loss_C


def closed_form(objective: Objective) -> ClosedForm | None:
    """The objective as a `ClosedForm`, or None where it is none."""
    if objective is cross_entropy:
        return ClosedForm()
    return objective if isinstance(objective, ClosedForm) else None


def label_smoothing(smoothing: float) -> Objective:
    """(1 - e) CE + e * mean over the vocabulary of -log p (Szegedy et al. 2016, arXiv 1512.00567, section 7)."""
    return ClosedForm(smoothing=smoothing)


def smoothed(loss_C: torch.Tensor, logits_CV: torch.Tensor, smoothing: float) -> torch.Tensor:
    """(1 - e) loss + e * mean over the tokens that are possible of -log p."""
    if smoothing == 0.0:
        return loss_C
    log_p_CV, possible_CV = _log_probabilities(logits_CV)
    return (1.0 - smoothing) * loss_C - smoothing * log_p_CV.sum(-1) / possible_CV.sum(-1)


def focal(gamma: float) -> Objective:
    """-(1 - p)^gamma log p (Lin et al. 2017, arXiv 1708.02002, equation 4)."""

    def objective(logits_CV, labels_C):
        loss_C = cross_entropy(logits_CV, labels_C)
        return (-torch.expm1(-loss_C)).clamp_min(TINY).pow(gamma) * loss_C  # 1 - p without cancellation

    return objective


def tofu(gamma: float, beta: float) -> Objective:
    """-sg[(1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p] * beta * log p^(beta), tempered focal loss.

    p^(beta) is softmax(logits / beta) at the label; sg stops the gradient (Klypa and Cherednichenko 2026, arXiv 2605.00195).
    """

    def objective(logits_CV, labels_C):
        with torch.no_grad():
            loss_C = cross_entropy(logits_CV, labels_C)
            rest_C = (-torch.expm1(-loss_C)).clamp_min(TINY)
            factor_C = rest_C.pow(gamma) + gamma * (-loss_C).exp() * rest_C.pow(gamma - 1.0) * loss_C
        return factor_C * beta * cross_entropy(logits_CV / beta, labels_C)

    return objective


def entropy_regularized(coefficient: float) -> Objective:
    """CE - coefficient * H(p), the confidence penalty (Pereyra et al. 2017, arXiv 1701.06548, section 3)."""

    def objective(logits_CV, labels_C):
        log_p_CV, _ = _log_probabilities(logits_CV)
        entropy_C = -(torch.softmax(logits_CV, -1) * log_p_CV).sum(-1)
        return cross_entropy(logits_CV, labels_C) - coefficient * entropy_C

    return objective


def gem(beta: float, h: str) -> Objective:
    """sum_j q_j h'_j (log p_j - log p_label), q = softmax(logits / beta) and h' without gradient.

    h' is 1 (linear) or sigmoid(.01 (logit_j - logit_label)) (logsigmoid): Li et al. 2025, arXiv 2408.16673,
    as its public code has it. With h linear the gradient in the logits is q - onehot(label).
    """

    def objective(logits_CV, labels_C):
        log_p_CV, possible_CV = _log_probabilities(logits_CV)
        with torch.no_grad():
            weight_CV = torch.softmax(logits_CV / beta, -1)
            if h == "logsigmoid":
                weight_CV = weight_CV * torch.sigmoid(0.01 * (logits_CV - logits_CV.gather(1, labels_C.unsqueeze(1))))
            weight_CV = torch.where(possible_CV, weight_CV, 0.0)  # -inf - -inf, where the label is impossible
        return weight_CV.sum(-1) * cross_entropy(logits_CV, labels_C) + (weight_CV * log_p_CV).sum(-1)

    return objective


def _log_probabilities(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p with 0 where p is exactly 0, mask of the other places), both [C, V]."""
    possible_CV = logits_CV != -torch.inf
    return F.log_softmax(logits_CV, -1).masked_fill(~possible_CV, 0.0), possible_CV
