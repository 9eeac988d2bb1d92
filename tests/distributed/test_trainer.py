"""A plain transformers Trainer under ZeRO-3, with and without `enable()`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("trainer_worker.py")
EARLY = {"warmup_steps": 2, "ramp_steps": 1}
HALF = {"level": 0.5, "controller": EARLY}
FOUR = {
    "level": 0.5,
    "controller": EARLY,
    "stabilizers": {"feedback": {}, "clipping": {}, "averaging": {}, "regularization": {"kind": "init_decay"}},
}
SAVING = {"save_strategy": "steps", "save_steps": 3}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 1}
GOVERNED = {"controller": {"mode": "governor", "warmup_steps": 1, "setpoint_ramp_steps": 0, "probe_interval": 2, "probe_size": 6}}
LORA = {"lora": True, "steps": 18, "block": {"level": 0.5, "controller": {"warmup_steps": 8, "ramp_steps": 2}},
        "arguments": {"learning_rate": 5e-2, "save_strategy": "steps", "save_steps": 10}}  # fmt: skip
# Three accumulation steps do not divide an epoch of 16 micro-batches: its last step has one.
BF16 = {"config": "zero2_bf16.json", "accumulation": 3, "steps": 7, "arguments": {"bf16": True}}
RUNS = {
    "plain": {"enable": False},
    "plain_block": {"enable": False, "block": HALF},  # DeepSpeed ignores a key that it does not know
    "zero": {"block": {"level": 0}},
    "noise_plain": {"enable": False, "arguments": {"neftune_noise_alpha": 5.0}},
    "noise_zero": {"block": {"level": 0}, "arguments": {"neftune_noise_alpha": 5.0}},
    "half": {"block": HALF, "steps": 6, "arguments": SAVING},
    "half_resumed": {"block": HALF, "steps": 6, "arguments": SAVING, "resume": {"run": "half", "step": 3}},
    "half_evaluated": {"block": HALF, "steps": 6, "arguments": EVALUATING, "evaluation": ["a"], "evaluate_after": True},
    "all_first": {"block": HALF, "trainer": "FirstTrainer"},
    "logged": {"block": HALF, "arguments": {**EVALUATING, "report_to": "tensorboard"}, "evaluation": ["a"]},
    "short": {"block": {"level": 0.5}},
    "two_sets": {"block": HALF, "arguments": EVALUATING, "evaluation": ["a", "b"]},
    "averaged": {"block": HALF | {"ema": {"decay": 0.5}}, "arguments": EVALUATING, "evaluation": ["a", "b"], "save_averaged": True},
    "averaged_late": {"block": HALF | {"ema": {"start_step": 4}}},
    "four": {"block": FOUR, "steps": 6, "arguments": SAVING},
    "four_resumed": {"block": FOUR, "steps": 6, "arguments": SAVING, "resume": {"run": "four", "step": 3}},
    "governed": {"block": GOVERNED, "steps": 6, "arguments": SAVING, "evaluation": ["a"]},
    "governed_resumed": {"block": GOVERNED, "steps": 6, "arguments": SAVING, "evaluation": ["a"], "resume": {"run": "governed", "step": 3}},
    "governed_blind": {"block": GOVERNED},
    "other_level": {"block": {**HALF, "level": 0.4}, "steps": 6, "resume": {"run": "half", "step": 3}},
    "activation": {"block": HALF, "steps": 6, "arguments": {"activation_checkpointing": True}},
    "gradient": {"block": HALF, "steps": 6, "arguments": {"gradient_checkpointing": True,
                                                          "gradient_checkpointing_kwargs": {"use_reentrant": True}}},
    "lora_start": {"enable": False, "lora": True, "steps": 1},
    "lora": LORA,
    "lora_resumed": {**LORA, "resume": {"run": "lora", "step": 10}},
    "lora_checkpointing": {**LORA, "arguments": {"learning_rate": 5e-2, "activation_checkpointing": True}},
    "bf16_plain": {**BF16, "enable": False},
    "bf16_zero": {**BF16, "block": {"level": 0}},
    "bf16_half": {**BF16, "block": HALF},
    "smoothing": {"block": HALF, "arguments": {"label_smoothing_factor": 0.1}},
    "liger": {"block": HALF, "arguments": {"use_liger_kernel": True}},
    "function": {"block": HALF, "trainer": "FunctionTrainer"},
    "preference": {"block": HALF, "trainer": "PreferenceTrainer"},
    "no_labels": {"block": HALF, "trainer": "NoLabelsTrainer"},
    "no_labels_zero": {"block": {"level": 0}, "trainer": "NoLabelsTrainer"},
    "no_labels_plain": {"enable": False, "trainer": "NoLabelsTrainer"},
    "ranks_differ": {"block_of_rank": [HALF, {**HALF, "level": 0.6}]},
    "wrong_key": {"block": {"levl": 0.5}},
    "evaluate_plain": {"enable": False, "evaluate_only": True, "evaluation": ["a"]},
    "evaluate_only": {"block": HALF, "evaluate_only": True, "evaluation": ["a"]},
    "not_finite": {"block": {**HALF, "max_skipped_steps": 2}, "poison": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("trainer")
    (out / "spec.json").write_text(json.dumps({"runs": [{"name": name, **run} for name, run in RUNS.items()]}))
    done = run_ranks(WORKER, out / "spec.json", out, timeout=600)
    assert (out / "DONE").exists(), done.stdout[-2000:] + done.stderr[-6000:]
    results = {name: torch.load(out / f"{name}.pt") for name in RUNS if (out / f"{name}.pt").exists()}
    yield out, results, done.stdout + done.stderr
    shutil.rmtree(out)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def lines(folder, prefixes=()):
    """The lines of a metrics.jsonl as they stand there, without times and without keys of `prefixes`."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith(("_seconds", "_per_second", *prefixes))
             and not key.startswith(tuple(prefixes))} for row in rows]  # fmt: skip


