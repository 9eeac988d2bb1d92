"""A precision that the accelerator does not have is one line, before anything is loaded; and what the tests make of it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import precisions
import pytest
import torch

import ds_stability
from ds_stability import engine
from ds_stability.cli import main as command
from ds_stability.deepspeed_config import precision
from ds_stability.errors import StabilityConfigError
from ds_stability.eval.suite import Suite
from ds_stability.integrations.transformers import disable, enable
from ds_stability.launchers import train
from ds_stability.precision_support import missing_precision, require_precision

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "ds_configs"
FP16, BF16, AUTO = {"fp16": {"enabled": True}}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": "auto"}}


@pytest.fixture
def accelerator(monkeypatch):
    """accelerator(device, *precisions): what DeepSpeed finds on this machine."""

    def find(device, *names):
        found = SimpleNamespace(device_name=lambda: device, is_bf16_supported=lambda: "bf16" in names,
                                is_fp16_supported=lambda: True if "fp16" in names else None)  # fmt: skip
        monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: found)

    return find


@pytest.mark.parametrize(("config", "device", "names", "shown"), [
    (FP16, "cpu", ["bf16"], ["fp16.enabled true", "cpu has no fp16", "AVX-512 FP16 or AMX", "fp16.enabled false", "bf16.enabled true"]),
    (FP16, "hpu", ["bf16"], ["fp16.enabled true", "hpu has no fp16", "fp16.enabled false", "bf16.enabled true"]),
    (BF16, "npu", ["fp16"], ["bf16.enabled true", "npu has no bf16", "bf16.enabled false", "or fp16.enabled true"]),
    ({"bfloat16": {"enabled": True}}, "mps", [], ["bf16", "mps has no bf16", "fp32"]),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "mps", [], ["torch_autocast.enabled true", "no bf16"]),
])  # fmt: skip
def test_what_the_accelerator_has_not_is_one_line(accelerator, config, device, names, shown):
    accelerator(device, *names)
    with pytest.raises(StabilityConfigError) as caught:
        require_precision(config)
    assert all(text in str(caught.value) for text in shown) and "\n" not in str(caught.value)
    assert ("AMX" in str(caught.value)) == (device == "cpu") and ("or bf16" in str(caught.value)) == ("bf16" in names)


@pytest.mark.parametrize("config", [{}, AUTO, {"fp16": {"enabled": False}, "bf16": {"enabled": False}}, {"fp16": 3}])
def test_fp32_asks_for_nothing(accelerator, config):
    accelerator("cpu")
    assert missing_precision(config) is None


@pytest.mark.parametrize("config", [FP16, BF16])
def test_what_the_accelerator_has_is_taken(accelerator, config):
    accelerator("cuda", "fp16", "bf16")
    assert missing_precision(config) is None


@pytest.mark.parametrize(("config", "flags"), [(FP16, []), (AUTO, ["--fp16", "true"])])
@pytest.mark.parametrize("level", ["0", "0.5"])
def test_the_training_script_says_it_before_it_joins_the_others(accelerator, monkeypatch, tmp_path, config, flags, level):
    accelerator("cpu", "bf16")
    monkeypatch.setattr(train, "join", lambda command: pytest.fail("the process group was started"))
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**json.loads((CONFIGS / "zero3_cpu.json").read_text()), **config}))
    words = ["--config_name", str(CONFIGS / "models" / "llama_tiny.json"), "--dataset_name", "builtin:prose", "--deepspeed", str(file),
             "--output_dir", str(tmp_path / "run"), "--stability_level", level, *flags]  # fmt: skip
    with pytest.raises(StabilityConfigError, match="cpu has no fp16"):
        train.main(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("level", [0, 0.5])
def test_initialize_and_enable_say_it_before_deepspeed_does(accelerator, monkeypatch, level):
    accelerator("cpu", "bf16")
    monkeypatch.setattr(engine, "_deepspeed_initialize", lambda config=None, **kwargs: pytest.fail("DeepSpeed was asked"))
    config = {**FP16, "train_batch_size": 1, "stability": {"level": level}}
    with pytest.raises(StabilityConfigError, match="cpu has no fp16"):
        ds_stability.initialize(model=torch.nn.Linear(1, 1), config=config)
    enable()
    try:
        with pytest.raises(StabilityConfigError, match="cpu has no fp16"):
            deepspeed.initialize(model=torch.nn.Linear(1, 1), config=config)
    finally:
        disable()


def test_inspect_warns_as_the_file_may_be_for_another_machine(accelerator, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps({**FP16, "gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}))
    accelerator("cpu", "bf16")
    assert command(["inspect", str(tmp_path / "ds.json"), "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("cpu has no fp16" in warning and "a run on this machine" in warning for warning in warnings)
    accelerator("cpu", "bf16", "fp16")
    assert command(["inspect", str(tmp_path / "ds.json")]) == 0
    assert "has no fp16" not in capsys.readouterr().out


RUNS = [{"name": "plain"}, {"name": "half", "ds": FP16}, {"name": "bf16", "ds": BF16}, {"name": "off", "ds": {"fp16": {"enabled": False}}}]


@pytest.mark.parametrize(("hidden", "supported", "kept"), [("1", True, 3), ("0", True, 4), ("0", False, 3), ("1", False, 3)])
def test_tests_leave_out_what_cannot_run_and_keep_its_neighbours(monkeypatch, hidden, supported, kept):
    monkeypatch.setenv(precisions.HIDE_FP16, hidden)
    monkeypatch.setattr(precisions, "supports_fp16", lambda: supported)
    runs, left_out = precisions.without_missing(RUNS)
    assert [run["name"] for run in runs] == [run["name"] for run in RUNS if kept == 4 or run["name"] != "half"]
    results = precisions.Results(left_out, plain="its result")
    assert results["plain"] == "its result"
    if left_out:
        reason = f"{precisions.HIDE_FP16}=1" if hidden == "1" else "takes AVX-512 FP16 or AMX"
        with pytest.raises(pytest.skip.Exception, match=reason):
            results["half"]
    with pytest.raises(KeyError):
        results["a name that nobody gave"]


def commands_for_cpus():
    """What README, docs, recipes and scripts tell people to run on CPUs: (file, command of one line)."""
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("launchers/**/*.*"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*")]
    for file in files:
        text = file.read_text(encoding="utf-8").replace("\\\n#", " ").replace("\\\n", " ") if file.is_file() and file.suffix != ".pyc" else ""
        yield from ((file, line) for line in text.splitlines() if "DS_ACCELERATOR=cpu deepspeed" in line)


def test_nothing_for_cpus_is_in_a_precision_that_few_of_them_multiply_fast():
    found = list(commands_for_cpus())
    assert len(found) >= 6
    for file, line in found:
        recipe = re.search(r"launchers/recipes/\w+\.yaml", line)
        named = re.search(r"ds_configs/\w+\.json", line if recipe is None else (ROOT / recipe[0]).read_text())
        assert named is not None and precision(json.loads((ROOT / named[0]).read_text())) == "fp32", (file, line)
    for suite in ROOT.glob("eval/suites/*.yaml"):
        assert Suite.load(str(suite)).dtype in ("auto", "float32"), suite
