"""Another number of processes: what is refused and how, and which flag the line names. The conversion itself: tests/distributed."""

from types import SimpleNamespace

import pytest
import torch

from ds_stability import universal_worker
from ds_stability.errors import UserError
from ds_stability.launchers import world_size
from ds_stability.run_dir import RunDir
from ds_stability.universal import IMPOSSIBLE_CODE, convert, load_universal, partitions_of


def write_checkpoint(folder, states, ranks=2, stage=3):
    tag = folder / "checkpoint-4" / "global_step4"
    tag.mkdir(parents=True)
    (folder / "checkpoint-4" / "latest").write_text("global_step4")
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    for rank in range(ranks):
        stored = {"zero_stage": stage, key: {"state": states, "param_groups": []}}
        torch.save({"optimizer_state_dict": stored}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder / "checkpoint-4"


ADAM = {"step": torch.tensor(4.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}


def refusal(checkpoint, capsys):
    """What the converting process says, run in this one: it takes seconds to start."""
    with pytest.raises(SystemExit) as caught:
        universal_worker.main(checkpoint / "global_step4", checkpoint / "nowhere")
    assert caught.value.code == IMPOSSIBLE_CODE
    return capsys.readouterr().err


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"momentum_buffer": torch.ones(3)}, "this optimizer keeps momentum_buffer"),
        ({}, "this optimizer keeps nothing"),
        ({**ADAM, "max_exp_avg_sq": torch.ones(3)}, "this optimizer keeps step, exp_avg, exp_avg_sq, max_exp_avg_sq"),
    ],
)
def test_other_optimizers_are_refused(tmp_path, capsys, stage, state, words):
    text = refusal(write_checkpoint(tmp_path, {0: state}, stage=stage), capsys)
    assert words in text and "possible for Adam and AdamW only" in text and "as many processes as wrote the checkpoint" in text


def test_a_mixture_of_experts_is_refused(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path, {0: ADAM})
    (checkpoint / "global_step4" / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"")
    assert "not possible for a mixture of experts" in refusal(checkpoint, capsys)


def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path):
    checkpoint = write_checkpoint(tmp_path, {0: {"momentum_buffer": torch.ones(3)}})
    with pytest.raises(UserError) as caught:
        convert(checkpoint, tmp_path / ".universal-4")
    assert str(caught.value).startswith(f"{checkpoint}: another number of processes") and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_what_deepspeed_cannot_convert_is_one_line_and_leaves_nothing(tmp_path):
    checkpoint = write_checkpoint(tmp_path, {0: ADAM})  # no model states beside
    with pytest.raises(UserError) as caught:
        convert(checkpoint, tmp_path / ".universal-4")
    assert "could not convert it" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_partitions_are_counted(tmp_path):
    assert partitions_of(write_checkpoint(tmp_path, {0: ADAM}, ranks=3)) == 3
    for file in (tmp_path / "checkpoint-4" / "global_step4").iterdir():
        file.unlink()
    assert partitions_of(tmp_path / "checkpoint-4") is None
    (tmp_path / "checkpoint-4" / "latest").unlink()
    with pytest.raises(UserError, match="no DeepSpeed checkpoint"):
        partitions_of(tmp_path / "checkpoint-4")


def test_the_config_is_copied():
    config = {"zero_optimization": {"stage": 3}, "checkpoint": {"tag_validation": "Warn"}}
    assert load_universal(config)["checkpoint"] == {"tag_validation": "Warn", "load_universal": True}
    assert config["checkpoint"] == {"tag_validation": "Warn"}


@pytest.mark.parametrize(
    ("size", "steps", "ranks", "advice"),
    [
        (2, 2, 2, None),
        (4, 2, 1, None),
        (2, 2, 1, "give --gradient_accumulation_steps 4"),
        (2, 2, 4, "give --gradient_accumulation_steps 1"),
        (3, 1, 2, "give --per_device_train_batch_size 2 --gradient_accumulation_steps 2"),
        (1, 1, 3, "start with a number of processes that divides 8"),
    ],
)
def test_the_line_says_which_flag_to_change(tmp_path, monkeypatch, size, steps, ranks, advice):
    run = RunDir(tmp_path)
    run.write_manifest({"world_size": 2, "config": {"training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}}})
    monkeypatch.setattr(world_size.dist, "get_world_size", lambda: ranks)
    command = SimpleNamespace(training={"per_device_train_batch_size": size, "gradient_accumulation_steps": steps})
    if advice is None:
        world_size.require_same_batch(command, run)
        return
    with pytest.raises(UserError) as caught:
        world_size.require_same_batch(command, run)
    assert str(caught.value).endswith(advice) and "takes 8 blocks a step" in str(caught.value) and str(tmp_path) in str(caught.value)