def losses(result):
    return [entry["loss"] for entry in result["log"] if "loss" in entry]


def errors(out, name):
    return [(out / f"{name}.error.{rank}").read_text() for rank in (0, 1)]


def test_importing_alone_changes_nothing(runs):
    assert json.loads((runs[0] / "DONE").read_text())["import_changes_nothing"]


def test_without_enable_the_block_is_inert(runs):
    _, results, _ = runs
    assert equal(results["plain"]["weights"], results["plain_block"]["weights"])
    assert not results["plain_block"]["extended"]


@pytest.mark.parametrize(("plain", "zero"), [("plain", "zero"), ("bf16_plain", "bf16_zero"), ("noise_plain", "noise_zero")])
def test_level_zero_is_plain_training_to_the_bit(runs, plain, zero):
    _, results, _ = runs
    assert equal(results[plain]["weights"], results[zero]["weights"])
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [row.get(key) for row in results[plain]["log"]] == [row.get(key) for row in results[zero]["log"]]


def test_neftune_noise_reaches_the_training(runs):
    """transformers' own flag: noise of magnitude alpha / sqrt(L d) on the embeddings (arXiv 2310.05914), under ZeRO-3."""
    _, results, _ = runs
    assert not equal(results["noise_zero"]["weights"], results["zero"]["weights"])


def test_other_stages_and_precisions_are_extended_the_same_way(runs):
    out, results, _ = runs
    assert results["bf16_half"]["world"] == [2, 2, 2] and not equal(results["bf16_half"]["weights"], results["bf16_zero"]["weights"])
    rows = lines(out / "bf16_half")
    assert rows[5]["stability/tokens"] < 0.5 * rows[4]["stability/tokens"]  # the short step at the end of the epoch
    assert all(row["stability/variance_ratio"] < 0.9 for row in rows[3:])


def test_level_half_changes_the_training_and_says_by_how_much(runs):
    out, results, _ = runs
    rows = lines(out / "half")
    assert rows[0]["cross_entropy"] == lines(out / "zero")[0]["cross_entropy"] and rows[0]["stability/gain"] == 0.0
    assert not equal(results["half"]["weights"], results["zero"]["weights"])
    for row in rows[2:]:
        assert row["stability/gain"] > 0.0
        assert row["stability/variance_ratio"] < 0.9
    assert rows[-1]["loss"] != rows[-1]["cross_entropy"]


@pytest.mark.parametrize("name", ["zero", "half"])
def test_trainer_and_accelerate_see_a_deepspeed_engine(runs, name):
    result = runs[1][name]
    assert result["engine"] == "StabilityDeepSpeedEngine"
    assert result["is_deepspeed"] and result["is_accelerators"] and result["unwraps"] and result["extended"]
    assert result["world"] == [2, 2, 3]


def test_disable_undoes_enable(runs):
    assert all(result["undone"] for result in runs[1].values() if "undone" in result)


@pytest.mark.parametrize(("name", "steps"), [("zero", 4), ("half", 6), ("half_resumed", 6), ("four_resumed", 6)])
def test_one_line_and_one_event_per_step_under_the_same_keys(runs, name, steps):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = runs[0] / name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = {key for row in rows for key, value in row.items() if value is not None} - {"step"}
    assert set(events.Tags()["scalars"]) == tags
    for tag in ("cross_entropy", "stability/variance_ratio", "stability/entropy"):
        assert [event.step for event in events.Scalars(tag)] == list(range(1, steps + 1))
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([row[tag] for row in rows], rel=1e-6)


def test_torch_distributed_says_who_writes(runs):
    folder = runs[0] / "all_first"
    assert [row["step"] for row in lines(folder)] == [1, 2, 3, 4] and len(list((folder / "tensorboard").iterdir())) == 1


