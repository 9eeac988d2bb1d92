"""How the scripts that tests launch on several ranks begin and end: SPEC.json and OUT_DIR as their two arguments."""

import gc
import json
import os
import sys
from pathlib import Path

import deepspeed
from deepspeed import comm as dist


def begin() -> tuple[dict, Path, int, int]:
    """(spec, output folder, rank, world size). The process group is there: Accelerate believes in one process else."""
    gc.freeze()  # DeepSpeed collects garbage for every engine: the imports need not be walked each time
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    deepspeed.init_distributed()
    return spec, out, dist.get_rank(), dist.get_world_size()


def end(out: Path, note: str = "") -> None:
    """Write OUT_DIR/DONE on rank 0 when all ranks are here, and leave."""
    dist.barrier()
    if dist.get_rank() == 0:
        (out / "DONE").write_text(note)
    sys.stdout.flush()
    os._exit(0)  # a rare abort at teardown must not count (docs/footguns.md)
