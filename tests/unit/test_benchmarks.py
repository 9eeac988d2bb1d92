"""Statistics, tables, rendering and the run-keeping of the benchmark scripts."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # they are plain scripts: their folder is where they import from

import common  # noqa: E402
import demo  # noqa: E402
import figures  # noqa: E402
import governor  # noqa: E402
import render  # noqa: E402
import smollm2  # noqa: E402
import training  # noqa: E402

# ---- statistics -----------------------------------------------------------------------------------------------------


def ar1(phi, n, seed):
    noise = np.random.default_rng(seed).normal(size=n)
    series = np.empty(n)
    series[0] = noise[0] / math.sqrt(1 - phi**2)
    for t in range(1, n):
        series[t] = phi * series[t - 1] + noise[t]
    return series


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8])
def test_autocorrelation_time_of_an_ar1_process(phi):
    estimates = [common.autocorrelation_time(ar1(phi, 4000, seed)) for seed in range(8)]
    assert np.mean(estimates) == pytest.approx((1 + phi) / (1 - phi), rel=0.15)


def test_error_of_the_mean_is_that_of_repeated_runs():
    runs = [ar1(0.7, 500, seed) for seed in range(300)]
    true_error = np.std([run.mean() for run in runs])
    stated = [common.mean_over_time(run).error for run in runs]
    assert np.mean(stated) == pytest.approx(true_error, rel=0.15)
    assert np.mean([run.std(ddof=1) / math.sqrt(500) for run in runs]) < 0.6 * true_error  # the naive one is far too small


def test_anticorrelated_and_constant_series():
    alternating = [1.0, -1.0] * 50
    assert common.autocorrelation_time(alternating) == 1.0
    assert common.mean_over_time([1.0 - 1e-16] * 30) == pytest.approx((1.0, 0.0, 30), abs=1e-12)
    assert common.mean_over_time([1.0]) is None and common.mean_over_time([]) is None


def metric_rows(ratio=lambda step: 0.5, steps=200):
    return [{"step": s, "stability/variance_ratio": ratio(s), "stability/saturated": 0, "step_seconds": 0.1} for s in range(1, steps + 1)]


def test_settled_reads_the_right_steps():
    # Steps 31..130 after a warm-up of 20 are the lines 51..150; anything else would show.
    rows = metric_rows(lambda step: 0.5 if 51 <= step <= 150 else 9.0)
    result = common.settled(rows, level=0.5, warmup_steps=20, last=130)
    assert result["ratio_n"] == 100
    assert (result["ratio"], result["worst_moving_mean"]) == pytest.approx((0.5, 0.0))
    assert common.settled(rows, level=0.5, warmup_steps=20)["ratio"] > 0.5  # to the end
    assert result["target_ratio"] == 0.5 and result["saturated"] == 0


def test_settled_of_a_run_that_is_too_short_is_unknown():
    result = common.settled(metric_rows(steps=30), level=0.25, warmup_steps=10)
    assert result["ratio"] is None and result["worst_moving_mean"] is None and result["ratio_n"] == 0


def test_skipped_and_unknown_steps_have_no_value():
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": 5.0, "skipped": True}, {"step": 3, "a": None}, {"step": 4, "a": 2.0}]
    assert common.series_of(rows, "a", 1) == [1.0, 2.0]
    assert common.series_of(rows, "a", 2, 3) == []


def test_worst_moving_mean_by_brute_force():
    values = list(np.random.default_rng(0).normal(size=80))
    means = [sum(values[i : i + 30]) / 30 for i in range(51)]
    assert common.worst_moving_mean(values, 0.1) == pytest.approx(max(abs(m - 0.1) for m in means))


def test_stability_measures_take_the_last_known_value():
    rows = [{"step": 1, "stability/update_ratio": 0.5, "loss": 2.0}, {"step": 2, "stability/update_ratio": None, "loss": 1.0}]
    result = common.stability_measures(rows)
    assert (result["update_ratio"], result["train_loss"], result["loss_spikes"]) == (0.5, 1.0, None)


def test_bootstrap_interval_holds_the_median():
    values = list(np.random.default_rng(1).normal(loc=1.05, scale=0.02, size=25))
    low, high = common.bootstrap_median(values)
    assert low < np.median(values) < high and high - low < 0.04
    assert common.bootstrap_median([1.0, 1.0]) == [1.0, 1.0]


# ---- description and tables -----------------------------------------------------------------------------------------


def test_command_is_portable():
    argv = [str(BENCHMARKS / "demo.py"), "--model", "/somewhere/models/M", "--output", "runs/demo", "--levels", "0.5"]
    assert common.portable_command(argv) == "python benchmarks/demo.py --model M --output runs/demo --levels 0.5"


def test_description_names_no_host_and_no_path():
    description = common.describe_measurement("demo", {"seed": 3}, {"steps": 7})
    assert description["seeds"] == {"seed": 3} and description["versions"]["torch"]
    assert description["machine"]["cores"] >= 1
    assert str(BENCHMARKS.parent) not in json.dumps(description)


def test_tables():
    table = common.text_table(["level", "ratio"], [["0", "1.000"], ["0.25", "-"]])
    assert table.splitlines() == ["level  ratio", "-----  -----", "0      1.000", "0.25       -"]
    assert common.markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    assert (common.number(None), common.number(1.25, 1), common.with_error(0.5, 0.01)) == ("-", "1.2", "0.500 ± 0.010")


# ---- running and resuming -------------------------------------------------------------------------------------------


def test_flag_words():
    flags = {"train_file": ["a.txt", "b.txt"], "max_steps": 3, "high_frequency_file": None}
    assert training.flag_words(flags) == ["--train_file", "a.txt", "b.txt", "--max_steps", "3"]


@pytest.fixture
def fake_launch(monkeypatch):
    """launch_training without training: it leaves a run, with DONE unless its flags say `fail`."""
    launched = []

    def launch(flags, num_gpus, log, on_progress=None):
        launched.append(Path(flags["output_dir"]).name)
        run = training.RunDir(flags["output_dir"]).create()
        run.write_manifest({})
        if "fail" in flags:
            raise RuntimeError("training ended without DONE")
        run.mark_done()

    monkeypatch.setattr(training, "launch_training", launch)
    return launched


def test_a_sweep_goes_on_where_it_was_broken_off(fake_launch, tmp_path):
    first, second = training.Cell("a", {"level": 0}, 5), training.Cell("b", {"level": 1}, 5)
    with pytest.raises(RuntimeError):
        training.train_cells([first, training.Cell("b", {"level": 1, "fail": True}, 5)], tmp_path, 2)
    runs = training.train_cells([first, second], tmp_path, 2)
    assert fake_launch == ["a", "b", "b"] and runs["b"].done.exists()
    training.train_cells([first, second], tmp_path, 2)
    assert fake_launch == ["a", "b", "b"]
    assert training.training_seconds([first, second], tmp_path) >= 0


def test_a_cell_of_other_settings_is_trained_again(fake_launch, tmp_path):
    training.train_cells([training.Cell("a", {"steps": 5}, 5)], tmp_path, 2)
    training.train_cells([training.Cell("a", {"steps": 6}, 6)], tmp_path, 2)
    training.train_cells([training.Cell("a", {"steps": 6}, 6)], tmp_path, 1)
    assert fake_launch == ["a", "a", "a"]


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious.txt").write_text("mine")
    training._remove_run(training.RunDir(tmp_path / "a"))
    assert (tmp_path / "a" / "precious.txt").exists()


def test_a_run_without_done_is_an_error_with_its_log(monkeypatch, tmp_path):
    def start(script, words, num_gpus, port, **options):
        code = "import sys; print('error: no such flag', file=sys.stderr); sys.exit(2)"
        return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **options)

    monkeypatch.setattr(training, "start_script", start)
    with pytest.raises(RuntimeError, match="exit code 2.*\n.*no such flag"):
        training.launch_training({"output_dir": str(tmp_path / "run")}, 2, tmp_path / "log")


def test_progress_tells_rate_and_time_left(monkeypatch):
    progress = training.Progress(cells=3, stream=io.StringIO())
    monkeypatch.setattr(training.time, "monotonic", lambda: 0.0)
    progress.begin(training.Cell("level-0.5", {}, 110), position=2)
    assert "starting" in progress.line(0, 5.0)
    progress.first = (10, 20.0)
    progress.cell_seconds = [60.0]
    assert progress.line(60, 30.0) == "level-0.5 (2 of 3)  step 60/110  5.0 steps/s  0:10 left here, 1:10 in all"


def test_demo_cells_differ_in_level_only(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--levels", "0.5", "0", "--num_gpus", "2"])
    arguments = demo.parse_arguments()
    first, second = (dict(demo.demo_cell(level, arguments, tmp_path / "c.json", tmp_path).flags) for level in arguments.levels)
    assert (first.pop("stability_level"), second.pop("stability_level")) == ("0", "0.5")
    assert first.pop("high_frequency_file") is None
    assert second.pop("high_frequency_file") == str(tmp_path / "level-0" / "high_frequency.json")
    assert first == second and first["stability_loss_path"] == "linear"


@pytest.mark.parametrize("module, cell", [(demo, "demo_cell"), (smollm2, "smollm2_cell")])
def test_flags_of_the_cells_are_accepted(module, cell, tmp_path, monkeypatch):
    from ds_stability.launchers.arguments import parse_command

    text = tmp_path / "a.txt"
    text.write_text("Some words.\n")
    needed = ["--model", str(tmp_path), "--train_file", str(text)] if module is smollm2 else []
    monkeypatch.setattr(sys, "argv", ["x.py", "--levels", "0.25", "--num_gpus", "2", *needed])
    arguments = module.parse_arguments()
    config = demo.probing_config(arguments.steps, 100) if module is demo else smollm2.cpu_config(arguments.precision)
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(json.dumps(config))
    flags = {**vars(module)[cell](0.25, arguments, ds_config, tmp_path).flags, "output_dir": str(tmp_path / "run")}
    command = parse_command(training.flag_words(flags))
    assert command.stability.level == 0.25 and command.stability.controller.warmup_steps == (100 if module is demo else 10)
    assert command.training["max_steps"] == arguments.steps


# ---- rendering ------------------------------------------------------------------------------------------------------


SHOWN = ("demo", "smollm2")  # the others have tests of their own


def dose_row(level, ratio, entropy):
    return {
        "level": level, "name": f"level {level:g}", "ratio": ratio, "ratio_error": 0.004, "worst_moving_mean": 0.01,
        "cross_entropy": 4.125, "entropy": entropy, "top1_mass": 0.25, "sample/distinct_2": 0.875, "sample/seq_rep_4": 0.0625,
        "sample/high_frequency_share": 0.625, "loss_deviation": 0.05, "log_grad_norm_deviation": 0.3, "loss_spikes": 0,
        "grad_norm_spikes": 2, "update_ratio": 0.00123, "train_cross_entropy": 4.0, "train_loss": 2.5, "revision": "a" * 40,
        "samples": [{"prompt": "It is a truth", "completion": "universally\nacknowledged ``` x" + " y" * 400}],
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A folder with two results files, small."""
    head = {
        "finished_at": "2026-01-02T03:04:05+00:00", "command": "python benchmarks/demo.py --levels 0 0.5",
        "git": {"revision": "b" * 40, "dirty": True}, "versions": {"python": "3.11", "torch": "2.13", "peft": None},
        "machine": {"processor": "A CPU", "cores": 2, "memory_gib": 8.0, "accelerators": []}, "seeds": {"seed": 7},
        "settings": {"steps": 310, "probe": {"num_prompts": 64}}, "seconds": 90.0,
    }  # fmt: skip
    rows = [dose_row(0.0, 1.0, 4.5), dose_row(0.5, 0.503, 3.25), dose_row(0.9, None, 1.5)]
    untouched = {**dose_row(0.0, None, 4.75), "level": None, "name": "untouched"}
    folder = tmp_path / "results"
    folder.mkdir()
    for kind, body in (("demo", {"rows": rows}), ("smollm2", {"rows": [untouched, *rows]})):
        (folder / f"{kind}.json").write_text(json.dumps({"kind": kind, **head, **body}))
    return folder


