"""Which failures are the cluster's, not the program's: a lost rank or network, and a file system that fails.

Each becomes one line and an exit code of its own (errors.py). Anything else keeps its traceback.
"""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ds_stability.errors import PeerLostError, StorageError
from ds_stability.siblings import ended_soon

_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
# safetensors wraps the operating system's error, torch.save keeps it for itself.
_STORAGE_WORDS = ("No space left on device", "Read-only file system", "Disk quota exceeded", "Input/output error")
_TORCH_WORDS = ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
# gloo raises plain RuntimeErrors; NCCL's and the store's are DistErrors.
_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo/transport",
               "Connection refused", "Application timeout caused pair closure", "Socket Timeout", "No route to host")  # fmt: skip
REASON_CHARACTERS = 200


def storage_reason(error: BaseException) -> str | None:
    """What the file system said, in one line, if `error` or its cause says that writing failed; else None."""
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        return f"{os.fsdecode(error.filename or 'a file')}: {os.strerror(error.errno)}"
    text = _one_line(error)
    wrapped = isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"
    if wrapped and any(word in text for word in _STORAGE_WORDS):
        return text
    if wrapped and any(word in text for word in _TORCH_WORDS):
        return f"torch.save met a full or failing disk: {text}"
    cause = error.__cause__ or error.__context__
    return storage_reason(cause) if cause is not None else None


def peer_reason(error: BaseException) -> str | None:
    """What torch.distributed said, in one line, if `error` says that another rank could not be reached; else None."""
    import torch.distributed as dist

    text = _one_line(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in text for word in _PEER_WORDS)):
        return text
    return None


@contextmanager
def cluster_failures(hosts: list[str], rank: int, again: str) -> Iterator[None]:
    """Turn a lost rank or a failing file system inside into a PeerLostError or StorageError.

    Args:
        hosts: the host of every rank, by rank (`gather_hosts`). rank: of this process. again: how to start the job again.
    """
    plain, threading.excepthook = threading.excepthook, _of_a_thread
    try:
        yield
        threading.excepthook = plain  # after a failure the hook stays: a thread may speak later than this one
    except Exception as error:  # raised again, as what it is
        lost, storage = peer_reason(error), storage_reason(error)
        if lost is not None:
            raise PeerLostError(f"lost contact with {_others(hosts, rank)} ({lost}); the run stops; {again}") from error
        if storage is not None:
            raise StorageError(f"writing failed ({storage}); what was written before is whole; make room, then {again}") from error
        raise


def _of_a_thread(failure: threading.ExceptHookArgs) -> None:
    """No traceback of a failing disk: TensorBoard's writer keeps the error, and the main thread meets it there."""
    if failure.exc_value is None or storage_reason(failure.exc_value) is None:
        threading.__excepthook__(failure)


def gather_hosts() -> list[str]:
    """The host name of every rank; a collective."""
    import torch.distributed as dist

    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


def _others(hosts: list[str], rank: int) -> str:
    """Who may be lost: a rank of this host that has ended, else the ranks of the other hosts, else those of this one."""
    ended = ended_soon()
    if ended:
        return f"rank {', '.join(map(str, ended))} on {hosts[rank]}, which has ended"
    by_host: dict[str, list[int]] = {}
    for number, host in enumerate(hosts):
        if number != rank:
            by_host.setdefault(host, []).append(number)
    if len(by_host) > 1:
        by_host.pop(hosts[rank], None)
    parts = [f"{ranks[0]}-{ranks[-1]} on {host}" if len(ranks) > 1 else f"{ranks[0]} on {host}" for host, ranks in by_host.items()]
    many = len(parts) > 1 or "-" in parts[0].split(" on ")[0] if parts else False
    shown = ", ".join(parts[:4]) + (f" and {len(parts) - 4} more hosts" if len(parts) > 4 else "")
    return f"{'one or more of ranks' if many else 'rank'} {shown}" if parts else "another process"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 3] + "..."
