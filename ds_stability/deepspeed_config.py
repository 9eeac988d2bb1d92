"""Reading a DeepSpeed JSON with one-line errors, and what can be said about it without DeepSpeed.

Key names are those of DeepSpeed 0.19.8: `deepspeed/runtime/config.py` (DeepSpeedConfig), the `constants.py` files
that it imports, and `deepspeed/__init__.py`. DeepSpeed ignores unknown top-level keys without a word.
"""

import base64
import binascii
import copy
import json
import os
from typing import Any

import hjson

from ds_stability.config_errors import did_you_mean, key_path, one_line, show_value
from ds_stability.errors import StabilityConfigError

DEEPSPEED_KEYS = frozenset("""
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine inference log_level managed_gradient_accumulation
    memory_breakdown optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type
    sequence_parallel_size steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
""".split())  # fmt: skip
#: Keys that deepspeed.initialize refuses, because the feature behind them is gone.
REMOVED_KEYS = frozenset("""
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients
""".split())  # fmt: skip
#: "auto" values that Accelerate or transformers' Trainer fill in; any other makes Accelerate raise.
AUTO_KEYS = frozenset("""
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping bf16.enabled
    fp16.enabled optimizer.params.lr optimizer.params.betas optimizer.params.eps optimizer.params.weight_decay
    scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr scheduler.params.warmup_num_steps
    scheduler.params.total_num_steps zero_optimization.stage zero_optimization.reduce_bucket_size
    zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold
    zero_optimization.stage3_gather_16bit_weights_on_model_save zero_optimization.offload_optimizer.device
    zero_optimization.offload_optimizer.nvme_path zero_optimization.offload_param.device
    zero_optimization.offload_param.nvme_path
""".split())  # fmt: skip
FP16_NAMES = ("torch.float16", "fp16", "float16", "half")


def load_ds_config(config: Any) -> dict[str, Any]:
    """A DeepSpeed config as a dict of its own (a deep copy).

    Args:
        config: dict, path of a JSON file, or base64 of the JSON text, as `deepspeed.initialize` takes them.

    Raises:
        StabilityConfigError: missing or unreadable file, not UTF-8, neither JSON nor HJSON (with the line), not an object.
    """
    if isinstance(config, dict):
        try:
            return copy.deepcopy(config)
        except RecursionError:
            raise StabilityConfigError("DeepSpeed config: the dict is nested too deeply to be one") from None
    if not isinstance(config, (str, os.PathLike)) or not str(config):
        raise StabilityConfigError(
            f"DeepSpeed config: {show_value(config)} is not allowed; must be a dict or the path of a JSON file"
        )
    name = one_line(str(config), 200)
    return _parse_json(_read_text(config, name), name)


