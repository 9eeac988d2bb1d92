"""From a sweep's YAML to its cells: ids, arms, references between cells, and every mistake in one line."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ds_stability.errors import UserError
from ds_stability.launchers.sweep_check import check_cells
from ds_stability.launchers.sweep_plan import load_plan
from ds_stability.launchers.sweep_values import canonical, digest, flag_words

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "launchers" / "sweeps").glob("*.yaml"))
BASE = {"deepspeed": "ds_configs/zero3_cpu.json", "config_name": "ds_configs/models/llama_tiny.json",
        "dataset_name": "builtin:prose", "block_size": 128, "max_steps": 20}  # fmt: skip


@pytest.fixture
def plan_of(tmp_path):
    def make(*settings, num_gpus=None, text=None, **document):
        file = tmp_path / "test.yaml"
        document = {"flags": BASE, **document}
        file.write_text(yaml.safe_dump(document, sort_keys=False) if text is None else text, encoding="utf-8")
        return load_plan(file, settings, num_gpus)

    return make


def by_axes(plan, **axes):
    return next(cell for cell in plan.cells if all(cell.axes.get(key) == value for key, value in axes.items()))


WHOLE_SEQUENCES = ("unlikelihood_token", "unlikelihood_sequence", "reverse_kl")


def test_there_are_shipped_sweeps():
    assert {file.stem for file in SHIPPED} >= {"reproduce", "reproduce_quick", "example", "cures"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_sweep_is_planned_and_every_cell_is_a_command_line(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its paths are found from anywhere
    plan = load_plan(file)
    commands = check_cells(plan, tmp_path / "runs" / plan.name)
    assert list(commands) == [cell.id for cell in plan.cells] and plan.name == file.stem
    for cell in plan.cells:
        command = commands[cell.id]
        assert command.stability.level == cell.axes["level"] and command.training["seed"] == cell.axes["seed"]
        # Else level 0 would differ in more than its level; some objectives have the chunked path alone.
        assert command.stability.loss_path == "linear" or command.stability.objective.name in WHOLE_SEQUENCES
    assert not list(tmp_path.iterdir())  # nothing is written


def test_headline_grid():
    cells = load_plan("reproduce").cells
    main = [cell for cell in cells if cell.arm in ("main", "feedback")]
    assert len(main) == 45 and {cell.axes["architecture"] for cell in main} == {"gpt2", "llama", "gpt_neox"}
    assert {cell.axes["level"] for cell in main} == {0, 0.25, 0.5, 0.75, 1}
    replayed = [cell for cell in cells if cell.arm == "replay"]
    assert len(replayed) == 3
    for cell in replayed:
        needed = next(other for other in cells if (other.id,) == cell.needs)
        # Its own seed's gains would give its own seed's weights, to the bit.
        assert needed.arm == "feedback" and needed.axes == {**cell.axes, "level": 0.5, "seed": (cell.axes["seed"] + 1) % 3}
    by_arm = {cell.arm: cell for cell in cells}
    assert by_arm["permuted"].ds_config(by_arm["permuted"].block)["stability"]["stabilizers"] == {"feedback": {"permute": True}}
    assert by_arm["clipping"].ds_config(by_arm["clipping"].block)["stability"]["stabilizers"] == {"clipping": {}}


def test_grid_is_the_product_and_ids_are_readable(plan_of):
    plan = plan_of(grid={"stability.level": [0, 0.5], "architecture": {
        "gpt2": {"config_name": "ds_configs/models/gpt2_tiny.json"}, "my llama": {"learning_rate": 0.5}}, "seed": [0, 1]})  # fmt: skip
    assert len(plan.cells) == 8 == len({cell.id for cell in plan.cells})
    cell = by_axes(plan, level=0.5, architecture="my llama", seed=1)
    assert cell.id.startswith("level-0.5_my-llama_seed-1-") and len(cell.id.rpartition("-")[2]) == 8
    assert cell.flags["learning_rate"] == 0.5 and cell.flags["seed"] == 1 and cell.block == {"level": 0.5}
    assert cell.flags["config_name"] == str(REPOSITORY / "ds_configs" / "models" / "llama_tiny.json")
    assert by_axes(plan, architecture="gpt2").flags["config_name"].endswith("gpt2_tiny.json")
    config = cell.ds_config(cell.block)
    assert config["stability"]["level"] == 0.5 and config["zero_optimization"]["stage"] == 3


def test_axes_always_have_level_architecture_and_seed(plan_of):
    cell = plan_of().cells[0]
    assert cell.axes == {"level": 0.5, "architecture": "llama_tiny", "seed": 42} and cell.arm == "main"


def test_id_does_not_depend_on_order_or_on_how_a_number_is_written(plan_of, tmp_path):
    one = plan_of(flags=BASE, grid={"seed": [0], "stability.level": [1]}).cells[0]
    turned = {key: BASE[key] for key in reversed(BASE)} | {"max_steps": 20.0}
    other = plan_of(flags=turned, grid={"seed": [0.0], "stability.level": [1.0]}).cells[0]
    assert one.id == other.id
    copied = tmp_path / "copy.json"  # the same settings at another place
    copied.write_text((REPOSITORY / BASE["deepspeed"]).read_text())
    assert plan_of(flags={**BASE, "deepspeed": str(copied)}, grid={"seed": [0], "stability.level": [1]}).cells[0].id == one.id
    config = json.loads(copied.read_text())
    copied.write_text(json.dumps({**config, "gradient_clipping": 0.5}))
    assert plan_of(flags={**BASE, "deepspeed": str(copied)}, grid={"seed": [0], "stability.level": [1]}).cells[0].id != one.id


@pytest.mark.parametrize("change", [{"flags": {**BASE, "max_steps": 21}}, {"num_gpus": 3}, {"grid": {"seed": [1]}},
                                    {"flags": {**BASE, "stability.controller.ramp_steps": 7}}])  # fmt: skip
def test_any_changed_setting_is_another_id(plan_of, change):
    original = plan_of(grid={"seed": [0]}).cells[0]
    changed = plan_of(**{"grid": {"seed": [0]}, **change}).cells[0]
    assert changed.id.rpartition("-")[2] != original.id.rpartition("-")[2]


JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3))  # fmt: skip


@given(JSON, JSON)
def test_digests_are_equal_exactly_for_equal_values(one, other):
    def text(value):
        return json.dumps(canonical(value), sort_keys=True)

    assert (digest(one) == digest(other)) == (text(one) == text(other))
    assert digest(True) != digest(1) and digest([0]) == digest((0.0,))


def test_arms_have_the_grid_and_their_own_flags_and_axes(plan_of):
    plan = plan_of(
        flags={**BASE, "stability.level": 0}, grid={"seed": [0, 1]},
        arms={"plain": {}, "feedback": {"grid": {"stability.level": [0.5, 1]}},
              "clip": {"flags": {"stability": {"stabilizers": {"clipping": {"level": 0.5}}}}},
              "one": {"flags": {"max_steps": 99}, "grid": {"seed": [7]}}},
    )  # fmt: skip
    assert [cell.arm for cell in plan.cells] == ["plain"] * 2 + ["feedback"] * 4 + ["clip"] * 2 + ["one"]
    assert plan.cells[0].id.startswith("plain_seed-0-") and plan.cells[0].axes["level"] == 0
    assert plan.cells[-1].flags["max_steps"] == 99 and plan.cells[-1].axes["seed"] == 7
    clip = next(cell for cell in plan.cells if cell.arm == "clip")
    assert clip.ds_config(clip.block)["stability"]["stabilizers"] == {"clipping": {"level": 0.5}}


def test_a_whole_key_replaces_the_keys_beneath_it(plan_of):
    flags = {**BASE, "stability.stabilizers.clipping.level": 0.5}
    cell = plan_of(flags=flags, arms={"none": {"flags": {"stability.stabilizers": {}}}}).cells[0]
    assert cell.block == {"stabilizers": {}}


def test_objectives_are_an_axis_by_name_or_with_their_keys(plan_of, tmp_path):
    named = {"focal1": {"stability.objective": {"name": "focal", "gamma": 1.0}}, "tofu": {"stability_objective": "tofu"}}
    for grid in ({"stability.objective": ["cross_entropy", "gem", {"name": "focal", "gamma": 1}]}, {"objective": named}):
        plan = plan_of(grid=grid)
        commands = check_cells(plan, tmp_path / "runs")
        names = {command.stability.objective.name for command in commands.values()}
        assert names == ({"focal", "tofu"} if "objective" in grid else {"cross_entropy", "gem", "focal"})
        assert len(set(commands)) == len(plan.cells) == len(names)


def test_the_average_of_the_weights_is_an_axis_or_an_arm(plan_of, tmp_path):
    plan = plan_of(grid={"stability.ema": [None, {"decay": 0.99}, {"decay": 0.9, "warmup": False}]})
    commands = check_cells(plan, tmp_path / "runs")
    found = [command.stability.ema and command.stability.ema.model_dump() for command in commands.values()]
    for expected in (None, {"decay": 0.99, "start_step": 0, "warmup": True}, {"decay": 0.9, "start_step": 0, "warmup": False}):
        assert found.count(expected) == 1
    for flags in ({"stability.ema": {"decay": 0.99}}, {"stability.ema.decay": 0.99}):
        plan = plan_of(arms={"plain": {}, "ema": {"flags": flags}})
        blocks = {cell.arm: cell.ds_config(cell.block)["stability"] for cell in plan.cells}
        assert blocks["ema"]["ema"] == {"decay": 0.99} and "ema" not in blocks["plain"]


def test_references_are_ordered_resolved_and_part_of_the_id(plan_of):
    arms = {"replay": {"flags": {"stability.stabilizers.feedback.replay": "{cell:arm=feedback,level=0.5}/metrics.jsonl"},
                       "grid": {"stability.level": [0.5]}},
            "feedback": {"grid": {"stability.level": [0.5, 1.0]}}}  # fmt: skip
    plan = plan_of(arms=arms, grid={"seed": [0, 1]})
    assert [(cell.arm, cell.axes["seed"], cell.axes["level"]) for cell in plan.cells] == [
        ("feedback", 0, 0.5), ("replay", 0, 0.5), ("feedback", 1, 0.5), ("replay", 1, 0.5), ("feedback", 0, 1.0), ("feedback", 1, 1.0)
    ]  # fmt: skip
    needed, cell = plan.cells[:2]
    assert cell.needs == (needed.id,)
    block = cell.resolved(Path("/runs/test"))[1]
    assert block["stabilizers.feedback.replay"] == f"/runs/test/{needed.id}/metrics.jsonl"
    changed = plan_of("max_steps=21", arms=arms, grid={"seed": [0, 1]}).cells[1]
    assert changed.arm == "replay" and changed.id != cell.id


def test_next_is_another_value_of_an_axis_in_a_circle(plan_of):
    arms = {"feedback": {}, "replay": {"flags": {"stability.stabilizers.feedback.replay": "{cell:arm=feedback,seed=next}/metrics.jsonl"}}}
    grid = {"seed": [5, 0, 3], "stability.level": [0.5, 1]}
    plan = plan_of(arms=arms, grid=grid)
    cells = {cell.id: cell for cell in plan.cells}
    found = {(cell.axes["seed"], cells[cell.needs[0]].axes["seed"], cells[cell.needs[0]].axes["level"] == cell.axes["level"])
             for cell in plan.cells if cell.arm == "replay"}  # fmt: skip
    assert found == {(5, 0, True), (0, 3, True), (3, 5, True)}
    with pytest.raises(UserError, match=r"seed=next\}.*arm replay \(seed 3\): next needs.*they have 3$"):
        plan_of("grid.seed=[3]", arms=arms, grid=grid)
    with pytest.raises(UserError, match=r"arm replay \(no axis seed\)"):
        plan_of(arms=arms, grid={"stability.level": [0.5]})


@pytest.mark.parametrize("reference, message", [
    ("{cell:arm=feedback}/metrics.jsonl", "matches 2 cells"),
    ("{cell:level=0.7}/metrics.jsonl", "matches 0 cells"),
    ("{cell:level}/metrics.jsonl", "AXIS=VALUE"),
    ("{cell:level=0.5/metrics.jsonl", "allowed is a reference such as"),
])  # fmt: skip
def test_wrong_references(plan_of, reference, message):
    with pytest.raises(UserError, match=message):
        plan_of(arms={"feedback": {"grid": {"stability.level": [0.5, 1]}}, "replay": {"flags": {"model_name_or_path": reference}}})


def test_circle(plan_of):
    arms = {"a": {"flags": {"tokenizer_name": "{cell:arm=b}/final"}}, "b": {"flags": {"tokenizer_name": "{cell:arm=a}/final"}}}
    with pytest.raises(UserError, match="refer to each other in a circle"):
        plan_of(arms=arms)


def test_exclude(plan_of):
    grid = {"stability.level": [0, 1], "seed": [0, 1]}
    plan = plan_of(grid=grid, exclude=[{"level": 1, "seed": 1}, {"stability.level": 0, "seed": 0}])
    assert [(cell.axes["level"], cell.axes["seed"]) for cell in plan.cells] == [(0, 1), (1, 0)]
    with pytest.raises(UserError, match="matches no cell"):
        plan_of(grid=grid, exclude=[{"level": 0.3}])
    assert len(plan_of("grid.seed=[1]", grid=grid, exclude=[{"seed": 0}]).cells) == 2


def test_settings(plan_of):
    grid = {"seed": [0, 1], "model": {"a": {"weight_decay": 0.1}, "b": {"weight_decay": 0.2}}}
    plan = plan_of("max_steps=7", "stability.level=0.25", "grid.seed=[5]", "grid.model=b", "train_file=a.txt,b.txt", "evaluate.suite=standard",
                   "evaluate.seeds=[1, 2]", num_gpus=4, grid=grid)  # fmt: skip
    (cell,) = plan.cells
    assert cell.flags["max_steps"] == 7 and cell.axes == {"seed": 5, "model": "b", "level": 0.25, "architecture": "llama_tiny"}
    assert cell.flags["train_file"] == ["a.txt", "b.txt"] and "dataset_name" not in cell.flags  # one source replaces the other
    assert plan.evaluate == {"suite": "standard", "seeds": [1, 2]} and plan.num_gpus == 4
    assert plan_of("stability_level=0.5").cells[0].axes["level"] == 0.5
    assert plan_of("stability_level=0:0,9:0.5").cells[0].axes["level"] == [[0, 0.0], [9, 0.5]]


def test_recipe_gives_defaults(plan_of):
    flags = {"max_steps": 5, "stability.level": 0.25}
    cell = plan_of(recipe="launchers/recipes/tiny_llama_prose.yaml", flags=flags).cells[0]
    assert cell.flags["max_steps"] == 5 and cell.flags["vocab_size"] == 1024 and cell.block == {"level": 0.25}


@pytest.mark.parametrize("document, settings, message", [
    ({"grdi": {}}, [], "unknown key 'grdi'; did you mean 'grid'"),
    ({"flags": {"max_steps": 5}}, [], "flags.deepspeed is not given"),
    ({"grid": {"seed": [0, 0.0]}}, [], "two cells have the same settings|two cells have one id"),
    ({"grid": {"architecture": {"a": {"seed": 1}, "b": {"seed": 1}}}}, [], "two cells have the same settings"),
    ({"grid": {"seed": [0]}, "arms": {"a": {}, "b": {}}}, [], "two cells have the same settings"),
    ({"grid": {"seed": []}}, [], "with at least one"),
    ({"grid": {"seed": 3}}, [], "allowed is a list of values"),
    ({"grid": {"seed": [0]}, "arms": {"a": {"flags": {"seed": 3}}}}, [], "seed is set by arms.a.flags and by the axis seed"),
    ({"grid": {"stability.level": [0], "stability_level": [1]}}, [], "an axis called level is there already"),
    ({"flags": {**BASE, "stability_level": 0.5, "stability": {"level": 1}}}, [], "stability.level is given twice"),
    ({"flags": {**BASE, "output_dir": "x"}}, [], "output_dir cannot be set in a sweep"),
    ({"arms": {"a": {"flag": {}}}}, [], "unknown key 'flag'; did you mean 'flags'"),
    ({"name": "a/b"}, [], "name 'a/b': allowed are letters"),
    ({"num_gpus": 0}, [], "num_gpus 0: allowed is"),
    ({"evaluate": {"suite": "quick", "seeds": 3}}, [], "allowed is {suite: NAME or FILE"),
    ({"exclude": {"seed": 1}}, [], "exclude: allowed is a list of mappings"),
    ({"grid": {"seed": [0]}}, ["seed=3"], "choose its values with --set grid.seed"),
    ({"grid": {"model": {"a": {"seed": 3}}}}, ["seed=3"], "the axis model sets seed"),
    ({"grid": {"model": {"a": {"seed": 3}}}}, ["grid.model=[c]"], "no value 'c'; allowed are a"),
    ({}, ["max_steps"], "allowed is key=value"),
    ({}, ["max_steps=[1"], "is no YAML"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(plan_of, document, settings, message):
    with pytest.raises(UserError, match=message) as error:
        plan_of(*settings, **document)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [("- a\n", "holds a list"), ("flags: {a: [}\n", "is no YAML"),
                                           ("grid: {seed: [0]}\ngrid: {seed: [1]}\n", "the key grid stands twice")])  # fmt: skip
def test_files_that_are_no_sweeps(plan_of, text, message):
    with pytest.raises(UserError, match=message):
        plan_of(text=text)


def test_no_such_file():
    with pytest.raises(UserError, match=r"no such sweep file; .* ship: cures, example, .*reproduce"):
        load_plan("nowhere.yaml")


@pytest.mark.parametrize("document, message", [
    ({"flags": {**BASE, "max_stepz": 3}}, "test.yaml: flags.max_stepz: .* no flag of this name; did you mean max_steps"),
    ({"grid": {"learning_rat": [0.1]}}, "test.yaml: grid.learning_rat: .*did you mean learning_rate"),
    ({"grid": {"model": {"a": {"sed": 1}}}}, "test.yaml: grid.model.a.sed: .*did you mean seed"),
    ({"arms": {"a": {"flags": {"zzz": 1}}}}, "arms.a.flags.zzz: .*stability.KEY"),
    ({"grid": {"learning_rate": ["high"]}}, r"cell learning_rate-high-\w+: grid.learning_rate: invalid float value: 'high'$"),
    ({"recipe": "launchers/recipes/tiny_llama_prose.yaml", "grid": {"seed": [-1]}}, r"cell seed-1-\w+: grid.seed -1: allowed"),
    ({"flags": {**BASE, "stability.levle": 3}}, "stability.levle"),
    ({"grid": {"stability.level": [0, 2]}}, r"cell level-2-\w+: .*stability.level"),
    ({"grid": {"block_size": [64, 4096]}}, r"cell block_size-4096-\w+: .*4096"),
    ({"flags": {**BASE, "config_name": "nowhere.json"}}, "nowhere.json: no such file"),
    ({"arms": {"a": {}, "b": {"flags": {"config_name": None, "model_name_or_path": "gpt2"}}}}, "the tokenizers of .* differ"),
    ({"grid": {"vocab_size": [512, 1024]}}, "its tokenizer .* would differ"),
    ({"grid": {"dataset_name": ["builtin:prose", "builtin:synthetic"]}}, "its tokenizer .* would differ"),
])  # fmt: skip
def test_a_cell_that_train_py_would_refuse_is_named(plan_of, tmp_path, document, message):
    plan = plan_of(**document)
    with pytest.raises(UserError, match=message) as error:
        check_cells(plan, tmp_path / "runs")
    assert "\n" not in str(error.value) and "test.yaml" in str(error.value)
    assert "/tmp/tmp" not in str(error.value)  # nor is it told of a scratch file


def test_a_changed_flag_is_named_as_it_was_given(plan_of, tmp_path):
    with pytest.raises(UserError, match=r"test.yaml: --set max_stepz: .*did you mean max_steps"):
        check_cells(plan_of("max_stepz=3"), tmp_path / "runs")
    with pytest.raises(UserError, match=r": --set block_size 1: allowed is"):
        check_cells(plan_of("block_size=1"), tmp_path / "runs")


BRANCHES = {"arms": {"trunk": {"flags": {"stability.level": 0.0}},
                     "branch": {"flags": {"branch_from": "{cell:arm=trunk}/checkpoint-8"}, "grid": {"stability.level": [0.25, 0.5]}}},
            "flags": {**BASE, "save_steps": 4}, "grid": {"seed": [0, 1]}}  # fmt: skip


def test_branches_of_a_cell(plan_of, tmp_path):
    plan = plan_of(**BRANCHES)
    commands = check_cells(plan, tmp_path / "runs")
    cells = {cell.id: cell for cell in plan.cells}
    branches = [cell for cell in plan.cells if cell.arm == "branch"]
    assert len(plan.cells) == 6 and len(branches) == 4
    for cell in branches:
        (needed,) = cell.needs
        assert cells[needed].arm == "trunk" and cells[needed].axes["seed"] == cell.axes["seed"]
        assert cell.resolved(Path("/s"))[0]["branch_from"] == f"/s/{needed}/checkpoint-8"
        assert commands[cell.id].stability.level == cell.axes["level"]


@pytest.mark.parametrize("changes, message", [
    ({"flags": {**BASE, "save_steps": 5}}, r"cell branch_\S+: arms.branch.flags.branch_from .* saves every 5 steps up to step 20, so never 8"),
    ({"flags": {**BASE, "save_steps": 4, "save_total_limit": 2}}, "keeps its last 2 checkpoints only"),
    ({"flags": {**BASE, "save_steps": 4, "max_steps": 8}}, "the branch goes on from step 8 of its trunk"),
    ({"grid": {}, "arms": {**BRANCHES["arms"], "trunk": {"flags": {"seed": 3}}}}, "the trunk has seed 3, this cell 42"),
    ({"arms": {**BRANCHES["arms"], "branch": {"flags": {"branch_from": "{cell:arm=trunk}/final"}}}}, "allowed is a checkpoint of the cell"),
    ({"arms": {"branch": {"flags": {"branch_from": "nowhere/checkpoint-8"}}}}, "nowhere/checkpoint-8: no such checkpoint folder"),
])  # fmt: skip
def test_branches_that_cannot_be(plan_of, tmp_path, changes, message):
    plan = plan_of(**{**BRANCHES, **changes})
    with pytest.raises(UserError, match=message) as error:
        check_cells(plan, tmp_path / "runs")
    assert "\n" not in str(error.value)


def test_flag_words():
    words = flag_words({"a": [1, "b"], "c": True, "d": None, "e": {"x": 1}, "f": 1e-3})
    assert words == ["--a", "1", "b", "--c", "true", "--e", '{"x": 1}', "--f", "0.001"]
