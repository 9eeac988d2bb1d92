"""Where a run of launchers/train.py starts: anew, from a checkpoint in its own folder, or from that of a trunk.

    --resume_from_checkpoint   OUTPUT_DIR holds a whole checkpoint     it holds none
    true                       its newest                              an error
    auto                       its newest                              --branch_from if that is given, else anew
    OUTPUT_DIR/checkpoint-N    that one                                an error
    OTHER/checkpoint-N         an error                                as --branch_from OTHER/checkpoint-N
    (not given)                an error                                --branch_from if that is given, else anew
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ds_stability.checkpoint_files import size_fault
from ds_stability.errors import UserError
from ds_stability.run_dir import RunDir


class StartingPoint(NamedTuple):
    """mode: --resume_from_checkpoint as false, true, auto, or path. checkpoint: to start from; None starts anew. trunk: the
    checkpoint that the run is a branch of, as given; None if none was given."""

    mode: str
    checkpoint: str | None
    trunk: str | None


def starting_point(training: dict[str, Any]) -> StartingPoint:
    """What the flags ask for, as far as file sizes tell that the checkpoint is whole.

    Raises:
        UserError: there is no such checkpoint, or the flags contradict each other.
    """
    given, trunk, output_dir = training["resume_from_checkpoint"], training["branch_from"], training["output_dir"]
    mode, trunk = resume_mode(given), None if trunk is None else str(Path(trunk))
    if mode in ("true", "auto"):
        own = RunDir(output_dir).complete_checkpoints()
        if own:
            return StartingPoint(mode, str(own[-1][1]), trunk)
    if mode == "true":
        kind = "complete checkpoint" if RunDir(output_dir).checkpoints() else "checkpoint"
        raise UserError(f"--resume_from_checkpoint true: {output_dir} holds no {kind}; leave the flag out, and use an empty "
                        f"--output_dir, or give auto, which then {'begins the branch' if trunk else 'starts anew'}")  # fmt: skip
    if mode == "path":
        if trunk is not None:
            raise UserError(f"--resume_from_checkpoint {given} and --branch_from {trunk}: give one; auto goes on from the newest "
                            "checkpoint in --output_dir, or begins the branch")  # fmt: skip
        _require_whole(given, "resume_from_checkpoint")
        if os.path.dirname(os.path.realpath(given)) == os.path.realpath(output_dir):
            return StartingPoint(mode, str(given), None)
        trunk = str(Path(given))
    if trunk is not None:
        _require_trunk(trunk, training, "branch_from" if training["branch_from"] else "resume_from_checkpoint")
    return StartingPoint(mode, trunk, trunk)


def resume_mode(given: Any) -> str:
    """`--resume_from_checkpoint` as false, true, auto, or path."""
    text = "false" if given is None else str(given).lower()
    return text if text in ("false", "true", "auto") else "path"


def step_of(checkpoint: str | os.PathLike) -> int:
    """N of .../checkpoint-N.

    Raises:
        UserError: the folder has another name.
    """
    found = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.path.normpath(checkpoint)))
    if found is None:
        raise UserError(f"{checkpoint}: a checkpoint's folder is called checkpoint-N")
    return int(found[1])


def _require_whole(given: str, flag: str) -> None:
    if not os.path.isdir(given):
        raise UserError(f"--{flag} {given}: no such checkpoint folder; give true, auto, or RUN/checkpoint-N")
    fault = size_fault(Path(given))
    if fault is not None:
        raise UserError(f"--{flag} {given}: is not a complete checkpoint ({fault}); give true, or another checkpoint-N")


def _require_trunk(given: str, training: dict[str, Any], flag: str) -> None:
    whole = [path for _, path in RunDir(given).complete_checkpoints()] if os.path.isdir(given) else []
    if whole:  # a run's folder: which state is meant must not change while the run goes on
        raise UserError(f"--{flag} {given}: is the folder of a run; give one of its checkpoints, such as {whole[-1]}")
    _require_whole(given, flag)
    RunDir(Path(os.path.realpath(given)).parent).read_manifest()
    require_steps_left(training, step_of(given))


def require_steps_left(training: dict[str, Any], step: int) -> None:
    """Raise UserError for a branch from step `step` that has nothing to train."""
    if 0 < training["max_steps"] <= step:
        raise UserError(f"--max_steps {training['max_steps']}: the branch goes on from step {step} of its trunk, whose steps count; "
                        "give a larger number")  # fmt: skip
