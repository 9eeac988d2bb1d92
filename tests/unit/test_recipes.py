"""Every recipe that ships is a command line that train.py accepts."""

import json
from pathlib import Path

import pytest
import yaml

from ds_stability.errors import UserError
from ds_stability.launchers.arguments import parse_command

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPOSITORY / "launchers" / "recipes").glob("*.yaml"))
#: What a recipe leaves to the command line, beside --output_dir: the name of a file to train on.
DATA_FILES = {"smollm2_text": "corpus.txt", "smollm2_tofu_neftune": "corpus.txt", "smollm2_governor": "corpus.txt",
              "smollm2_lora_chat": "chats.jsonl"}  # fmt: skip


@pytest.fixture
def command_of(tmp_path, monkeypatch):
    """The parsed command of a recipe, run from the repository's root, with the flags that it leaves open."""
    monkeypatch.chdir(REPOSITORY)

    def parse(recipe: Path, *extra: str):
        argv = ["--config", str(recipe), "--output_dir", str(tmp_path / "run")]
        if recipe.stem in DATA_FILES:
            data = tmp_path / DATA_FILES[recipe.stem]
            data.write_text('{"messages": []}\n', encoding="utf-8")
            argv += ["--train_file", str(data)]
        return parse_command([*argv, *extra])

    return parse


def test_there_are_recipes():
    assert {recipe.stem for recipe in RECIPES} >= {"tiny_llama_prose", "tiny_gpt2_synthetic", *DATA_FILES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_every_value_arrives(recipe, command_of):
    command = command_of(recipe)
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    parts = [vars(command.model), vars(command.data), command.training]
    for key, value in given.items():
        if key in ("stability_level", "stability_target", "stability_objective", "deepspeed"):
            continue
        arrived = next(part[key] for part in parts if key in part)
        assert arrived == value, key
    objective = command.stability.to_dict()["objective"]
    assert objective == given.get("stability_objective", {"name": "cross_entropy"}) | objective
    assert command.stability.governed == ("stability_target" in given)
    assert command.stability.active or objective["name"] != "cross_entropy"
    assert command.ds_config["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_how_to_run_it(recipe):
    head = recipe.read_text(encoding="utf-8").split("\n")[:8]
    assert any(f"--config launchers/recipes/{recipe.name}" in line for line in head)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_command_line_wins_over_the_recipe(recipe, command_of):
    governed = "stability_target" in yaml.safe_load(recipe.read_text(encoding="utf-8"))
    flags = ("--stability_target", "2.5") if governed else ("--stability_level", "0.125")
    command = command_of(recipe, *flags, "--block_size", "64")
    assert command.stability.controller.target == 2.5 if governed else command.stability.level == 0.125
    assert command.data.block_size == 64


def test_a_level_and_a_target_exclude_each_other(command_of):
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "tiny_llama_governor")
    with pytest.raises(UserError, match="--stability_level 0.5 and --stability_target 4.26 exclude each other"):
        command_of(recipe, "--stability_level", "0.5")


def test_a_governor_without_held_out_data_is_refused(command_of):
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "tiny_llama_governor")
    with pytest.raises(UserError, match="measures on held-out text; give --validation_file"):
        command_of(recipe, "--validation_split_percentage", "0")


def test_an_alarm_without_a_reference_text_is_refused(command_of, tmp_path):
    """The training text would take its place without a word."""
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "tiny_gpt2_synthetic")
    ds_config = yaml.safe_load(recipe.read_text(encoding="utf-8"))["deepspeed"]
    block = json.loads((REPOSITORY / ds_config).read_text(encoding="utf-8"))

    def command(**alarm):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({**block, "stability": {"alarm": {"action": "warn", **alarm}, "probe": {"interval": 5}}}))
        return command_of(recipe, "--deepspeed", str(path), "--validation_split_percentage", "0", "--eval_strategy", "no")

    with pytest.raises(UserError, match="stability.alarm.action warn holds samples against held-out text; give --validation_file"):
        command()
    text = tmp_path / "reference.txt"
    text.write_text("words", encoding="utf-8")
    assert command(reference_file=str(text)).stability.alarm.reference_file == str(text)


def test_a_governor_that_nobody_starts_is_refused(command_of, tmp_path):
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "tiny_llama_governor")
    ds_config = yaml.safe_load(recipe.read_text(encoding="utf-8"))["deepspeed"]
    block = json.loads((REPOSITORY / ds_config).read_text(encoding="utf-8"))
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**block, "stability": {"controller": {"mode": "governor", "start": "alarm"}}}))
    with pytest.raises(UserError, match='"alarm" is not allowed with stability.alarm.action "off"'):
        command_of(recipe, "--deepspeed", str(path))


def test_level_of_the_text_recipe_is_a_schedule(command_of):
    command = command_of(next(recipe for recipe in RECIPES if recipe.stem == "smollm2_text"))
    assert [command.stability.family_level("feedback", step) for step in (0, 50, 55, 60, 999)] == [0, 0, 0.25, 0.5, 0.5]


def test_a_recipe_is_read_as_written(command_of, tmp_path):
    """YAML 1.1 reads False, 1200.5, "1e-4" and 8 here."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("config_name: ds_configs/models/llama_tiny.json\ndataset_name: builtin:prose\ndeepspeed: ds_configs/zero3_cpu.json\n"
                      "save_strategy: no\nstability_level: 20:0.5\nlearning_rate: 1e-4\nseed: 010\nrun_name: 2026-12-01\n")  # fmt: skip
    command = command_of(recipe)
    assert command.training["save_strategy"] == "no" and command.training["run_name"] == "2026-12-01"
    assert command.training["learning_rate"] == 1e-4 and command.training["seed"] == 10
    assert command.stability.to_dict()["level"] == [[20, 0.5]]
