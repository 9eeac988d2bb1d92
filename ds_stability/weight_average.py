"""EMA: an exponential moving average of the weights beside the training, which does not see it.

With theta_n the weights after n applied steps and s = start_step, avg = theta_s at n = s, and after the t-th step from there

    avg = d_t avg + (1 - d_t) theta,    d_t = min(decay, (1 + t) / (10 + t)),  t = 1, 2, ...    (d_t = decay without warm-up)

as in TensorFlow's ExponentialMovingAverage with num_updates. Averaging of iterates: Polyak and Juditsky 1992; as an EMA in
deep learning: Morales-Brotons et al. 2024, arXiv 2411.18704. Each rank averages its own partition of the fp32 master weights,
in fp32, where the optimizer has it: no collective, no host sync, one more copy of the partition.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ds_stability.ema_config import EmaConfig
from ds_stability.masters import refresh_parameters, release_parameters

#: Elements that are exchanged at a time.
PIECE = 2**22
WARMUP_STEPS = 10


def decay_at(config: EmaConfig, update: int) -> float:
    """d_t of the average's t-th step, t = `update` = 1, 2, ..."""
    return min(config.decay, (1 + update) / (WARMUP_STEPS + update)) if config.warmup else config.decay


class WeightAverage:
    """The average of this rank's partitions.

    Args:
        partitions: gives the fp32 master partitions, in an order that stays.

    Attributes:
        tensors: partition index -> average, flat fp32; empty before the first step that counts.
        updates: t, applied steps that are in the average.
        swapped: whether the averages now stand in place of the weights, which `tensors` then hold.
        stale: whether the parameters are still those of the averages, after an error.
    """

    def __init__(self, config: EmaConfig, partitions: Callable[[], list[torch.Tensor]]):
        self.config, self.partitions = config, partitions
        self.tensors: dict[int, torch.Tensor] = {}
        self.updates, self.swapped, self.stale = 0, False, False

    def begin(self, applied_steps: int) -> None:
        """Called before each step: where the average is to begin, it begins with the weights."""
        if not self.tensors and applied_steps >= self.config.start_step:
            self.tensors = {index: part.detach().clone() for index, part in enumerate(self.partitions())}

    @torch.no_grad()
    def update(self) -> None:
        """Called after each applied step."""
        if self.tensors:
            self.updates += 1
            weights = [part.detach() for part in self.partitions()]
            torch._foreach_lerp_(list(self.tensors.values()), weights, 1.0 - decay_at(self.config, self.updates))

    def clear(self) -> None:
        """Begin anew: other weights were loaded."""
        self.tensors, self.updates = {}, 0

    def metrics(self) -> dict[str, float]:
        """The decay of the last step; 0 before the average begins, when it would be the weights."""
        return {"stability/weight_average_decay": decay_at(self.config, self.updates) if self.updates else 0.0}

    @contextmanager
    def in_place_of_weights(self, engine) -> Iterator[None]:
        """The averages as the model's weights; afterwards the weights again, to the bit. Collective, between steps.

        Nested, or before the average has begun, it does nothing. After an error inside, the masters are the weights again at once,
        and the parameters at the next call of `mend`: what fails on one rank must not wait for the others.
        """
        if self.swapped or not self.updates:
            yield
            return
        release_parameters(engine)
        self._exchange()
        try:
            refresh_parameters(engine)
            yield
        except BaseException:
            self._exchange()
            self.stale = True
            raise
        release_parameters(engine)
        self._exchange()
        refresh_parameters(engine)

    def require_plain(self, engine, what: str) -> None:
        """See to it that the parameters are those of the training. Raises RuntimeError inside `averaged_weights()`."""
        self.mend(engine)
        if self.swapped:
            raise RuntimeError(f"{what} is not possible inside averaged_weights(), where the weights are not those of the training")

    def mend(self, engine) -> None:
        """Called before a forward, a checkpoint, an export and evaluation metrics: makes the parameters anew after an error in
        `in_place_of_weights`."""
        if self.stale:
            self.stale = False
            release_parameters(engine)
            refresh_parameters(engine)

    @torch.no_grad()
    def _exchange(self) -> None:
        for part, average in zip(self.partitions(), self.tensors.values(), strict=True):
            for start in range(0, average.numel(), PIECE):
                weights, averages = part.data[start : start + PIECE], average[start : start + PIECE]
                kept = weights.clone()
                weights.copy_(averages)
                averages.copy_(kept)
        self.swapped = not self.swapped

    def state_dict(self) -> dict:
        """What is not in the tensors, which the checkpoint keeps apart."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Continue; the checkpoint has filled `tensors`, if there are updates."""
        self.updates = state["updates"]
