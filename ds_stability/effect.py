"""What a block will do in a run of so many steps, said before it, and what it has done, said after it.

A level in a run that is shorter than its warm-up acts like no level at all, and nothing in such a run looks wrong.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ds_stability.config import StabilityConfig
from ds_stability.config_controller import WINDOW_TOKENS
from ds_stability.schedule import level_at
from ds_stability.takeover import CLIPPING, GOVERNOR


def first_step(config: StabilityConfig, part: str) -> int | None:
    """The first applied step in which `part` (a family or "governor") acts; None if never. `config` is resolved."""
    if part == "governor":
        return config.controller.warmup_steps
    schedule = config.family_schedule(part)
    if config.max_level(part) <= 0.0:
        return None
    start = 0
    if part == "feedback" and config.families["feedback"].replay is None:
        start = config.controller.warmup_steps
    if part == "clipping":
        start = max(config.controller.warmup_steps, 2)
    points = [] if isinstance(schedule, float) else [step + more for step, _ in schedule for more in (0, 1)]
    return next((step for step in sorted({start, *points}) if step >= start and level_at(schedule, step) > 0.0), None)


def ramp_steps(config: StabilityConfig, part: str) -> int:
    """Applied steps from the first in which `part` acts until it acts in full."""
    if part == "governor":
        return config.controller.setpoint_ramp_steps
    replayed = part == "feedback" and config.families["feedback"].replay is not None
    return config.controller.ramp_steps if part == "feedback" and not replayed else 0


def outlook(config: StabilityConfig, steps: int, behind: int = 0, anew: Collection[str] = ()) -> list[str]:
    """One line for each part that acts, or should, in a run of `steps` applied steps; `config` is resolved.

    Averages and objectives act from the first step, and have none.

    Args:
        behind: how many of the steps are those of a branch's trunk. anew: what begins after them (takeover.py).
    """
    lines, trunk = [], f", {behind} of them the trunk's" if behind else ""
    for part in _acting(config):
        if part == "governor" and config.controller.start == "alarm":
            lines.append(f"governor: {steps} steps; begins when the alarm says so")
            continue
        begin = first_step(config, part)
        opening = _opening(config, part, begin)
        if begin is not None and CLIPPING in anew and part == "clipping":
            begin = max(begin, behind + max(config.controller.warmup_steps, 2))
            opening = f"warm-up {begin}"
        if begin is not None and GOVERNOR in anew and part == "governor" and begin < behind:
            begin, opening = behind, "warm-up of the trunk"
        if begin is None or begin >= steps:
            lines.append(f"{part}: {steps} steps{trunk}; {opening}; never acts: {_remedy(config, part)}")
            continue
        full = begin + ramp_steps(config, part)
        ramp, first = f", ramp to {full}" if full > begin else "", max(full, behind)
        acts = f"acts for {steps - first} steps" if full < steps else f"only its ramp acts, for {steps - begin} steps: {_remedy(config, part)}"
        lines.append(f"{part}: {steps} steps{trunk}; {opening}{ramp}; {acts}")
    return lines


def outlooks(config: StabilityConfig) -> list[str]:
    """From which step on each part acts, where neither the model nor the number of steps is known."""
    fresh, tuned = config.resolve(pretrained=False), config.resolve(pretrained=True)
    lines = []
    for part in _acting(fresh):
        found = [first_step(resolved, part) for resolved in (fresh, tuned)]
        if None in found:
            continue
        full = [begin + ramp_steps(fresh, part) for begin in found]
        other = f" (of a pretrained model: {found[1]} and {full[1]})" if found[0] != found[1] else ""
        lines.append(f"{part} acts from applied step {found[0]} on, in full from {full[0]}{other}")
    return lines


def _acting(config: StabilityConfig) -> list[str]:
    return (["governor"] if config.governed else []) + [name for name in config.families if config.max_level(name) > 0.0]


def _opening(config: StabilityConfig, part: str, begin: int | None) -> str:
    waits = part in ("governor", "feedback", "clipping") and begin == config.controller.warmup_steps
    return f"warm-up {begin}" if waits else f"level 0 until {begin}" if begin else "no warm-up" if begin == 0 else "level 0 throughout"


def _remedy(config: StabilityConfig, part: str) -> str:
    ramp = {"governor": " or controller.setpoint_ramp_steps", "feedback": " or controller.ramp_steps"}.get(part, "")
    return f"lower stability.controller.warmup_steps{ramp}, or raise the number of steps (--max_steps)"


def held_ratio(metrics: Mapping[str, Any]) -> float | None:
    """The variance ratio to set beside the target in a step: of few tokens that of the window, as their own comes out too high."""
    windowed = metrics.get("stability/windowed_variance_ratio")
    few = (metrics.get("stability/tokens") or 0.0) < WINDOW_TOKENS
    return windowed if few and windowed is not None else metrics.get("stability/variance_ratio")


class Effect:
    """Counts what the parts of a block did in the steps of this process; `config` is resolved."""

    def __init__(self, config: StabilityConfig):
        self.config, self.parts = config, _acting(config)
        self.steps = self.applied = self.full = self.saturated = self.ramping = 0
        self.value = self.target = 0.0
        self.acted = dict.fromkeys(self.parts, 0)

    def observe(self, applied_step: int, metrics: Mapping[str, Any]) -> None:
        """Take in a step: its number among the applied ones, from 0, and its metrics."""
        self.steps += 1
        if metrics.get("skipped"):
            return
        self.applied += 1
        for part in ("feedback", "governor"):
            if part in self.parts:
                self._hold(part, applied_step, metrics)
        threshold, norm = metrics.get("stability/clip_threshold"), metrics.get("grad_norm")
        acts = {
            "clipping": threshold is not None and norm is not None and norm > threshold,
            "averaging": (metrics.get("stability/averaging_beta") or 0.0) > 0.0,
            "regularization": (metrics.get("stability/regularization_coefficient") or 0.0) > 0.0,
        }
        for part in acts.keys() & self.acted.keys():
            self.acted[part] += acts[part]

    def _hold(self, part: str, applied_step: int, metrics: Mapping[str, Any]) -> None:
        if part == "feedback":
            value, target = held_ratio(metrics), metrics.get("stability/target_ratio")
        else:
            value, target = metrics.get("stability/governor_statistic"), metrics.get("stability/governor_setpoint")
        acts = metrics.get("stability/gain") or metrics.get("stability/entropy_bonus")
        self.acted[part] += bool(acts)
        begin = first_step(self.config, part)
        if part == "feedback":
            full = begin is not None and applied_step >= begin + ramp_steps(self.config, part) and target is not None and target < 1.0
        else:
            full = target is not None and target == metrics.get("stability/governor_target")
        self.ramping += bool(acts) and not full
        if full and value is not None:
            self.full += 1
            self.saturated += bool(metrics.get("stability/saturated"))
            self.value, self.target = self.value + value, self.target + target

    def lines(self) -> list[str]:
        """What each part did; nothing where nothing was to act."""
        return [self._line(part) for part in self.parts]

    def _line(self, part: str) -> str:
        if part not in ("feedback", "governor"):
            return f"{part}: acted in {self.acted[part]} of {self.steps} steps"
        if not self.full:
            done = f"on its ramp alone, for {self.ramping} steps" if self.ramping else "in no step"
            return f"{part}: acted {done} of {self.steps}, so nothing was held: {_remedy(self.config, part)}"
        kind = "variance ratio" if part == "feedback" else self.config.controller.statistic.replace("_", " ")
        goal = "target" if part == "feedback" else "set point"
        return (f"{part}: held {kind} {self.value / self.full:.4g} ({goal} {self.target / self.full:.4g}) over {self.full} of "
                f"{self.steps} steps; saturated in {self.saturated}")  # fmt: skip
