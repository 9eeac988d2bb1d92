"""One micro-batch through the head: logits, statistics and gradients, in pieces that fit into fixed buffers.

Shape suffixes: N tokens of a micro-batch, C tokens of a chunk, V vocabulary, W words of a block of it, D hidden size.

Three ways, chosen by the head's dtype and the sizes:

* fp32, and objectives that autograd differentiates: token chunks, each complete (logits, statistics, gradients) before its
  buffer is used again; the head's gradient is summed in place, in fp32.
* bf16, few tokens: all logits in blocks of the vocabulary. A block's gradient takes the place of its logits, and the head's
  gradient the place of the blocks before it: one buffer, little larger than the head's gradient alone, and three products.
* half precision otherwise: token chunks for the statistics; in backward the logits once more, block of the vocabulary by
  block. Matrix units make that cheap; in return a block of the head's gradient is summed in fp32 while it is small and written
  once, where token chunks would read, widen and write all of it for every chunk.

In the last two the incoming gradient is known when the head's gradient is made, which saves a pass over it.
"""

import torch

from ds_stability.linear_spec import FIELDS, LossSpec, Tokens
from ds_stability.loss import CHUNK_ELEMENTS_DEFAULT, statistics_in_place, token_weights, view_of
from ds_stability.objectives.token import closed_form

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
#: Where all logits are kept: at most as many blocks of the vocabulary, of at least as many words.
BLOCKS, BLOCK_WORDS = 8, 4096
#: fp16 gradients of logits are kept this much larger: 2^-25 rounds to zero there.
FP16_BOOST, FP16_TOP = 2.0**10, 2.0**14
HALF = (torch.float16, torch.bfloat16)


