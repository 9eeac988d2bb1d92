"""Locks that end with the processes that hold them, however these end: flock(2) on a file that stays where it is.

A descriptor passed on to a child keeps the lock until the child is gone, too. On NFS (Linux emulates flock there by
byte-range locks) other hosts see the lock, but a child does not hold it.
"""

import errno
import fcntl
import os
from pathlib import Path

from ds_stability.errors import UserError

TRAIN_LOCK = "train.lock"  # in a run's folder, held by rank 0 of launchers/train.py for its life
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class NoLocksError(UserError):
    """The file system knows no locks."""


def try_lock(path: Path) -> int | None:
    """The descriptor that holds the lock, to be closed with os.close, or None if another process holds it.

    Raises:
        NoLocksError: the file system knows no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        if error.errno in _UNSUPPORTED:
            raise NoLocksError(f"{path}: this file system has no file locks (flock); use a folder on one that has") from None
        raise
    return descriptor


def unlock(descriptor: int) -> None:
    """Let go of the lock, also where a child that was forked still has the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock. Makes no file."""
    if not path.exists():
        return False
    descriptor = try_lock(path)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False
