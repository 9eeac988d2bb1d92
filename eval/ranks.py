"""The processes of an evaluation: gloo and a store, no deepspeed. The launcher only sets the environment.

A rank that fails says so in the store: the others stop at their next look instead of waiting for it. One that is killed, or
a host that is cut off, is noticed by its connection (peers.py).
"""

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ds_stability.errors import PeerLostError, UserError
from ds_stability.failures import peer_reason

from .peers import LOST_SECONDS, PeerLinks

T = TypeVar("T")
POLL_SECONDS = 0.05
# Gloo's waits end by success, or because a rank is gone: a slow unit of another rank is no error.
WAIT = timedelta(days=7)
_FAILED = "failed"


class OtherRankFailed(RuntimeError):
    """Another rank has failed and has printed why."""


class Ranks:
    """All processes of this command. `start` makes it from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, store: Any = None, links: PeerLinks | None = None):
        self.links = links
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.store = dist.HashStore() if store is None else store

    @classmethod
    def start(cls) -> "Ranks":
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=10))))
        store.set_timeout(WAIT)
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group("gloo", store=group_store, rank=rank, world_size=world_size, timeout=WAIT)
        store = dist.PrefixStore("eval", store)
        return cls(rank, world_size, local_rank, store, PeerLinks(rank, world_size, store))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def stop(self) -> None:
        self._close_links()
        if dist.is_initialized():
            dist.destroy_process_group()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one has failed.

        Raises:
            OtherRankFailed, PeerLostError: `error` only says that this one was left alone.
        """
        if self.world_size == 1:
            return
        if peer_reason(error) is not None:
            self._explain(error)
        with contextlib.suppress(dist.DistError):  # rank 0 has gone, and the store with it
            self.store.set(f"{_FAILED}/text", f"rank {self.rank}: {type(error).__name__}: {error}")
            self.store.add(_FAILED, 1)
        self._close_links()

    def _explain(self, error: BaseException) -> None:
        with contextlib.suppress(dist.DistError):
            self.check()  # one has failed, and has said why
        time.sleep(LOST_SECONDS)  # the thread of the links knows who is lost, and ends this process
        raise PeerLostError(f"lost contact with another rank ({peer_reason(error)}); start the same command again, and it goes "
                            "on") from error  # fmt: skip

    def _close_links(self) -> None:
        if self.links is not None:
            self.links.close()
            self.links = None

    def check(self) -> None:
        """Raise OtherRankFailed if any rank has failed."""
        if self.world_size > 1 and self.store.add(_FAILED, 0) > 0:
            raise OtherRankFailed(self.store.get(f"{_FAILED}/text").decode())

    def wait(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until every rank has come to `name` (used once); `meanwhile` is called now and then.

        Raises:
            OtherRankFailed: one will not come.
        """
        arrived = self.store.add(f"at/{name}", 1)
        while arrived < self.world_size:
            self.check()
            meanwhile()
            time.sleep(POLL_SECONDS)
            arrived = self.store.add(f"at/{name}", 0)

    def from_first(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank; a UserError there is raised everywhere."""
        outcome: list[Any] = [None, None]
        failure = None
        if self.is_first:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = ("user", str(error))
            except Exception as error:  # raised below, after the other ranks have heard of it
                failure, outcome[1] = error, ("other", f"rank 0: {type(error).__name__}: {error}")
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            kind, text = outcome[1]
            if kind == "other":
                raise OtherRankFailed(text)
            agreed = UserError(text)
            agreed.everywhere = self.world_size > 1
            raise agreed
        return outcome[0]

    def all_say(self, value: T) -> list[T]:
        """The values of all ranks, in order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values
