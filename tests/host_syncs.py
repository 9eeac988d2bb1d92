"""Counts what would make a GPU's host wait: a tensor's value asked for by Python.

On a CPU nothing waits, but the questions are the same: `item`, `bool`, `float`, `int` and indexing by a tensor's value all
dispatch `aten::_local_scalar_dense`; `cpu` and `tolist` are Tensor methods, watched by name (`numpy` takes host tensors only);
the number of non-zero elements decides a shape.
"""

import traceback
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default,
             torch.ops.aten.masked_select.default, torch.ops.aten.equal.default, torch.ops.aten.allclose.default}  # fmt: skip
METHODS = ("cpu", "tolist")


class HostSyncs(TorchDispatchMode):
    """`with HostSyncs().watching() as syncs: ...`, then `syncs.places`: (what was asked, the lines that asked) of each."""

    def __init__(self):
        super().__init__()
        self.places = []

    def note(self, name):
        self.places.append((name, [f"{line.filename}:{line.lineno}" for line in traceback.extract_stack()[-8:-2]]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPERATORS:
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self):
        with ExitStack() as stack:
            for name in METHODS:
                stack.enter_context(mock.patch.object(torch.Tensor, name, self._watched(getattr(torch.Tensor, name), name)))
            stack.enter_context(self)
            yield self

    def _watched(self, method, name):
        def call(tensor, *args, **kwargs):
            self.note(name)
            return method(tensor, *args, **kwargs)

        return call