def test_page_is_rendered_from_the_files(results):
    page = "# Results\n\nBy hand.\n\n" + "".join(f"<!-- generated: {name} -->\nold\n<!-- end -->\n\n" for name in SHOWN)
    text = render.filled(page, results)
    assert text.startswith("# Results\n\nBy hand.\n") and "old" not in text
    assert "| 0.5 | 0.503 ± 0.004 | 4.12 | 3.25 | 0.250 | 0.875 | 0.062 | 0.625 |" in text
    assert "| untouched | - | 4.125 | 4.750 |" in text
    assert "python benchmarks/demo.py --levels 0 0.5" in text and "Seeds: seed 7." in text and "torch 2.13" in text
    assert f"Commit `{'b' * 12}` with uncommitted changes, some runs at `{'a' * 12}`." in text
    assert "peft" not in text and "probe num_prompts 64" in text
    assert render.filled(text, results) == text


def test_samples_stay_inside_their_block(results):
    text = render.section("smollm2", results)
    assert text.count("```") % 2 == 0
    line = next(line for line in text.splitlines() if line.startswith("It is a truth | universally acknowledged ''' x"))
    assert len(line) < 500 and line.endswith("...")


def test_missing_and_wrong_files(results):
    (results / "demo.json").rename(results / "generation.json")
    assert "Not measured yet" in render.section("demo", results)
    with pytest.raises(ValueError, match="kind 'demo'"):
        render.section("generation", results)
    with pytest.raises(KeyError):
        render.filled("<!-- generated: nothing -->\n<!-- end -->", results)


