"""Ports for tests that run at the same time, and what is named by them."""

import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

FIRST, LAST = 10_000, 32_000  # below those that Linux gives to a socket without a wish: no other socket of a test gets one
STRIDE = 64  # more than there are workers


def free_port() -> int:
    """A port on which nobody listens. Each worker of pytest-xdist has ports of its own, as one is closed again before its use."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = FIRST + secrets.randbelow((LAST - FIRST) // STRIDE) * STRIDE + worker % STRIDE
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def named_buffers(launch: Sequence[str]) -> list[Path]:
    """The files in shared memory of the ranks that a command of the deepspeed launcher started."""
    port = launch[launch.index("--master_port") + 1]
    return list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
