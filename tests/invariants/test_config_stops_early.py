"""Invariant 9: a wrong block stops a script with exit code 2 and one line from one rank, before any model is loaded."""

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "launchers" / "train.py"
CASES = {
    "wrong key": ({"levl": 0.5}, "levl", "run_distributed"),
    "out of range": ({"level": 1.5}, "1.5", "run_ranks"),
    "auto": ({"level": "auto"}, "auto", "run_ranks"),
}


@pytest.mark.parametrize("case", ["wrong key", "auto", pytest.param("out of range", marks=pytest.mark.slow)])
def test_one_line_exit_code_2(request, tmp_path, case):
    block, shown, fixture = CASES[case]
    launch = request.getfixturevalue(fixture)
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps({**config, "stability": block}))
    process = launch(TRAIN, "--config_name", str(REPOSITORY / "ds_configs" / "models" / "llama_tiny.json"), "--dataset_name",
                     "builtin:prose", "--deepspeed", str(tmp_path / "ds.json"), "--output_dir", str(tmp_path / "run"), timeout=120)  # fmt: skip
    assert process.returncode == 2, process.stderr[-3000:]
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and shown in lines[0]
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()
