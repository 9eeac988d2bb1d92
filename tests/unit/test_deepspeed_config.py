"""The DeepSpeed config around the stability block."""

import json
from pathlib import Path

import pytest

from ds_stability.config import StabilityConfig, find_auto, load_ds_config, split_config, unsupported
from ds_stability.deepspeed_config import DEEPSPEED_KEYS, precision, unknown_keys, uses_deepspeed_cpu_adam, zero_stage

ROOT = Path(__file__).parents[2]
REFUSED = (ROOT / "docs" / "footguns.md").read_text(encoding="utf-8").partition("### What ds_stability refuses")[2].partition("## Evaluation")[0]


def test_split_config_takes_the_block_out_and_leaves_the_input_alone():
    ds_config = {"train_batch_size": 8, "stability": {"level": 0.5}}
    rest, cfg = split_config(ds_config)
    assert rest == {"train_batch_size": 8} and cfg.level == 0.5
    assert ds_config == {"train_batch_size": 8, "stability": {"level": 0.5}}
    assert split_config({"bf16": {"enabled": True}}) == ({"bf16": {"enabled": True}}, StabilityConfig())


def test_no_real_deepspeed_key_looks_like_the_block():
    rest, cfg = split_config(dict.fromkeys(DEEPSPEED_KEYS))
    assert set(rest) == DEEPSPEED_KEYS and cfg == StabilityConfig()
    assert unknown_keys(rest) == []


@pytest.mark.parametrize(
    "key, guess",
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("optimiser", "optimizer"),
        ("train_batchsize", "train_batch_size"),
        ("bf16_", "bf16"),
        ("xyzzy", None),
    ],
)
def test_misspelled_deepspeed_keys_are_found(key, guess):
    assert unknown_keys({key: 1, "fp16": {}}) == [(key, guess)]


def test_the_key_list_is_that_of_the_installed_deepspeed():
    import importlib.util

    root = Path(importlib.util.find_spec("deepspeed").origin).parent
    sources = [root / "__init__.py", *(root / "runtime").glob("*.py"), *(root / "utils").glob("*.py")]
    for folder in ("comm", "profiling", "autotuning", "monitor", "datastates", "runtime/swap_tensor",
                   "runtime/activation_checkpointing", "runtime/data_pipeline", "runtime/tensor_parallel"):  # fmt: skip
        sources += (root / folder).glob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    missing = [key for key in DEEPSPEED_KEYS if f'"{key}"' not in text and f"'{key}'" not in text]
    assert set(missing) <= {"inference"}  # read by transformers, not by DeepSpeed's training engine


def test_find_auto_names_every_path_in_order_and_survives_cycles():
    ds_config = {"a": "auto", "b": {"c": [1, "auto", {"d": "auto"}]}, "e": "automatic"}
    ds_config["b"]["self"] = ds_config
    assert find_auto(ds_config) == ["a", "b.c[1]", "b.c[2].d"]
    assert find_auto({}) == []


def test_load_ds_config_copies_a_dict_and_reads_a_file_and_base64(tmp_path):
    import base64

    ds_config = {"zero_optimization": {"stage": 3}}
    copy = load_ds_config(ds_config)
    assert copy == ds_config and copy["zero_optimization"] is not ds_config["zero_optimization"]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds_config), encoding="utf-8")
    assert load_ds_config(path) == load_ds_config(str(path)) == ds_config
    packed = base64.urlsafe_b64encode(json.dumps(ds_config).encode()).decode()
    assert load_ds_config(packed) == ds_config
    long = {**ds_config, "tensorboard": {"job_name": "x" * 5000}}  # longer than a file name may be
    assert load_ds_config(base64.urlsafe_b64encode(json.dumps(long).encode()).decode()) == long


@pytest.mark.parametrize(
    "ds_config, named",
    [
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "zero_optimization.zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
         "zero_optimization.offload_optimizer.super_offload"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "expert_parallel.enabled"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        *(({"zero_optimization": {"stage": 3, f"zero_quantized_{what}": True}}, f"zero_optimization.zero_quantized_{what}")
          for what in ("weights", "nontrainable_weights", "gradients")),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param.device"),
        ({"stability": {"stabilizers": {"clipping": {"level": 0.1}}}}, "stability.stabilizers.clipping"),
        ({"zero_optimization": {"stage": 0}, "stability": {"level": 0.1, "stabilizers": {"averaging": {}}}},
         "stability.stabilizers.averaging"),
    ],
)  # fmt: skip
def test_unsupported_features_get_a_sentence(ds_config, named):
    problems = unsupported(ds_config)
    assert len(problems) == 1 and problems[0].startswith(named + ": ") and problems[0].isprintable()
    if not named.startswith("stability."):
        assert f"| `{named}`" in REFUSED, "docs/footguns.md, What ds_stability refuses"


def test_every_refused_key_of_the_docs_is_refused():
    """Each row of the table against the code; compute_grad_norm is refused where the optimizer is known."""
    rows = {line.split("`")[1] for line in REFUSED.splitlines() if line.startswith("| `")}
    source = (ROOT / "ds_stability" / "deepspeed_config.py").read_text(encoding="utf-8")
    assert len(rows) > 12 and all(f'"{row}": (' in source for row in rows - {"zero_optimization.compute_grad_norm"})


@pytest.mark.parametrize(
    "ds_config",
    [
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": False}}},
        {"optimizer": {"type": "AdamW"}, "compile": {"deepcompile": False}, "pipeline": {}},
        {"tensor_parallel": {"autotp_size": 1}, "expert_parallel": {"enabled": False}, "sequence_parallel_size": 1},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2, "zero_quantized_weights": False}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "hybrid_engine": {"enabled": False}},
        {"zero_optimization": {"stage": 1}, "stability": {"level": 1, "stabilizers": {"clipping": {}, "averaging": {}}}},
        {"zero_optimization": {"stage": "auto"}, "stability": {"level": 0.5, "stabilizers": {"clipping": {}}}},
        {"stability": {"stabilizers": {"clipping": {"level": 0}}}},
        {"optimizer": [], "zero_optimization": 7, "compile": None, "torch_autocast": "x"},
    ],
)
def test_supported_and_malformed_configs_pass(ds_config):
    assert unsupported(ds_config) == []


def test_stage_and_precision_of_odd_configs():
    assert [zero_stage({"zero_optimization": z}) for z in ({}, {"stage": 2}, True, False, {"stage": 7}, [], None)] == [
        0, 2, 1, 0, None, None, None]  # fmt: skip
    assert zero_stage({}) == 0
    assert precision({}) == precision({"bf16": {"enabled": False}, "fp16": 3}) == "fp32"
    assert precision({"fp16": {"enabled": True}}) == "fp16"
    assert precision({"bfloat16": {"enabled": True}}) == "bf16"
    assert precision({"bf16": {"enabled": "auto"}}) == "bf16 if --bf16 is given, else fp32"


@pytest.mark.parametrize(
    "extra, cpu_adam",
    [
        ({}, True),
        ({"zero_force_ds_cpu_optimizer": False}, False),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, True),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, False),
        ({"optimizer": {"type": "SGD"}}, False),
    ],
)
def test_deepspeed_cpu_adam_is_recognized(extra, cpu_adam):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert uses_deepspeed_cpu_adam({"zero_optimization": zero, **extra}) is cpu_adam
    assert not uses_deepspeed_cpu_adam({"zero_optimization": {"stage": 3}, **extra})
