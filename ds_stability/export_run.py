"""`ds-stability export RUN`: final/ from a checkpoint of the run, on the CPU, in one process, without a launcher.

The same weights that the run itself would have exported: of the last whole checkpoint, or of the best one where the run loads
it at its end, and their average where it keeps one. Checkpoints are unpickled: export only runs that you would resume.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ds_stability.checkpoint import AVERAGE, RANK_FILES
from ds_stability.checkpoint_files import hash_fault
from ds_stability.data.frequency import FILE_NAME
from ds_stability.errors import UserError
from ds_stability.export import ADAPTER, DESCRIPTION, write_export
from ds_stability.model_card import card_of
from ds_stability.run_dir import RunDir
from ds_stability.safe_read import read_json
from ds_stability.universal import tag_folder
from ds_stability.weights import load_causal_lm

MODEL_FILE = "mp_rank_00_model_states.pt"  # whole weights, at stages 0 to 2


class _Tokenizer:
    """The tokenizer's files, as the run wrote them at its start."""

    def __init__(self, description: Path):
        self.files = [path for path in description.iterdir() if path.is_file() and not path.name.endswith("config.json")]
        self.files += [path for path in [description / "tokenizer_config.json"] if path.is_file()]

    def save_pretrained(self, folder: os.PathLike) -> None:
        for path in self.files:
            shutil.copyfile(path, Path(folder) / path.name)


def export_run(path: str | os.PathLike, trust_remote_code: bool = False) -> tuple[int, bool]:
    """Write RUN/final, and DONE if the run was trained to its end; an earlier final/ is replaced.

    Call it while nobody trains in the folder.

    Returns:
        (step of the exported weights, whether the run is complete)

    Raises:
        UserError: no run, no whole checkpoint, a run of an earlier version, a base model that is gone, or a model with code of its
            own without `trust_remote_code`.
    """
    run = RunDir(path)
    manifest = run.read_manifest()
    description = run.path / DESCRIPTION
    if not (description / "config.json").is_file():
        raise UserError(f"{run.path}: has no {DESCRIPTION}/config.json, so no version that can export wrote it; resume the run instead")
    checkpoint, state = _checkpoint(run, manifest)
    try:
        dtype = _dtype(manifest["config"])
        module, weights = _model(manifest, description, dtype, trust_remote_code), _weights(checkpoint)
        if not _is_partitioned(tag_folder(checkpoint)):
            module.to(dtype)  # as DeepSpeed does there, adapters included
        block, tag = manifest["config"]["stability"], tag_folder(checkpoint)
        updates = read_json(tag / "stability_state.json")["ema"]["updates"] if block.get("ema") else None
        _fill(module, weights | (_average(tag) if updates else {}), checkpoint)
    except KeyError as error:
        raise UserError(f"{run.manifest}: lacks {error}, which a run's manifest has") from None
    complete = state["trained"] >= state["max_steps"]
    card = card_of(block, state["step"], state["trained"], updates)
    frequent = run.path / FILE_NAME
    write_export(module, module.state_dict(), run.final, _Tokenizer(description), card, frequent if frequent.is_file() else None)
    if complete:
        run.mark_done()
    return state["step"], complete


def _checkpoint(run: RunDir, manifest: Mapping[str, Any]) -> tuple[Path, dict[str, int]]:
    """The checkpoint to export, read whole, and {"step": of its weights, "trained": steps of the run so far, "max_steps"}."""
    found = run.complete_checkpoints()
    if not found:
        raise UserError(f"{run.path}: holds no whole checkpoint to export")
    trained, newest = found[-1]
    state = read_json(newest / "trainer_state.json")
    chosen, step, best = newest, trained, state.get("best_global_step")
    if manifest["config"]["training"].get("load_best_model_at_end") and best in dict(found) and trained >= state["max_steps"]:
        chosen, step = run.checkpoint(best), best
    fault = hash_fault(chosen)
    if fault is not None:
        raise UserError(f"{chosen}: is damaged ({fault}); set it aside to export the one before it")
    return chosen, {"step": step, "trained": trained, "max_steps": state["max_steps"]}


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    enabled = {name for name in ("bf16", "fp16") if config["deepspeed"].get(name, {}).get("enabled") is True or config["training"].get(name)}
    return torch.bfloat16 if "bf16" in enabled else torch.float16 if "fp16" in enabled else torch.float32


