"""How a script of ours speaks: one rank, one line for a user's mistake, quiet libraries."""

import atexit
import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

from ds_stability.errors import (
    ExportError,
    PageError,
    PeerLostError,
    SkippedStepsError,
    StoppedError,
    StorageError,
    UserError,
)
from ds_stability.failures import storage_reason
from ds_stability.output import stop_when_unread
from ds_stability.preemption import release_signals
from ds_stability.safe_text import safe_line
from ds_stability.siblings import ended_soon

T = TypeVar("T")
SPEAK_AFTER_SECONDS = 15.0  # the launcher polls once a second, and rank 0 may import more slowly
STORAGE_SECONDS = 3.0  # a disk may be full for one rank alone, for which all others wait


def global_rank() -> int:
    """Rank of this process as its launcher says (0 without one): known before torch.distributed starts."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def quiet_libraries() -> None:
    """Keep DeepSpeed's progress and the libraries' FutureWarnings off every rank's stderr, so that errors are seen.

    Call it before deepspeed is imported. DS_STABILITY_VERBOSE=1 keeps them.
    """
    if os.environ.get("DS_STABILITY_VERBOSE") == "1":
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|deepspeed|transformers|accelerate)\b")
    for name in ("DeepSpeed", "transformers", "accelerate", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run_script(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run `main(argv)`; an error of errors.py becomes one line from rank 0 and its exit code.

    The launcher ends all ranks of a host as soon as one has failed. The other ranks therefore give rank 0 time to say what
    is wrong; one that is still there afterwards is alone with its mistake (a file missing on its host) and says so itself.
    """
    stop_when_unread()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except StoppedError as stop:  # as asked for: nobody else has to say it
        if global_rank() == 0:
            print(f"stopped: {stop}", file=sys.stderr, flush=True)
        return stop.exit_code
    except UserError as error:
        _speak(error)
        return _refuse(error.exit_code)
    except (SkippedStepsError, ExportError, PageError) as error:
        _speak(error)
        return error.exit_code
    except (PeerLostError, StorageError) as error:
        _speak(error)
        sys.stdout.flush()
        if isinstance(error, PeerLostError) and ended_soon():
            time.sleep(SPEAK_AFTER_SECONDS)  # the launcher ends this one, and returns the code of the rank that failed first
        os._exit(error.exit_code)  # a communicator without its peers can hang in its destructor
    return 0


def _refuse(code: int) -> int:
    """`code`; a member of a process group leaves with it here, as gloo's threads now and then abort the interpreter's own end (-6)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        atexit._run_exitfuncs()  # loader workers and loggers end as ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _speak(error: UserError | SkippedStepsError | ExportError | PageError | PeerLostError | StorageError) -> None:
    rank = global_rank()
    if not isinstance(error, PeerLostError):
        release_signals()  # it is the launcher's now to end those that wait here, and they have nothing to add
    if rank != 0:
        time.sleep(STORAGE_SECONDS if isinstance(error, StorageError) else SPEAK_AFTER_SECONDS)
        if error.everywhere:
            return
    with contextlib.suppress(OSError):  # cut off from the launcher's host: nobody listens, but the exit code must be right
        print(f"error: {f'rank {rank}: ' if rank else ''}{safe_line(error)}", file=sys.stderr, flush=True)


def agree(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any, fail on all with the first rank's message.

    A file can be missing, or a disk full, on one node only: without this the others would wait in a collective. What the
    user can mend (UserError, OSError) is raised as a UserError, a failing file system as a StorageError, anything else as it
    came, or as a RuntimeError elsewhere.
    """
    import torch.distributed as dist

    result, message, failure, storage = None, None, None, False
    try:
        result = action()
    except UserError as error:
        message = str(error)
    except OSError as error:
        message, storage = f"{error.filename or 'file system'}: {error.strerror or error}", storage_reason(error) is not None
    except Exception as error:  # raised below, after the other ranks have heard of it
        failure, message = error, f"{type(error).__name__}: {error}"
    outcomes = [(message, failure is not None, storage)]
    if dist.is_initialized():
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (message, failure is not None, storage))
    if failure is not None:
        raise failure
    messages = [text for text, _, _ in outcomes]
    for rank, (text, failed, storage) in enumerate(outcomes):
        if text is not None and failed:
            raise RuntimeError(f"rank {rank}: {text}")
        if text is not None and storage:
            raise StorageError(f"rank {rank}: writing failed ({text}); what was written before is whole; make room, then start again")
        if text is not None:
            agreed = UserError(text if rank == 0 or text == messages[0] else f"rank {rank}: {text}")
            agreed.everywhere = dist.is_initialized()
            raise agreed
    return result
