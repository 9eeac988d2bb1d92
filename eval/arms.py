"""Which arms concentrate: every arm and level against the baseline, paired by seed and unit."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .aggregate import Group
from .contrasts import holm
from .report_cells import UNTOUCHED, Key
from .verdict import ENTROPY, HIGH_FREQUENCY, SIGNIFICANT, UNDECIDED, Facts

YES, IN_PART, SPREADS, MIXED, NOT_SHOWN = "yes", "in part", "spreads", "mixed", "not shown"
Row = dict[str, Any]


def arms_table(facts: Facts, keys: Sequence[Key]) -> list[Row]:
    """A line per arm and level: its rows by key, the adjusted p of their differences, and whether it concentrates.

    Adjusted (Holm) over all arms and levels of one key within an architecture.
    """
    groups = {group for _, group in facts.rows if group.level is not None and not group.arm.startswith(UNTOUCHED)}
    adjusted = {key: _adjusted(facts, key, groups) for key in {*keys, ENTROPY, HIGH_FREQUENCY}}
    lines = []
    for group in sorted(groups, key=lambda g: (g.architecture, g.arm != facts.main_arm, g.arm, g.level)):
        found = {key: facts.rows.get((key, group)) for key in keys}
        if not any(row and row["difference"] is not None for row in found.values()):
            continue
        entropy, share = facts.rows.get((ENTROPY, group)), facts.rows.get((HIGH_FREQUENCY, group))
        own = facts.rows.get((ENTROPY, group._replace(arm=facts.main_arm or "")))
        lines.append({"group": group, "rows": found, "adjusted": {key: adjusted[key].get(group) for key in keys}, "entropy": entropy,
                      "concentrates": concentration(_side(entropy, adjusted[ENTROPY].get(group)), _side(share, adjusted[HIGH_FREQUENCY].get(group))),
                      "relative": _relative(entropy, own, adjusted[ENTROPY].get(group._replace(arm=facts.main_arm or "")))})  # fmt: skip
    return lines


def _adjusted(facts: Facts, key: Key, groups: set[Group]) -> dict[Group, float]:
    """Holm's p of each group's difference; of groups whose difference has two seeds or more."""
    families: dict[str, dict[Group, float]] = defaultdict(dict)
    for group in groups:
        row = facts.rows.get((key, group))
        if row and row["difference_p"] is not None and row["difference_seeds"] > 1:
            families[group.architecture][group] = row["difference_p"]
    return {group: p for family in families.values() for group, p in zip(family, holm(list(family.values())), strict=True)}


def _side(row: Row | None, adjusted: float | None) -> int | None:
    """1 or -1 where the difference is decided, 0 where it is not, None where nothing could be tested."""
    if row is None or adjusted is None:
        return None
    return 0 if adjusted >= SIGNIFICANT else 1 if row["difference"] > 0 else -1


def concentration(entropy: int | None, share: int | None) -> str:
    """By the sides on which the differences of entropy and high-frequency share lie: below and above the baseline.

    "not shown" where neither is decided: that is not "no". One seed decides nothing.
    """
    if entropy is None or share is None:
        return UNDECIDED
    toward, away = [entropy < 0, share > 0], [entropy > 0, share < 0]
    if any(away):
        return MIXED if any(toward) else SPREADS
    return YES if all(toward) else IN_PART if any(toward) else NOT_SHOWN


def _relative(row: Row | None, reference: Row | None, adjusted: float | None) -> float | None:
    """A change of entropy as a share of the dose-response arm's at the same level; None where that one's is not decided."""
    if not row or row["difference"] is None or not _side(reference, adjusted):
        return None
    return row["difference"] / reference["difference"]
