"""The process in which universal.py converts a checkpoint: `python -m ds_stability.universal_worker TAG_FOLDER TARGET`.

What DeepSpeed's converter cannot hold is refused first, with one line on stderr and exit code 2.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from ds_stability.universal import IMPOSSIBLE_CODE, OPTIMIZER_FILES

ADAM = ("exp_avg", "exp_avg_sq")


def main(source: Path, target: Path) -> None:
    """Convert the tag folder `source` into `target`."""
    from deepspeed.checkpoint import ds_to_universal

    files = sorted(source.glob(OPTIMIZER_FILES))
    _require_possible(source, files)
    workers = max(1, min(len(files), len(os.sched_getaffinity(0)) // 2))
    ds_to_universal.main(argparse.Namespace(
        input_folder=os.fspath(source), output_folder=os.fspath(target), num_extract_workers=workers,
        num_merge_workers=workers, keep_temp_folder=False, strict=True, inject_missing_state=True,
    ))  # fmt: skip
    _slim(target / "zero" / "optimizer_state.pt")


def _require_possible(source: Path, files: list[Path]) -> None:
    """Exit with one line where a universal checkpoint cannot hold what this one holds."""
    advice = "resume with as many processes as wrote the checkpoint"
    if list(source.glob("*expert*_states.pt")):
        _refuse(f"another number of processes is not possible for a mixture of experts (expert files); {advice}")
    stored = torch.load(files[0], map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
    base = stored["optimizer_state_dict"] if stored.get("zero_stage", 1) == 3 else stored["base_optimizer_state"]
    states = base["state"] if isinstance(base, dict) else base
    for state in states.values() if isinstance(states, dict) else states:
        more = [key for key, value in state.items() if key not in (*ADAM, "step") and torch.is_tensor(value) and value.numel() > 1]
        if more or not all(key in state for key in ADAM):
            _refuse("another number of processes is possible for Adam and AdamW only, and this optimizer keeps "
                    f"{', '.join(map(str, state)) or 'nothing'}; {advice}")  # fmt: skip


def _refuse(reason: str) -> None:
    print(reason, file=sys.stderr)
    sys.exit(IMPOSSIBLE_CODE)


def _slim(file: Path) -> None:
    """Take rank 0's own shard out of the common optimizer state, which every rank will read whole."""
    common = torch.load(file, map_location="cpu", weights_only=False)
    common.pop("fp32_flat_groups", None)
    inner = common.get("optimizer_state_dict")
    if inner is not None:
        inner["state"] = {index: {key: value for key, value in state.items() if key not in ADAM}
                          for index, state in inner["state"].items()}  # fmt: skip
    torch.save(common, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
