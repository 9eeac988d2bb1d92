"""What a user can get wrong on the command line of launchers/train.py: one line each, before anything is started."""

import json
import os
import re
from pathlib import Path

import pytest

from ds_stability.errors import UserError
from ds_stability.launchers.arguments import parse_command
from ds_stability.launchers.setup_model import load_config, load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
LLAMA = str(REPOSITORY / "ds_configs" / "models" / "llama_tiny.json")
ZERO3 = str(REPOSITORY / "ds_configs" / "zero3_cpu.json")
BF16 = str(REPOSITORY / "ds_configs" / "zero3_bf16.json")


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {"--config_name": LLAMA, "--dataset_name": "builtin:prose", "--deepspeed": ZERO3, "--output_dir": str(tmp_path / "run"),
            "--block_size": "64"}  # fmt: skip


def words(flags):
    return [word for key, value in flags.items() for word in ([key] if value is None else [key, str(value)])]


CASES = {
    # name: (flags to change; None removes one), words that the line must hold
    "no model": ({"--config_name": None}, ["--model_name_or_path", "--config_name", "neither"]),
    "two models": ({"--model_name_or_path": "gpt2"}, ["both are given"]),
    "missing model folder": ({"--config_name": None, "--model_name_or_path": "./nowhere"}, ["./nowhere", "no such"]),
    "missing config file": ({"--config_name": "/tmp/none/x.json"}, ["x.json", "no such"]),
    "missing tokenizer folder": ({"--tokenizer_name": "./nowhere"}, ["--tokenizer_name", "./nowhere"]),
    "overrides without config": (
        {"--config_name": None, "--model_name_or_path": "gpt2", "--config_overrides": "a=1"}, ["--config_overrides"]),
    "no deepspeed config": ({"--deepspeed": None}, ["--deepspeed", "zero3_bf16.json"]),
    "missing deepspeed config": ({"--deepspeed": "none.json"}, ["none.json"]),
    "no output": ({"--output_dir": None}, ["--output_dir"]),
    "level too high": ({"--stability_level": "1.5"}, ["--stability_level", "1.5"]),
    "level not a number": ({"--stability_level": "half"}, ["--stability_level", "half"]),
    "level nan": ({"--stability_level": "nan"}, ["--stability_level", "nan"]),
    "level auto": ({"--stability_level": "auto"}, ["--stability_level", "auto"]),
    "schedule not increasing": ({"--stability_level": "10:0.1,5:0.2"}, ["--stability_level", "10"]),
    "schedule half a pair": ({"--stability_level": "0:0,10"}, ["--stability_level"]),
    "stock loss above level 0": ({"--stability_loss_path": "stock"}, ["loss_path", "stock"]),
    "unknown loss path": ({"--stability_loss_path": "fast"}, ["loss_path", "fast"]),
    "missing frequency file": ({"--high_frequency_file": "none.json"}, ["--high_frequency_file", "none.json"]),
    "no data": ({"--dataset_name": None}, ["--train_file", "--dataset_name"]),
    "two data sources": ({"--train_file": "a.txt"}, ["--train_file", "--dataset_name"]),
    "missing file": ({"--dataset_name": None, "--train_file": "a.txt"}, ["a.txt", "no such file"]),
    "unknown built-in": ({"--dataset_name": "builtin:poems"}, ["builtin:poems", "builtin:prose"]),
    "block of one": ({"--block_size": "1"}, ["--block_size", "1"]),
    "block not a number": ({"--block_size": "many"}, ["--block_size", "many"]),
    "validation share": ({"--validation_split_percentage": "120"}, ["--validation_split_percentage", "120"]),
    "batch size": ({"--per_device_train_batch_size": "0"}, ["--per_device_train_batch_size", "0"]),
    "accumulation": ({"--gradient_accumulation_steps": "-1"}, ["--gradient_accumulation_steps", "-1"]),
    "learning rate": ({"--learning_rate": "0"}, ["--learning_rate", "0"]),
    "learning rate nan": ({"--learning_rate": "nan"}, ["--learning_rate", "nan"]),
    "label smoothing": ({"--label_smoothing_factor": "0.1"}, ["--label_smoothing_factor", "0.1"]),
    "clipping disagrees": ({"--max_grad_norm": "0.5"}, ["--max_grad_norm", "0.5", "gradient_clipping"]),
    "precision disagrees": ({"--bf16": "true"}, ["--bf16", "bf16.enabled"]),
    "unknown flag": ({"--stability_levle": "0.5"}, ["--stability_levle"]),
    "abbreviated flag": ({"--stability_lev": "0.5"}, ["--stability_lev"]),
    "nothing to resume": ({"--resume_from_checkpoint": "true"}, ["--resume_from_checkpoint", "no checkpoint"]),
    "no such checkpoint": ({"--resume_from_checkpoint": "run/checkpoint-9"}, ["checkpoint-9", "no such"]),
    "missing recipe": ({"--config": "recipe.yaml"}, ["--config", "recipe.yaml"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line(base, case):
    changes, expected = CASES[case]
    flags = {**base, **changes}
    flags = {key: value for key, value in flags.items() if not (key in changes and value is None)}
    with pytest.raises(UserError) as caught:
        parse_command(words(flags))
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    for word in expected:
        assert word in message, message


@pytest.mark.parametrize(("text", "expected"), [
    ("stability_levl: 0.5\n", ["stability_levl", "stability_level"]),
    ("- a\n- b\n", ["list"]),
    ("a: [1\n", ["no YAML"]),
    ("", ["NoneType"]),
    ("config: other.yaml\n", ["config"]),
])  # fmt: skip
def test_recipe(base, text, expected):
    Path("recipe.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        parse_command(["--config", "recipe.yaml", *words(base)])
    assert "\n" not in str(caught.value)
    for word in expected:
        assert word in str(caught.value), str(caught.value)


def test_the_command_line_wins_over_the_recipe(base):
    Path("recipe.yaml").write_text("stability_level: 0.25\nlearning_rate: 0.003\nblock_size: 32\n")
    command = parse_command(["--config", "recipe.yaml", *words(base), "--stability_level", "0.75"])
    assert command.stability.level == 0.75
    assert command.training["learning_rate"] == 0.003
    assert command.data.block_size == 64


def test_output_directory_of_another_run(base):
    folder = Path(base["--output_dir"])
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds another run"):
        parse_command(words(base))


def test_output_directory_is_a_file(base):
    Path(base["--output_dir"]).write_text("x")
    with pytest.raises(UserError, match="not a directory"):
        parse_command(words(base))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_directory_not_writable(base, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(UserError, match="writ"):
        parse_command(words({**base, "--output_dir": locked / "run"}))


def test_unsupported_deepspeed_features(base, tmp_path):
    config = json.loads(Path(ZERO3).read_text())
    (tmp_path / "ds.json").write_text(json.dumps({**config, "compile": {"deepcompile": True}}))
    with pytest.raises(UserError, match="[Dd]eep[Cc]ompile"):
        parse_command(words({**base, "--deepspeed": tmp_path / "ds.json"}))


def test_bf16_config_sets_the_flag(base):
    command = parse_command(words({**base, "--deepspeed": BF16}))
    assert command.training["bf16"] is True and command.training["max_grad_norm"] == 1.0


def test_block_size_above_the_context(base):
    command = parse_command(words({**base, "--block_size": "4096"}))
    with pytest.raises(UserError, match="4096.*512|512.*4096"):
        load_config(command)


def test_folder_without_a_model(base, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = {key: value for key, value in base.items() if key != "--config_name"}
    command = parse_command(words({**flags, "--model_name_or_path": tmp_path / "empty"}))
    with pytest.raises(UserError, match="--model_name_or_path") as caught:
        load_config(command)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", ["hidden", "no_such_key=3", "hidden_size=wide"])
def test_bad_overrides(base, overrides):
    command = parse_command(words({**base, "--config_overrides": overrides}))
    with pytest.raises(UserError, match="--config_overrides"):
        load_config(command)


def test_tokenizer_larger_than_the_model(base, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from ds_stability.data.tokenizer import word_tokenizer

    config = AutoConfig.from_pretrained(LLAMA, vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    word_tokenizer([f"word{i}" for i in range(40)]).save_pretrained(tmp_path / "model")
    flags = {key: value for key, value in base.items() if key != "--config_name"}
    command = parse_command(words({**flags, "--model_name_or_path": tmp_path / "model"}))
    with pytest.raises(UserError, match="vocabulary"):
        load_tokenizer(command, load_config(command))


@pytest.mark.parametrize(("flags", "expected"), [
    ({"--vocab_size": "10"}, ["--vocab_size", "10"]),
    ({"--lora_r": "0"}, ["--lora_r", "0"]),
    ({"--seed": str(2**40)}, ["--seed"]),
    ({"--save_only_model": "true"}, ["--save_only_model", "final"]),
    ({"--eval_strategy": "steps", "--validation_split_percentage": "0"}, ["--eval_strategy", "held-out"]),
    ({"--streaming": "true"}, ["--streaming", "--max_steps"]),
])  # fmt: skip
def test_flags_that_would_fail_late(base, flags, expected):
    with pytest.raises(UserError) as caught:
        parse_command(words({**base, **flags}))
    assert all(word in str(caught.value) for word in expected), str(caught.value)


def test_prompts_file_is_looked_for_before_anything_is_started(base, tmp_path):
    config = json.loads(Path(ZERO3).read_text())
    config["stability"] = {"probe": {"interval": 5, "prompts_file": "nowhere.txt"}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="nowhere.txt"):
        parse_command(words({**base, "--deepspeed": tmp_path / "ds.json"}))


def test_a_checkpoint_of_another_run_is_not_continued_here(base, tmp_path):
    other = tmp_path / "other" / "checkpoint-4"
    other.mkdir(parents=True)
    (other / "trainer_state.json").write_text("{}")
    (other / "rng_state_0.pth").write_text("")
    with pytest.raises(UserError, match="--output_dir|checkpoint"):
        parse_command(words({**base, "--resume_from_checkpoint": other}))


@pytest.mark.parametrize("value", [True, None, "yes"])
def test_a_precision_that_is_no_object(base, tmp_path, value):
    config = {**json.loads(Path(ZERO3).read_text()), "bf16": value}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command = parse_command(words({**base, "--deepspeed": tmp_path / "ds.json"}))
    assert command.ds_config["bf16"] == value  # left to DeepSpeed, which says what it thinks of it


@pytest.mark.parametrize(("ema", "expected"), [
    ({"start_step": 20}, "stability.ema.start_step: 20 is not allowed in a run of 20 steps"),
    ({"decay": 1}, "stability.ema.decay: 1 is not allowed"),
])  # fmt: skip
def test_an_average_of_the_weights_that_cannot_be(base, tmp_path, ema, expected):
    config = json.loads(Path(ZERO3).read_text()) | {"stability": {"ema": ema}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(expected)):
        parse_command(words({**base, "--deepspeed": str(tmp_path / "ds.json"), "--max_steps": "20"}))
