"""The four families of stabilizers. Each is driven by the same level and can be used alone.

A stabilizer is an object with five methods, `Stabilizer` below. Its state is Python floats, advanced only by applied
steps from global sums, and therefore the same on every rank; state as large as the parameters lives in
`optimizer_hooks.py` and is per rank.
"""

from typing import Protocol

from ds_stability.loss import StabilityLoss
from ds_stability.statistics import StepSums


class Stabilizer(Protocol):
    def prepare(self, step: int, loss: StabilityLoss) -> None:
        """Set what applied step `step`, the coming one, uses."""

    def update(self, sums: StepSums) -> None:
        """Advance by one applied step with finite global sums."""

    def metrics(self) -> dict[str, float | None]:
        """What was in force in the step that `update` is about to close."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...
