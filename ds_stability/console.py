"""How a script of ours speaks: one rank, one line for a user's mistake, quiet libraries."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from ds_stability.errors import SkippedStepsError, UserError

T = TypeVar("T")


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
    """Run `main(argv)`; a UserError or SkippedStepsError becomes one line from rank 0 and its exit code."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (UserError, SkippedStepsError) as error:
        if global_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def agree(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails for the user's fault on any, fail on all with the first rank's message.

    A file can be missing on one node only: without this the others would wait for it in a collective.
    """
    import torch.distributed as dist

    result, message = None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [message]
    if dist.is_initialized():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message)
    for rank, text in enumerate(messages):
        if text is not None:
            raise UserError(text if rank == 0 or text == messages[0] else f"rank {rank}: {text}")
    return result