def test_a_trainers_own_logger_gets_every_tag_in_one_folder(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, usual = runs[0] / "logged", runs[0] / "half_evaluated"
    assert not (folder / "tensorboard").exists()
    (board,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(board)).Reload()
    found = {tag.partition("/")[2] if tag.startswith("train/") else tag for tag in events.Tags()["scalars"]}
    wanted = {key for row in lines(usual)[:4] for key, value in row.items() if value is not None} - {"step"}
    assert wanted <= found, wanted - found
    rows = lines(folder)
    assert [event.value for event in events.Scalars("train/stability/entropy")] == pytest.approx(
        [row["stability/entropy"] for row in rows])  # fmt: skip


def test_what_a_run_will_and_did_do_is_said_once(runs):
    said = [line for line in runs[2].splitlines() if line.startswith("ds_stability: feedback:")]
    assert "ds_stability: feedback: 6 steps; warm-up 2, ramp to 3; acts for 3 steps" in said
    assert any(line.startswith("ds_stability: feedback: held variance ratio 0.") and "over 3 of 6 steps" in line for line in said)
    never = [line for line in said if "never acts" in line]
    assert len(never) == 1 and never[0].startswith("ds_stability: feedback: 4 steps; warm-up 100; never acts: lower ")
    assert sum("acted in no step of 4" in line for line in said) == 1


def test_nothing_is_recorded_without_enable(runs):
    assert not (runs[0] / "plain" / "metrics.jsonl").exists() and not (runs[0] / "plain" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["half", "four", "lora"])
def test_resumed_equals_uninterrupted_to_the_bit(runs, name):
    out, results, _ = runs
    whole, resumed = results[name], results[f"{name}_resumed"]
    assert equal(whole["weights"], resumed["weights"])
    assert whole["state"] == resumed["state"]
    assert lines(out / name) == lines(out / f"{name}_resumed")
    assert losses(whole) == losses(resumed)


def test_four_stabilizers_act_together(runs):
    out, results, _ = runs
    assert not equal(results["four"]["weights"], results["half"]["weights"])
    last = lines(out / "four")[-1]
    for key in ("gain", "averaging_beta", "regularization_coefficient", "gradient_cosine", "clip_threshold"):
        assert last[f"stability/{key}"], key


def test_every_rank_holds_the_same_state(runs):
    assert all(result["same_on_ranks"] for result in runs[1].values() if result.get("extended"))


def test_evaluation_changes_no_state(runs):
    out, results, _ = runs
    assert equal(results["half"]["weights"], results["half_evaluated"]["weights"])
    assert results["half"]["state"] == results["half_evaluated"]["state"]
    assert lines(out / "half") == lines(out / "half_evaluated", prefixes=("eval/",))[:6]


def test_evaluation_is_recorded_in_the_line_of_its_step(runs):
    out, results, _ = runs
    rows = lines(out / "half_evaluated")
    evaluated = [entry["eval_loss"] for entry in results["half_evaluated"]["log"] if "eval_loss" in entry]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]  # the last one: evaluated after training
    # Trainer averages batches, we average tokens.
    assert [row["eval/cross_entropy"] for row in rows] == pytest.approx(evaluated, rel=0.05)
    # Not counting the prediction in between, the last evaluation saw what the one before it saw.
    assert {key: value for key, value in rows[-1].items() if key.startswith("eval/")}.items() <= rows[-2].items()


def test_two_evaluation_sets_stay_apart(runs):
    rows = lines(runs[0] / "two_sets")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["eval/a/cross_entropy"] != row["eval/b/cross_entropy"]
        assert "eval/cross_entropy" not in row


def test_with_an_average_it_is_evaluated_and_the_training_does_not_see_it(runs):
    out, results, _ = runs
    assert equal(results["averaged"]["weights"], results["two_sets"]["weights"])
    plain, averaged = lines(out / "two_sets"), lines(out / "averaged")
    for row, other in zip(averaged, plain, strict=True):
        assert row["eval/a/averaged"] == row["eval/b/averaged"] == 1 and "eval/a/averaged" not in other
        assert row["eval/a/cross_entropy"] != other["eval/a/cross_entropy"]
        assert row["eval/a/tokens"] == other["eval/a/tokens"] and row["loss"] == other["loss"]
    assert [row["stability/weight_average_decay"] for row in averaged] == pytest.approx([2 / 11, 3 / 12, 4 / 13, 5 / 14])
    assert results["averaged"]["undone"]


def test_save_model_saves_the_average_inside(runs):
    out, results, _ = runs
    saved, averages = load_file(out / "averaged" / "average" / "model.safetensors"), results["averaged"]["averages"]
    assert equal(saved, averages)
    assert not equal(averages, results["averaged"]["weights"])


