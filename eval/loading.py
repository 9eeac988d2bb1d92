"""A model from a `from_pretrained` folder or from the hub, checked, on one device or spread over several.

A model whose weights do not fit into its device is spread by accelerate over the GPUs of its rank, then the machine's memory,
then the disk.
"""

import hashlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ds_stability.data.frequency import FILE_NAME as HIGH_FREQUENCY_FILE
from ds_stability.data.frequency import HighFrequencySet
from ds_stability.data.tokenizer import special_token_ids, tokenizer_hash
from ds_stability.errors import UserError
from ds_stability.safe_read import read_json
from ds_stability.weights import check_names, load_causal_lm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DESCRIPTIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")  # of config and tokenizer
MEMORY_SHARE = 0.8  # of a device's memory that weights may take: caches and activations need the rest
SAMPLED_BYTES, SAMPLES = 2**16, 64  # of a weight file, for the fingerprint


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be evaluated.

    Attributes:
        eos_ids: tokens that end a text; may be empty.
        pad_id: for padding, always masked.
        special_ids: tokens that are marks rather than text.
        context_length: positions, None where the architecture names no limit.
        vocab_size: width of the logits.
        high_frequency: the set in the model's folder, if there is one.
        device: where inputs go.
        folder: where the files are (for a model from the hub, its snapshot).
    """

    model: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    special_ids: tuple[int, ...]
    context_length: int | None
    vocab_size: int
    high_frequency: HighFrequencySet | None
    device: torch.device
    folder: Path


@dataclass(frozen=True)
class Description:
    """What is known of a model without its weights; attributes as in Loaded, `vocab_size` as its config has it."""

    config: Any
    tokenizer: Any
    context_length: int | None
    vocab_size: int
    high_frequency: HighFrequencySet | None
    folder: Path


def describe(path: str | Path, trust_remote_code: bool = False) -> Description:
    """Read config, tokenizer and high-frequency set: in seconds, whatever the size of the model. UserError as in `load`."""
    folder = model_folder(path)
    weight_files(folder)
    config, tokenizer = _read_description(path, folder, trust_remote_code)
    # A foreign config need not say how wide its logits are.
    vocab_size = getattr(config.get_text_config(), "vocab_size", None) or len(tokenizer)
    _check_tokenizer(path, tokenizer, vocab_size)
    check_names(folder, f"--model {path}", trust_remote_code=trust_remote_code)
    return Description(config, tokenizer, context_length(config), vocab_size, _high_frequency(folder, tokenizer, vocab_size), folder)


def _read_description(path: str | Path, folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """(config, tokenizer)"""
    with _one_line(path, trust_remote_code):
        return (AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code),
                AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))  # fmt: skip


def load(
    path: str | Path,
    device: torch.device | str,
    dtype: str = "auto",
    max_memory_gib: float | None = None,
    gpus_per_model: int = 1,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load model, tokenizer and high-frequency set.

    Args:
        path: a folder as `save_pretrained` writes it, or the name of a model on the hub.
        device: "cpu", or the first of the rank's `gpus_per_model` GPUs, which are consecutive.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        max_memory_gib: weights of at most this size on each GPU and in the machine's memory, the rest on disk.

    Raises:
        UserError: one line; no such model, parts of it missing or broken, an unknown dtype, or a tokenizer that disagrees.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: allowed are auto, {', '.join(DTYPES)}")
    device, folder = torch.device(device), model_folder(path)
    files = weight_files(folder)
    config, tokenizer = _read_description(path, folder, trust_remote_code)
    placement = _placement(files, config, device, dtype, max_memory_gib, gpus_per_model)
    model = _load_weights(path, folder, placement, dtype, trust_remote_code)
    vocab_size = _logits_width(model)
    _check_tokenizer(path, tokenizer, vocab_size)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return Loaded(model, tokenizer, end_ids(tokenizer, model), pad_id, tuple(special_token_ids(tokenizer)),
                  context_length(config), vocab_size, _high_frequency(folder, tokenizer, vocab_size), device, folder)  # fmt: skip


def model_folder(path: str | Path) -> Path:
    """The folder itself, or the snapshot of a model of the hub (downloaded if need be)."""
    if os.path.isdir(path):
        return Path(path)
    name = str(path)
    if os.path.exists(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"--model {name}: no such folder")
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*DESCRIPTIONS, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["*.bin"])
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: no such folder, and no model of the hub that can be reached "
                        f"({_line(error)})") from error  # fmt: skip
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, by name.

    Raises:
        UserError: a folder without a model, an adapter alone, or one in which a part is missing.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"--model {folder}: is a PEFT adapter without its base model; merge it first: PeftModel."
                            "from_pretrained(base_model, adapter).merge_and_unload().save_pretrained(folder), with the "
                            "tokenizer")  # fmt: skip
        raise UserError(f"--model {folder}: holds no model (no config.json); give a folder as save_pretrained writes it")
    main = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if main is None:
        raise UserError(f"--model {folder}: has a config.json but no weights ({WEIGHTS[0]} or shards of it)")
    if main.suffix != ".json":
        return [main]
    try:
        names = set(read_json(main)["weight_map"].values())
        if not all(isinstance(name, str) and Path(name).name == name != ".." for name in names):
            raise ValueError("a weight file outside of the folder")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--model {folder}: {main.name} is no index of weights; copy the folder again") from error
    missing = sorted(name for name in names if not os.path.isfile(folder / name))
    if missing:
        raise UserError(f"--model {folder}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}; copy "
                        "the folder again")  # fmt: skip
    return [folder / name for name in sorted(names)]


def fingerprint(path: str | Path) -> str:
    """sha256 hex of a model: names and sizes of its files, all of config and tokenizer, and samples of the weights.

    Weight files up to a few MiB are read whole, larger ones at 64 evenly spaced places. The card, logs and what else lies in
    the folder do not count.
    """
    folder = model_folder(path)
    weights = weight_files(folder)
    described = sorted({file for pattern in DESCRIPTIONS for file in folder.glob(pattern) if file.is_file()})
    digest = hashlib.sha256()
    for file in [*described, *weights]:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for start in _places(size) if file in weights else [None]:
                stream.seek(start or 0)
                digest.update(stream.read(-1 if start is None else SAMPLED_BYTES))
    return digest.hexdigest()


def _places(size: int) -> Iterable[int]:
    last = max(0, size - SAMPLED_BYTES)
    return sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})


def end_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's end token, and those of the model's generation config.

    Of the latter only what the tokenizer holds for special: a config's default may be an ordinary word here.
    """
    declared = model.generation_config.eos_token_id
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = {token for token in (declared if isinstance(declared, list) else [declared]) if token in special}
    return tuple(sorted(ids | ({tokenizer.eos_token_id} - {None})))


