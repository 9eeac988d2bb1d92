"""Token-weighted loss with statistics, computed in chunks over tokens.

Shape suffixes: B batch, T sequence, V vocabulary, N tokens of a micro-batch (B * T), C tokens of a chunk, K fields.

`StabilityLoss` takes the place of a transformers model's `loss_function` (transformers/modeling_utils.py, property
`loss_function`): it gets the final logits, after soft-capping and scaling, so it is right for every architecture that
calls it. In the chunked path no [tokens, vocab] fp32 tensor outlives a chunk: the forward keeps the logits (in their own
dtype) and a coefficient per token, the backward recomputes the softmax chunk by chunk. In the linear path there are no
logits: the model's head has computed the loss (`fused_head.py`), and what comes here as logits is its carrier.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ds_stability.controller import Setting
from ds_stability.errors import StabilityConfigError
from ds_stability.forwards import Forward, Forwards
from ds_stability.histogram import Z_MAX
from ds_stability.statistics import TOKEN_FIELDS
from ds_stability.token_sums import TokenAccumulator
from ds_stability.weighted_loss import Objective, RowObjective, WeightedLoss, cross_entropy, objective_at

IGNORE_INDEX = -100
#: Elements of one fp32 chunk: 64 MiB on an accelerator; on a CPU what two buffers of fit into the L2 cache.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_DEFAULT = 2**24
#: Tokens whose histogram is counted at a time: [bins, tokens] fp64 stays at 2 MiB.
COUNT_TOKENS = 4096


def shift_labels(labels_BT: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """Labels of the next token, [N]: position t is scored against t + 1, the last position against nothing."""
    return F.pad(labels_BT, (0, 1), value=ignore_index)[..., 1:].reshape(-1)


def chunk_tokens(logits_NV: torch.Tensor, chunk_size: int | None) -> int:
    """Tokens per chunk: `chunk_size`, else as many as fit in a fixed number of fp32 elements."""
    if chunk_size:
        return chunk_size
    return max(1, CHUNK_ELEMENTS.get(logits_NV.device.type, CHUNK_ELEMENTS_DEFAULT) // logits_NV.shape[-1])


def view_of(buffer: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The first elements of a flat `buffer` as a matrix."""
    return buffer[: shape[0] * shape[1]].view(shape)


@torch.no_grad()
def token_statistics(logits_CV, labels_C, high_frequency_V, buffers=None):
    """Per-token statistics of one chunk, in fp32.

    Args:
        logits_CV: any float dtype. -inf (a padded vocabulary) is allowed: a probability of 0 adds 0 to the entropy.
        labels_C: target ids; must be valid ids (mask first).
        high_frequency_V: fp32 0/1 mask of the high-frequency set, or None.
        buffers: two flat fp32 tensors of at least C * V elements to work in; None makes them.

    Returns:
        [5, C]: surprisal, entropy (nats), top-1 probability, log-partition (nats), high-frequency probability.
    """
    if buffers is None:
        buffers = logits_CV.new_empty(2, logits_CV.numel(), dtype=torch.float32)
    work_CV = view_of(buffers[0], logits_CV.shape).copy_(logits_CV)
    return statistics_in_place(work_CV, view_of(buffers[1], logits_CV.shape), labels_C.unsqueeze(1), high_frequency_V)[0]


def statistics_in_place(logits_CV, exp_CV, labels_C1, high_frequency_V):
    """As `token_statistics`, without another tensor of that size; no host sync.

    `exp_CV` ends as exp(logits - peak), `logits_CV` as that times (logits - peak). Also returns the sum [C, 1] of `exp_CV` and
    its logarithm.
    """
    peak_C1 = logits_CV.amax(dim=-1, keepdim=True)
    shifted_CV = logits_CV.sub_(peak_C1)  # entropy of a collapsed model needs the small numbers, not lse - E[x]
    label_C1 = shifted_CV.gather(1, labels_C1)
    # Below -104 exp() is 0 in fp32, so the bound changes nothing but 0 * -inf.
    torch.exp(shifted_CV.clamp_(min=-200.0), out=exp_CV)
    total_C1 = exp_CV.sum(dim=-1, keepdim=True)
    log_total_C1 = total_C1.log()
    entropy_C1 = log_total_C1 - shifted_CV.mul_(exp_CV).sum(dim=-1, keepdim=True) / total_C1
    high_C1 = torch.zeros_like(total_C1)
    if high_frequency_V is not None:
        high_C1 = torch.mv(exp_CV, high_frequency_V.to(exp_CV.dtype)).unsqueeze(1) / total_C1
    values_5C = torch.cat([log_total_C1 - label_C1, entropy_C1, 1.0 / total_C1, peak_C1 + log_total_C1, high_C1], dim=1).t()
    return values_5C, total_C1, log_total_C1


