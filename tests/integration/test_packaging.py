"""What an installed package holds: one top-level name, with the configs, the launchers and the recipes inside."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-lib", "out"], cwd=source, check=True, capture_output=True)
    return source / "out"


def test_one_top_level_name(built):
    assert [path.name for path in built.iterdir()] == ["ds_stability"]


@pytest.mark.parametrize("name", [
    "ds_configs/zero3_bf16.json", "ds_configs/models/llama_tiny.json", "launchers/train.py", "launchers/plain_loop.py",
    "launchers/README.md", "launchers/hostfile.example", "launchers/recipes/smollm2_text.yaml", "data/synthetic.py",
    "stabilizers/averaging.py", "integrations/transformers.py", "eval/__init__.py",
])  # fmt: skip
def test_it_holds(built, name):
    assert (built / "ds_stability" / name).is_file()


def test_importing_is_cheap():
    code = "import sys, ds_stability; print([m for m in ('torch', 'deepspeed', 'transformers', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
