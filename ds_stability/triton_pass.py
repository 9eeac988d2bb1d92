"""The linear loss with Triton's row kernels: raw logits in, statistics and gradients out, no fp32 work buffers.

What remains torch's is what the vocabulary has no part in: weights, values of the objective, matrix products.

Shape suffixes as in `linear_pass.py`.
"""

import sys

import torch

from ds_stability import triton_rows
from ds_stability.linear_pass import Pass, closed_value

#: Elements of a gradient that are widened at a time where that of the bias is summed.
BIAS_ELEMENTS = 2**22


class TritonPass(Pass):
    """A `Pass` for a closed form in fp32, bf16 or fp16, on what triton was installed for, or in its interpreter.

    The gradient of the bias is summed in fp32 from what the logits' gradient was rounded to; `Pass` sums it before.
    """

    buffered = False

    def _make_buffers(self, size: int) -> None:
        self.span, self.buffers = sys.maxsize, []

    def _boost(self) -> torch.Tensor:
        """A tensor on the device in any case: nothing is copied to it."""
        return self.boost if torch.is_tensor(self.boost) else self.hidden_ND.new_full((), self.boost, dtype=torch.float32)

    def _statistics(self, pieces, rows, weight_N, wanted: bool) -> None:
        columns, raw_CW = pieces[0]  # the other blocks lie behind it
        found_KC = triton_rows.statistics(raw_CW, self.labels_N1[rows].squeeze(1), self.vocab, columns.stop - columns.start,
                                          self._boost(), self.spec, self.form, wanted)  # fmt: skip
        values_5C, self.possible_N[rows] = found_KC[:5], found_KC[5]
        value_C = closed_value(self.form, values_5C[0], values_5C[3], found_KC[6])
        self._record(values_5C, value_C, rows, weight_N)
        if wanted:
            self._add_bias(pieces, rows)

    def _tile(self, pieces, rows) -> None:
        columns, raw_CW = pieces[0]
        triton_rows.tile_gradient(raw_CW, self.labels_N1[rows].squeeze(1), columns.start, self._values("log_partition", rows),
                                  self._values("entropy", rows), self.possible_N[rows], self._boost(), self.spec, self.form)  # fmt: skip
        self._add_bias(pieces, rows)

    def _add_bias(self, pieces, rows) -> None:
        if self.grad_bias_V is None:
            return
        coefficient_C = (self._coefficient(rows) / self.boost).squeeze(1)
        for columns, raw_CW in pieces:
            step = max(1, BIAS_ELEMENTS // raw_CW.shape[1])
            for some_CW, some_C in zip(raw_CW.split(step), coefficient_C.split(step), strict=True):
                self.grad_bias_V[columns].addmv_(some_CW.to(self.dtype).t(), some_C)
