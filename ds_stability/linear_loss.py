"""Linear head, token-weighted loss and statistics in one pass over chunks of tokens: no [tokens, vocab] tensor exists.

Shape suffixes: N tokens of a micro-batch, C tokens of a chunk, V vocabulary, D hidden size, K statistics.

The weights of the tokens are known once their surprisal is (gain, mu and sigma are fixed before the step), so a chunk's
logits give its statistics, its loss and its gradients with respect to hidden states, head weight and bias before they are
dropped: three matrix products, where recomputing the logits in backward takes four. What is kept from forward to
backward is [tokens, hidden] and [vocab, hidden], the latter in the head's own dtype.

Half precision computes the logits once more, block of the vocabulary by block, see `_Pass`: it is faster and smaller there.

Memory beyond that: one chunk in the head's dtype and fp32 work buffers (one for an fp32 head, two in half precision, one more
with a soft-cap), of the chunk's size on an accelerator and of a fixed small one on a CPU, where what stays in the cache is twice
as fast. Like Liger's fused linear cross-entropy (arXiv 2410.10989) this divides nothing by the token count: `grad_output` alone
scales. fp16 factors of a product are brought to a size that neither under- nor overflows, see `FP16_BOOST` and `_fp16_product`.

The products are torch.mm in the head's dtype, as the model's own head would be: in fp32 with full precision unless
torch.backends.cuda.matmul.allow_tf32 is set; in bf16 and fp16 with fp32 accumulation inside a product, up to
allow_bf16_reduced_precision_reduction.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ds_stability.controller import Setting
from ds_stability.loss import (
    CHUNK_ELEMENTS_DEFAULT,
    Objective,
    cross_entropy,
    statistics_in_place,
    token_weights,
    view_of,
)

#: Elements of one chunk's [tokens, vocab] buffer. On a CPU more than the logits path's: a chunk costs one read of the head and
#: one read and write of its gradient, to be spread over many tokens.
CHUNK_ELEMENTS = {"cpu": 2**23}
CHUNK_TOKENS_MIN = 64
#: On CUDA the buffers get this share of the device's memory, and a chunk no more tokens than keep its matrix units busy.
CUDA_SHARE, CUDA_TOKENS_MAX = 64, 512
#: Elements that are worked on at a time: on a CPU the fp32 buffers of this size stay in the L2 cache.
WORK_ELEMENTS = {"cpu": 2**18}
#: Tokens of one tile of a half-precision gradient; its columns fill the chunk's buffer.
TILE_TOKENS = 512
#: fp16 gradients of logits are kept this much larger: 2^-25 rounds to zero there.
FP16_BOOST, FP16_TOP = 2.0**10, 2.0**14
HALF = (torch.float16, torch.bfloat16)
#: Rows of `Tokens.values_KN`.
FIELDS = ("surprisal", "entropy", "top1_mass", "log_partition", "high_frequency_mass", "weight", "objective")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does between its head and its loss: softcap * tanh(scale * z / softcap), or scale * z without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """In place; `logits_CV` in fp32 or better."""
        factor = self.scale / (self.softcap or 1.0)
        if factor != 1.0:
            logits_CV.mul_(factor)
        return logits_CV.tanh_().mul_(self.softcap) if self.softcap else logits_CV

    def slope(self, logits_CV: torch.Tensor) -> torch.Tensor | float:
        """d transformed / d raw, at the transformed logits."""
        if not self.softcap:
            return self.scale
        return (logits_CV / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass
class LossSpec:
    """What one pass computes.

    Attributes:
        setting: gain, mu, sigma and mean weight of the step; weight_i = exp(-gain z_i) / mean_weight multiplies token i.
        objective: per-token objective; anything but `cross_entropy` is differentiated by autograd, a chunk at a time.
        entropy_coefficient: adds coefficient * entropy_i (nats) to the objective, weighted alike; its gradient is exact.
        permute: (weight_N, mask_N) -> weight_N replaces the weights once all are known (a control experiment); costs a pass
            over the head without gradients before the pass proper.
    """

    setting: Setting = field(default_factory=Setting)
    objective: Objective = cross_entropy
    entropy_coefficient: float = 0.0
    transform: LogitTransform = field(default_factory=LogitTransform)
    high_frequency_V: torch.Tensor | None = None
    chunk_size: int | None = None
    permute: Callable | None = None


@dataclass
class Tokens:
    """Per-token results of a pass, fp32 (fp64 for an fp64 head), rows as FIELDS; where `mask_N` is False without meaning."""

    values_KN: torch.Tensor
    mask_N: torch.Tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values_KN[FIELDS.index(name)]


def chunk_tokens(hidden_ND: torch.Tensor, vocab: int, chunk_size: int | None) -> int:
    """Tokens per chunk: `chunk_size`, else equal chunks from the vocabulary and the device's memory; no host sync."""
    tokens = max(1, hidden_ND.shape[0])
    if chunk_size:
        return min(chunk_size, tokens)
    half, most = hidden_ND.dtype in HALF, tokens
    elements = CHUNK_ELEMENTS.get(hidden_ND.device.type, CHUNK_ELEMENTS_DEFAULT)
    if hidden_ND.device.type == "cuda":  # a chunk, and work buffers of its size
        memory = torch.cuda.get_device_properties(hidden_ND.device).total_memory
        elements, most = memory // CUDA_SHARE // (10 if half else 8), CUDA_TOKENS_MAX
    most = min(max(CHUNK_TOKENS_MIN, elements // vocab), most)
    return -(-tokens // -(-tokens // most))


class _Pass:
    """Buffers, statistics and gradients of one micro-batch.

    fp32: token chunks, each complete (logits, statistics, gradients), the head's gradient summed in place.
    Half precision: the statistics by token chunks, then the gradients by tiles, block of the vocabulary by block. The logits
    are computed twice, which matrix units make cheap; in return a block of the head's gradient is summed in fp32 while it is
    small and written once, where token chunks would read, widen and write all of it for every chunk.
    """

    def __init__(self, hidden_ND, weight_VD, bias_V, needs, spec):
        self.hidden_ND, self.weight_VD, self.bias_V, self.needs, self.spec = hidden_ND, weight_VD, bias_V, needs, spec
        self.dtype, self.half = torch.promote_types(hidden_ND.dtype, torch.float32), hidden_ND.dtype in HALF
        tokens, vocab = hidden_ND.shape[0], weight_VD.shape[0]
        self.chunk = chunk_tokens(hidden_ND, vocab, spec.chunk_size)
        height = min(TILE_TOKENS, max(tokens, 1))
        self.tile = (height, min(vocab, -(-self.chunk * vocab // height)))
        # Reused by every chunk: an allocator that maps fresh pages for each costs as much as the softmax on a CPU.
        size, new = max(self.chunk * vocab, self.tile[0] * self.tile[1]), hidden_ND.new_empty
        self.raw = new(size)  # logits of a chunk or a tile, then their gradient
        self.span = min(size, max(vocab, WORK_ELEMENTS.get(hidden_ND.device.type, size)))
        self.buffers = [new(self.span if self.half else 0, dtype=self.dtype), new(self.span, dtype=self.dtype)]
        self.values_KN = new((len(FIELDS), tokens), dtype=self.dtype)
        kept = torch.float32 if hidden_ND.dtype == torch.float16 else hidden_ND.dtype  # fp16 would lose small gradients
        self.grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=self.dtype) if needs[0] else None
        self.grad_weight_VD = torch.empty_like(weight_VD, dtype=kept) if needs[1] else None  # its first touch is a write
        if needs[1] and not tokens:
            self.grad_weight_VD.zero_()
        self.grad_bias_V = new(vocab, dtype=self.dtype).zero_() if needs[2] else None
        self.boost = 1.0
        if hidden_ND.dtype == torch.float16 and any(needs):  # less for large weights or slopes, which could overflow
            low, high = torch.aminmax(weight_VD)
            largest = (torch.maximum(high, -low).float() / 8.0).clamp(min=1.0)
            self.boost = FP16_BOOST / max(1.0, abs(spec.transform.scale)) / largest
        self.sum_WD: torch.Tensor | None = None  # of the block of the vocabulary at work, in half precision

    def run(self, targets_N, mask_N, weight_N=None) -> Tokens:
        """Everything; `weight_N` takes the place of exp(-gain z)."""
        labels_N1, self.mask_N = torch.where(mask_N, targets_N, 0).unsqueeze(1), mask_N
        tiled = self.half and self.spec.objective is cross_entropy
        if self.half and not tiled and self.grad_weight_VD is not None and len(targets_N) > self.chunk:
            self.sum_WD = torch.empty_like(self.weight_VD, dtype=self.dtype)  # an objective that needs whole rows
        for start in range(0, len(targets_N), self.chunk):
            rows = slice(start, start + self.chunk)
            columns, wanted = slice(0, len(self.weight_VD)), any(self.needs) and not tiled
            raw_CV = self._product(rows, columns)
            for part, at in self._parts(rows, raw_CV):
                self._statistics(raw_CV[part], at, labels_N1[at], weight_N, wanted)
            if wanted:
                self._accumulate(rows, columns, raw_CV)
        if self.sum_WD is not None:
            self.grad_weight_VD.copy_(self.sum_WD)
        if tiled and any(self.needs):
            self._tiles(labels_N1)
        return Tokens(self.values_KN, mask_N)

    def _coefficient(self, rows) -> torch.Tensor:
        """weight_i / mean_weight, [C, 1]; 0 where nothing is supervised."""
        weight_C = self.values_KN[FIELDS.index("weight"), rows] / self.spec.setting.mean_weight
        return torch.where(self.mask_N[rows], weight_C, 0.0).unsqueeze(1)

    def _product(self, rows: slice, columns: slice) -> torch.Tensor:
        """Raw logits of some tokens and some of the vocabulary, in the head's dtype."""
        hidden_CD, weight_WD = self.hidden_ND[rows], self.weight_VD[columns]
        raw_CW = view_of(self.raw, (len(hidden_CD), len(weight_WD)))
        if self.bias_V is None:
            return torch.mm(hidden_CD, weight_WD.t(), out=raw_CW)
        return torch.addmm(self.bias_V[columns], hidden_CD, weight_WD.t(), out=raw_CW)

    def _parts(self, rows: slice, raw_CW):
        """(rows of the chunk, rows of the micro-batch) of each part that fits into the work buffers."""
        step = max(1, self.span // raw_CW.shape[1])
        for start in range(0, len(raw_CW), step):
            stop = min(start + step, len(raw_CW))
            yield slice(start, stop), slice(rows.start + start, rows.start + stop)

    def _logits(self, raw_CW) -> torch.Tensor:
        """Transformed logits in fp32 or better; those of a full-precision head in place."""
        logits_CW = view_of(self.buffers[0], raw_CW.shape).copy_(raw_CW) if self.half else raw_CW
        return self.spec.transform.apply_(logits_CW)

    def _keep(self, gradient_CW, slope_CW, raw_CW, rows, columns) -> None:
        """The gradient of a part takes the place of its raw logits; that of the bias is summed before it is rounded."""
        if not (isinstance(slope_CW, float) and slope_CW == 1.0):
            gradient_CW.mul_(slope_CW)
        if self.grad_bias_V is not None:
            self.grad_bias_V[columns].addmv_(gradient_CW.t(), self._coefficient(rows).squeeze(1))
        if raw_CW.dtype == torch.float16:
            gradient_CW.mul_(self.boost)
        raw_CW.copy_(gradient_CW)

    def _statistics(self, raw_CV, rows, labels_C1, weight_N, wanted: bool) -> None:
        """Statistics of a part into `values_KN`; with `wanted` its raw logits become d objective / d raw logits."""
        spec, logits_CV = self.spec, self._logits(raw_CV)
        slope_CV = spec.transform.slope(logits_CV) if wanted else 1.0
        plain = spec.objective is cross_entropy
        value_C, other_CV = (None, None) if plain else _differentiate(spec.objective, logits_CV, labels_C1.squeeze(1), wanted)
        exp_CV = view_of(self.buffers[1], logits_CV.shape)
        values_5C, total_C1, log_total_C1 = statistics_in_place(logits_CV, exp_CV, labels_C1, spec.high_frequency_V)
        (surprisal_C, entropy_C), product_CV = values_5C[:2], logits_CV
        weight_C = token_weights(surprisal_C, spec.setting) if weight_N is None else weight_N[rows]
        value_C = (surprisal_C if plain else value_C) + spec.entropy_coefficient * entropy_C
        self.values_KN[:5, rows], self.values_KN[5, rows], self.values_KN[6, rows] = values_5C, weight_C, value_C
        if not wanted:
            return
        c = spec.entropy_coefficient  # d entropy / d logit = -p (log p + entropy)
        factor_C1 = (float(plain) + c * (log_total_C1 - entropy_C.unsqueeze(1))) / total_C1
        gradient_CV = exp_CV.mul_(factor_C1)
        if c:
            gradient_CV.sub_(product_CV.mul_(c / total_C1))
        if plain:
            gradient_CV.scatter_add_(1, labels_C1, torch.full_like(total_C1, -1.0))
        else:
            gradient_CV.add_(other_CV)
        self._keep(gradient_CV, slope_CV, raw_CV, rows, slice(0, raw_CV.shape[1]))

    def _accumulate(self, rows, columns, grad_CW) -> None:
        """Add the gradients of a chunk or a tile. The weights scale rows of width D, not V: cheaper, and safe in fp16."""
        hidden_CD, weight_C1 = self.hidden_ND[rows], self._coefficient(rows)
        if self.grad_hidden_ND is not None:
            self.grad_hidden_ND[rows] += torch.mm(grad_CW, self.weight_VD[columns]).to(self.dtype) * (weight_C1 / self.boost)
        if self.grad_weight_VD is None:
            return
        block_WD, first = self.grad_weight_VD[columns], rows.start == 0
        if not self.half:
            block_WD.addmm_(grad_CW.t(), hidden_CD * weight_C1, beta=0 if first else 1)
            return
        if hidden_CD.dtype == torch.float16:
            part_WD = self._fp16_product(grad_CW, hidden_CD * weight_C1)
        else:
            scaled_CD = (hidden_CD * weight_C1).to(hidden_CD.dtype)
            if self.sum_WD is None:  # all tokens at once
                torch.mm(grad_CW.t(), scaled_CD, out=block_WD)
                return
            part_WD = torch.mm(grad_CW.t(), scaled_CD)
        target_WD = block_WD if self.sum_WD is None else self.sum_WD
        target_WD.copy_(part_WD) if first else target_WD.add_(part_WD)

    def _fp16_product(self, grad_CW, scaled_CD) -> torch.Tensor:
        """Gradient of the head, fp32. Each column of `scaled_CD` (fp32) gets a size with which no sum over tokens overflows."""
        top_D = scaled_CD.abs().amax(dim=0).clamp_(min=1e-30) * (len(scaled_CD) * FP16_BOOST / FP16_TOP)
        part_WD = torch.mm(grad_CW.t(), (scaled_CD / top_D).to(grad_CW.dtype))
        return part_WD.float().mul_(top_D / self.boost)

    def _tiles(self, labels_N1) -> None:
        """Gradients of the plain objective from the known log-partition and entropy, block of the vocabulary by block."""
        tokens, (size, width) = len(labels_N1), self.tile
        several = tokens > size and self.grad_weight_VD is not None  # tiles fall on one block: sum them in fp32
        for left in range(0, len(self.weight_VD), width):
            columns = slice(left, min(left + width, len(self.weight_VD)))
            if several:
                self.sum_WD = self.hidden_ND.new_empty((columns.stop - left, self.hidden_ND.shape[1]), dtype=self.dtype)
            for start in range(0, tokens, size):
                rows = slice(start, min(start + size, tokens))
                raw_CW = self._product(rows, columns)
                for part, at in self._parts(rows, raw_CW):
                    self._tile(raw_CW[part], at, columns, labels_N1[at])
                self._accumulate(rows, columns, raw_CW)
            if several:
                self.grad_weight_VD[columns] = self.sum_WD

    def _tile(self, raw_CW, rows, columns, labels_C1) -> None:
        """Raw logits of a part of a tile become d (cross-entropy + coefficient * entropy) / d raw logits."""
        spec, logits_CW = self.spec, self._logits(raw_CW)
        slope_CW = spec.transform.slope(logits_CW)
        log_p_CW = logits_CW.sub_(self.values_KN[FIELDS.index("log_partition"), rows].unsqueeze(1))
        p_CW = torch.exp(log_p_CW, out=view_of(self.buffers[1], log_p_CW.shape))
        if spec.entropy_coefficient:
            entropy_C1 = self.values_KN[FIELDS.index("entropy"), rows].unsqueeze(1)
            log_p_CW.clamp_(min=-200.0).add_(entropy_C1).mul_(-spec.entropy_coefficient).add_(1.0)
            p_CW.mul_(log_p_CW)
        inside_C1 = (labels_C1 >= columns.start) & (labels_C1 < columns.stop)
        p_CW.scatter_add_(1, (labels_C1 - columns.start).clamp(0, columns.stop - columns.start - 1), -inside_C1.to(p_CW.dtype))
        self._keep(p_CW, slope_CW, raw_CW, rows, columns)


def _differentiate(objective, logits_CV, labels_C, wanted: bool):
    """(objective_C, d objective / d logits or None); the logits stay as they are."""
    with torch.set_grad_enabled(wanted):
        leaf_CV = logits_CV.detach().clone().requires_grad_(wanted)
        value_C = objective(leaf_CV, labels_C)
        grad_CV = torch.autograd.grad(value_C, leaf_CV, torch.ones_like(value_C))[0] if wanted else None
    return value_C.detach(), grad_CV


def _supervised_rows(mask_N: torch.Tensor) -> torch.Tensor | None:
    """Indices of the supervised tokens where the others can be left out: on an accelerator their number is a host sync."""
    if mask_N.device.type != "cpu":
        return None
    rows = mask_N.nonzero().squeeze(1)
    return rows if len(rows) < len(mask_N) else None


def _permute(permute: Callable, weight_M: torch.Tensor, mask_N: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """`permute` sees every position, so that its random order does not depend on what is left out."""
    if rows is None:
        return permute(weight_M, mask_N)
    weight_N = weight_M.new_zeros(mask_N.shape).index_copy_(0, rows, weight_M)
    return permute(weight_N, mask_N)[rows]


class _LinearLoss(torch.autograd.Function):
    """(hidden, weight, bias) -> weighted sum of the objective, carrier; the gradients are ready when forward returns."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, mask_N, spec, results):
        needs = ctx.needs_input_grad[:3]
        ctx.dtypes = tuple(t.dtype if t is not None else None for t in (hidden_ND, weight_VD, bias_V))
        device = hidden_ND.device.type
        # Under autocast F.linear would cast; the statistics must not be cast, so the casting is done here instead.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        inputs = [t.detach().to(dtype) if t is not None else None for t in (hidden_ND, weight_VD, bias_V)]
        ctx.rows, ctx.shape = _supervised_rows(mask_N), hidden_ND.shape
        if ctx.rows is not None:
            inputs[0], targets_N = inputs[0][ctx.rows], targets_N[ctx.rows]
        used_N = mask_N if ctx.rows is None else torch.ones_like(targets_N, dtype=torch.bool)
        with torch.autocast(device, enabled=False):
            weight_N = None
            if spec.permute is not None:
                scout_N = _Pass(*inputs, (False, False, False), spec).run(targets_N, used_N)["weight"]
                weight_N = _permute(spec.permute, scout_N, mask_N, ctx.rows)
            work = _Pass(*inputs, needs, spec)
            tokens = work.run(targets_N, used_N, weight_N)
            terms_N = tokens["weight"].double() / spec.setting.mean_weight * tokens["objective"].double()
            loss = torch.where(used_N, terms_N, 0.0).sum().to(work.dtype)
            ctx.gradients = (work.grad_hidden_ND, work.grad_weight_VD, work.grad_bias_V)
        results.append(tokens)
        ctx.finite = loss.isfinite()
        ctx.set_materialize_grads(False)
        return loss, loss.new_zeros(()).to(hidden_ND.dtype)

    @staticmethod
    def backward(ctx, grad_output, _):
        if ctx.gradients is None:
            raise RuntimeError("the linear loss keeps its gradients for one backward pass; set loss_path to \"chunked\" "
                               "where a graph is walked twice (retain_graph)")  # fmt: skip
        gradients, ctx.gradients = ctx.gradients, None
        # A non-finite surprisal can still have a finite gradient; every rank has to see that this step is lost.
        scale = torch.where(ctx.finite, grad_output, torch.nan)
        # In place: the head's gradient is the largest tensor of the pass, and nobody else holds it.
        scaled = [g.mul_(scale).to(dtype) if g is not None else None for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        if ctx.rows is not None and scaled[0] is not None:
            scaled[0] = scaled[0].new_zeros(ctx.shape).index_copy_(0, ctx.rows, scaled[0])
        return *scaled, None, None, None, None


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
