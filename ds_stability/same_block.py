"""Whether a checkpoint was written under the stability block that a run has."""

from ds_stability.errors import StabilityConfigError

STATE_VERSION = 2  # of the state that `Stability.state_dict` gives
#: Keys that blocks did not always have, with what an absent one means.
LATER = {"ema": None, "loss_kernel": "torch"}


def training_part(block: dict) -> dict:
    """The block without what only looks on: a run may be resumed with another probe."""
    onlookers = ("max_skipped_steps",) if block["alarm"]["action"] == "govern" else ("probe", "alarm", "max_skipped_steps")
    return {key: value for key, value in without_absent(block).items() if key not in onlookers}


def without_absent(block: dict) -> dict:
    """The block as it was before `ema` and `loss_kernel` were keys, where they say what was done then: that is the same block."""
    return {key: value for key, value in block.items() if key not in LATER or value != LATER[key]}


def require_version(state: dict) -> None:
    """Raises StabilityConfigError for a state of another version of the format."""
    if state["version"] != STATE_VERSION:
        raise StabilityConfigError(
            f"the checkpoint's stability state has version {state['version']} and this release reads {STATE_VERSION} (since 2, averages of "
            "surprisal weigh tokens, not steps); go on with the release that wrote it, or start a new run from its weights"
        )


def require_same_block(old: dict, new: dict) -> None:
    """Raises StabilityConfigError where a checkpoint's block `old` is not the run's block `new`."""
    if old["loss_path"] != new["loss_path"] and old | {"loss_path": new["loss_path"]} == new:
        raise StabilityConfigError(
            f"the checkpoint was written with stability.loss_path {old['loss_path']!r} and this run has {new['loss_path']!r}, which "
            f'rounds differently; set stability.loss_path to "{old["loss_path"]}" to resume'
        )
    if old != new:
        raise StabilityConfigError(
            f"the checkpoint was written with another stability block ({difference(old, new)})"
            "; resume with the same block (a level that changes over time is a schedule: [[step, level], ...])"
        )


def difference(old: dict, new: dict, path: str = "stability") -> str:
    """The first key in which two blocks differ, as text."""
    for key in sorted(old.keys() | new.keys()):
        a, b = (block.get(key, LATER.get(key)) for block in (old, new))
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            return difference(a, b, f"{path}.{key}")
        if a != b:
            return f"{path}.{key}: {a!r} there, {b!r} here"
    return "no difference"
