"""The stability state in a DeepSpeed checkpoint.

The replicated floats are one key of DeepSpeed's `client_state`, which survives the universal converter, and stand again in
`TAG/stability_state.json` for people to read. State as large as the parameters (the gradient's running mean, the initial
weights, the average of the weights) is per rank, in `TAG/ds_stability_rank_XXXXX.safetensors`: slices of parameters by name, without padding, so that
any number of ranks finds its own again. Nothing of ours is pickled.

    key       mean/, initial/ or average/PARAMETER, fp32 [numel of the slice]
    metadata  world_size, rank, slices: JSON of PARAMETER -> [first element, numel, numel of the whole parameter]
"""

import json
import logging
from pathlib import Path

import torch
from deepspeed import comm as dist
from safetensors import safe_open
from safetensors.torch import save_file

from ds_stability.atomic import write_json_atomic
from ds_stability.console import agree
from ds_stability.errors import StabilityConfigError
from ds_stability.layout import Piece, overlap, partition_layout
from ds_stability.same_block import require_version
from ds_stability.takeover import take_over

KEY = "ds_stability"
RANK_FILES = "ds_stability_rank_*.safetensors"
MEAN, INITIAL, AVERAGE = "mean", "initial", "average"
MEANING = {MEAN: "the gradient's running mean", INITIAL: "the initial weights", AVERAGE: "the average of the weights"}
logger = logging.getLogger(__name__)


def save(engine, save_dir: str, tag: str, state: dict) -> None:
    """Write this rank's tensors and, on rank 0, the readable state; call it before DeepSpeed writes `latest`."""
    folder = Path(save_dir) / tag
    folder.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        write_json_atomic(folder / "stability_state.json", state)
    stored = _stored(engine.stability)
    if any(stored.values()):
        save_slices(folder, stored, partition_layout(engine.optimizer), dist.get_rank(), dist.get_world_size())


def load(engine, path: str, client_state: dict) -> None:
    """Take our key out of `client_state`, and let the engine's stability go on from it and from this rank's tensors.

    At level 0 a plain DeepSpeed checkpoint may be continued: nothing is loaded then. A branch takes over what fits (takeover.py).

    Raises:
        StabilityConfigError: the checkpoint has no stability state, or lacks a part of a tensor that this rank needs; on
            every rank alike.
    """
    state = client_state.pop(KEY, None)
    if state is None and not engine.stability.config.active:
        logger.warning("%s has no stability state: statistics start anew", path)
        return
    if state is None:
        raise StabilityConfigError(
            f"{path} has no stability state (a plain DeepSpeed checkpoint); start from its exported weights instead"
        )
    stability, settle, kinds = engine.stability, (), set(MEANING)
    state = json.loads(json.dumps(state))
    if stability.branching:
        require_version(state)
        fresh = {name: part.state_dict() for name, part in stability.stabilizers.items()}
        taken = take_over(state, stability.config.to_dict(), fresh)
        state, settle, kinds, stability.begun_anew = taken.state, taken.settle, taken.tensors, taken.anew
    if state.get("ema") is None or state["ema"]["updates"] == 0:
        kinds -= {AVERAGE}
    if kinds & _stored(stability).keys() and state["applied_steps"] > 0:  # before the first applied step there are none
        agree(lambda: _load_tensors(engine, Path(path).parent, kinds))
    stability.load_state_dict(state, settle)


def _stored(stability) -> dict[str, dict[int, torch.Tensor]]:
    """kind -> {partition index: tensor}: the live dicts of the stabilizers that keep something."""
    stored = {}
    if stability.averaging is not None:
        stored[MEAN] = stability.averaging.means
    if stability.regularization is not None and stability.regularization.kind == "init_decay":
        stored[INITIAL] = stability.regularization.initial
    if stability.ema is not None:
        stored[AVERAGE] = stability.ema.tensors
    return stored


def _load_tensors(engine, folder: Path, kinds: set[str]) -> None:
    stability = engine.stability
    partitions, layout = stability.gradients.partitions(), partition_layout(engine.optimizer)
    for kind, target in _stored(stability).items():
        if kind not in kinds:
            continue
        tensors = [torch.zeros_like(partition, requires_grad=False) for partition in partitions]
        load_slices(folder, kind, tensors, layout, dist.get_rank())
        target.clear()
        target.update(enumerate(tensors))


def save_slices(folder: Path, stored: dict[str, dict[int, torch.Tensor]], layout: list[list[Piece]], rank: int,
                ranks: int) -> None:  # fmt: skip
    """Write rank `rank`'s file: of each kind the pieces of each partition's tensor (flat fp32, partition index -> tensor)."""
    tensors, slices = {}, {}
    for kind, by_partition in stored.items():
        for index, tensor in by_partition.items():
            for piece in layout[index]:
                part = tensor.detach().narrow(0, piece.offset, piece.numel)
                tensors[f"{kind}/{piece.name}"] = part.to("cpu", copy=True)  # safetensors wants storages of their own
                slices[piece.name] = [piece.start, piece.numel, piece.total]
    target = folder / f"ds_stability_rank_{rank:05d}.safetensors"
    temporary = target.with_suffix(".tmp")
    save_file(tensors, temporary, {"world_size": str(ranks), "rank": str(rank), "slices": json.dumps(slices)})
    temporary.replace(target)


def load_slices(folder: Path, kind: str, tensors: list[torch.Tensor], layout: list[list[Piece]], rank: int) -> None:
    """Fill `tensors`, one per partition, with the stored elements of `kind`, whatever number of ranks wrote them.

    Only overlaps are read. Padding stays as it is.

    Raises:
        StabilityConfigError: the files do not hold every element of the layout.
    """
    files = sorted(folder.glob(RANK_FILES))
    files = files[rank:] + files[:rank]  # with the same number of ranks, the first one has it all
    missing = sum(piece.numel for pieces in layout for piece in pieces)
    for file in files:
        if missing == 0:
            return
        with safe_open(file, framework="pt") as stored:
            missing -= _copy_overlaps(file, stored, kind, tensors, layout)
    if missing > 0:
        raise StabilityConfigError(
            f"{folder} lacks {missing:,} elements of {MEANING[kind]}: a rank's ds_stability_rank file is missing, or the "
            "checkpoint was written without this stabilizer"
        )


def _copy_overlaps(file: Path, stored, kind: str, tensors: list[torch.Tensor], layout: list[list[Piece]]) -> int:
    """Copy what one rank's open file holds of the layout; the number of elements copied."""
    metadata = stored.metadata()
    if "slices" not in metadata:
        raise StabilityConfigError(f"{file} was written by an earlier version of ds_stability; resume with that version")
    slices, keys, copied = json.loads(metadata["slices"]), set(stored.keys()), 0
    for tensor, pieces in zip(tensors, layout, strict=True):
        for piece in pieces:
            if f"{kind}/{piece.name}" not in keys:
                continue
            start, numel, total = slices[piece.name]
            if total != piece.total:
                raise StabilityConfigError(f"{file}: {piece.name} had {total:,} elements, this model's has {piece.total:,}")
            shared = overlap(piece, start, numel)
            if shared is not None:
                low, high = shared
                part = stored.get_slice(f"{kind}/{piece.name}")[low - start : high - start]
                tensor.narrow(0, piece.offset + low - piece.start, high - low).copy_(part)
                copied += high - low
    return copied
