"""One view of the reduced gradient over DeepSpeed's optimizers (0.19.8), by ZeRO stage and precision.

Between the last backward of a step and `optimizer.step()` every DeepSpeed optimizer holds this rank's share of the
reduced gradient, each in a place of its own (deepspeed-notes: runtime/zero/stage3.py `averaged_gradients` and
`fp32_partitioned_groups_flat`, runtime/zero/stage_1_and_2.py, runtime/bf16_optimizer.py, runtime/fp16). These classes
name the place; they only read it. Gradients are changed elsewhere: in a step pre-hook of the base optimizer, where they
are fp32, unscaled and clipped (`stabilizers/averaging.py`), and through the clip value that DeepSpeed itself applies.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_stability.errors import StabilityConfigError
from ds_stability.layout import clear_padding, partition_layout
from ds_stability.norms import squared_norm


class ReducedGradients:
    """Reduced gradients of an engine at stage 0: replicated on every rank, in `param.grad`.

    Attributes:
        replicas: ranks that hold the same values; local sums are divided by it before the all-reduce.
        norm_is_global: whether every rank knows the whole |reduced gradient|^2 without a collective of ours.
        whole: that number after `squared_norm`, loss scale divided out; fp64.
    """

    norm_is_global, whole = False, None

    def __init__(self, engine):
        self.engine, self.optimizer = engine, engine.optimizer
        self.replicas = engine.seq_dp_world_size

    def partitions(self) -> list[torch.Tensor]:
        """fp32 parameter partitions that the base optimizer steps, in the order of `tensors()`; none at stage 0."""
        return []

    def tensors(self) -> Iterator[list[torch.Tensor]]:
        """Lists of gradient tensors, one list per optimizer group; any float dtype, still times `loss_scale`."""
        yield [p.grad for p in self.engine.module.parameters() if p.requires_grad and p.grad is not None]

    def squared_norm(self, device: torch.device) -> torch.Tensor:
        """This rank's share of |reduced gradient|^2, loss scale divided out: the sum over ranks is the whole. fp64 on `device`."""
        found = torch.zeros((), dtype=torch.float64, device=device)
        for tensors in self.tensors():
            if tensors:
                found += squared_norm(tensors).to(device, non_blocking=True)
        return found / (self.loss_scale**2 * self.replicas)

    @contextmanager
    def norm_known(self, squared: float) -> Iterator[None]:
        """DeepSpeed's step may take this |reduced gradient|^2 (of all ranks, loss scale divided out) for its own."""
        yield

    @property
    def loss_scale(self) -> float:
        if isinstance(self.optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
            return float(self.optimizer.loss_scale_config.cur_scale)
        return 1.0

    def scaling_down(self, scale: float) -> bool:
        """True if a skipped step at loss scale `scale` was a dynamic scale looking for its range."""
        return self.engine.fp16_enabled() and self.engine.dynamic_loss_scale() and self.loss_scale < scale

    def base_optimizers(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers whose `step` receives fp32, unscaled, clipped gradients."""
        if isinstance(self.optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
            return [self.optimizer.optimizer]
        return [self.optimizer]

    @contextmanager
    def clipped_at(self, threshold: float | None) -> Iterator[None]:
        """Clip this step at `threshold` (None: leave DeepSpeed's own value)."""
        if threshold is None:
            yield
            return
        # At stage 0 in fp32 the engine clips, by its config.
        plain = isinstance(self.optimizer, torch.optim.Optimizer)
        holder, name = (self.engine._config, "gradient_clipping") if plain else (self.optimizer, "clip_grad")
        static = getattr(holder, name)
        setattr(holder, name, min(static, threshold) if static > 0.0 else threshold)
        try:
            yield
        finally:
            setattr(holder, name, static)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Make DeepSpeed skip this step as it skips an overflow: no update, counted, learning rate held."""
        if isinstance(self.optimizer, torch.optim.Optimizer):  # stage 0 in fp32 has no overflow path of its own
            step = self.optimizer.step
            self.optimizer.step, self.optimizer.overflow = _no_step, True
            try:
                yield
            finally:
                self.optimizer.step = step
                self.optimizer.overflow = False
            return
        dense = next(tensor for tensor in next(self.tensors()) if not tensor.is_sparse)
        dense.view(-1)[:1].fill_(torch.nan)
        yield


class Zero12Gradients(ReducedGradients):
    """ZeRO stages 1 and 2 (`DeepSpeedZeroOptimizer`), with and without CPU offload."""

    def __init__(self, engine):
        super().__init__(engine)
        self.replicas = 1
        if not self.optimizer.compute_grad_norm:
            raise StabilityConfigError(
                "zero_optimization.compute_grad_norm is false, but ds_stability skips a bad step through the norm; leave it true"
            )

    def tensors(self):
        if self.optimizer.cpu_offload:
            self.optimizer._wait_for_offload_copies()  # else DeepSpeed waits for them inside its own step
        for index in range(len(self.optimizer.bit16_groups)):
            if self.optimizer.cpu_offload:
                yield [self.optimizer.single_partition_of_fp32_groups[index].grad]
            else:
                yield list(self.optimizer.averaged_gradients[index])

    def partitions(self):
        return list(self.optimizer.single_partition_of_fp32_groups)

    @property
    def loss_scale(self):
        return float(self.optimizer.loss_scale)

    def base_optimizers(self):
        return [self.optimizer.optimizer]

    @contextmanager
    def skipped(self):
        checked = self.optimizer.check_grad_overflow
        self.optimizer.check_grad_overflow = True  # bf16 looks at the norm only when asked to
        norm, self.optimizer.scaled_global_norm = self.optimizer.scaled_global_norm, _invalid_norm
        try:
            yield
        finally:
            self.optimizer.scaled_global_norm, self.optimizer.check_grad_overflow = norm, checked


class Zero3Gradients(ReducedGradients):
    """ZeRO stage 3, with and without optimizer or parameter offload to CPU.

    The norm is taken once in a step: DeepSpeed's own costs a copy of the gradient partition in fp64 and an all-reduce. With `exact`
    it is DeepSpeed's, taken a moment earlier and kept for its step, which stays as it is to the bit. Else DeepSpeed gets ours.
    """

    def __init__(self, engine, exact: bool):
        super().__init__(engine)
        # After an overflow in fp16 DeepSpeed takes no norm: to ask for one would be a collective more.
        self.exact, self.shared = exact, not (exact and self.optimizer.dtype == torch.float16)
        self.norm_is_global = self.exact and self.shared
        self.norm_groups: list[torch.Tensor] = []
        self.first = float(dist.get_rank(group=engine.seq_data_parallel_group) == 0)
        self.replicas = 1
        if self.optimizer.swap_optimizer:
            raise StabilityConfigError(
                "zero_optimization.offload_optimizer.device is 'nvme', which ds_stability does not support; use 'cpu' or 'none'"
            )
        clear_padding(self.partitions(), partition_layout(self.optimizer))

    def tensors(self):
        if self.optimizer.offload_optimizer and not get_accelerator().resolves_data_dependency():
            get_accelerator().current_stream().synchronize()  # copies to the host may still be under way
        for index in range(len(self.optimizer.fp16_groups)):
            if self.optimizer.offload_optimizer:
                yield [self.optimizer.fp32_partitioned_groups_flat[index].grad]
            else:
                yield list(self.optimizer.averaged_gradients[index])

    def partitions(self):
        return list(self.optimizer.fp32_partitioned_groups_flat)

    @property
    def loss_scale(self):
        return float(self.optimizer.loss_scale)

    def base_optimizers(self):
        backup = [self.optimizer.backup_optimizer] if self.optimizer.partial_offload < 1.0 else []
        return [self.optimizer.optimizer, *backup]

    def squared_norm(self, device):
        if not self.norm_is_global:
            return super().squared_norm(device)
        self.norm_groups = self.optimizer._get_norm_groups()
        norms = [torch.where(norm >= 0, norm, torch.nan).to(device).double() for norm in self.norm_groups]  # -1: not finite
        self.whole = torch.stack(norms).square().sum() / self.loss_scale**2
        return self.whole * self.first  # one rank brings it in, so that the sum over ranks is the same number

    @contextmanager
    def norm_known(self, squared):
        if not self.shared:
            yield
            return
        kept = self.norm_groups
        if not self.exact:
            kept = [torch.full((), squared**0.5 * self.loss_scale, dtype=torch.float64, device=self.optimizer.device)]
        with self._norm_groups(lambda: kept):
            yield

    def skipped(self):
        return self._norm_groups(lambda: [_invalid_norm()])

    @contextmanager
    def _norm_groups(self, function):
        groups, self.optimizer._get_norm_groups = self.optimizer._get_norm_groups, function
        try:
            yield
        finally:
            self.optimizer._get_norm_groups = groups


class BF16Gradients(ReducedGradients):
    """ZeRO stage 1 in bf16 with fp32 gradient accumulation (`BF16_Optimizer`)."""

    def __init__(self, engine):
        super().__init__(engine)
        self.replicas = 1

    def tensors(self):
        for partition in self.optimizer.fp32_groups_gradient_flat_partition:
            yield [partition]

    def partitions(self):
        return list(self.optimizer.fp32_groups_flat_partition)

    def base_optimizers(self):
        return [self.optimizer.optimizer]


def reduced_gradients(engine, exact: bool = True) -> ReducedGradients:
    """The view that fits the live `engine`. `exact`: its step stays as DeepSpeed makes it, to the bit.

    Raises:
        StabilityConfigError: the engine's optimizer is of a kind that has not been shown to work.
    """
    optimizer = engine.optimizer
    if "muon" in type(engine.basic_optimizer).__name__.lower():
        raise StabilityConfigError("the Muon optimizer does not work with ds_stability yet; use AdamW")
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return Zero3Gradients(engine, exact)
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return Zero12Gradients(engine)
    if type(optimizer) is BF16_Optimizer:
        return BF16Gradients(engine)
    if isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer | torch.optim.Optimizer):
        return ReducedGradients(engine)
    raise StabilityConfigError(
        f"DeepSpeed built a {type(optimizer).__name__}, which ds_stability does not support; "
        "use ZeRO stages 0 to 3 without ZenFlow, SuperOffload or a pipeline"
    )


def _no_step(closure=None):
    """Stands in for `optimizer.step` in a skipped step."""


def _invalid_norm(*args, **kwargs):
    return torch.tensor(-1.0)  # DeepSpeed's own sign of an invalid norm (runtime/utils.py, is_invalid_grad_norm)