def _read_text(path: Any, name: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        text = _decode_base64(str(path))
        if text is None:
            raise StabilityConfigError(f"{name}: no such file; must be the path of a DeepSpeed JSON file") from None
        return text
    except IsADirectoryError:
        raise StabilityConfigError(f"{name}: is a directory; must be the path of a DeepSpeed JSON file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        text = _decode_base64(str(path))  # a long base64 text is no valid file name
        if text is None:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise StabilityConfigError(f"{name}: cannot be read ({reason}); must be a DeepSpeed JSON file") from None
        return text
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StabilityConfigError(
            f"{name}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); must be JSON saved as UTF-8"
        ) from None


def _decode_base64(text: str) -> str | None:
    """The JSON object that DeepSpeed's launcher packs into base64 (its autotuner does), or None."""
    try:
        decoded = base64.b64decode(text, altchars=b"-_", validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _parse_json(text: str, name: str) -> dict[str, Any]:
    try:
        config = _parse(text)
    except json.JSONDecodeError as error:
        given = show_value(text.splitlines()[error.lineno - 1].strip()) if text.strip() else "an empty file"
        raise StabilityConfigError(
            f"{name}, line {error.lineno}: not JSON ({error.msg}) at {given}; must be JSON (comments and trailing commas are allowed)"
        ) from None
    except RecursionError:
        raise StabilityConfigError(f"{name}: nested too deeply to be a DeepSpeed config") from None
    except StabilityConfigError as error:
        raise StabilityConfigError(f"{name}: {error}") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise StabilityConfigError(f"{name}: {one_line(str(error), 120)}; must be plain JSON") from None
    if not isinstance(config, dict):
        raise StabilityConfigError(f"{name}: {show_value(config)} at the top; must be a JSON object of DeepSpeed keys")
    return config


def _parse(text: str) -> Any:
    """JSON, else HJSON, which DeepSpeed reads: comments, trailing commas, names without quotes. JSONDecodeError where it is neither."""
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError:
        if not text.strip():  # {} in HJSON
            raise
        try:
            config = hjson.loads(text, object_pairs_hook=_refuse_duplicates)
        except StabilityConfigError:
            raise
        except (ValueError, OverflowError, RecursionError):  # the parser's own, and what it lets through (3e310)
            config = None
        if not isinstance(config, dict):
            raise
        return config


def is_plain_json(config: Any) -> bool:
    """False for a file that DeepSpeed reads as HJSON, and a transformers Trainer does not read at all."""
    if isinstance(config, dict):
        return True
    try:
        json.loads(_read_text(config, str(config)))
    except ValueError:
        return False
    return True


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise StabilityConfigError(
                f"the key {show_value(key)} stands twice in one object, with {show_value(result[key])} and "
                f"{show_value(value)}; must stand once"
            )
        result[key] = value
    return result


def section(ds_config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The object at a key path, or {} if there is none or the value is no object."""
    node: Any = ds_config
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def find_auto(ds_config: dict[str, Any]) -> list[str]:
    """Key paths whose value is "auto", in order. transformers' Trainer fills them; a plain loop cannot."""
    found: list[str] = []
    stack: list[tuple[tuple[object, ...], Any]] = [((), ds_config)]
    seen: set[int] = set()  # a dict may refer to itself
    while stack:
        path, node = stack.pop()
        if isinstance(node, str) and node == "auto":
            found.append(key_path(path))
        elif isinstance(node, (dict, list, tuple)) and id(node) not in seen:
            seen.add(id(node))
            items = node.items() if isinstance(node, dict) else enumerate(node)
            stack.extend(((*path, key), value) for key, value in reversed(list(items)))
    return found


def unknown_keys(ds_config: dict[str, Any]) -> list[tuple[str, str | None]]:
    """(key, closest real key or None) for every top-level key that DeepSpeed 0.19.8 does not read."""
    known = DEEPSPEED_KEYS | REMOVED_KEYS | {"stability"}
    return [(str(key), did_you_mean(key, DEEPSPEED_KEYS, cutoff=0.7)) for key in ds_config if key not in known]


def zero_stage(ds_config: dict[str, Any]) -> int | None:
    """ZeRO stage, 0 if absent; None if it is not one of 0, 1, 2, 3 (such as "auto")."""
    zero = ds_config.get("zero_optimization", {})
    if isinstance(zero, bool):  # deprecated form: true means stage 1
        return int(zero)
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    return int(stage) if stage in (0, 1, 2, 3) and not isinstance(stage, bool) else None


def offload_devices(ds_config: dict[str, Any]) -> dict[str, str]:
    """{"optimizer": device, "parameters": device}, "none" where nothing is offloaded."""
    zero = section(ds_config, "zero_optimization")
    old = {"optimizer": zero.get("cpu_offload"), "parameters": zero.get("cpu_offload_param")}  # deprecated flags
    devices = {}
    for name, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        device = section(zero, key).get("device", "cpu" if old[name] is True else "none")
        devices[name] = one_line(device, 20) if isinstance(device, str) else show_value(device)
    return devices


def precision(ds_config: dict[str, Any]) -> str:
    """"bf16", "fp16" or "fp32"; "bf16 if --bf16 is given, else fp32" and the like for "auto"."""
    modes = {
        "bf16": section(ds_config, "bf16" if "bf16" in ds_config else "bfloat16").get("enabled", False),
        "fp16": section(ds_config, "fp16").get("enabled", False),
    }
    for name, enabled in modes.items():
        if enabled is True:
            return name
    flags = [name for name, enabled in modes.items() if enabled == "auto"]
    return ", ".join(f"{name} if --{name} is given" for name in flags) + ", else fp32" if flags else "fp32"


def unsupported_features(ds_config: dict[str, Any]) -> list[str]:
    """One sentence for each DeepSpeed feature in the config that ds_stability does not work with."""
    zero, autocast = section(ds_config, "zero_optimization"), section(ds_config, "torch_autocast")
    optimizer = section(ds_config, "optimizer").get("type")
    found = {
        "pipeline": ("pipeline parallelism", bool(ds_config.get("pipeline"))),
        "zero_optimization.zenflow": ("ZenFlow", zero.get("zenflow") is not None),
        "zero_optimization.offload_optimizer.super_offload": (
            "SuperOffload", _is_on(section(zero, "offload_optimizer"), "super_offload")),
        "zero_optimization.offload_optimizer.device": (
            "NVMe optimizer offload", section(zero, "offload_optimizer").get("device") == "nvme"),
        "optimizer.type": ("the Muon optimizer", isinstance(optimizer, str) and optimizer.lower() == "muon"),
        "compile.deepcompile": ("DeepCompile", _is_on(section(ds_config, "compile"), "deepcompile")),
        "torch_autocast.dtype": (
            "torch_autocast in fp16", _is_on(autocast, "enabled") and autocast.get("dtype") in FP16_NAMES),
        "hybrid_engine.enabled": ("the hybrid engine", _is_on(section(ds_config, "hybrid_engine"), "enabled")),
        "tensor_parallel.autotp_size": (
            "tensor parallelism (AutoTP)", section(ds_config, "tensor_parallel").get("autotp_size") not in (None, 0, 1)),
        "expert_parallel.enabled": ("expert parallelism (AutoEP)", _is_on(section(ds_config, "expert_parallel"), "enabled")),
        "sequence_parallel_size": ("sequence parallelism (Ulysses)", ds_config.get("sequence_parallel_size") not in (None, 1)),
        "zero_optimization.zero_quantized_weights": ("ZeRO++ quantization of weights", _is_on(zero, "zero_quantized_weights")),
        "zero_optimization.zero_quantized_nontrainable_weights": (
            "ZeRO++ quantization of frozen weights", _is_on(zero, "zero_quantized_nontrainable_weights")),
        "zero_optimization.zero_quantized_gradients": (
            "ZeRO++ quantization of gradients", _is_on(zero, "zero_quantized_gradients")),
        "zero_optimization.offload_param.device": (
            "NVMe parameter offload", section(zero, "offload_param").get("device") == "nvme"),
    }  # fmt: skip
    return [
        f"{path}: {name} does not work with ds_stability yet; remove the key or use plain deepspeed.initialize"
        for path, (name, present) in found.items()
        if present
    ]


def uses_deepspeed_cpu_adam(ds_config: dict[str, Any]) -> bool:
    """Whether an offloaded optimizer is DeepSpeedCPUAdam, which does not resume bit-exactly.

    So it is for Adam and AdamW in the config without "torch_adam", and for a torch optimizer that Accelerate converts
    unless "zero_force_ds_cpu_optimizer" is false (accelerate/accelerator.py, `_prepare_deepspeed`).
    """
    if offload_devices(ds_config)["optimizer"] == "none":
        return False
    if "optimizer" not in ds_config:
        return ds_config.get("zero_force_ds_cpu_optimizer", True) is not False
    kind = section(ds_config, "optimizer").get("type")
    torch_adam = section(ds_config, "optimizer", "params").get("torch_adam", False) is True
    return isinstance(kind, str) and kind.lower() in ("adam", "adamw") and not torch_adam


def _is_on(node: dict[str, Any], key: str) -> bool:
    """Whether a switch is anything but absent, null or false: a wrong value is no reason to let a feature pass."""
    return node.get(key, False) not in (False, None)
