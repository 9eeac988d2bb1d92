"""The arithmetic, the plan and the page of benchmarks/performance.py."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))  # plain scripts: their folder is where they import from

import performance  # noqa: E402
import performance_cases as plan  # noqa: E402
import performance_engines  # noqa: E402
import performance_memory  # noqa: E402
import performance_page as page  # noqa: E402
import performance_stats as stats  # noqa: E402

# ---- ratios and verdicts --------------------------------------------------------------------------------------------


def test_a_ratio_is_of_the_same_round():
    found = stats.ratios([1.1, 2.2, 6.0], [1.0, 2.0, 5.0])  # the machine got slower
    assert found["ratios"] == pytest.approx([1.1, 1.1, 1.2]) and found["ratio"] == pytest.approx(1.1)
    low, high = found["interval"]
    assert low == pytest.approx(1.1) and 1.1 <= high <= 1.2 + 1e-9
    with pytest.raises(ValueError):
        stats.ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize("value, interval, verdict", [
    (1.0, [0.9, 1.05], "met"), (1.1, [1.0, 1.1], "met"), (1.1, [1.0, 1.2], "met; the interval reaches above"),
    (1.15, [1.05, 1.2], "missed; the interval reaches below"), (1.2, [1.12, 1.3], "missed"), (1.0, None, "met"), (1.11, None, "missed"),
    (None, None, "not measured"), (math.nan, [0.0, 1.0], "not measured"),
])  # fmt: skip
def test_verdict(value, interval, verdict):
    assert stats.judge(value, 1.1, interval) == verdict


def memory(activation, copy=0.0):
    return {"peak": 1000.0, "held": 500.0, "activation": activation, "resident_activation": activation, "copy": copy}


def test_the_stated_copy_is_left_out_only_where_the_target_says_so():
    arms = {plan.PLAIN: {"memory": memory(100.0)}, plan.LEVEL_5: {"ratio": 0.9, "interval": [0.8, 1.1], "memory": memory(70.0)},
            plan.ALL_FOUR: {"memory": memory(90.0, copy=30.0)}}  # fmt: skip
    targets = {
        plan.LEVEL_5: vars(plan.Target(1.0, 0.65)),
        plan.ALL_FOUR: vars(plan.Target(1.1, 0.6, copy=True)),
        plan.LEVEL_0: vars(plan.Target(1.1)),
    }
    rows = stats.verdicts(arms, targets, plan.PLAIN)
    assert [(row["arm"], row["quantity"], row["value"], row["verdict"]) for row in rows] == [
        (plan.LEVEL_5, "step time", 0.9, "met; the interval reaches above"), (plan.LEVEL_5, "activation memory", 0.7, "missed"),
        (plan.ALL_FOUR, "step time", None, "not measured"),
        (plan.ALL_FOUR, "activation memory without the stated copy", 0.6, "met"), (plan.LEVEL_0, "step time", None, "not measured"),
    ]  # fmt: skip
    assert stats.activation_ratio(arms[plan.ALL_FOUR], arms[plan.PLAIN]) == 0.9
    assert stats.activation_ratio({}, arms[plan.PLAIN]) is None


def test_memory_is_the_median_over_processes():
    assert stats.memory_of([memory(1.0), memory(5.0), memory(2.0)])["activation"] == 2.0


def test_messages_that_plain_does_not_have():
    plain = {"all_gather": {"64": 3, "512": 1}, "all_reduce": {"8": 1}}
    ours = {"all_gather": {"64": 3, "512": 2}, "all_reduce": {"8": 1, "1704": 1}}
    assert stats.messages(ours, plain) == {"calls": 7, "extra": [["all_gather", 512, 1], ["all_reduce", 1704, 1]]}
    assert stats.messages(plain, ours)["extra"] == [["all_gather", 512, -1], ["all_reduce", 1704, -1]]
    assert stats.messages(plain, plain) == {"calls": 5, "extra": []}


# ---- growth ---------------------------------------------------------------------------------------------------------


def noisy(slope, noise, rounds=12, xs=(128, 256, 512, 1024)):
    rng = np.random.default_rng(3)
    return [(x, list(1.05 + slope * math.log2(x / 128) + noise * rng.normal(size=rounds))) for x in xs]


@pytest.mark.parametrize("slope, noise, verdict", [
    (-0.03, 0.002, "falling"), (0.0, 0.002, "flat"), (0.03, 0.002, "growing"), (0.0, 0.3, "undecided"),
])  # fmt: skip
def test_slope_and_its_verdict(slope, noise, verdict):
    found = stats.slope(noisy(slope, noise))
    assert found["verdict"] == verdict
    low, high = found["interval"]
    assert low < found["slope"] < high
    if noise < 0.1:
        assert found["slope"] == pytest.approx(slope, abs=0.002)


def test_slope_is_for_a_doubling():
    assert stats.slope([(1, [1.0]), (2, [1.1]), (4, [1.2])])["slope"] == pytest.approx(0.1)


# ---- where the time goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator, group",
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::_softmax", "softmax, exp and log"),
        ("aten::copy_", "copies and casts"),
        ("c10d::_allgather_base_", "communication"),
        ("gloo:all_reduce", "communication"),
        ("aten::mul", stats.REST),
        ("aten::sum", "sums, norms and extrema"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::empty", "allocation and filling"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::embedding_dense_backward", "embedding, gather and scatter"),
    ],
)
def test_operators_have_words(operator, group):
    assert stats.group_of(operator) == group


def test_profile_difference():
    plain = {"wall_ms": 10.0, "operators": {"aten::mm": 6.0, "aten::exp": 1.0}}
    arm = {"wall_ms": 14.0, "operators": {"aten::mm": 6.5, "aten::exp": 4.0, "aten::log": 1.0}}
    found = stats.profile_difference(arm, plain, top=1)
    assert found["groups"] == [
        ["softmax, exp and log", 1.0, 5.0],
        ["matrix products", 6.0, 6.5],
        [stats.OUTSIDE, 3.0, 2.5],
    ]
    assert found["operators"] == [["aten::exp", 1.0, 4.0]] and found["wall_ms"] == [10.0, 14.0]


def test_running_peak_of_allocations():
    assert performance_memory.highest([(3.0, -5), (1.0, 5), (2.0, 7), (4.0, 4)]) == 12
    assert performance_memory.highest([]) == 0 and performance_memory.highest([(1.0, -4)]) == 0


def test_peak_of_a_step_is_what_torch_gave_out_at_once():
    def step():
        first = torch.ones(300_000)
        second = first * 2  # both alive: 2.4 MB
        del first
        return (second + 1).sum()

    assert performance_memory.peak_of_one_step(step) == pytest.approx(2.4e6, rel=1e-3)


def test_every_live_storage_counts_once():
    before = performance_memory.live_bytes()
    held = torch.zeros(250_000)
    views = [held[:10], held.view(500, 500)]
    assert performance_memory.live_bytes() - before == 10**6 and len(views) == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_resident_memory_is_below_its_high_water_mark():
    assert 0 < performance_memory.status_bytes("VmRSS") <= performance_memory.status_bytes("VmHWM")


def test_an_engine_without_a_block_has_no_loss_path_and_no_copy():
    trainer = object.__new__(performance_memory.Trainer)
    trainer.engine = torch.nn.Linear(1, 1)
    assert trainer.loss_path is None and trainer.copy_bytes() == 0


def test_moments_count_as_held_once_the_optimizer_has_them():
    trainer, layer = object.__new__(performance_memory.Trainer), torch.nn.Linear(30, 4)
    trainer.engine = layer
    layer.basic_optimizer = torch.optim.AdamW(layer.parameters())
    assert trainer.moment_bytes() == 0
    layer(torch.ones(1, 30)).sum().backward()
    layer.basic_optimizer.step()
    assert trainer.moment_bytes() == 4 * (2 * 124 + 2)  # two moments of 124 numbers, a step count for weight and bias


def test_headless_trains_the_layers_and_not_the_head():
    case = {"model": plan.llama(64, 16, 1, 2, 1, 32, tied=False), "bf16": False}
    model = performance_engines.Headless(performance_engines.build_model(case))
    ids = torch.arange(8).view(1, 8)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(names) == len(list(model.parameters())) and not any("lm_head" in name for name in names)


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_every_target_of_the_cases_is_measured():
    from ds_stability.config import StabilityConfig

    for case in [*plan.cases().values(), *plan.cases(quick=True).values()]:
        assert case.arms[0] == plan.PLAIN and set(case.targets) <= set(case.arms)
        assert set(case.memory) <= {*case.arms, plan.HEADLESS}
        assert case.memory_steps >= 2  # the resident peak of the first step is without the moments that are taken from it
        if not case.title.startswith("smoke"):
            assert all(arm in case.memory for arm, target in case.targets.items() if target.activation is not None)
        json.dumps(case.spec())
    for arm in plan.ARMS.values():
        StabilityConfig.parse(arm["stability"] or {})
    assert StabilityConfig.parse(plan.ARMS[plan.ALL_FOUR]["stability"]).families.keys() == {
        "feedback",
        "clipping",
        "averaging",
        "regularization",
    }


def test_axes_of_growth_cover_their_ranges():
    axes = plan.growth()
    ends = {axis: (points[0].x, points[-1].x) for axis, points in axes.items()}
    assert axes.keys() == plan.AXES.keys()
    assert (ends["sequence"], ends["vocabulary"], ends["ranks"]) == ((128, 4096), (2048, 262_144), (1, 4))
    assert [point.x for point in plan.growth(max_ranks=1)["ranks"]] == [1]
    assert all(a.x < b.x for points in axes.values() for a, b in pairwise(points))


def test_parameters_are_those_of_the_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    for model in (plan.tiny(), plan.tiny(tied=True), plan.cases(quick=True)["quick"].model):
        assert plan.parameters(model) == LlamaForCausalLM(LlamaConfig(**model)).num_parameters()
    assert plan.parameters(plan.cases()["smollm2"].model) == 134_515_008  # SmolLM2-135M


def test_named_parts_leave_out_the_others(monkeypatch):
    def chosen(*words):
        monkeypatch.setattr(sys, "argv", ["performance.py", *words])
        cases, axes = performance.chosen(performance.parse_arguments())
        return list(cases), list(axes)

    assert chosen() == (["observe", "smollm2", "freed", "vocabulary"], ["sequence", "vocabulary", "ranks", "parameters"])
    assert chosen("--cases", "observe") == (["observe"], []) and chosen("--growth", "ranks") == ([], ["ranks"])
    assert chosen("--cases", "observe", "--growth", "ranks") == (["observe"], ["ranks"])
    assert chosen("--quick") == (["quick"], ["vocabulary"])


@pytest.mark.parametrize("words, message", [
    (["--cases", "large"], "large"), (["--quick", "--cases", "observe"], "leave out"), (["--memory_rounds", "0"], "--memory_rounds 0"),
])  # fmt: skip
def test_wrong_flags_are_refused(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["performance.py", *words])
    with pytest.raises(SystemExit) as stopped:
        performance.parse_arguments()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# ---- a whole run without engines ------------------------------------------------------------------------------------


def fake_launch(job, output, meter):
    """What the worker writes, made up: level 0.5 is slow and small, Liger does not run."""
    results = []
    for case in job.cases:
        factor = {plan.PLAIN: 1.0, plan.LEVEL_0: 1.05, plan.LEVEL_5: 1.2, plan.ALL_FOUR: 1.0, plan.TRL: 1.5}
        if job.mode == "memory":
            (arm,) = case["arms"]
            missing = {} if arm in factor else {arm: "no CUDA"}
            results.append(
                {
                    "memory": memory(100.0 * (0.3 if arm == plan.LEVEL_5 else 1.0)) if not missing else None,
                    "not_run": missing,
                }
            )
            continue
        arms = [arm for arm in case["arms"] if arm in factor]
        seconds = {arm: [factor[arm] * (0.1 + 0.001 * i) for i in range(case["rounds"])] for arm in arms}
        operators = {arm: {"aten::mm": 50.0, "aten::exp": 100 * factor[arm] - 50} for arm in arms}
        results.append(
            {
                "seconds": seconds,
                "not_run": {arm: "no CUDA" for arm in case["arms"] if arm not in factor},
                "world_size": job.ranks,
                "messages": {
                    arm: {"all_reduce": {"8": 1} | ({"1704": 1} if arm == plan.LEVEL_5 else {})} for arm in arms
                },
                "profile": {arm: {"wall_ms": 100 * factor[arm], "operators": operators[arm]} for arm in arms},
                "loss_path": {arm: "linear" if arm == plan.LEVEL_5 else None for arm in arms},
            }
        )
    return results


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*words): the command without its engines; the results file."""
    monkeypatch.setattr(performance, "launch", fake_launch)
    monkeypatch.setattr(performance.training, "on_gpu", lambda: False)

    def start(*words):
        docs = ["--docs", str(tmp_path / "docs")] if "--quick" not in words else []
        monkeypatch.setattr(sys, "argv", ["performance.py", "--output", str(tmp_path / "out"), *docs, *words])
        assert performance.main() == 0
        return json.loads((tmp_path / "out" / "performance.json").read_text())

    return start


