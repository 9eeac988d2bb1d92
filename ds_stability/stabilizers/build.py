"""The stabilizers that a stability block names."""

import torch

from ds_stability.collective import require_equal
from ds_stability.config import StabilityConfig
from ds_stability.console import agree
from ds_stability.controller import FeedbackController
from ds_stability.stabilizers.averaging import Averaging
from ds_stability.stabilizers.clipping import Clipping
from ds_stability.stabilizers.feedback import Feedback, read_gains
from ds_stability.stabilizers.governance import Governance
from ds_stability.stabilizers.regularization import Regularization

NAMES = ("feedback", "governance", "clipping", "averaging", "regularization")


def build_stabilizers(config: StabilityConfig, device: torch.device, group) -> dict:
    """{name: stabilizer} of those in use, in the order of `NAMES`. Collective where gains are replayed.

    Raises:
        StabilityConfigError: the gains to replay cannot be read, or differ between ranks.
    """
    control, families = config.controller, config.families
    parts = {}
    if config.governed:
        parts["governance"] = Governance(control, config.statistics.ema_decay)
    else:
        parts["feedback"] = _feedback(config, device, group)
    if config.max_level("clipping") > 0:
        parts["clipping"] = Clipping(lambda step: config.family_level("clipping", step), control.warmup_steps,
                                     families["clipping"].ema_decay)  # fmt: skip
    if config.max_level("averaging") > 0:
        parts["averaging"] = Averaging(lambda step: config.family_level("averaging", step), families["averaging"].beta_max)
    if config.max_level("regularization") > 0:
        family = families["regularization"]
        parts["regularization"] = Regularization(lambda step: config.family_level("regularization", step),
                                                 family.kind, family.max)  # fmt: skip
    return parts


def _feedback(config: StabilityConfig, device: torch.device, group) -> Feedback:
    control, family = config.controller, config.families.get("feedback")
    gains = None
    if family is not None and family.replay is not None:
        gains = agree(lambda: read_gains(family.replay))
        require_equal({"gains": gains}, device, group, "replayed gains")
    controller = FeedbackController(
        lambda step: config.family_level("feedback", step),
        control.warmup_steps, control.ramp_steps, control.gain_max, control.trim_kp, control.trim_ki,
        control.trim_max, config.statistics.ema_decay, gains,
    )  # fmt: skip
    return Feedback(controller, family is not None and family.permute)
