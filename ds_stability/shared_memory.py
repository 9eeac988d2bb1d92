"""DeepSpeed's CPU all-reduce buffers: 66 MiB a rank in /dev/shm, which DeepSpeed never removes.

Where all ranks are on one host, each makes deepspeed_allreduce_buffer_UID_ADDRESS_PORT_RANK in `init_distributed`, opens those
of the others by name, and keeps all mapped (deepspeed/ops/csrc/cpu/comm/shm.cpp). Then the names have served: a file without
one lives as long as a process maps it, and is gone with the last, however that ends.
"""

import os
import time
from pathlib import Path

FOLDER, PREFIX = Path("/dev/shm"), "deepspeed_allreduce_buffer"
#: Ranks open the buffers of a run within moments; until then a file is left alone, whoever maps it: processes of another
#: container that shares /dev/shm are not seen from here.
OPENING_SECONDS = 60.0


def forget_buffers() -> None:
    """Remove the names of the buffers that this process maps, and on the host's first rank what runs left that were killed.

    Call it on every rank after a collective that followed `init_distributed`: then all ranks have opened all buffers.
    """
    if not list(_buffers()):
        return
    for path in _mapped("self"):
        path.unlink(missing_ok=True)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        remove_abandoned()


def remove_abandoned(port: int | None = None) -> None:
    """Remove this user's buffers that no process maps, those of the last minute excepted.

    Args:
        port: remove the buffers of this master port only, new ones too. For who started the ranks, when they have ended.
    """
    deadline = time.time() - OPENING_SECONDS
    found = {path for path in _buffers(port) if port is not None or _modified(path) < deadline}
    if not found:
        return
    for process in Path("/proc").glob("[0-9]*"):
        found -= _mapped(process.name)
    for path in found:
        path.unlink(missing_ok=True)


def _buffers(port: int | None = None):
    return FOLDER.glob(f"{PREFIX}_{os.getuid()}_*_{'*' if port is None else port}_*")


def _modified(path: Path) -> float:
    """Seconds since the epoch; of a file that has just been removed, now."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _mapped(process: str) -> set[Path]:
    """The buffers that a process maps, by the names that they still have; none of a process that has ended or is another user's."""
    try:
        maps = Path("/proc", process, "maps").read_text(errors="replace")
    except OSError:
        return set()
    start = f"{FOLDER}/{PREFIX}_"
    names = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if start in line)
    return {Path(name) for name in names if not name.endswith(" (deleted)")}
