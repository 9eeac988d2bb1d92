"""Invariant 7: the mean variance ratio over steps 31..130 after warm-up is within .02 of 1 - level."""

import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WARMUP = {"llama": 100, "gpt2": 100, "trained": 10}  # the defaults from scratch and from pretrained weights
LEVELS = (0.25, 0.5, 0.75)
FAST = ["llama:0.25", "llama:0.75", "trained:0.5"]
SLOW = ["llama:0.5", "trained:0.25", "trained:0.75", *(f"gpt2:{level}" for level in LEVELS)]
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


def load_common():
    path = HERE.parent.parent / "benchmarks" / "common.py"
    spec = importlib.util.spec_from_file_location("benchmarks_common", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_cases(run_ranks, tmp_path_factory):
    def run(*cases):
        out = tmp_path_factory.mktemp("ratio") / "out.json"
        process = run_ranks(HERE / "ratio_worker.py", str(out), *cases, timeout=560)
        assert out.exists(), process.stderr[-4000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="module")
def fast_rows(run_cases):
    return run_cases("llama:0.0", *FAST)  # the trained models go on from this one's weights


@pytest.fixture(scope="module")
def slow_rows(run_cases):
    return run_cases("llama:0.0", *SLOW)


@pytest.fixture
def rows(request, case):
    return request.getfixturevalue("fast_rows" if case in FAST else "slow_rows")


@pytest.mark.parametrize("case", CASES)
def test_the_level_is_reached(rows, case):
    level, warmup = float(case.split(":")[1]), WARMUP[case.split(":")[0]]
    ratios = [row["stability/variance_ratio"] for row in rows[case]]
    assert min(row["stability/tokens"] for row in rows[case]) > 900  # 1,024 less the first tokens of documents
    estimate = load_common().mean_over_time(ratios[warmup + 30 : warmup + 130])
    print(f"{case}: ratio {estimate.mean:.4f} +- {estimate.error:.4f}, asked {1 - level}")
    assert estimate.mean == pytest.approx(1 - level, abs=0.02)


@pytest.mark.parametrize("case", CASES)
def test_the_moving_mean_stays_near_from_step_60(rows, case):
    target, warmup = 1 - float(case.split(":")[1]), WARMUP[case.split(":")[0]]
    ratios = [row["stability/variance_ratio"] for row in rows[case]]
    for end in range(warmup + 60, len(ratios) + 1):
        window = ratios[end - 30 : end]
        assert sum(window) / 30 == pytest.approx(target, abs=0.03), end


@pytest.mark.parametrize("case", CASES)
def test_warm_up_has_gain_zero_and_then_ramps(rows, case):
    gains, warmup = [row["stability/gain"] for row in rows[case]], WARMUP[case.split(":")[0]]
    assert gains[:warmup] == [0.0] * warmup
    assert 0 < gains[warmup] < gains[warmup + 4]


@pytest.mark.parametrize("case", ["llama:0.25", pytest.param("gpt2:0.25", marks=pytest.mark.slow)])
def test_entropy_falls_with_the_level(rows, case):
    arch = case.split(":")[0]
    levels = [level for level in LEVELS if f"{arch}:{level}" in rows]
    ends = [sum(r["stability/entropy"] for r in rows[f"{arch}:{level}"][-20:]) / 20 for level in levels]
    assert len(ends) >= 2 and ends == sorted(set(ends), reverse=True)
