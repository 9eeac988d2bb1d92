"""Requests in fixed batches: divided over ranks, journaled, and answered alike whatever the number of ranks.

The members of a batch, and so its padding, depend on the set of requests and the batch size only. A batch is computed whole
by one rank, its answers are appended to that rank's journal in one write, and a batch of any journal is never computed again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_stability.safe_read import parse_json

Answer = Any  # JSON: [log-likelihood, greedy], a text, or None where the model gave no finite number


def digest(*parts: Any) -> str:
    """sha256 hex of the JSON of `parts`."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """One question to the model.

    Attributes:
        key: digest of everything that decides the answer; requests of one key are answered once.
        group: requests of different groups never share a batch, so that a task's figures do not depend on its neighbors.
        length: tokens, for batches of about equal lengths.
        payload: what the computation takes (picklable).
    """

    key: str
    group: str
    length: int
    payload: Any


def fixed_batches(requests: Iterable[Request], batch_size: int) -> list[list[Request]]:
    """Batches by group, longest first; the order of `requests` and repetitions do not matter."""
    unique = {request.key: request for request in requests}
    ordered = sorted(unique.values(), key=lambda r: (r.group, -r.length, r.key))
    batches: list[list[Request]] = []
    for request in ordered:
        if not batches or batches[-1][0].group != request.group or len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1].append(request)
    return batches


class Journal:
    """Answers of whole batches, one JSON line each, in a file per rank that is only appended to.

    A line that was cut short is dropped: its batch is computed again, with the same members.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.path = Path(folder), Path(folder) / f"rank-{rank:05d}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_torn_end()

    def _drop_torn_end(self) -> None:
        if self.path.exists():
            with open(self.path, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def read(self) -> dict[str, list[Answer]]:
        """Answers by batch, of the journals of all ranks, those of an earlier number of ranks included."""
        answers: dict[str, list[Answer]] = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    entry = parse_json(line)
                    answers.setdefault(str(entry["batch"]), list(entry["answers"]))
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a crash of the machine left half written; its batch is computed again
        return answers

    def append(self, batch: str, answers: list[Answer]) -> None:
        line = json.dumps({"batch": batch, "answers": answers}, allow_nan=False) + "\n"
        with open(self.path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


class BatchRunner:
    """Answers requests with a computation over batches. Every rank must make it, and call `run`, equally often.

    Args:
        journal: where answers are kept, and come from if an earlier process gave them.
        batch_size: members of a batch.
        works: False for a rank that has no model (its device belongs to another rank's) and only waits.
        store, label: a torch.distributed store, and a prefix used once in it: each rank then takes the next batch as it is
            ready, so that a slow one holds nobody up. Without a store, batches are dealt out in turn.
        group: process group of pickled objects; the default one if None.
    """

    def __init__(
        self, journal: Journal, batch_size: int, rank: int = 0, world_size: int = 1, *, works: bool = True,
        store: Any = None, label: str = "", group: Any = None,
    ):  # fmt: skip
        self.journal, self.batch_size, self.rank, self.world_size = journal, batch_size, rank, world_size
        self.store, self.label, self.group, self.runs = store, label, group, 0
        self.workers = [worker for worker, has_model in enumerate(self.gather(works)) if has_model]
        # Gathering is also what keeps a rank from appending while another still reads.
        self.known: dict[str, list[Answer]] = {}
        for answers in self.gather(journal.read()):
            self.known.update(answers)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank. Pickled objects, so that gloo and NCCL both do."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def run(self, requests: Sequence[Request], compute: Callable[[list[Request]], list[Answer]]) -> dict[str, Answer]:
        """Answers by key of this rank's requests (and of the other ranks').

        Ranks may all pass the same requests, or each its own share: batches are formed over their union.
        """
        pooled = list(requests)
        if len(set(self.gather(digest(sorted({request.key for request in requests}))))) > 1:
            pooled = [request for share in self.gather(pooled) for request in share]
        batches = {digest([r.key for r in batch]): batch for batch in fixed_batches(pooled, self.batch_size)}
        new: dict[str, list[Answer]] = {}
        for name in self._claimed([name for name in batches if name not in self.known]):
            new[name] = compute(batches[name])
            self.journal.append(name, new[name])
        for answers in self.gather(new):
            self.known.update(answers)
        return {
            request.key: answer
            for name, batch in batches.items()
            for request, answer in zip(batch, self.known[name], strict=True)
        }

    def _claimed(self, names: list[str]) -> Iterator[str]:
        """The batches that this rank computes, one at a time."""
        self.runs += 1
        if self.rank not in self.workers:
            return
        if self.store is None or self.world_size == 1:
            yield from names[self.workers.index(self.rank) :: len(self.workers)]
            return
        while (place := self.store.add(f"{self.label}/{self.runs}", 1) - 1) < len(names):
            yield names[place]