def test_command_writes_page_and_figures_and_checks_them(results, monkeypatch, capsys):
    page = results.parent / "page.md"
    page.write_text("<!-- generated: demo -->\n<!-- end -->\n")
    command = ["render.py", "--results", str(results), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert render.main() == 1 and "out of date" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", command)
    assert render.main() == 0
    for name in render.SECTIONS.keys() - render.DRAWN_ELSEWHERE:
        assert (results.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert render.main() == 0


def test_pages_of_the_docs_have_every_section_and_are_up_to_date():
    text = "".join((render.DOCS / page).read_text(encoding="utf-8") for page in (*render.PAGES, "reliability.md"))
    assert all(f"<!-- generated: {name} -->" in text for name in render.SECTIONS)
    assert render.filled(text, render.DOCS / "results") == text, "run make docs"


def test_figure_draws_every_row_that_is_known(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_finish", lambda figure, path, title: drawn.append(figure))
    rows = [{"level": 0.0, "ratio": 1.0, "ratio_error": 0.01, "entropy": 4.0}, {"level": 0.5, "ratio": None, "entropy": 3.0}]
    panels = [panel for panel in figures.DOSE_PANELS if panel.key in ("ratio", "entropy")]
    figures.dose_response(rows, tmp_path / "x.png", "title", panels, baseline={"entropy": 5.0})
    ratio, entropy = drawn[0].axes
    assert list(entropy.containers[0].lines[0].get_ydata()) == [4.0, 3.0]
    assert list(ratio.containers[0].lines[0].get_xdata()) == [0.0]
    assert any(list(line.get_ydata()) == [5.0, 5.0] for line in entropy.lines)


# ---- the governor's benchmark -----------------------------------------------------------------------------------------


def governor_row(actuator, target, over, miss, cost):
    return {"seed": 0, "actuator": actuator, "target": target, "over_natural": over, "miss": miss, "cost": cost, "entropy": 4.2,
            "cross_entropy": 3.9, "top1_mass": 0.25, "output": None if actuator is None else 0.2, "seconds_mean": 0.1}  # fmt: skip


def test_the_verdict_on_the_governor_knows_its_bounds():
    rows = [governor_row(None, None, None, None, None), governor_row("token_weight", 3.9, 1.0, 0.004, 0.006),
            governor_row("token_weight", 4.29, 1.1, -0.009, 0.019), governor_row("entropy_bonus", 4.29, 1.1, -0.011, -0.3),
            governor_row("entropy_bonus", "data", None, 0.2, 0.2)]  # fmt: skip
    lines = governor.verdict(rows).splitlines()
    assert ["not met" in line for line in lines] == [True, False, True]
    header, body = governor.governor_table(rows)
    assert len(body) == len(rows) + len(governor.PROTOTYPE) and all(len(line) == len(header) for line in body)
    assert body[1][3] == "+0.40 %" and body[2][1] == "4.290 (1.10)" and body[0][1] == "-" and body[4][1] == "data"


def test_cells_of_the_governor_are_commands_that_train_accepts(tmp_path, monkeypatch):
    from ds_stability.launchers.arguments import parse_command

    monkeypatch.setattr(sys, "argv", ["governor.py", "--num_gpus", "2"])
    arguments = governor.parse_arguments()
    cells = [cell for cell, _, _ in governor.governed_cells(0, 3.9, arguments, tmp_path)]
    assert len(cells) == 6
    for cell in cells:
        flags = {**cell.flags, "high_frequency_file": None, "output_dir": str(tmp_path / cell.name)}
        command = parse_command(training.flag_words(flags))
        assert command.stability.governed and command.stability.controller.warmup_steps == governor.WARMUP
