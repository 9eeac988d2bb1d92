"""Groups and chance levels of the lm-eval adapter, against lm-eval's own."""

from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.metrics import aggregate_subtask_metrics  # noqa: E402

from ds_stability.eval.downstream_measures import chance, group_measures  # noqa: E402
from ds_stability.eval.records import Measured  # noqa: E402


def test_group_is_weighted_as_in_lm_eval():
    parts = []
    for name, hits in (("a", [1, 0, 1]), ("b", [0, 0, 0, 0, 1])):
        settings = {"task": name, "filter": "none", "documents": len(hits), "chance": 0.25 if name == "a" else 0.5}
        parts.append(Measured(f"{name}_acc", list(range(len(hits))), hits, [1] * len(hits), settings=settings))
    for by_size in (True, False):
        wanted = SimpleNamespace(metric="acc", filter_list=["none"], weight_by_size=by_size)
        tasks = [SimpleNamespace(task_name="a"), SimpleNamespace(task_name="b")]
        group = SimpleNamespace(name="g", get_all_tasks=lambda tasks=tasks: tasks, aggregate_metric_list=[wanted])
        (row,) = group_measures([group], parts)
        assert row.metric == "g_acc" and row.value == pytest.approx(aggregate_subtask_metrics([2 / 3, 1 / 5], [3, 5], by_size))
        assert row.settings["chance"] == pytest.approx(aggregate_subtask_metrics([0.25, 0.5], [3, 5], by_size))


def test_chance_of_several_right_answers():
    documents = [
        {"arguments": [()] * 4, "metrics": ["acc"], "target": 1},
        {"arguments": [()] * 2, "metrics": ["acc"], "target": [0, 1]},
    ]
    assert chance("multiple_choice", "acc", documents) == pytest.approx((1 / 4 + 1) / 2)
    assert chance("multiple_choice", "f1", documents) is None and chance("loglikelihood", "acc", documents) is None
    assert chance("generate_until", "exact_match", documents) == 0.0 and chance("generate_until", "bleu", documents) is None
