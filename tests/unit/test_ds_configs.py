"""Every shipped config loads, splits, resolves and is known to DeepSpeed; the loop config has nothing left open."""

import json
from pathlib import Path

import pytest

from ds_stability.config import find_auto, load_ds_config, split_config, unsupported
from ds_stability.deepspeed_config import AUTO_KEYS, unknown_keys, uses_deepspeed_cpu_adam
from ds_stability.inspect_config import inspect_config

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
CONFIGS = sorted(FOLDER.glob("*.json"))
TRAINER = [path for path in CONFIGS if not path.name.startswith("loop_")]
LOOP = [path for path in CONFIGS if path.name.startswith("loop_")]
MODELS = sorted((FOLDER / "models").glob("*.json"))


def ids(paths):
    return {"argvalues": paths, "ids": [path.stem for path in paths]}


def test_the_shipped_set_is_complete():
    trainer = {"zero3_cpu", "zero3_bf16", "zero3_bf16_offload", "zero3_bf16_multinode", "zero2_bf16"}
    assert {path.stem for path in CONFIGS} == trainer | {"loop_zero3"}
    assert {path.stem for path in MODELS} == {"llama_tiny", "gpt2_tiny", "gpt_neox_tiny"}


@pytest.mark.parametrize("path", **ids(CONFIGS))
def test_config_loads_splits_and_resolves_without_a_warning(path):
    config, stability = split_config(load_ds_config(path))
    assert "stability" not in config
    assert stability.level == 0.5 and stability.resolve(pretrained=False).loss_path == "linear"
    assert unknown_keys(config) == [] and unsupported(config, stability) == []
    assert inspect_config(path).warnings == []


@pytest.mark.parametrize("path", **ids(CONFIGS))
def test_gradient_clipping_is_spelled_out_as_the_default_of_max_grad_norm(path):
    assert load_ds_config(path)["gradient_clipping"] == 1.0


@pytest.mark.parametrize("path", **ids(CONFIGS))
def test_the_name_says_stage_precision_and_offload(path):
    report = inspect_config(path)
    assert report.zero_stage == int(path.stem.partition("zero")[2][0])
    assert report.precision == ("bf16" if "bf16" in path.stem else "fp32")
    assert (report.offload["optimizer"] == "cpu") == (report.offload["parameters"] == "cpu") == ("offload" in path.stem)


@pytest.mark.parametrize("path", **ids(TRAINER))
def test_trainer_configs_leave_to_training_arguments_what_they_own(path):
    config = load_ds_config(path)
    owned = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    assert owned <= set(find_auto(config)) <= AUTO_KEYS
    # Trainer's own torch AdamW has decay groups and resumes exactly.
    assert "optimizer" not in config and "scheduler" not in config
    assert not uses_deepspeed_cpu_adam(config)


@pytest.mark.parametrize("path", **ids(LOOP))
def test_loop_configs_are_complete(path):
    config = load_ds_config(path)
    assert find_auto(config) == []
    assert config["train_micro_batch_size_per_gpu"] > 0 and config["gradient_accumulation_steps"] > 0
    assert "train_batch_size" not in config  # it would fix the number of ranks
    assert config["optimizer"]["type"] == "AdamW" and config["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem in ("zero3_cpu", "loop_zero3")], ids=lambda p: p.stem)
def test_cpu_configs_have_small_buckets(path):
    zero = load_ds_config(path)["zero_optimization"]  # the default of 5e8 elements takes 1.9 GiB for any model
    assert zero["reduce_bucket_size"] <= 5_000_000 and zero["stage3_prefetch_bucket_size"] <= 5_000_000


@pytest.mark.parametrize("path", **ids(MODELS))
def test_model_configs_build_a_tiny_model_without_dropout(path):
    from transformers import AutoConfig

    raw = json.loads(path.read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(path)
    assert config.model_type == raw["model_type"]
    assert set(raw) - {"architectures", "model_type"} <= set(config.to_dict())  # no key that transformers would ignore
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_size) == (1024, 512, 128)
    assert config.num_hidden_layers in (3, 4)
    assert all(value == 0 for key, value in config.to_dict().items() if "drop" in key)
