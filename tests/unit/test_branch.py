"""Branches: what the command line means, what must be the trunk's, and what is taken over from its stability state."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from ds_stability.checkpoint_files import write_manifest
from ds_stability.config import StabilityConfig
from ds_stability.controller import SurprisalState
from ds_stability.effect import outlook
from ds_stability.errors import UserError
from ds_stability.eval.report_curves import warmup
from ds_stability.launchers.arguments import parse_command
from ds_stability.launchers.branch import (
    announcement,
    batches_of,
    branch_entry,
    global_batches,
    go_on_at,
    overruled,
    require_same_order,
    require_trunk,
)
from ds_stability.launchers.setup_model import load_config
from ds_stability.launchers.setup_run import early_identity, require_same_run
from ds_stability.launchers.starting_point import StartingPoint, starting_point, step_of
from ds_stability.run_dir import RunDir, build_manifest
from ds_stability.stabilizers.build import build_stabilizers
from ds_stability.takeover import MOMENTS, take_over

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ["--config_name", str(REPOSITORY / "ds_configs/models/llama_tiny.json"), "--dataset_name", "builtin:prose", "--deepspeed",
         str(REPOSITORY / "ds_configs/zero3_cpu.json"), "--block_size", "64", "--max_steps", "20", "--per_device_train_batch_size", "2"]  # fmt: skip


@pytest.fixture
def trunk(tmp_path, monkeypatch):
    """A run of 2 processes with checkpoint-4 and checkpoint-8, as far as the command line can see."""
    monkeypatch.chdir(tmp_path)
    command = parse_command([*WORDS, "--output_dir", "old"])
    run = RunDir(tmp_path / "old").create()
    config = {"training": {**command.training, "optim": "adamw_torch_fused", "lr_scheduler_type": "linear", "train_sampling_strategy": "random"},
              "deepspeed": command.ds_config, "data": command.spec.to_dict(), "stability": command.stability.to_dict()}  # fmt: skip
    identity = early_identity(command, load_config(command)) | {"model_config": "?", "tokenizer": "1e"}
    manifest = build_manifest(config=config, identity=identity, seeds={"seed": 42, "data_seed": 42}, data={}, world_size=2)
    run.write_manifest(json.loads(json.dumps(manifest, default=str)))
    for step in (4, 8):
        run.checkpoint(step).mkdir()
        write_manifest(run.checkpoint(step), {}, step, 2)
    return run


def command(*more, output="new"):
    return parse_command([*WORDS, "--output_dir", output, *map(str, more)])


@pytest.mark.parametrize(("flags", "mode", "own", "branches"), [
    (["--resume_from_checkpoint", "old/checkpoint-8/"], "path", [], True),
    (["--branch_from", "old/checkpoint-8"], "false", [], True),
    (["--branch_from", "old/checkpoint-8", "--resume_from_checkpoint", "auto"], "auto", [], True),
    (["--branch_from", "old/checkpoint-8", "--resume_from_checkpoint", "auto"], "auto", [12], False),
    (["--branch_from", "gone/checkpoint-8", "--resume_from_checkpoint", "true"], "true", [12], False),  # the trunk is not needed any more
    (["--resume_from_checkpoint", "auto"], "auto", [12], False),
])  # fmt: skip
def test_where_a_branch_starts(trunk, flags, mode, own, branches):
    new = RunDir("new")
    for step in own:
        new.checkpoint(step).mkdir(parents=True)
        write_manifest(new.checkpoint(step), {}, step, 2)
    if own:
        new.write_manifest({})
    found = command(*flags)
    assert (found.resume_mode, found.branches, found.continues) == (mode, branches, not branches)
    assert found.resume == ("old/checkpoint-8" if branches else "new/checkpoint-12")


@pytest.mark.parametrize(("flags", "words"), [
    (["--branch_from", "old/checkpoint-9"], "--branch_from old/checkpoint-9: no such checkpoint folder"),
    (["--branch_from", "old"], "is the folder of a run; give one of its checkpoints, such as old/checkpoint-8"),
    (["--branch_from", "old/checkpoint-8", "--resume_from_checkpoint", "true"], "true: new holds no checkpoint.*auto, which then begins the branch"),
    (["--branch_from", "old/checkpoint-8", "--resume_from_checkpoint", "old/checkpoint-4"], "give one"),
    (["--branch_from", "old/checkpoint-8", "--max_steps", "8"], "--max_steps 8: the branch goes on from step 8"),
    (["--branch_from", "torn/checkpoint-3"], "is not a complete checkpoint"),
    (["--resume_from_checkpoint", "foreign/checkpoint-3"], "no manifest.json, so this is not the directory of a run"),
    (["--branch_from", "old/best"], "called checkpoint-N"),
])  # fmt: skip
def test_what_is_no_trunk_is_one_line(trunk, flags, words):
    Path("torn/checkpoint-3").mkdir(parents=True)
    for name in ("foreign/checkpoint-3", "old/best"):
        Path(name).mkdir(parents=True)
        write_manifest(Path(name), {}, 3, 2)
    with pytest.raises(UserError, match=words) as caught:
        command(*flags)
    assert "\n" not in str(caught.value)


def test_an_output_folder_in_use_is_no_place_for_a_branch(trunk):
    Path("used").mkdir()
    Path("used/notes.txt").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        command("--branch_from", "old/checkpoint-8", output="used")
    with pytest.raises(UserError, match="--output_dir old: holds another run"):
        command("--branch_from", "old/checkpoint-8", output="old")


@pytest.mark.parametrize(("flags", "words"), [
    ([], None),
    (["--learning_rate", "0.1", "--lr_scheduler_type", "cosine", "--stability_level", "0.3", "--max_steps", "99", "--weight_decay", "0.5"], None),
    (["--seed", "3"], "seed = 42, this command has 3"),
    (["--data_seed", "3"], "data_seed = 42, this command has 3"),
    (["--block_size", "32"], "block_size = 64"),
    (["--max_train_samples", "5"], "max_train_samples = null, this command has 5"),
    (["--dataset_name", "builtin:synthetic"], "data = "),
    (["--use_peft"], "adapter = null"),
    (["--optim", "sgd"], 'optim = "adamw_torch_fused", this command has "sgd"'),
    (["--lr_scheduler_type", "reduce_lr_on_plateau"], "lr_scheduler_type"),
    (["--deepspeed", str(REPOSITORY / "ds_configs/zero2_bf16.json")], "bf16 = false"),
])  # fmt: skip
def test_what_must_be_the_trunks(trunk, flags, words):
    asked = command("--branch_from", "old/checkpoint-8", *flags)
    if words is None:
        require_trunk(asked, early_identity(asked, load_config(asked)))
        return
    with pytest.raises(UserError, match=words) as caught:
        require_trunk(asked, early_identity(asked, load_config(asked)))
    assert str(caught.value).startswith("--branch_from old/checkpoint-8: its run has ")


@pytest.mark.parametrize(("trunk_flags", "flags", "fits"), [
    (["--validation_split_percentage", "0"], ["--validation_file", "b.txt"], True),
    (["--validation_file", "b.txt"], ["--validation_file", "c.txt"], True),
    (["--validation_file", "b.txt"], ["--validation_split_percentage", "0"], True),
    (["--validation_split_percentage", "5"], ["--validation_file", "b.txt"], False),  # the trunk has not trained on 5 % of the text
    (["--validation_file", "b.txt"], ["--validation_split_percentage", "5"], False),
    (["--validation_split_percentage", "5"], ["--validation_split_percentage", "8"], False),
])  # fmt: skip
def test_held_out_text_is_free_if_it_is_no_share_of_the_training_text(tmp_path, monkeypatch, trunk_flags, flags, fits):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "c.txt"):
        Path(name).write_text(f"A text of {name}.\n\nAnd more of it.\n")
    before, now = command(*trunk_flags), command(*flags)
    asked = dataclasses.replace(now, resume="old/checkpoint-4", trunk="old/checkpoint-4")
    identity = early_identity(before, load_config(before))
    RunDir("old").create().write_manifest({"identity": identity, "seeds": {"data_seed": 42}, "config": {
        "training": before.training | {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear"},
        "deepspeed": before.ds_config, "data": before.spec.to_dict()}})  # fmt: skip
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="its run has data = "):
        require_trunk(asked, early_identity(asked, load_config(asked)))


def test_a_resumed_run_keeps_the_order_of_its_blocks(trunk):
    require_same_order(command("--resume_from_checkpoint", "true", output="old"), trunk)
    with pytest.raises(UserError, match="--output_dir .*old: its run has shuffle_buffer = 0, this command has 5"):
        require_same_order(command("--resume_from_checkpoint", "true", "--shuffle_buffer", "5", output="old"), trunk)


def test_what_a_resumed_run_does_not_take_is_said(trunk):
    assert overruled(command("--resume_from_checkpoint", "true", output="old"), trunk) == []
    given = command("--resume_from_checkpoint", "true", "--learning_rate", "0.1", "--max_steps", "30", output="old")
    assert overruled(given, trunk) == ["--learning_rate 0.1 has no effect: the run's is 5e-05, and goes on; a branch takes another one"]


def test_the_manifest_names_the_trunk(trunk):
    asked = command("--branch_from", "old/checkpoint-8")
    args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=1, world_size=2, max_steps=20)
    batches = global_batches(asked, args, [])
    entry = branch_entry(asked, batches)
    assert batches == [(0, 4)] and entry.keys() == {"branch"}
    assert entry["branch"]["run"] == str(trunk.path) and entry["branch"]["step"] == 8 and len(entry["branch"]["fingerprint"]) == 64
    assert entry["branch"]["identity"]["seed"] == 42
    args.world_size = 3
    batches = global_batches(asked, args, [])
    assert batches == [(0, 4), (8, 6)]
    manifest = trunk.read_manifest() | branch_entry(asked, batches)
    new = RunDir("new").create()
    new.write_manifest(manifest)
    assert batches_of(new) == batches
    again = parse_command([*WORDS, "--output_dir", "newer", "--branch_from", "old/checkpoint-8", "--max_steps", "-1"])
    args.max_steps = -1
    with pytest.raises(UserError, match="takes 4 blocks, one of this command 6.*give --max_steps"):
        global_batches(again, args, [0] * 11)
    args.world_size, args.num_train_epochs = 2, 2.5
    with pytest.raises(UserError, match="--num_train_epochs 2.5 makes 8 steps, and the branch goes on from step 8"):
        global_batches(again, args, [0] * 11)
    args.num_train_epochs = 3
    assert global_batches(again, args, [0] * 11) == [(0, 4)]


def test_a_branch_that_died_early_is_not_begun_anew_as_a_run(trunk):
    asked = command("--branch_from", "old/checkpoint-8", "--resume_from_checkpoint", "auto")
    identity = early_identity(asked, load_config(asked))
    new = RunDir("new").create()
    new.write_manifest({**trunk.read_manifest(), "identity": identity, **branch_entry(asked, [(0, 4)])})
    again = command("--branch_from", "old/checkpoint-8", "--resume_from_checkpoint", "auto")
    require_same_run(again, new, identity)
    other = command("--branch_from", "old/checkpoint-4", "--resume_from_checkpoint", "auto")
    with pytest.raises(UserError, match="branch.checkpoint = .*checkpoint-8.*checkpoint-4"):
        require_same_run(other, new, early_identity(other, load_config(other)))
    without = command("--resume_from_checkpoint", "auto")
    with pytest.raises(UserError, match="is a branch of .*old/checkpoint-8 and has no checkpoint yet; give --branch_from"):
        require_same_run(without, new, early_identity(without, load_config(without)))


def test_step_and_starting_point():
    assert step_of("a/checkpoint-12/") == 12
    assert starting_point({"resume_from_checkpoint": None, "branch_from": None, "output_dir": "x"}) == StartingPoint("false", None, None)


# ---- the optimizer's schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3, 9])
def test_a_schedule_goes_on_as_if_it_had_held_from_the_start(steps):
    def made(rate):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        return optimizer, LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    optimizer, scheduler = made(0.3)
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    branch, other = made(0.3)
    go_on_at(other, branch.param_groups, steps)
    for _ in range(3):
        assert branch.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] and other.get_last_lr() == scheduler.get_last_lr()
        assert {k: v for k, v in other.state_dict().items() if k != "lr_lambdas"} == {
            k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}  # fmt: skip
        for pair in ((optimizer, scheduler), (branch, other)):
            pair[0].step()
            pair[1].step()


# ---- the stability state ----------------------------------------------------------------------------------------------------

FULL = {"level": 0.5, "stabilizers": {"feedback": {}, "clipping": {}, "averaging": {"level": 0.3},
                                      "regularization": {"level": 0.5, "kind": "init_decay"}}, "ema": {}}  # fmt: skip
GOVERNOR = {"controller": {"mode": "governor", "target": 3.0, "probe_interval": 0}}


def parts_of(block):
    config = StabilityConfig.parse(block).resolve(pretrained=True)
    return config.to_dict(), build_stabilizers(config, torch.device("cpu"), None)


def state_of(block):
    """The state of a run under `block` after 40 applied steps; of the stabilizers, what tells them apart from fresh ones."""
    config, parts = parts_of(block)
    states = {name: part.state_dict() for name, part in parts.items()}
    moments = {"tokens": 1000.0, "surprisal": 3000.0, "surprisal_sq": 11000.0, "histogram": [0.1, 0.3, 0.95] + [0.0] * 189}
    if "feedback" in states:
        states["feedback"] |= moments | {"applied_steps": 40, "trim": 0.2, "integral": 0.1}
    if "governance" in states:
        states["governance"]["surprisal"] |= moments
        states["governance"]["governor"] |= {"applied_steps": 40, "output": 0.4, "engaged_step": 20, "start": 3.5, "target": 3.0}
    if "clipping" in states:
        states["clipping"] |= {"steps": 40, "mean": 0.5, "square": 0.6}
    if "averaging" in states:
        states["averaging"] = {"weight": 0.9}
    return json.loads(json.dumps({
        "version": 2, "config": config, "applied_steps": 40, "skipped_steps": 1, "skipped_in_a_row": 0, "stabilizers": states,
        "measures": {"some": 1}, "update_meter": [1.0, 2.0], "alarm": {"watch": 1}, "ema": {"updates": 40} if config["ema"] else None}))  # fmt: skip


def taken(old, new):
    state = state_of(old)
    config, parts = parts_of(new)
    result = take_over(state, config, {name: part.state_dict() for name, part in parts.items()})
    for name, part in parts.items():
        part.load_state_dict(result.state["stabilizers"][name])
        if name in result.settle:
            part.settle()
    return state, result, parts


@pytest.mark.parametrize("block", [FULL, GOVERNOR, {"level": 0.0}])
def test_a_branch_that_changes_nothing_takes_over_everything(block):
    state, result, _ = taken(block, block)
    assert result.state == state and not result.settle and not result.anew
    assert result.tensors == ({"mean", "initial", "average"} if block is FULL else set())


def test_another_level_keeps_what_was_measured_and_acts_at_once():
    state, result, parts = taken(FULL, {**FULL, "level": 0.25})
    before, after = state["stabilizers"]["feedback"], result.state["stabilizers"]["feedback"]
    assert after["surprisal"] == before["surprisal"] and after["histogram"] == before["histogram"] and after["applied_steps"] == 40
    assert (after["trim"], after["integral"]) == (0.0, 0.0) and result.settle == ["feedback"]
    assert result.state["stabilizers"]["clipping"] == state["stabilizers"]["clipping"]
    assert result.anew == ["the trim of the feedback loop"] and result.tensors == {"mean", "initial", "average"}
    assert 0 < parts["feedback"].controller.setting.gain < parts_gain(0.5)


def parts_gain(level):
    return taken({"level": 0.0}, {"level": level})[2]["feedback"].controller.setting.gain


def test_a_level_begins_from_a_plain_trunk():
    _, result, parts = taken({"level": 0.0}, FULL)
    assert parts["feedback"].controller.setting.gain > 0 and result.tensors == set()
    assert parts["clipping"].state.steps == 0 and parts["averaging"].weight == 0.0 and result.state["ema"] == {"updates": 0}
    words = announcement("old/checkpoint-8", result.anew)
    assert all(word in words for word in ("clipping", "averaging", "init_decay", "ema")) and "\n" not in words


def test_a_level_that_ends_leaves_a_gain_of_0():
    _, result, parts = taken(FULL, {"level": 0.0})
    assert parts["feedback"].controller.setting.gain == 0.0 and parts.keys() == {"feedback"}
    assert result.tensors == set() and announcement("x", []).count(":") == 1


def test_a_governor_begins_with_the_moments_of_the_trunk_and_an_output_of_0():
    state, result, parts = taken(FULL, GOVERNOR)
    governance = parts["governance"]
    assert governance.surprisal.surprisal == 3000.0 and governance.governor.state.output == 0.0
    assert governance.governor.state.applied_steps == 40 and governance.governor.state.initial is None
    assert governance.setting.mu > 0 and governance.setting.gain == 0.0 and result.anew == ["the governor"]


def test_another_target_begins_the_governor_anew_and_a_level_takes_its_moments():
    other = {"controller": GOVERNOR["controller"] | {"target": 2.5}}
    assert taken(GOVERNOR, other)[2]["governance"].governor.state.engaged_step is None
    _, result, parts = taken(GOVERNOR, {"level": 0.5})
    assert parts["feedback"].controller.state.surprisal == 3000.0 and parts["feedback"].controller.setting.gain > 0
    assert result.state["stabilizers"].keys() == {"feedback"}


def test_another_decay_of_the_averages():
    state, result, _ = taken(FULL, {**FULL, "statistics": {"ema_decay": 0.5}})
    assert result.state["stabilizers"]["feedback"] == state["stabilizers"]["feedback"]
    assert result.state["update_meter"] == [0.0, 0.0]
    clipping = {**FULL, "stabilizers": FULL["stabilizers"] | {"clipping": {"ema_decay": 0.5}}}
    assert taken(FULL, clipping)[2]["clipping"].state.steps == 0  # whose moments are averages, corrected by their decay


@pytest.mark.parametrize("block, old, line", [
    ({"level": 0.5}, {"level": 0.0}, "feedback: 300 steps, 200 of them the trunk's; warm-up 10, ramp to 15; acts for 100 steps"),
    ({"level": 0.5, "stabilizers": {"clipping": {}}}, {"level": 0.0}, "clipping: 300 steps, 200 of them the trunk's; warm-up 210; acts for 90 steps"),
    ({"level": 0.5, "stabilizers": {"clipping": {}}}, {"level": 0.2, "stabilizers": {"clipping": {}}},
     "clipping: 300 steps, 200 of them the trunk's; warm-up 10; acts for 100 steps"),
    (GOVERNOR | {"controller": GOVERNOR["controller"] | {"setpoint_ramp_steps": 20}}, {"level": 0.0},
     "governor: 300 steps, 200 of them the trunk's; warm-up of the trunk, ramp to 220; acts for 80 steps"),
])  # fmt: skip
def test_the_first_line_counts_a_branch_own_steps(block, old, line):
    anew = taken(old, block)[1].anew
    assert outlook(StabilityConfig.parse(block).resolve(pretrained=True), 300, 200, anew) == [line]


def test_the_ratio_of_a_branch_is_settled_after_its_branch_point():
    block = {"controller": {"warmup_steps": 10}}
    cell = SimpleNamespace(meta={"run": {"stability": block, "branch": {"step": 200}}})
    assert warmup(cell) == 200
    cell.meta["run"]["branch"] = None
    assert warmup(cell) == 10


def test_the_moments_are_all_that_is_known_of_the_surprisal():
    assert tuple(field.name for field in dataclasses.fields(SurprisalState)) == MOMENTS
