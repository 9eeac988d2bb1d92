"""Invariant 7: the mean variance ratio over steps 31..130 after warm-up is within .02 of 1 - level."""

import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WARMUP = 100  # the default from scratch
CASES = [f"{arch}:{level}" for arch in ("llama", "gpt2") for level in (0.25, 0.5, 0.75)]


def load_common():
    path = HERE.parent.parent / "benchmarks" / "common.py"
    spec = importlib.util.spec_from_file_location("benchmarks_common", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(run_distributed, tmp_path_factory):
    out = tmp_path_factory.mktemp("ratio") / "out.json"
    process = run_distributed(HERE / "ratio_worker.py", str(out), *CASES, timeout=500)
    assert out.exists(), process.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_level_is_reached(rows, case, record_property):
    level = float(case.split(":")[1])
    ratios = [row["stability/variance_ratio"] for row in rows[case]]
    assert min(row["stability/tokens"] for row in rows[case]) > 900  # 1,024 less the first tokens of documents
    estimate = load_common().mean_over_time(ratios[WARMUP + 30 : WARMUP + 130])
    print(f"{case}: ratio {estimate.mean:.4f} +- {estimate.error:.4f}, asked {1 - level}")
    assert estimate.mean == pytest.approx(1 - level, abs=0.02)


@pytest.mark.parametrize("case", CASES)
def test_the_moving_mean_stays_near_from_step_60(rows, case):
    target = 1 - float(case.split(":")[1])
    ratios = [row["stability/variance_ratio"] for row in rows[case]]
    for end in range(WARMUP + 60, len(ratios) + 1):
        window = ratios[end - 30 : end]
        assert sum(window) / 30 == pytest.approx(target, abs=0.03), end


@pytest.mark.parametrize("case", CASES)
def test_warm_up_has_gain_zero_and_then_ramps(rows, case):
    gains = [row["stability/gain"] for row in rows[case]]
    assert gains[:WARMUP] == [0.0] * WARMUP
    assert 0 < gains[WARMUP] < gains[WARMUP + 4]


def test_entropy_falls_with_the_level(rows):
    for arch in ("llama", "gpt2"):
        ends = [sum(r["stability/entropy"] for r in rows[f"{arch}:{level}"][-20:]) / 20 for level in (0.25, 0.5, 0.75)]
        assert ends[0] > ends[1] > ends[2]
