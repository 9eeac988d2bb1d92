"""With no dose-response at all: how often is one found? Trends after Holm, predictions, arms, and bounds met with equality."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
from test_trend import make_groups  # noqa: E402

from ds_stability.eval import aggregate, trend, verdict  # noqa: E402
from ds_stability.eval.arms import arms_table  # noqa: E402
from ds_stability.eval.predictions import Prediction  # noqa: E402
from ds_stability.eval.report_tables import metric_family  # noqa: E402
from ds_stability.eval.verdict import ENTROPY, HIGH_FREQUENCY, MET, NOT_MET, Facts  # noqa: E402

SWEEPS = 120
ARCHITECTURES, LEVELS = ("a", "b"), (0.0, 0.5, 1.0)


def at_most_nominal(hits: int, sweeps: int = SWEEPS, rate: float = 0.05) -> bool:
    """Whether so many hits are no sign, at 1 in 1000, of a rate above the nominal one."""
    return stats.binom.sf(hits - 1, sweeps, rate) > 1e-3


def sweep_without_effect(random, seeds) -> dict:
    """Groups in which a run deviates by itself, a seed and a unit do at all levels, and the level does nothing."""
    groups: dict = {}
    for architecture in ARCHITECTURES:
        for arm in ("feedback", "clipping"):
            own = [0.95 + 0.08 * random.normal() for _ in range(seeds)]
            curve = {level: own for level in LEVELS if arm == "feedback" or level}
            merged: dict = {}
            for key in (ENTROPY, HIGH_FREQUENCY):
                for group, cells in make_groups(curve, range(seeds), 0.05, 6, key, architecture, arm, random, step=0.05).items():
                    if group in merged:
                        for cell, other in zip(merged[group], cells, strict=True):
                            cell.rows |= other.rows
                            cell.measured |= other.measured
                    merged.setdefault(group, cells)
            groups |= merged
    return groups


def facts_of(groups) -> Facts:
    rows = [row for key in (ENTROPY, HIGH_FREQUENCY) for row in aggregate.group_rows(groups, key)]
    trends = [trend.trend(name, "feedback", key, groups) for name in ARCHITECTURES for key in (ENTROPY, HIGH_FREQUENCY)]
    trend.adjust(trends, metric_family)
    return Facts(rows, trends, "feedback", 0.0, groups)


@pytest.mark.parametrize("seeds", [2, 5])
def test_nothing_is_found_where_nothing_is(seeds):
    random, hits = np.random.default_rng(seeds), dict.fromkeys(("page", "slope", "direction", "bound", "arms"), 0)
    falls = Prediction("P", "falls", ENTROPY, direction="falls")
    at_bound = Prediction("P", "is at its bound", HIGH_FREQUENCY, minimum=0.95)
    for _ in range(SWEEPS):
        facts = facts_of(sweep_without_effect(random, seeds))
        held_out = [item for item in facts.trends.values() if item.key == ENTROPY]
        hits["page"] += any(item.p_adjusted < 0.05 for item in held_out)
        hits["slope"] += any(item.slope_p_adjusted < 0.05 for item in held_out)
        hits["direction"] += verdict.judge(falls, facts).outcome in (MET, NOT_MET)
        hits["bound"] += verdict.judge(at_bound, facts).outcome in (MET, NOT_MET)
        lines = [line for line in arms_table(facts, (ENTROPY,)) if line["group"].architecture == "a"]
        hits["arms"] += any(line["adjusted"][ENTROPY] < 0.05 for line in lines)
    assert all(at_most_nominal(count) for count in hits.values()), hits


def test_the_trend_test_holds_its_level_over_many_sweeps():
    """Page's p at 3 seeds and 5 levels: at most the share of sweeps that it says, at every level of it."""
    random = np.random.default_rng(9)
    p = np.array([trend.page_test(random.normal(size=(3, 1)) + random.normal(size=(3, 5)))[0] for _ in range(2000)])
    for level in (0.01, 0.05, 0.2, 0.5):
        assert at_most_nominal(int((p <= level).sum()), 2000, level) and (p <= level).mean() > 0.8 * level, level