def context_length(config: Any) -> int | None:
    # Models without a fixed context (state space, ALiBi) do not declare one.
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def _one_line(path: str | Path, trust_remote_code: bool) -> Iterator[None]:
    """Turns what transformers raises on a broken or foreign folder into a UserError of one line, without its reports."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the readers of a foreign folder raise whatever they stumble over, tokenizers Exception itself
        if "trust_remote_code" in str(error) and not trust_remote_code:
            text = "needs code from its own repository; read it, then give --trust_remote_code"
        else:
            text = f"cannot be loaded ({_line(error)})"
        raise UserError(f"--model {path}: {text}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _placement(
    files: list[Path], config: Any, device: torch.device, dtype: str, max_memory_gib: float | None, gpus_per_model: int
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where the weights go: all on `device`, if they fit."""
    gpus = range(device.index or 0, (device.index or 0) + gpus_per_model) if device.type == "cuda" else range(0)
    if gpus and gpus[-1] >= torch.cuda.device_count():
        raise UserError(f"--gpus_per_model {gpus_per_model}: GPU {gpus[-1]} is wanted, and there are "
                        f"{torch.cuda.device_count()}; start fewer ranks or lower it")  # fmt: skip
    if max_memory_gib is not None and not max_memory_gib > 0:
        raise UserError(f"--max_memory_gib {max_memory_gib}: allowed is a number above 0")
    machine = int(psutil.virtual_memory().available * MEMORY_SHARE)
    memory: dict[Any, int] = {gpu: int(torch.cuda.get_device_properties(gpu).total_memory * MEMORY_SHARE) for gpu in gpus}
    if max_memory_gib is None:
        stored = config.dtype.itemsize if isinstance(config.dtype, torch.dtype) else 4
        wanted = stored if dtype == "auto" else DTYPES[dtype].itemsize
        needed = sum(file.stat().st_size for file in files) * wanted / stored
        if gpus_per_model == 1 and needed <= memory.get(device.index or 0, machine):
            return {"device_map": {"": str(device)}}
        memory["cpu"] = machine
    else:
        memory = {place: int(max_memory_gib * 2**30) for place in [*gpus, "cpu"]}
    return {"device_map": "auto", "max_memory": memory}


def _load_weights(path: str | Path, folder: Path, placement: dict[str, Any], dtype: str, trust_remote_code: bool) -> Any:
    transformers_logging.disable_progress_bar()
    offload = tempfile.mkdtemp(prefix="ds_stability_offload_") if placement["device_map"] == "auto" else None
    try:
        model = load_causal_lm(folder, f"--model {path}", dtype="auto" if dtype == "auto" else DTYPES[dtype],
                               trust_remote_code=trust_remote_code, offload_folder=offload, **placement)  # fmt: skip
    except BaseException:
        if offload is not None:
            shutil.rmtree(offload, ignore_errors=True)
        raise
    if offload is not None:  # it holds weights: as long as the model lives
        weakref.finalize(model, shutil.rmtree, offload, ignore_errors=True)
    return model.eval()


def _logits_width(model: Any) -> int:
    head = model.get_output_embeddings()
    return model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]


def _check_tokenizer(path: str | Path, tokenizer: Any, vocab_size: int) -> None:
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise UserError(f"--model {path}: its tokenizer has no tokens; save the tokenizer into the folder")
    if index >= vocab_size:
        raise UserError(f"--model {path}: its tokenizer has id {index} ({token!r}), but the model's logits end at "
                        f"{vocab_size - 1}; put the model's own tokenizer into the folder, or resize its embeddings")  # fmt: skip


def _high_frequency(folder: Path, tokenizer: Any, vocab_size: int) -> HighFrequencySet | None:
    file = folder / HIGH_FREQUENCY_FILE
    return HighFrequencySet.load(str(file), vocab_size, tokenizer_hash(tokenizer)) if file.is_file() else None
