"""Invariant 8: the same seed and world size give the same metrics, times aside."""

import pytest

BLOCK = {"level": 0.5, "controller": {"warmup_steps": 2},
         "stabilizers": {"feedback": {}, "clipping": {"level": 0.3}, "averaging": {"level": 0.2},
                         "regularization": {"level": 0.5}}}  # fmt: skip
RUNS = [{"name": name, "arch": arch, "steps": 8, "stability": BLOCK, "evaluate": evaluate}
        for arch in ("llama", "gpt2")
        for name, evaluate in ((f"{arch}_first", False), (f"{arch}_second", False), (f"{arch}_evaluated", True))]  # fmt: skip


@pytest.fixture(scope="module")
def results(trainings):
    return trainings(RUNS)


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in rows]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_same_metrics_twice(results, arch):
    first, second = results[f"{arch}_first"], results[f"{arch}_second"]
    assert without_times(first["metrics"]) == without_times(second["metrics"])
    assert first["state"] == second["state"]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_evaluation_passes_change_no_state(results, arch):
    first, evaluated = results[f"{arch}_first"], results[f"{arch}_evaluated"]
    assert without_times(first["metrics"]) == without_times(evaluated["metrics"])
    assert all((first["weights"][k] == evaluated["weights"][k]).all() for k in first["weights"])