def test_a_run_writes_results_page_and_figures(run, tmp_path, capsys):
    body = run("--quick")
    out = tmp_path / "out"
    case, text = body["cases"]["quick"], (out / "performance.md").read_text()
    assert case["arms"][plan.LIGER]["not_run"] == "no CUDA" and "| Liger, fused loss | not run: no CUDA |" in text
    assert "| level 0.5, loss_kernel triton | not run: no CUDA |" in text
    verdicts = {(row["arm"], row["quantity"]): row["verdict"] for row in case["verdicts"]}
    assert verdicts[plan.LEVEL_5, "step time"] == "missed" and verdicts[plan.LEVEL_5, "activation memory"] == "met"
    assert verdicts[plan.LEVEL_0, "activation memory"] == "not measured"
    assert list(case["profiles"]) == [plan.LEVEL_5] and "| softmax, exp and log | 50.00 | 70.00 | +20.00 |" in text
    assert case["arms"][plan.LEVEL_5]["against"][plan.TRL]["ratio"] == pytest.approx(0.8)
    assert "| +1 all_reduce of 1704 bytes |" in text and "its figures mean nothing" in text
    assert "there is no `performance_cuda.json`" in text
    for name in ("performance.png", "performance_growth.png"):
        assert (out / "figures" / name).read_bytes().startswith(b"\x89PNG") and f"(figures/{name})" in text
    assert json.loads((out / "results" / "performance.json").read_text()) == body
    assert "missed" in capsys.readouterr().out
    assert page.check(out) == 0
    (out / "performance.md").write_text(text.replace("1.200", "1.100"))
    assert page.check(out) == 1 and "out of date" in capsys.readouterr().err