def test_an_average_that_would_never_begin_is_refused(runs):
    for rank in range(2):
        text = (runs[0] / f"averaged_late.error.{rank}").read_text()
        assert text == "StabilityConfigError: stability.ema.start_step: 4 is not allowed in a run of 4 steps; must be below that"


@pytest.mark.parametrize("name", ["activation", "gradient"])
def test_activation_checkpointing_changes_nothing_that_matters(runs, name):
    out, results, _ = runs
    for key, weight in results["half"]["weights"].items():
        torch.testing.assert_close(results[name]["weights"][key], weight, rtol=1e-4, atol=1e-6)
    for row, other in zip(lines(out / "half"), lines(out / name), strict=True):
        assert row["stability/variance_ratio"] == pytest.approx(other["stability/variance_ratio"], rel=1e-4)
        assert row["stability/gradient_noise_scale"] == pytest.approx(other["stability/gradient_noise_scale"], rel=1e-3)


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("name", ["lora", "lora_checkpointing"])
def test_lora_learns_under_feedback_and_leaves_the_frozen_weights(runs, name):
    out, results, _ = runs
    assert results[name]["trainable"] and all("lora_" in key for key in results[name]["trainable"])
    rows = lines(out / name)
    assert mean([row["cross_entropy"] for row in rows[5:8]]) < rows[0]["cross_entropy"] - 0.3  # warm-up: plain training
    assert mean([row["loss"] for row in rows[-3:]]) < mean([row["loss"] for row in rows[9:12]]) - 0.5
    assert all(row["stability/gain"] > 0.5 for row in rows[9:])
    assert 0.2 < mean([row["stability/variance_ratio"] for row in rows[9:]]) < 0.7
    for key, weight in results[name]["weights"].items():
        assert "lora_" in key or torch.equal(weight, results["lora_start"]["weights"][key])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smoothing", "--label_smoothing_factor 0.1 takes the loss away from the model"),
        ("liger", "--use_liger_kernel True takes the loss away from the model"),
        ("function", "pass through the model's loss function"),
        ("preference", "a training forward has no logits"),
        ("no_labels", "pass through the model's loss function"),
        ("ranks_differ", "stability block differs between ranks"),
        ("wrong_key", 'did you mean "level"'),
        ("other_level", "stability.level: 0.5 there, 0.4 here"),
    ],
)
def test_refused_with_one_line_on_every_rank(runs, name, words):
    out, results, _ = runs
    assert name not in results
    for text in errors(out, name):
        kind = "NoLogitsError" if name == "preference" else "StabilityConfigError"
        assert text.startswith(f"{kind}: ") and words in text and "\n" not in text


def test_a_loss_of_its_own_trains_as_ever_at_level_zero(runs):
    out, results, output = runs
    assert equal(results["no_labels_plain"]["weights"], results["no_labels_zero"]["weights"])
    assert [row["cross_entropy"] for row in lines(out / "no_labels_zero")] == [None] * 4
    assert lines(out / "no_labels_zero")[0]["grad_norm"] > 0
    assert output.count("token statistics are null") == 1  # once, from one rank


def test_an_engine_without_an_optimizer_is_left_alone(runs):
    _, results, _ = runs
    plain, ours = results["evaluate_plain"], results["evaluate_only"]
    assert plain["engine"] == ours["engine"] == "DeepSpeedEngine"
    assert [row["eval_loss"] for row in plain["log"]] == [row["eval_loss"] for row in ours["log"]] != []


def test_a_run_of_skipped_steps_ends_with_all_its_lines_written(runs):
    out, _, _ = runs
    for text in errors(out, "not_finite"):
        assert text.startswith("SkippedStepsError: 2 optimizer steps in a row were skipped") and "\n" not in text
    assert [(row["step"], row["skipped"], row["loss"]) for row in lines(out / "not_finite")] == [(1, True, None), (2, True, None)]


def test_the_governor_measures_on_the_eval_dataset(runs):
    out, results, _ = runs
    rows = [json.loads(line) for line in (out / "governed" / "metrics.jsonl").read_text().splitlines()]
    values = [row["stability/governor_statistic"] for row in rows]
    assert values[0] == rows[-1]["stability/governor_target"]  # before the first step: that of the untouched model
    assert values[1] == values[2] != values[3] == values[4] != values[5]
    assert rows[-1]["stability/gain"] != 0.0 and "governed" in results


def test_a_governed_run_is_resumed_to_the_bit(runs):
    _, results, _ = runs
    assert equal(results["governed"]["weights"], results["governed_resumed"]["weights"])


def test_a_governor_without_an_eval_dataset_stops_with_one_line(runs):
    out, _, _ = runs
    for rank in (0, 1):
        text = (out / f"governed_blind.error.{rank}").read_text()
        assert "the trainer has no eval_dataset; give it one" in text and "\n" not in text