def token_weights(surprisal_C: torch.Tensor, setting: Setting) -> torch.Tensor:
    """w = exp(-gain * clip((s - mu) / sigma, -3, 3)) (design section 3); no gradient."""
    return torch.exp(-setting.gain * ((surprisal_C - setting.mu) / setting.sigma).clamp(-Z_MAX, Z_MAX))


class StabilityLoss:
    """Drop-in for `model.loss_function` that weights tokens and records statistics.

    A forward is training if it is differentiated (forwards.py). In eval mode the number that is returned is the plain
    cross-entropy; differentiated, it gives the gradient of training.

    Args:
        module: the model; only its `training` flag is read.
        stock: the model's own loss function, used at level 0 and without gradients.
        chunked: use our weighted loss where gradients may be asked for, in chunks over tokens (the path is chosen once per run).
        chunk_size: tokens per chunk; None chooses from memory.

    Attributes:
        setting: gain, mu, sigma, mean weight and entropy bonus of the coming step (set by the engine before each step).
        base_objective: per-token objective of the run, or of the coming micro-batch.
        objective: what is optimized next: the same, with what regularization adds.
        measure: False lets the stock path skip its statistics in this step (`statistics.interval`).
        high_frequency_V: fp32 0/1 mask, or None.
        permutation_step: the applied step that seeds a permutation of the weights (a control experiment), or None for none.
            The recorded weighted moments stay those of the weights in place; the recorded loss is the one optimized.
        rank: of this process, another part of that seed.
        kernel: what the linear path computes statistics and gradients with (`LossSpec.kernel`).
        head: the `FusedHead` that computes the loss in the model's head (the linear path), or None.
        train, evaluation: accumulators. on_backward(grad_output, denominator, tokens) is told of every backward.
        per_tensor: a weak reference to what DeepSpeed does to the incoming gradient of each tensor of an output (install_loss.py).
        parts: what an engine has hung on the model; `release` takes it all away.
    """

    def __init__(self, module: torch.nn.Module, stock: Callable, chunked: bool, device, chunk_size: int | None = None):
        self.module, self.stock, self.chunked, self.chunk_size = module, stock, chunked, chunk_size
        self.setting, self.measure = Setting(), True
        self.base_objective: Objective | RowObjective = cross_entropy
        self.objective: Objective | RowObjective = cross_entropy
        self.high_frequency_V: torch.Tensor | None = None
        self.train, self.evaluation = TokenAccumulator(device), TokenAccumulator(device)
        self.calls = Forwards(module)
        self.latest: Forward | None = None
        self.statistics_only = False  # evaluation passes need no loss
        self.permutation_step: int | None = None
        self.rank = 0
        self.kernel = "torch"
        self.interleaved = False  # refuse a backward after the forward that came next
        self.on_backward: Callable | None = None
        self.per_tensor: Callable | None = None
        self.head = None
        self.parts: list[Callable[[], None]] = []

    def release(self) -> None:
        """Give the model back as it was: another engine takes it, or none."""
        if self.head is not None:
            self.head.release()
            self.head = None
        while self.parts:
            self.parts.pop()()
        if self.module.loss_function is self:
            self.module.loss_function = self.stock

    @property
    def backwards(self) -> int:
        """How many forwards were differentiated since the last step."""
        return self.calls.differentiated

    def require_used(self) -> None:
        """The gradient of our loss must have been asked for since the last step.

        Raises:
            StabilityConfigError: the trainer computes its loss elsewhere (DPO, GRPO, Liger, a label smoother, ...).
        """
        if self.chunked and self.backwards == 0:
            raise StabilityConfigError(
                "the training loss did not pass through the model's loss function, so no stability level above 0 can act on "
                "it (DPO, GRPO, Liger, label_smoothing_factor and compute_loss_func do this); set stability.level to 0, or train "
                "with the model's own loss"
            )

    def close_step(self) -> torch.Tensor:
        """The sums of the step, fp64 [TOKEN_FIELDS and the histogram]; all is empty then."""
        vector = self.train.vector()
        self.train.reset()
        self.calls.close_step(self.evaluation)
        return vector

    def evaluated(self) -> torch.Tensor:
        """The sums of all evaluation passes since the last call, as `close_step`."""
        self.calls.settle(self.evaluation)
        vector = self.evaluation.vector()
        self.evaluation.reset()
        return vector

    def __deepcopy__(self, memo):
        """A copied model (a reference model, an EMA) gets the stock loss, not a hand in this run's statistics."""
        return self.stock

    def __call__(self, logits, labels, vocab_size=None, num_items_in_batch=None, ignore_index=IGNORE_INDEX,
                 shift_labels=None, **kwargs):  # fmt: skip
        """Scalar loss. Arguments as in transformers/loss/loss_utils.py, ForCausalLMLoss."""
        taken = self.head.take(logits, labels, shift_labels, ignore_index) if self.head is not None else None
        if taken is not None:
            return self._finished(*taken, num_items_in_batch)
        targets_N = _shift(labels, ignore_index) if shift_labels is None else shift_labels.reshape(-1)
        targets_N = targets_N.to(logits.device)
        logits_NV = logits.reshape(-1, logits.shape[-1])
        differentiable = torch.is_grad_enabled() and logits.requires_grad
        if differentiable and self.chunked:
            return self._weighted(logits_NV, targets_N, num_items_in_batch, ignore_index)
        forward = self._begin(self.measure) if differentiable else None
        if self.measure or forward is None or not forward.training:
            self._record(forward.sums if differentiable else self.evaluation, logits_NV.detach(), targets_N, ignore_index)
        if self.statistics_only and not differentiable:
            return logits.new_zeros(())  # the stock loss would copy the logits to fp32
        loss = self.stock(logits=logits, labels=labels, vocab_size=vocab_size or logits.shape[-1],
                          num_items_in_batch=num_items_in_batch, ignore_index=ignore_index, shift_labels=shift_labels,
                          **kwargs)  # fmt: skip
        tokens = (targets_N != ignore_index).sum()
        # Without a supervised token the stock mean is 0/0: give a 0 that still hangs on the graph. No host sync.
        loss = torch.where(tokens > 0, loss, 0.0)
        if not differentiable:
            return loss
        denominator = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        self._watch(forward, loss, denominator, tokens)
        logits.register_hook(lambda grad: self._count(forward))  # a loss that the user makes of the logits trains as well
        return loss

    def _begin(self, measured: bool = True) -> Forward:
        self.latest = self.calls.begin(self.train.fresh(), measured)
        return self.latest

    def _weighted(self, logits_NV, targets_N, num_items_in_batch, ignore_index):
        if isinstance(self.objective, RowObjective) and self.objective.count != logits_NV.shape[0]:
            raise StabilityConfigError(
                f"stability.objective was made for {self.objective.count} tokens and the model gives logits of {logits_NV.shape[0]}; "
                "such an objective needs the logits of all positions (no virtual tokens, no sequence parallelism)"
            )
        forward = self._begin()
        weighted_N = self._record(forward.sums, logits_NV.detach(), targets_N, ignore_index, keep=True)
        mask_N = targets_N != ignore_index
        tokens = mask_N.sum()
        denominator = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        objective_N, weight_N = weighted_N
        if self.permutation_step is not None:
            in_place_N, weight_N = weight_N, self.permuted(weight_N, mask_N)
            change_N = (weight_N.double() - in_place_N.double()) / self.setting.mean_weight * objective_N.double()
            forward.sums.sums_K[TOKEN_FIELDS.index("loss")] += torch.where(mask_N, change_N, 0.0).sum()
        coefficient_N = torch.where(mask_N, weight_N / self.setting.mean_weight / denominator, 0.0)
        loss_sum = torch.where(mask_N, coefficient_N * objective_N, 0.0).sum()
        # A non-finite surprisal can still have a finite gradient; every rank has to see that this step is lost.
        coefficient_N = torch.where(loss_sum.isfinite(), coefficient_N, torch.nan)
        chunk = chunk_tokens(logits_NV, self.chunk_size)
        labels_N = torch.where(mask_N, targets_N, 0)
        report = lambda grad: self._report(forward, grad, denominator, tokens)  # noqa: E731
        loss = WeightedLoss.apply(logits_NV, labels_N, coefficient_N, loss_sum, self.objective,
                                   self.setting.entropy_bonus, chunk, report)  # fmt: skip
        return self._shown(loss, forward, denominator)

    def _shown(self, loss, forward: Forward, denominator):
        """`loss` with the number of the plain cross-entropy in eval mode, as the stock loss has it."""
        if forward.training:
            return loss
        plain = (forward.sums.sums_K[TOKEN_FIELDS.index("surprisal")] / denominator).to(loss.dtype)
        return loss + (plain - loss).detach()

    def _finished(self, loss, tokens, num_items_in_batch):
        """The loss that the head has computed, divided; `loss` is a sum over `tokens` (linear_loss.Tokens)."""
        forward = self._begin()
        self._record_finished(forward.sums, tokens)
        count = tokens.mask_N.sum()
        denominator = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        divisor = torch.where(count > 0, denominator, 1)  # Trainer's denominator may be 0 then
        loss = loss / divisor
        self._watch(forward, loss, denominator, count)
        return self._shown(loss, forward, divisor)

    def _record_finished(self, accumulator, tokens) -> None:
        weight_N = token_weights(tokens["surprisal"], self.setting)  # in place, where `tokens` has permuted ones
        loss_N = tokens["weight"].double() / self.setting.mean_weight * tokens["objective"].double()
        self._add(accumulator, tokens.values_KN[:5], weight_N, loss_N, tokens.mask_N)

    @torch.no_grad()
    def _add(self, accumulator, values_5N, weight_N, loss_N, mask_N) -> None:
        """Add a micro-batch: `values_5N` as of `token_statistics`, `loss_N` what is optimized."""
        (s, *rest), w = values_5N.double(), weight_N.double()
        rows_KN = torch.stack([torch.ones_like(s), s, s * s, w, w * s, w * s * s, w * w, *rest, loss_N.double()])
        for start in range(0, rows_KN.shape[1], COUNT_TOKENS):
            part = slice(start, start + COUNT_TOKENS)
            accumulator.add(rows_KN[:, part], mask_N[part])

    @torch.no_grad()
    def permuted(self, weight_N, mask_N):
        """The weights of the supervised tokens of this micro-batch in random order."""
        seed = (self.permutation_step * 65_537 + self.backwards) * 65_537 + self.rank
        keys_N = torch.rand(len(weight_N), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        order_N = torch.where(mask_N, keys_N.to(mask_N.device), 2.0).argsort()  # supervised tokens first, shuffled
        places_N = (~mask_N).to(torch.int8).argsort(stable=True)  # supervised tokens first, in their order
        permuted_N = torch.empty_like(weight_N)
        permuted_N[places_N] = weight_N[order_N]
        return permuted_N

    @torch.no_grad()
    def _record(self, accumulator, logits_NV, targets_N, ignore_index, keep=False):
        """Add the statistics of a micro-batch; with `keep` also return (objective_N, weight_N), fp32."""
        with torch.autocast(logits_NV.device.type, enabled=False):  # the statistics stay in fp32
            return self._record_chunks(accumulator, logits_NV, targets_N, ignore_index, keep)

    def _record_chunks(self, accumulator, logits_NV, targets_N, ignore_index, keep):
        mask_N = targets_N != ignore_index
        labels_N = torch.where(mask_N, targets_N, 0)
        chunk = min(chunk_tokens(logits_NV, self.chunk_size), max(1, len(targets_N)))
        # Reused by every chunk: on a CPU fresh pages for each cost as much as the softmax.
        buffers = logits_NV.new_empty(2, chunk * logits_NV.shape[1], dtype=torch.float32)
        values_5N = logits_NV.new_empty(5, len(targets_N), dtype=torch.float32)
        objectives = []
        for start in range(0, len(targets_N), chunk):
            rows = slice(start, start + chunk)
            values_5N[:, rows] = token_statistics(logits_NV[rows], labels_N[rows], self.high_frequency_V, buffers)
            if keep and self.objective is not cross_entropy:
                function = objective_at(self.objective, rows)
                objectives.append(function(logits_NV[rows].float(), labels_N[rows]))
        value_N = torch.cat(objectives) if objectives else values_5N[0]
        if keep and self.setting.entropy_bonus != 0.0:
            value_N = value_N - self.setting.entropy_bonus * values_5N[1]
        weight_N = token_weights(values_5N[0], self.setting) if keep else torch.ones_like(value_N)
        loss_N = weight_N.double() / self.setting.mean_weight * value_N if keep else value_N
        self._add(accumulator, values_5N, weight_N, loss_N, mask_N)
        return (value_N, weight_N) if keep else None

    def _watch(self, forward: Forward, loss, denominator, tokens):
        """Learn the incoming gradient of the stock or the finished loss, which nobody else knows."""

        def seen(grad):
            self._report(forward, grad, denominator, tokens)
            return self.per_tensor()(grad) if forward.logits_shown and self.per_tensor is not None else None

        loss.register_hook(seen)

    def _report(self, forward: Forward, grad_output, denominator, tokens):
        self._count(forward)
        if self.on_backward is not None:
            self.on_backward(grad_output, denominator, tokens)

    def _count(self, forward: Forward) -> None:
        """`forward` is being differentiated: its statistics are those of training."""
        if self.calls.count(forward, self.interleaved) and forward.measured:
            self.train.merge(forward.sums)


_shift = shift_labels  # the argument of the same name, fixed by transformers, hides the function in __call__