def test_parts_are_merged(run, tmp_path):
    assert list(run("--cases", "observe")["cases"]) == ["observe"]
    body = run("--growth", "ranks", "parameters")
    assert list(body["cases"]) == ["observe"] and set(body["growth"]) == {"ranks", "parameters"}
    assert body["growth"]["ranks"]["slopes"][plan.LEVEL_5]["verdict"] == "flat"
    assert [point["world_size"] for point in body["growth"]["ranks"]["points"]] == [1, 2, 4]
    results = tmp_path / "out" / "performance.json"
    other = json.loads(results.read_text())
    other["machine"]["cores"] += 1
    results.write_text(json.dumps(other))
    with pytest.raises(performance.training.FailedRun, match="another machine"):
        run("--cases", "smollm2")


def test_page_of_the_docs_is_up_to_date():
    assert page.check(REPOSITORY / "docs") == 0
    marks = page._MARKED.findall((REPOSITORY / "docs" / "performance.md").read_text())
    assert {name for _, stem, name, _ in marks if stem == "performance"} == page.SECTIONS.keys() - {"all"}


# ---- progress -------------------------------------------------------------------------------------------------------


def test_progress_tells_rate_and_time_left(monkeypatch, tmp_path):
    log = tmp_path / "log"
    log.write_text("noise\nprogress 4/40\nprogress 12/40\nmore")
    assert performance.last_progress(log) == (12, 40)
    log.write_text("")
    assert performance.last_progress(log) == (0, 0)
    clock = [0.0]
    monkeypatch.setattr(performance.time, "monotonic", lambda: clock[0])
    jobs = [performance.Job(name, "time", [], 2, 30.0, lambda results: None) for name in "ab"]
    meter = performance.Meter(jobs)
    meter.begin(jobs[0])
    assert meter.left() == 60.0 and "starting" in meter.line(0, 0, 3.0)
    meter.line(10, 40, 10.0)
    assert meter.line(20, 40, 15.0) == "    step 20/40  2.00 steps/s  0:10 left here, 0:40 in all"
    clock[0] = 60.0  # twice as long as expected
    meter.end()
    meter.begin(jobs[1])
    assert meter.left() == 60.0
