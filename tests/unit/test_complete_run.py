"""Started again in the folder of a run that is complete."""

from pathlib import Path

import pytest

from ds_stability.errors import UserError
from ds_stability.launchers.arguments import parse_command
from ds_stability.launchers.setup_model import load_config
from ds_stability.launchers.setup_run import settings_identity
from ds_stability.launchers.train import main
from ds_stability.run_dir import RunDir, build_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    words = ["--config_name", str(ROOT / "ds_configs/models/llama_tiny.json"), "--dataset_name", "builtin:prose", "--deepspeed",
             str(ROOT / "ds_configs/zero3_cpu.json"), "--output_dir", str(tmp_path / "run")]  # fmt: skip
    parsed = parse_command(words)
    identity = settings_identity(parsed, load_config(parsed)) | {"data": "0f", "tokenizer": "1e"}
    run = RunDir(tmp_path / "run").create()
    run.write_manifest(build_manifest(config={}, identity=identity, seeds={}, data={}, world_size=1))
    run.mark_done()
    return words


def test_auto_has_nothing_left_to_do(command, capsys):
    main([*command, "--resume_from_checkpoint", "auto"])
    assert "this run is complete (DONE)" in capsys.readouterr().out


@pytest.mark.parametrize("flags, key", [(["--seed", "1"], "seed"), (["--stability_level", "0.25"], "stability.level"),
                                        (["--block_size", "64"], "block_size")])  # fmt: skip
def test_auto_is_not_content_with_another_run(command, flags, key):
    with pytest.raises(UserError, match=f"{key} = .*this command has"):
        main([*command, *flags, "--resume_from_checkpoint", "auto"])


def test_a_new_run_does_not_begin_there(command):
    with pytest.raises(UserError, match="holds another run"):
        main(command)
