"""The stability state in a DeepSpeed checkpoint.

The replicated floats are one key of DeepSpeed's `client_state`, which survives the universal converter, and stand again in
`TAG/stability_state.json` for people to read. State as large as the parameters (the gradient's running mean, the initial
weights) is per rank, in `TAG/ds_stability_rank_XXXXX.safetensors`. Nothing of ours is pickled.
"""

import json
import logging
from pathlib import Path

import torch
from deepspeed import comm as dist
from safetensors import safe_open
from safetensors.torch import save_file

from ds_stability.console import agree
from ds_stability.errors import StabilityConfigError
from ds_stability.run_dir import write_json_atomic

KEY = "ds_stability"
logger = logging.getLogger(__name__)


def save(engine, save_dir: str, tag: str, state: dict) -> None:
    """Write this rank's tensors and, on rank 0, the readable state; call it before DeepSpeed writes `latest`."""
    folder = Path(save_dir) / tag
    folder.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        write_json_atomic(folder / "stability_state.json", state)
    tensors = _rank_tensors(engine.stability)
    if tensors:
        metadata = {"world_size": str(dist.get_world_size()), "rank": str(dist.get_rank())}
        target = _rank_file(folder)
        temporary = target.with_suffix(".tmp")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.replace(target)


def load(engine, path: str, client_state: dict) -> dict | None:
    """Take our key out of `client_state`, load this rank's tensors, and return the replicated state.

    At level 0 a plain DeepSpeed checkpoint may be continued: None then.

    Raises:
        StabilityConfigError: the checkpoint has no stability state, lacks this rank's tensors, or was written at another
            world size; on every rank alike.
    """
    state = client_state.pop(KEY, None)
    if state is None and not engine.stability.config.active:
        logger.warning("%s has no stability state: statistics start anew", path)
        return None
    if state is None:
        raise StabilityConfigError(
            f"{path} has no stability state (a plain DeepSpeed checkpoint); start from its exported weights instead"
        )
    state = json.loads(json.dumps(state))
    stability = engine.stability
    if stability.averaging is not None or stability.regularization is not None:
        agree(lambda: _load_tensors(stability, Path(path).parent, required=state["applied_steps"] > 0))
    return state


def _rank_file(folder: Path) -> Path:
    return folder / f"ds_stability_rank_{dist.get_rank():05d}.safetensors"


def _rank_tensors(stability) -> dict[str, torch.Tensor]:
    means = stability.averaging.means if stability.averaging is not None else {}
    initial = stability.regularization.initial if stability.regularization is not None else {}
    return {f"mean.{index}": tensor for index, tensor in means.items()} | {
        f"initial.{index}": tensor for index, tensor in initial.items()
    }


def _load_tensors(stability, folder: Path, required: bool) -> None:
    file = _rank_file(folder)
    expected = stability.averaging is not None or stability.regularization.kind == "init_decay"
    if not file.exists():
        if required and expected:
            raise StabilityConfigError(f"{file} is missing: the checkpoint lacks a rank's running mean or initial weights")
        return
    partitions = stability.gradients.partitions()
    with safe_open(file, framework="pt") as stored:
        if int(stored.metadata()["world_size"]) != dist.get_world_size():
            raise StabilityConfigError(
                f"{file} was written by {stored.metadata()['world_size']} ranks; this run has {dist.get_world_size()}: "
                "resume with the same number of ranks"
            )
        for name in stored.keys():  # noqa: SIM118 - safe_open is no mapping
            kind, index = name.split(".")
            tensor = stored.get_tensor(name).to(partitions[int(index)].device)
            if kind == "mean" and stability.averaging is not None:
                stability.averaging.means[int(index)] = tensor
            if kind == "initial" and stability.regularization is not None:
                stability.regularization.initial[int(index)] = tensor
