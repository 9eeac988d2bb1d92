import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_stability import loss_kernel
from ds_stability.cli import main
from ds_stability.config import StabilityConfig, describe

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "stability": {"level": 0.5, "controller": {"warmup_steps": 20}},
}


@pytest.fixture
def inspect(tmp_path, capsys):
    """inspect(config, *flags) -> (exit code, stdout, stderr) of `ds-stability inspect`."""

    def run(config, *flags):
        path = tmp_path / "ds.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
        code = main(["inspect", str(path), *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_table_shows_every_key_and_marks_defaults(inspect):
    code, out, err = inspect(GOOD)
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert lines["level"] == ["0.5"]
    assert lines["controller.warmup_steps"] == ["20"]
    assert lines["controller.gain_max"] == ["8.0", "default"]
    assert lines["stabilizers.feedback.level"] == "null default: the block's level, 0.5".split()
    shown = {info.path for info in describe() if not info.section and "stabilizers" not in info.path and "(" not in info.path}
    assert {key for key in shown if not key.startswith("ema.")} <= set(lines)
    assert lines["ema"] == ["null", "default:", "none"]
    assert "stabilizers.clipping.level" not in lines  # the family is not in use
    assert "ZeRO stage 3, bf16, offload: none, gradient_clipping: 1.0" in out
    assert "loss path: linear (feedback up to 0.5)" in out
    assert "warnings" not in out


def test_the_level_flag_overrides_and_is_marked(inspect):
    code, out, _ = inspect(GOOD, "--stability_level", "0:0,200:0.25")
    assert code == 0
    assert "level" in out and "[[0, 0.0], [200, 0.25]]" in out and "--stability_level" in out
    assert "loss path: linear (feedback up to 0.25)" in out
    code, out, _ = inspect(GOOD, "--stability_level", "0")
    assert "loss path: stock (no stabilizer is ever above level 0)" in out


def test_json_output_is_the_whole_report(inspect):
    code, out, _ = inspect({**GOOD, "train_batch_size": "auto"}, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["zero_stage"], report["precision"], report["loss_path"]) == (3, "bf16", "linear")
    assert report["auto"] == ["train_batch_size"]
    values = {key["path"]: (key["value"], key["origin"]) for key in report["keys"]}
    assert values["level"] == (0.5, "file") and values["controller.gain_max"] == (8.0, "default")
    assert report["fingerprint"] == StabilityConfig.parse(GOOD["stability"]).fingerprint()


def test_an_explicit_null_is_not_called_a_default(inspect):
    _, out, _ = inspect({**GOOD, "stability": {"controller": {"warmup_steps": None}}}, "--json")
    key = next(key for key in json.loads(out)["keys"] if key["path"] == "controller.warmup_steps")
    assert key == {"path": "controller.warmup_steps", "value": None, "origin": "file",
                   "remark": "10 from pretrained weights, 100 from scratch (250 for a governor)"}  # fmt: skip


@pytest.mark.parametrize(
    "change, warning",
    [
        ({"gradient_clipping": None}, "gradient_clipping is absent: DeepSpeed then clips at 1.0"),
        ({"zero_optimization": None}, "zero_optimization is absent"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: 7 is none of 0, 1, 2, 3"),
        ({"zero_optimization": []}, "zero_optimization.stage: [] is none of 0, 1, 2, 3"),
        ({"zero_optimisation": {}}, 'ignores without a word; did you mean "zero_optimization"?'),
        ({"my_notes": "x"}, "my_notes: unknown top-level key, which DeepSpeed ignores without a word"),
        ({"amp": {"enabled": True}}, "amp: removed from DeepSpeed"),
        ({"wandb": {"team": "auto"}}, 'wandb.team: "auto" is not filled in by anyone'),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "does not resume bit-exactly"),
        ({"stability": {"level": 0.5, "stabilizers": {}}}, "stability.level 0.5 has no effect: stabilizers is {}"),
        ({"stability": {"level": 0.5, "stabilizers": {"feedback": {"level": 0.1}}}}, "no effect: every stabilizer has"),
        ({"stability": None}, 'no "stability" block: level 0'),
    ],
)  # fmt: skip
def test_warnings(inspect, change, warning):
    config = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    code, out, err = inspect(config)
    assert (code, err) == (0, "")
    assert warning in out.partition("\nwarnings\n")[2]
    assert warning not in inspect(GOOD)[1]


@pytest.mark.parametrize("config", ['{"gradient_clipping": NaN}', '{"gradient_clipping": [[[[1]]]], "bf16": 3}',
                                    '{"zero_optimization": {"offload_param": {"device": {"a": 1}}, "stage": null}}',
                                    '{"zero_optimization": true, "optimizer": "x"}', '{"a\\nb": 1}', "{}"])  # fmt: skip
def test_odd_configs_give_a_report_on_every_path(inspect, config):
    for flags in ((), ("--json",)):
        code, out, err = inspect(config, *flags)
        assert (code, err) == (0, "") and out
        assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.parametrize(
    "config, flags, parts",
    [
        ({**GOOD, "stability": {"levl": 1}}, (), ["stability.levl", "1", '"level"']),
        ({**GOOD, "stabilty": {}}, (), ["stabilty", '"stability"']),
        (GOOD, ("--stability_level", "2"), ["--stability_level", '"2"', "from 0 to 1"]),
        ({**GOOD, "stability": {"loss_path": "stock"}}, ("--stability_level", "1"), ["stability.loss_path", '"chunked"']),
        ({**GOOD, "pipeline": {"stages": 2}, "optimizer": {"type": "Muon"}}, (), ["pipeline", "(and 1 more)"]),
        ({"stability": {"stabilizers": {"clipping": {"level": 0.2}}}}, (), ["stabilizers.clipping", "stages 1 to 3"]),
        ("{", (), ["ds.json, line 1", "not JSON"]),
    ],
)
def test_errors_are_one_line_on_stderr_with_exit_code_2(inspect, config, flags, parts):
    code, out, err = inspect(config, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    for part in parts:
        assert part in err


@pytest.mark.parametrize("argv", [[], ["inspct", "x"], ["inspect", "x", "--nope"]])
def test_usage_errors_are_one_line_too(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_the_command_imports_no_torch(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD))
    for name in ("torch", "deepspeed", "transformers"):  # would fail if imported
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('must not be imported')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "ds_stability.cli", "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and "loss path: linear" in done.stdout, done.stderr


def test_a_closed_pipe_is_no_error(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(GOOD))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"set -o pipefail; {sys.executable} -m ds_stability.cli inspect {path} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_kernels_without_their_package_are_a_warning(inspect, monkeypatch):
    """The run may be meant for another machine."""
    monkeypatch.setattr(loss_kernel.importlib.util, "find_spec", lambda name: None)
    code, out, _ = inspect({**GOOD, "stability": {"level": 0.5, "loss_kernel": "triton"}})
    assert code == 0 and "loss_kernel needs" not in out and "needs the package triton; pip install 'ds_stability[triton]'" in out
    assert "loss_kernel" in inspect(GOOD)[1] and "package triton" not in inspect(GOOD)[1]


def test_a_governor_is_the_reason_for_the_loss_path(inspect):
    _, out, _ = inspect({**GOOD, "stability": {"controller": {"mode": "governor", "target": 3.5}}})
    assert "loss path: linear (the governor of entropy acts through it)" in out


READING = [
    "from ds_stability.integrations.transformers import enable\nenable()",
    "from ds_stability.integrations.transformers import enable as on\nif True:\n    on()",
    "from ds_stability.integrations import transformers as t\nt.enable()",
    "import ds_stability\nengine = ds_stability.initialize(model=None)[0]",
    "import ds_stability.integrations.transformers\nds_stability.integrations.transformers.enable()",
]
IGNORING = [
    "import deepspeed\ndeepspeed.initialize(model=None)",
    "from ds_stability.integrations.transformers import enable",  # not called
    "from ds_stability.recorder import read_metrics\nread_metrics('a')",
    "from faulthandler import enable\nenable()",
]


@pytest.mark.parametrize("text, reads", [*((text, True) for text in READING), *((text, False) for text in IGNORING)])
def test_a_script_that_ignores_the_block_is_named(tmp_path, capsys, text, reads):
    (tmp_path / "train.py").write_text(text)
    (tmp_path / "ds.json").write_text('{"stability": {"level": 0.5}, "gradient_clipping": 1.0}')
    assert main(["inspect", str(tmp_path / "ds.json"), "--script", str(tmp_path / "train.py")]) == 0
    output = capsys.readouterr().out
    assert ("so this block is ignored there" in output) == (not reads)
    assert "feedback acts from applied step 100 on, in full from 105 (of a pretrained model: 10 and 15)" in output


def test_a_script_that_is_none(tmp_path, capsys):
    (tmp_path / "ds.json").write_text("{}")
    for name, content, part in (("no.py", None, "cannot be read"), ("x.py", "a b", "is no Python script")):
        if content is not None:
            (tmp_path / name).write_text(content)
        assert main(["inspect", str(tmp_path / "ds.json"), "--script", str(tmp_path / name)]) == 2
        assert part in capsys.readouterr().err
