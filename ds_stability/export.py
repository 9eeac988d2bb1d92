"""The trained model as a directory for `AutoModelForCausalLM.from_pretrained`: `final/` of a run.

Weights are gathered in bounded pieces and collected in host memory on rank 0, in the engine's compute dtype, then saved
by transformers itself, so that tied weights, renamed weights and shards come out as the ecosystem expects. A peft
model gives its adapter in adapter/ and the merged model beside it; the live engine is only read.
"""

import copy
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_stability.engine import engine_of
from ds_stability.errors import ExportError, UserError
from ds_stability.gathered import base_model, is_partitioned, is_peft, random_state_kept, whole
from ds_stability.merging import check_merge, check_saving, merge_adapter
from ds_stability.model_card import model_card
from ds_stability.run_dir import sync_directory, write_atomic, write_json_atomic

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GATHER_BYTES = 2**28  # weights that are whole at the same time on the accelerator
HIGH_FREQUENCY_NAME = "high_frequency.json"
ADAPTER = "adapter"
DESCRIPTION = "description"  # of the exported model, in the run's folder from its start on


def check_exportable(module: torch.nn.Module) -> None:
    """Refuse what `export_model` could not save; call it before training rather than find out after.

    Raises:
        UserError: not a transformers model, an adapter that cannot be merged or that would act otherwise than merged, weights or a
            generation config that transformers refuses to save.
    """
    model = base_model(module)
    if is_peft(module):
        methods = [f"{c.peft_type.value}" for c in module.peft_config.values() if c.is_prompt_learning]
        if methods:
            raise UserError(f"peft method {methods[0]} cannot be merged into the model; use LoRA or another adapter")
        check_merge(module)
    else:
        _check_saving(model)
    try:
        with tempfile.TemporaryDirectory() as directory:
            model.generation_config.save_pretrained(directory)
    except ValueError as error:
        reason = " ".join(str(error).split())
        message = f"the model's generation config cannot be saved ({reason}); mend generation_config.json"
        raise UserError(message) from None


def _check_saving(model: "PreTrainedModel") -> None:
    try:
        check_saving(model)
    except Exception as error:  # the class's own conversion; else it would end the run at its end
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{type(model).__name__}: its weights cannot be saved in the stored form ({reason})") from error


def export_model(
    engine: "DeepSpeedEngine",
    tokenizer: "PreTrainedTokenizerBase | None",
    directory: str | os.PathLike,
    card_metadata: Mapping[str, Any],
    high_frequency_file: str | os.PathLike | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write the model, ready for `from_pretrained`. A collective: call it on every rank, between optimizer steps.

    The directory appears whole, under its name, or not at all; an earlier export of that name is replaced. The engine
    trains on as if nothing had happened.

    Args:
        card_metadata: what README.md tells about the training, as plain values; text in it is escaped.
        high_frequency_file: copied into the directory as high_frequency.json.

    Raises:
        ExportError: on every rank, when rank 0 could not write. An adapter that could not be merged is kept in adapter/ beside
            the directory.
    """
    state = gather_state_dict(engine)
    failure: Exception | None = None
    if state is not None:
        try:
            with random_state_kept():
                files = (tokenizer, card_metadata, high_frequency_file)
                write_export(engine.module, state, Path(directory), *files, max_shard_size)
        except Exception as error:  # raised below, after the other ranks have heard of it
            failure = error
    message = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    torch.distributed.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise ExportError(f"export to {directory} failed: {message[0]}") from failure


def gather_state_dict(engine: "DeepSpeedEngine") -> dict[str, torch.Tensor] | None:
    """Names and whole tensors of the module's state dict on rank 0, in host memory; None on other ranks. A collective.

    Tied parameters share one tensor, as in the live model.
    """
    own = engine_of(engine.module)
    if own is not None and own.stability.ema is not None:
        own.stability.ema.mend(own)
    main = torch.distributed.get_rank() == 0
    named = list(engine.module.named_parameters(remove_duplicate=False))
    copies: dict[int, torch.Tensor] = {}
    for piece in _pieces(engine, list(engine.module.parameters())):
        with whole(engine, piece):
            if main:
                copies.update((id(p), p.detach().to("cpu", copy=True)) for p in piece)
    if not main:
        return None
    state = {name: copies[id(parameter)] for name, parameter in named}
    for prefix, module in engine.module.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = buffer.detach().to("cpu", copy=True)
    return state


def _pieces(engine: "DeepSpeedEngine", parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Runs of parameters that take at most GATHER_BYTES together (or one that takes more by itself)."""
    pieces: list[list[torch.nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = (parameter.ds_numel if is_partitioned(engine) else parameter.numel()) * parameter.element_size()
        if not pieces or size > room:
            pieces.append([])
            room = GATHER_BYTES
        pieces[-1].append(parameter)
        room -= size
    return pieces


def write_export(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], directory: Path, tokenizer: "PreTrainedTokenizerBase | None",
    metadata: Mapping[str, Any], high_frequency_file: str | os.PathLike | None, max_shard_size: str = "5GB",
) -> None:  # fmt: skip
    """`export_model` for one process that has the whole tensors. If it fails, an adapter is kept in adapter/ beside `directory`."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        dtype = _main_dtype(state)
        model = base_model(module)
        if is_peft(module):
            module.save_pretrained(temporary / ADAPTER, state_dict=dict(state))
            model, state = _merged(module, state, temporary / ADAPTER, directory.with_name(ADAPTER))
        _save_model(model, state, temporary, dtype, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if high_frequency_file is not None:
            shutil.copyfile(high_frequency_file, temporary / HIGH_FREQUENCY_NAME)
        write_atomic(temporary / "README.md", model_card(metadata))
        _publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _merged(module, state, adapter: Path, refuge: Path) -> tuple["PreTrainedModel", Mapping[str, torch.Tensor]]:
    try:
        model = merge_adapter(module, state)
        return model, model.state_dict()
    except Exception:
        _publish(adapter, refuge)
        raise


def write_description(module: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase", directory: Path, keeps_cache: bool) -> None:
    """All of an export but the weights: what `ds-stability export` builds the model from, and the proof that it can be written.

    Args:
        keeps_cache: `use_cache` of the exported config; it is off while documents are packed.
    """
    model = base_model(module)
    config = copy.deepcopy(model.config)
    config.get_text_config().use_cache = keeps_cache
    config.architectures = [type(model).__name__]
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if is_peft(module):
            module.peft_config[module.active_adapter].save_pretrained(temporary / ADAPTER)
        _publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _main_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The floating dtype of most numbers: a few weights may be kept in fp32 beside bf16 ones."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]


def _save_model(
    model: "PreTrainedModel", state: Mapping[str, torch.Tensor], directory: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    config = model.config
    # save_pretrained writes into the config; the live model keeps its own.
    model.config = copy.deepcopy(config)
    try:
        model.save_pretrained(directory, state_dict=dict(state), max_shard_size=max_shard_size)
    finally:
        model.config = config
    saved = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    # It goes by the first parameter, which may be one of those kept in fp32.
    saved["dtype"] = str(dtype).removeprefix("torch.")
    write_json_atomic(directory / "config.json", saved)


def _publish(temporary: Path, directory: Path) -> None:
    """Bring the files to disk and give the directory its name."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(folder)
    earlier = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        os.replace(directory, earlier)
    os.replace(temporary, directory)
    sync_directory(directory.parent)
    shutil.rmtree(earlier, ignore_errors=True)
