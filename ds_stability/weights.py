"""Pretrained weights, loaded whole or not at all.

transformers gives a weight that it does not find random values, drops one that it does not know, and only warns. Here both,
and weights that are not finite, are one line of error. Names are compared before anything is read, on the meta device, where
transformers' report is the same at every ZeRO stage: under ZeRO-3 its own names neither unknown weights nor other shapes.
What a model ties, makes itself or declares ignorable is in no report.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import logging as transformers_logging

from ds_stability.console import agree
from ds_stability.errors import UserError

PLACEMENT = ("device_map", "max_memory", "offload_folder")
NAMED = 3  # weights that an error names


def load_causal_lm(name: str | os.PathLike, label: str, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(name, **options)`, checked. Under ZeRO-3 a collective.

    Args:
        label: how the source is called in an error, for example "--model_name_or_path PATH".

    Raises:
        UserError: it cannot be loaded, weights are missing, unknown, of another shape or not finite; under ZeRO-3 on every rank.
    """
    partitioned = hf_deepspeed.is_deepspeed_zero3_enabled()
    together: Callable = agree if partitioned else _alone
    together(lambda: check_names(name, label, **options))
    if partitioned:
        agree(lambda: _check_ties(name, label, options))
    model, report = together(lambda: _load(name, label, options))
    check_report(report, label)
    faulty = not_finite(model, partitioned)
    if partitioned:
        faults: list = [None] * dist.get_world_size()
        dist.all_gather_object(faults, faulty)
        faulty = [name for names in faults for name in names]
    if faulty:
        error = UserError(f"{label}: its weights are not finite (NaN or infinite): {_few(faulty)}; they come from a run that "
                          "diverged, or from a damaged file")  # fmt: skip
        error.everywhere = partitioned
        raise error
    return model


def check_names(name: str | os.PathLike, label: str, **options: Any) -> None:
    """Compare names and shapes of the stored weights with the model's; no weight is read, no collective.

    Raises:
        UserError: as `load_causal_lm`, but for values.
    """
    check_report(_load_meta(name, label, options)[1], label)


def check_report(report: Mapping[str, Any], label: str) -> None:
    """Raises UserError if transformers' loading report names any weight that is not what the model has."""
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    reshaped = [f"{key}: {list(stored)} for {list(wanted)}" for key, stored, wanted in sorted(report["mismatched_keys"])]
    prefix = _common_prefix(unknown, missing)
    if prefix:
        raise UserError(f"{label}: all names of its weights begin with {prefix!r}, which the model's do not ({unknown[0]}): they were "
                        "saved from a wrapped model; save the model inside the wrapper, or cut the prefix off")  # fmt: skip
    faults = {"missing": missing, "not the model's": unknown, "of another shape": reshaped}
    parts = [f"{len(names)} {what} ({_few(names)})" for what, names in faults.items() if names]
    if parts:
        raise UserError(f"{label}: its weights do not belong to its config.json: {', '.join(parts)}; give the folder that "
                        "save_pretrained wrote, whole, from the same class of model")  # fmt: skip


@torch.no_grad()
def not_finite(model: torch.nn.Module, partitioned: bool = False) -> list[str]:
    """Names of parameters with a NaN or an infinity and of saved buffers with a NaN (one may mask with -inf).

    Weights on the meta device (kept on disk) are not looked at.

    Args:
        partitioned: the weights are spread over the ranks by ZeRO-3; this rank looks at its own part.
    """
    faulty = []
    for name, parameter in model.named_parameters():
        values = _own_part(parameter) if partitioned else parameter
        if _is_checked(values):
            extremes = torch.stack(torch.aminmax(values))  # NaN wins; no tensor of the weights' size is made
            if not bool(torch.isfinite(extremes).all()):
                faulty.append(name)
    saved = model.state_dict(keep_vars=True)
    faulty += [name for name, buffer in model.named_buffers()
               if name in saved and _is_checked(buffer) and bool(torch.isnan(buffer).any())]  # fmt: skip
    return faulty


def _own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's part of a partitioned parameter, without what fills the last rank's part up (it is never written)."""
    part = parameter.ds_tensor
    left = parameter.ds_numel - part.numel() * parameter.ds_zero_partition_rank
    return part[: max(0, min(left, part.numel()))]


def _is_checked(values: torch.Tensor) -> bool:
    whole_range = values.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return whole_range and values.numel() > 0 and values.device.type != "meta"


def _check_ties(name: str | os.PathLike, label: str, options: Mapping[str, Any]) -> None:
    """Rank 0: refuse matrices that the config ties and that are stored with two values. Under ZeRO-3 transformers compares none
    of them and drops one; else it leaves them untied."""
    if dist.get_rank() == 0 and _parted(_load_meta(name, label, options)[0]):  # both are stored; are they the same?
        with _without_zero3():
            parted = _parted(_load(name, label, options)[0])
        if parted:
            raise UserError(f"{label}: its config.json ties {' and '.join(parted)}, and its files hold two different ones; write "
                            '"tie_word_embeddings": false into config.json')  # fmt: skip


def _parted(model: torch.nn.Module) -> list[str]:
    """Names of the first two weights that the config ties and that are two."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    return next(([target, source] for target, source in tied if model.get_parameter(target) is not model.get_parameter(source)), [])


def _load_meta(name: str | os.PathLike, label: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    options = {key: value for key, value in options.items() if key not in PLACEMENT}
    with _without_zero3():
        return _load(name, label, {**options, "device_map": "meta"})


def _load(name: str | os.PathLike, label: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its own report is a table of many lines
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # the readers of a foreign folder raise whatever they stumble over
        text = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in text and not options.get("trust_remote_code"):
            text = "it needs code from its own repository; read it, then give --trust_remote_code"
        raise UserError(f"{label}: the model cannot be loaded ({text if len(text) <= 200 else text[:197] + '...'})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Models are built as if transformers knew of no DeepSpeed config."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)


def _common_prefix(unknown: list[str], missing: list[str]) -> str:
    """What stands before every stored name, if the model misses one that goes on behind it; else nothing."""
    first = unknown[0] if unknown else ""
    for end in [place + 1 for place, letter in enumerate(first) if letter == "."]:
        if all(name.startswith(first[:end]) for name in unknown) and any(name[end:] in missing for name in unknown):
            return first[:end]
    return ""


def _few(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _alone(action: Callable) -> Any:
    return action()
