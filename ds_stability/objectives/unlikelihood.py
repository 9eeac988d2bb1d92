"""Unlikelihood training (Welleck et al. 2020, arXiv 1908.04319): -log(1 - p(c)) for tokens c that should not come.

Token level: c runs over the tokens that the document had before, without the label. Sequence level: the model goes on from
a prefix, and its own tokens that lie in an n-gram it has written before are penalized.
Shape suffixes: B sequences, T positions, N tokens of the micro-batch, C tokens of a chunk, V vocabulary.
"""

import torch
import torch.nn.functional as F

from ds_stability.objectives.rows import MicroBatch
from ds_stability.weighted_loss import Objective, RowObjective, cross_entropy

MAX_CANDIDATES = 2**20  # rows * positions that are scattered at a time: 8 MiB of indices


def log_complement(logits_CV: torch.Tensor) -> torch.Tensor:
    """log(1 - p) of every token, [C, V], exact also where p is 1 in fp32: there it is taken over the other logits."""
    peak_C1 = logits_CV.argmax(-1, keepdim=True)
    others_C1 = logits_CV.scatter(1, peak_C1, -torch.inf).logsumexp(-1, keepdim=True)
    result_CV = torch.log1p(-torch.softmax(logits_CV, -1).scatter(1, peak_C1, 0.0))
    return result_CV.scatter(1, peak_C1, -F.softplus(logits_CV.gather(1, peak_C1) - others_C1))


def token_level(alpha: float, batch: MicroBatch) -> RowObjective:
    """CE - alpha * sum over candidates c of log(1 - p(c)); the candidates are made chunk by chunk."""

    def at(rows) -> Objective:
        def objective(logits_CV, labels_C):
            negative_CV = candidates(batch, rows, labels_C, logits_CV.shape[-1])
            penalty_C = torch.where(negative_CV, -log_complement(logits_CV), 0.0).sum(-1)
            return cross_entropy(logits_CV, labels_C) + alpha * penalty_C

        return objective

    return RowObjective(at, batch.input_ids_BT.numel())


def candidates(batch: MicroBatch, rows, labels_C: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Bool [C, V]: the tokens of the document up to and with the position of each row, without the row's label."""
    width = batch.input_ids_BT.shape[1]
    rows_C = torch.arange(batch.input_ids_BT.numel(), device=labels_C.device)[rows]
    negative_CV = torch.zeros(len(rows_C), vocabulary, dtype=torch.bool, device=labels_C.device)
    step = max(1, MAX_CANDIDATES // width)
    for first in range(0, len(rows_C), step):
        part = slice(first, first + step)
        row_C, place_C1 = rows_C[part] // width, (rows_C[part] % width).unsqueeze(1)
        places_1T = torch.arange(width, device=labels_C.device).unsqueeze(0)
        before_CT = (places_1T <= place_C1) & (places_1T >= batch.starts_BT[row_C].gather(1, place_C1)) & batch.present_BT[row_C]
        label_C1 = labels_C[part].unsqueeze(1)
        tokens_CT = torch.where(before_CT, batch.input_ids_BT[row_C], label_C1)  # what does not count goes to the label
        negative_CV[part].scatter_(1, tokens_CT, True).scatter_(1, label_C1, False)
    return negative_CV


def sequence_level(repeated_BT: torch.Tensor) -> RowObjective:
    """-log(1 - p(token)) of the generated tokens that repeat an n-gram, 0 for the others."""
    # The row at position t is scored against the token at t + 1, as labels are.
    repeated_N = F.pad(repeated_BT, (0, 1))[:, 1:].reshape(-1)

    def at(rows) -> Objective:
        def objective(logits_CV, labels_C):
            log_rest_C = log_complement(logits_CV).gather(1, labels_C.unsqueeze(1)).squeeze(1)
            return torch.where(repeated_N[rows], -log_rest_C, 0.0)

        return objective

    return RowObjective(at, repeated_N.numel())


def repeated_ngrams(tokens_BT: torch.Tensor, n: int) -> torch.Tensor:
    """Bool [B, T]: tokens in an n-gram of the same row that has occurred before: every token of that n-gram, as in the paper's code."""
    repeated_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, tokens in enumerate(tokens_BT.tolist()):
        seen = set()
        for start in range(len(tokens) - n + 1):
            gram = tuple(tokens[start : start + n])
            if gram in seen:
                repeated_BT[row, start : start + n] = True
            seen.add(gram)
    return repeated_BT
