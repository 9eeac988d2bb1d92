"""Notice that another process of an evaluation is gone, wherever this one waits.

Ranks of an evaluation work for hours without a word to each other, so that no timeout of theirs can tell slow from lost. A
TCP connection between rank 0 and every other rank tells: it carries nothing, the kernel closes it when a process ends
(however it ends), and the kernel's keepalive probes find a host that is off or cut off. A process that computes, or is
stopped, keeps its connection. What has lost a peer says so in one line and leaves with exit code 69.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ds_stability.errors import PeerLostError
from ds_stability.siblings import ended_soon

IDLE_SECONDS, PROBE_SECONDS, PROBES = 10, 5, 4
LOST_SECONDS = IDLE_SECONDS + PROBE_SECONDS * PROBES  # after which a host without an answer is lost
CONNECT_SECONDS = 120.0
HELLO_SECONDS, HELLO_BYTES = 5.0, 1024
GOODBYE = b"bye"
BACKLOG = 128  # strangers must not keep ranks out
SPEAK_STEP_SECONDS = 2.0  # the launcher polls once a second; it ends the ranks of a host once one has left
_KEY = "links"


class PeerLinks:
    """The connections of this process: on rank 0 one to every other rank, elsewhere the one to rank 0.

    Args:
        store: where rank 0 says how it can be reached.
        leave: called once, on the watching thread, with the PeerLostError.
    """

    def __init__(self, rank: int, world_size: int, store: Any, leave: Callable[[PeerLostError], None] | None = None):
        self._leave = leave or leave_now
        self._selector = selectors.DefaultSelector()
        self._peers: list[socket.socket] = []
        self._wake, awake = socket.socketpair()
        self._selector.register(awake, selectors.EVENT_READ, None)
        if rank == 0:
            self._accept(world_size, store)
        else:
            self._connect(rank, store)
        self._thread = threading.Thread(target=self._watch, name="peer-links", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say goodbye: the others must not take this end for a loss."""
        self._wake.close()
        self._thread.join()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(GOODBYE)
            peer.close()
        self._selector.close()

    def _accept(self, world_size: int, store: Any) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=world_size + BACKLOG, dualstack_ipv6=dual) as server:
            token = secrets.token_hex(16)
            here = {"port": server.getsockname()[1], "token": token, "host": socket.gethostname()}
            store.set(_KEY, json.dumps(here))
            deadline = time.monotonic() + CONNECT_SECONDS
            while len(self._peers) < world_size - 1:
                server.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    raise PeerLostError(f"only {len(self._peers) + 1} of {world_size} ranks have come within "
                                        f"{CONNECT_SECONDS:.0f} s; start the same command again") from None  # fmt: skip
                hello = _hello(peer, token)
                if hello is None:  # a stranger, or one that ended meanwhile
                    peer.close()
                    continue
                self._add(peer, f"rank {hello['rank']} on {hello['host']}")

    def _connect(self, rank: int, store: Any) -> None:
        there = json.loads(store.get(_KEY))
        name = f"rank 0 on {there['host']}"
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], there["port"]), timeout=CONNECT_SECONDS)
            hello = {"rank": rank, "host": socket.gethostname(), "token": there["token"]}
            peer.sendall(json.dumps(hello).encode() + b"\n")
        except OSError as error:
            raise PeerLostError(f"{name} cannot be reached at {os.environ['MASTER_ADDR']} port {there['port']} ({error}); the ports of "
                                "the hosts must be open to each other") from None  # fmt: skip
        self._add(peer, name)

    def _add(self, peer: socket.socket, name: str) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # elsewhere only the end of a process is noticed soon
            for option, value in ((socket.TCP_KEEPIDLE, IDLE_SECONDS), (socket.TCP_KEEPINTVL, PROBE_SECONDS), (socket.TCP_KEEPCNT, PROBES)):
                peer.setsockopt(socket.IPPROTO_TCP, option, value)
        self._peers.append(peer)
        self._selector.register(peer, selectors.EVENT_READ, name)

    def _watch(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                try:
                    said, reason = key.fileobj.recv(len(GOODBYE)), "its connection is closed"
                except OSError as error:
                    said, reason = b"", f"{error.strerror}, no answer for {LOST_SECONDS} s" if isinstance(error, TimeoutError) else error.strerror
                self._selector.unregister(key.fileobj)
                if said != GOODBYE:
                    self._leave(PeerLostError(f"lost {key.data} ({reason}); this evaluation stops; start the same command again, and it "
                                              "goes on"))  # fmt: skip
                    return


def _hello(peer: socket.socket, token: str) -> dict[str, Any] | None:
    """Who has connected; None unless it is a rank of this run."""
    line, deadline = b"", time.monotonic() + HELLO_SECONDS
    try:
        while not line.endswith(b"\n") and len(line) < HELLO_BYTES:  # byte by byte: what comes after it is for the watching thread
            peer.settimeout(max(0.001, deadline - time.monotonic()))
            byte = peer.recv(1)
            if not byte:
                return None
            line += byte
        hello = json.loads(line)
        return hello if isinstance(hello, dict) and secrets.compare_digest(hello.get("token", ""), token) else None
    except (OSError, ValueError, TypeError):
        return None


def leave_now(error: PeerLostError) -> None:
    """Say what is lost, and end this process whatever its main thread waits for. One rank of a host speaks."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    ended = sum(lost < rank for lost in ended_soon())  # with rank 0 gone, rank 1 is the first that can speak
    time.sleep(SPEAK_STEP_SECONDS * (local_rank - ended))
    with contextlib.suppress(OSError):  # the network is gone, and with it whoever listens
        print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)