def chunk_tokens(hidden_ND: torch.Tensor, vocab: int, chunk_size: int | None, buffered: bool = True) -> int:
    """Tokens per chunk: `chunk_size`, else equal chunks from the vocabulary and the device's memory; no host sync.

    `buffered`: work buffers of a chunk's size stand beside its raw logits.
    """
    tokens = max(1, hidden_ND.shape[0])
    if chunk_size:
        return min(chunk_size, tokens)
    half, most = hidden_ND.dtype in HALF, tokens
    elements = CHUNK_ELEMENTS.get(hidden_ND.device.type, CHUNK_ELEMENTS_DEFAULT)
    if hidden_ND.device.type == "cuda":
        memory = torch.cuda.get_device_properties(hidden_ND.device).total_memory
        size = (2 if half else 4) + ((8 if half else 4) if buffered else 0)
        elements, most = memory // CUDA_SHARE // size, CUDA_TOKENS_MAX
    most = min(max(CHUNK_TOKENS_MIN, elements // vocab), most)
    return -(-tokens // -(-tokens // most))


class Blocks:
    """Raw logits of all tokens, block of the vocabulary by block, in one buffer with the head's gradient.

    The gradient [V, D] starts where the buffer starts, the blocks [N, W] end where it ends, and the buffer is so large that the
    gradient of a block never reaches the logits of that block or of a later one.
    """

    def __init__(self, tokens: int, vocab: int, hidden: int):
        self.tokens, self.vocab, self.hidden = tokens, vocab, hidden
        self.width = min(vocab, max(BLOCK_WORDS, -(-vocab // BLOCKS)))
        self.elements = max(vocab * hidden + self.width * tokens, vocab * tokens + self.width * hidden)

    def allocate(self, like: torch.Tensor) -> None:
        self.buffer = like.new_empty(self.elements)

    def __iter__(self):
        """(columns, raw logits [N, W]) of each block."""
        for left in range(0, self.vocab, self.width):
            right = min(left + self.width, self.vocab)
            start = self.elements - (self.vocab - left) * self.tokens
            raw = self.buffer[start : start + (right - left) * self.tokens]
            yield slice(left, right), raw.view(self.tokens, right - left)

    def gradient(self) -> torch.Tensor:
        """[V, D]; no view, which would keep autograd from adding to it in place."""
        return self.buffer.new_empty(0).set_(self.buffer, 0, (self.vocab, self.hidden), (self.hidden, 1))


class Pass:
    """Buffers, statistics and gradients of one micro-batch: `run` in forward, `gradients` in backward."""

    buffered = True

    def __init__(self, hidden_ND, weight_VD, bias_V, needs, spec: LossSpec):
        self.hidden_ND, self.weight_VD, self.bias_V, self.needs, self.spec = hidden_ND, weight_VD, bias_V, needs, spec
        self.dtype, self.half = torch.promote_types(hidden_ND.dtype, torch.float32), hidden_ND.dtype in HALF
        self.form, self.vocab = closed_form(spec.objective), len(weight_VD)
        tokens = len(hidden_ND)
        self.chunk = chunk_tokens(hidden_ND, self.vocab, spec.chunk_size, self.buffered)
        self.deferred = self.half and self.form is not None and any(needs)
        self.blocks = self._blocks()
        height = min(TILE_TOKENS, max(tokens, 1))
        self.tile = (height, min(self.vocab, -(-self.chunk * self.vocab // height)))
        # Reused by every chunk: an allocator that maps fresh pages for each costs as much as the softmax on a CPU.
        size, new = max(self.chunk * self.vocab, self.tile[0] * self.tile[1]), hidden_ND.new_empty
        self.raw = None if self.blocks is not None else new(size)  # logits of a chunk or a tile, then their gradient
        self._make_buffers(size)
        self.values_KN = new((len(FIELDS), tokens), dtype=self.dtype)
        self.possible_N = new(tokens, dtype=self.dtype)  # words of a probability above 0, for label smoothing
        self.grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=self.dtype) if needs[0] else None
        self.grad_weight_VD = None
        if needs[1] and not self.deferred:
            self.grad_weight_VD = self._new_grad_weight()
        self.grad_bias_V = new(self.vocab, dtype=self.dtype).zero_() if needs[2] else None
        self.boost = 1.0
        if hidden_ND.dtype == torch.float16 and any(needs):  # less for large weights or slopes, which could overflow
            low, high = torch.aminmax(weight_VD)
            largest = (torch.maximum(high, -low).float() / 8.0).clamp(min=1.0)
            self.boost = FP16_BOOST / max(1.0, abs(spec.transform.scale)) / largest
        self.sum_WD: torch.Tensor | None = None  # of the block of the vocabulary at work, in half precision
        self.scale: torch.Tensor | float = 1.0  # of the head's gradient, where it is made in backward

    def _make_buffers(self, size: int) -> None:
        """`span`: elements that are worked on at a time, in fp32 or better."""
        self.span = min(size, max(self.vocab, WORK_ELEMENTS.get(self.hidden_ND.device.type, size)))
        self.buffers = [self.hidden_ND.new_empty(n, dtype=self.dtype) for n in (self.span if self.half else 0, self.span)]

    def _blocks(self) -> Blocks | None:
        """Where all logits are kept: in bf16, if that takes no more memory than a chunk beside the head's gradient."""
        tokens, width = self.hidden_ND.shape
        if not (self.deferred and self.needs[1] and tokens and self.hidden_ND.dtype == torch.bfloat16):
            return None
        blocks = Blocks(tokens, self.vocab, width)
        return blocks if blocks.elements <= self.vocab * width + self.chunk * self.vocab else None

    def _new_grad_weight(self) -> torch.Tensor:
        kept = torch.float32 if self.hidden_ND.dtype == torch.float16 else self.hidden_ND.dtype  # fp16 would lose small gradients
        empty_VD = torch.empty_like(self.weight_VD, dtype=kept)  # its first touch is a write
        return empty_VD if len(self.hidden_ND) else empty_VD.zero_()

    # ---- forward ------------------------------------------------------------------------------------------------

    def run(self, targets_N, mask_N, weight_N=None) -> Tokens:
        """Statistics, and the gradients that are not left to `gradients`; `weight_N` takes the place of exp(-gain z)."""
        self.labels_N1, self.mask_N = torch.where(mask_N, targets_N, 0).unsqueeze(1), mask_N
        if self.blocks is not None:
            self._fill_blocks(weight_N)
            return Tokens(self.values_KN, mask_N)
        wanted, columns = any(self.needs) and not self.deferred, slice(0, self.vocab)
        if self.half and wanted and self.grad_weight_VD is not None and len(targets_N) > self.chunk:
            self.sum_WD = torch.empty_like(self.weight_VD, dtype=self.dtype)  # an objective that needs whole rows
        for start in range(0, len(targets_N), self.chunk):
            rows = slice(start, start + self.chunk)
            raw_CV = self._product(rows, columns)
            for part, at in self._parts(rows, len(raw_CV), self.vocab):
                self._statistics([(columns, raw_CV[part])], at, weight_N, wanted)
            if wanted:
                self._accumulate(rows, columns, raw_CV)
        if self.sum_WD is not None:
            self.grad_weight_VD.copy_(self.sum_WD)
            self.sum_WD = None
        return Tokens(self.values_KN, mask_N)

    def _fill_blocks(self, weight_N) -> None:
        """Every block's logits, then, some tokens at a time, their statistics and their gradients in their place."""
        self.blocks.allocate(self.hidden_ND)
        blocks, rows = list(self.blocks), slice(0, len(self.hidden_ND))
        for columns, raw_NW in blocks:
            self._product(rows, columns, raw_NW)
        for part, at in self._parts(rows, len(self.hidden_ND), self.vocab):
            self._statistics([(columns, raw_NW[part]) for columns, raw_NW in blocks], at, weight_N, True)

    def _product(self, rows: slice, columns: slice, raw_CW=None) -> torch.Tensor:
        """Raw logits of some tokens and some of the vocabulary, in the head's dtype."""
        hidden_CD, weight_WD = self.hidden_ND[rows], self.weight_VD[columns]
        if raw_CW is None:
            raw_CW = view_of(self.raw, (len(hidden_CD), len(weight_WD)))
        if self.bias_V is None:
            return torch.mm(hidden_CD, weight_WD.t(), out=raw_CW)
        return torch.addmm(self.bias_V[columns], hidden_CD, weight_WD.t(), out=raw_CW)

    def _parts(self, rows: slice, count: int, width: int):
        """(rows of the chunk, rows of the micro-batch) of each part of `width` columns that fits into the work buffers."""
        step = max(1, self.span // width)
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield slice(start, stop), slice(rows.start + start, rows.start + stop)

    def _logits(self, pieces) -> torch.Tensor:
        """Transformed logits in fp32 or better, from raw ones side by side; those of a full-precision head in place."""
        if not self.half:
            return self.spec.transform.apply_(pieces[0][1])
        first = pieces[0][0].start
        logits_CW = view_of(self.buffers[0], (len(pieces[0][1]), pieces[-1][0].stop - first))
        for columns, raw_CW in pieces:
            logits_CW[:, columns.start - first : columns.stop - first].copy_(raw_CW)
        return self.spec.transform.apply_(logits_CW)

    def _statistics(self, pieces, rows, weight_N, wanted: bool) -> None:
        """Statistics of a part into `values_KN`; with `wanted` its raw logits become d objective / d raw logits."""
        spec, form, logits_CV, labels_C1 = self.spec, self.form, self._logits(pieces), self.labels_N1[rows]
        slope_CV = spec.transform.slope(logits_CV) if wanted else 1.0
        value_C = other_CV = possible_CV = mean_C = None
        if form is None:
            value_C, other_CV = _differentiate(spec.objective, logits_CV, labels_C1.squeeze(1), wanted)
        elif form.smoothing:
            possible_CV = logits_CV != -torch.inf
            self.possible_N[rows] = possible_CV.sum(-1).to(self.dtype)
            mean_C = logits_CV.masked_fill(~possible_CV, 0.0).sum(-1) / self.possible_N[rows]
        exp_CV = view_of(self.buffers[1], logits_CV.shape)
        values_5C, total_C1, log_total_C1 = statistics_in_place(logits_CV, exp_CV, labels_C1, spec.high_frequency_V)
        (surprisal_C, entropy_C, _, log_partition_C), product_CV = values_5C[:4], logits_CV
        if form is not None:
            value_C = closed_value(form, surprisal_C, log_partition_C, mean_C)
        self._record(values_5C, value_C, rows, weight_N)
        if not wanted:
            return
        c = spec.entropy_coefficient  # d entropy / d logit = -p (log p + entropy)
        factor_C1 = c * (log_total_C1 - entropy_C.unsqueeze(1)) + self._share(rows)
        gradient_CV = exp_CV.mul_(factor_C1 / total_C1)
        if c:
            gradient_CV.sub_(product_CV.mul_(c / total_C1))
        if form is None:
            gradient_CV.add_(other_CV)
        else:
            self._subtract_target(gradient_CV, rows, slice(0, self.vocab), possible_CV)
        self._keep(gradient_CV, slope_CV, pieces, rows)

    def _record(self, values_5C, value_C, rows, weight_N) -> None:
        """The statistics of some tokens, their weights, and the objective `value_C` with its entropy."""
        weight_C = token_weights(values_5C[0], self.spec.setting) if weight_N is None else weight_N[rows]
        self.values_KN[:5, rows], self.values_KN[5, rows] = values_5C, weight_C
        self.values_KN[6, rows] = value_C + self.spec.entropy_coefficient * values_5C[1]

    def _share(self, rows) -> torch.Tensor | float:
        """What a word's probability is multiplied with in its gradient, [C, 1] or a number; the entropy's part apart."""
        if self.form is None or not self.form.z:
            return float(self.form is not None)
        return (1.0 + 2.0 * self.form.z * self._values("log_partition", rows)).unsqueeze(1)

    def _subtract_target(self, gradient_CW, rows, columns, possible_CW) -> None:
        """What the objective wants of each word: most of the label, a little of every possible one in label smoothing."""
        labels_C1, e, last = self.labels_N1[rows] - columns.start, self.form.smoothing, columns.stop - columns.start - 1
        inside_C1 = (labels_C1 >= 0) & (labels_C1 <= last)
        gradient_CW.scatter_add_(1, labels_C1.clamp(0, last), inside_C1.to(gradient_CW.dtype) * (e - 1.0))
        if e:
            gradient_CW.sub_(possible_CW * (e / self.possible_N[rows].unsqueeze(1)))

    def _values(self, name: str, rows) -> torch.Tensor:
        return self.values_KN[FIELDS.index(name), rows]

    def _keep(self, gradient_CW, slope_CW, pieces, rows) -> None:
        """The gradient of a part takes the place of its raw logits; that of the bias is summed before it is rounded."""
        if not (isinstance(slope_CW, float) and slope_CW == 1.0):
            gradient_CW.mul_(slope_CW)
        first = pieces[0][0].start
        if self.grad_bias_V is not None:
            self.grad_bias_V[first : pieces[-1][0].stop].addmv_(gradient_CW.t(), self._coefficient(rows).squeeze(1))
        if self.hidden_ND.dtype == torch.float16:
            gradient_CW.mul_(self.boost)
        for columns, raw_CW in pieces:
            raw_CW.copy_(gradient_CW[:, columns.start - first : columns.stop - first])

    # ---- gradients ----------------------------------------------------------------------------------------------

    def gradients(self, scale, weight_VD, bias_V) -> tuple[torch.Tensor | None, ...]:
        """(grad_hidden_ND, grad_weight_VD, grad_bias_V) times `scale`; can be called once. The head is given again: under
        ZeRO-3 it has been partitioned and gathered since `run`, which is why `release_head` let go of it."""
        self.weight_VD, self.bias_V = weight_VD, bias_V
        if self.deferred:
            self.scale = scale
            if self.blocks is not None:
                self.grad_weight_VD = self.blocks.gradient()
                for columns, raw_NW in self.blocks:
                    self._accumulate(slice(0, len(self.hidden_ND)), columns, raw_NW)
            else:
                self.grad_weight_VD = self._new_grad_weight() if self.needs[1] else None
                self._tiles()
        elif self.grad_weight_VD is not None:
            self.grad_weight_VD.mul_(scale)  # in place: the largest tensor of the pass, and nobody else holds it
        small = [g.mul_(scale) if g is not None else None for g in (self.grad_hidden_ND, self.grad_bias_V)]
        return small[0], self.grad_weight_VD, small[1]

    def release_head(self) -> None:
        self.weight_VD = self.bias_V = None

    def _coefficient(self, rows) -> torch.Tensor:
        """weight_i / mean_weight, [C, 1]; 0 where nothing is supervised."""
        weight_C = self._values("weight", rows) / self.spec.setting.mean_weight
        return torch.where(self.mask_N[rows], weight_C, 0.0).unsqueeze(1)

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
        scaled_CD = hidden_CD * (weight_C1 * self.scale)
        if hidden_CD.dtype == torch.float16:
            part_WD = self._fp16_product(grad_CW, scaled_CD)
        elif self.sum_WD is None:  # all tokens at once
            torch.mm(grad_CW.t(), scaled_CD.to(hidden_CD.dtype), out=block_WD)
            return
        else:
            part_WD = torch.mm(grad_CW.t(), scaled_CD.to(hidden_CD.dtype))
        target_WD = block_WD if self.sum_WD is None else self.sum_WD
        target_WD.copy_(part_WD) if first else target_WD.add_(part_WD)

    def _fp16_product(self, grad_CW, scaled_CD) -> torch.Tensor:
        """Gradient of the head, fp32. Each column of `scaled_CD` (fp32) gets a size with which no sum over tokens overflows."""
        top_D = scaled_CD.abs().amax(dim=0).clamp_(min=1e-30) * (len(scaled_CD) * FP16_BOOST / FP16_TOP)
        part_WD = torch.mm(grad_CW.t(), (scaled_CD / top_D).to(grad_CW.dtype))
        return part_WD.float().mul_(top_D / self.boost)

    def _tiles(self) -> None:
        """Gradients of a closed form from the known log-partition and entropy, block of the vocabulary by block."""
        tokens, (size, width) = len(self.hidden_ND), self.tile
        several = tokens > size and self.grad_weight_VD is not None  # tiles fall on one block: sum them in fp32
        for left in range(0, self.vocab, width):
            columns = slice(left, min(left + width, self.vocab))
            if several:
                self.sum_WD = self.hidden_ND.new_empty((columns.stop - left, self.hidden_ND.shape[1]), dtype=self.dtype)
            for start in range(0, tokens, size):
                rows = slice(start, min(start + size, tokens))
                raw_CW = self._product(rows, columns)
                for part, at in self._parts(rows, *raw_CW.shape):
                    self._tile([(columns, raw_CW[part])], at)
                self._accumulate(rows, columns, raw_CW)
            if several:
                self.grad_weight_VD[columns] = self.sum_WD

    def _tile(self, pieces, rows) -> None:
        """Raw logits of a part of a tile become d (objective + coefficient * entropy) / d raw logits."""
        spec, logits_CW, (columns, _) = self.spec, self._logits(pieces), pieces[0]
        slope_CW = spec.transform.slope(logits_CW)
        possible_CW = logits_CW != -torch.inf if self.form.smoothing else None
        log_p_CW = logits_CW.sub_(self._values("log_partition", rows).unsqueeze(1))
        p_CW = torch.exp(log_p_CW, out=view_of(self.buffers[1], log_p_CW.shape))
        if spec.entropy_coefficient:
            entropy_C1 = self._values("entropy", rows).unsqueeze(1)
            log_p_CW.clamp_(min=-200.0).add_(entropy_C1).mul_(-spec.entropy_coefficient).add_(self._share(rows))
            p_CW.mul_(log_p_CW)
        elif self.form.z:
            p_CW.mul_(self._share(rows))
        self._subtract_target(p_CW, rows, columns, possible_CW)
        self._keep(p_CW, slope_CW, pieces, rows)


def closed_value(form, surprisal_C, log_partition_C, mean_C) -> torch.Tensor:
    """A `ClosedForm` of a token; `mean_C` is its mean logit over the possible words, where smoothing needs it."""
    value_C = surprisal_C
    if form.smoothing:
        value_C = (1.0 - form.smoothing) * surprisal_C + form.smoothing * (log_partition_C - mean_C)
    return value_C + form.z * log_partition_C.square() if form.z else value_C


def _differentiate(objective, logits_CV, labels_C, wanted: bool):
    """(objective_C, d objective / d logits or None); the logits stay as they are."""
    with torch.set_grad_enabled(wanted):
        leaf_CV = logits_CV.detach().clone().requires_grad_(wanted)
        value_C = objective(leaf_CV, labels_C)
        grad_CV = torch.autograd.grad(value_C, leaf_CV, torch.ones_like(value_C))[0] if wanted else None
    return value_C.detach(), grad_CV