def _model(manifest: Mapping[str, Any], description: Path, dtype: torch.dtype, trust_remote_code: bool) -> torch.nn.Module:
    """The model as the run built it; an adapter's base with its weights, all else on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    flags = manifest["config"]["model"]
    if flags["trust_remote_code"] and not trust_remote_code:
        raise UserError(f"{description.parent}: was trained with --trust_remote_code; read that code, then give --trust_remote_code here too")
    config = AutoConfig.from_pretrained(description, trust_remote_code=trust_remote_code)
    generation = GenerationConfig.from_pretrained(description)
    if not (description / ADAPTER).is_dir():
        with torch.device("meta"):  # buffers that are not stored stay there, and are not saved
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.generation_config = generation
        return model
    from peft import PeftConfig, get_peft_model

    source = manifest["identity"]["model"] if os.path.isdir(manifest["identity"]["model"]) else flags["model_name_or_path"]
    if source is None:
        raise UserError("the adapter's base is a fresh model, whose weights no checkpoint holds; resume the run instead")
    base = load_causal_lm(source, f"base model {source}", config=config, dtype=dtype, revision=flags["model_revision"],
                          trust_remote_code=trust_remote_code)  # fmt: skip
    base.generation_config = generation
    return get_peft_model(base, PeftConfig.from_pretrained(description / ADAPTER))


def _is_partitioned(folder: Path) -> bool:
    return not (folder / MODEL_FILE).is_file()


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Names and whole tensors of what was trained, and of buffers."""
    folder = tag_folder(checkpoint)
    if list(folder.glob("mp_rank_01*")) or list(folder.glob("*_mp_rank_01_*")):
        raise UserError(f"{checkpoint}: was written with tensor parallelism, which this command does not put together; resume the run")
    if not _is_partitioned(folder):
        return torch.load(folder / MODEL_FILE, map_location="cpu", mmap=True, weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress
        return dict(get_fp32_state_dict_from_zero_checkpoint(os.fspath(checkpoint), folder.name, exclude_frozen_parameters=True))


def _average(folder: Path) -> dict[str, torch.Tensor]:
    """The average of the weights, put together from all ranks' slices; nothing before its first step."""
    whole: dict[str, torch.Tensor] = {}
    held: dict[str, int] = {}
    for file in sorted(folder.glob(RANK_FILES)):
        with safe_open(file, framework="pt") as stored:
            slices = json.loads(stored.metadata()["slices"])
            for name, (start, numel, total) in slices.items():
                if f"{AVERAGE}/{name}" in stored.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    part = whole.setdefault(name, torch.zeros(total))
                    part[start : start + numel] = stored.get_tensor(f"{AVERAGE}/{name}")
                    held[name] = held.get(name, 0) + numel
    torn = [name for name, numel in held.items() if numel != whole[name].numel()]
    if torn:
        raise UserError(f"{folder}: lacks a part of the average of {torn[0]}; a rank's file is missing")
    return whole


def _fill(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    """Give the module its weights, each in the dtype in which the run computed with it."""
    own = module.state_dict(keep_vars=True)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    unknown, missing = weights.keys() - own.keys(), trained - weights.keys()
    names = {id(own[name]) for name in weights if name in own}
    missing = {name for name in missing if id(own[name]) not in names}  # tied ones are stored once
    if unknown or missing:
        raise UserError(f"{checkpoint}: its weights are not those of the run's model, first {min(unknown | missing)}; resume the run instead")
    module.load_state_dict({name: value.reshape(own[name].shape).to(own[name].dtype) for name, value in weights.items()},
                           strict=False, assign=True)  # fmt: skip
    from ds_stability.gathered import base_model

    base_model(module).tie_weights()
