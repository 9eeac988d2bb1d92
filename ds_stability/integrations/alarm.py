"""The alarm of a live engine: after each probe, score the reference text, decide (alarm.py), warn once, perhaps stop.

Shape suffixes: B pieces, T positions, N tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist

from ds_stability.alarm import CAUSES, MIN_PIECES, Reading, Watch, decide, reference_bands
from ds_stability.errors import StabilityConfigError, UserError
from ds_stability.gathered import standalone_module
from ds_stability.loss import IGNORE_INDEX, token_statistics
from ds_stability.safe_read import read_text

if TYPE_CHECKING:
    from ds_stability.probe import Probe

logger = logging.getLogger("ds_stability")
MAX_PIECES = 512  # of the reference text: enough for the bands
MAX_REFERENCE_BYTES = 64 * 2**20
BATCH = 16  # pieces scored together at most


@dataclass(frozen=True)
class Piece:
    """A context, what follows it (without the end token), and whether an end token came next."""

    context: list[int]
    ids: list[int]
    ended: bool


def cut_pieces(blocks: Iterable[Sequence[int]], context: int, length: int, end_ids: Collection[int]) -> list[Piece]:
    """Pieces of at most `length` tokens, each with the `context` tokens before it; at most MAX_PIECES, one behind the other."""
    pieces: list[Piece] = []
    for block in blocks:
        ids = [int(token) for token in block]
        for start in range(0, len(ids) - context - length + 1, context + length):
            following = ids[start + context : start + context + length]
            end = next((t for t, token in enumerate(following) if token in end_ids), None)
            pieces.append(Piece(ids[start : start + context], following[:end], end is not None))
            if len(pieces) == MAX_PIECES:
                return pieces
    return pieces


def blocks_of_file(path: str, tokenizer, block_size: int) -> list[list[int]]:
    """A text file as one document, in blocks; its end token last."""
    try:
        text = read_text(path, MAX_REFERENCE_BYTES)
    except OSError as error:
        raise UserError(f"stability.alarm.reference_file {path}: {error.strerror or error}; give a text file") from None
    except ValueError as error:
        raise UserError(f"stability.alarm.reference_file {path}: {error}; give a text file") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return [ids[start : start + block_size] for start in range(0, len(ids), block_size)]


class Alarm:
    """Make it, `watch` and `check`, on every rank: the decision is the same on all, and rank 0 speaks.

    Args:
        probe: whose texts are judged; its settings decide how long the pieces are.
        blocks: token ids of the reference text, the same on every rank.
        context: tokens of the probe's prompts.

    Attributes:
        stop: whether a collapse was seen and `action` is "stop".
        said: the last warning, or "".
        reason: the warning of the collapse that made it stop, or "".

    Raises:
        UserError: the reference text gives too few pieces, or the probe would be skipped for the size of the weights.
    """

    def __init__(self, probe: "Probe", blocks: Iterable[Sequence[int]], context: int):
        stability = probe.engine.stability
        self.engine, self.probe, self.config = probe.engine, probe, stability.config.alarm
        if probe.oversize:
            raise UserError(f"stability.alarm.action: {self.config.action} needs the probe, which is skipped: {probe.oversize}; raise "
                            "stability.probe.max_gather_gib, or set the action to off")  # fmt: skip
        length = probe.config.max_new_tokens
        self.pieces = cut_pieces(blocks, context, length, set(probe.end_ids))
        if len(self.pieces) < MIN_PIECES:
            raise UserError(
                f"stability.alarm: the reference text gives only {len(self.pieces)} pieces of {context} + {length} tokens, and {MIN_PIECES} are "
                "needed; give more held-out text or a longer alarm.reference_file, longer blocks, or lower probe.max_new_tokens"
            )
        self.bands = reference_bands([(piece.ids, piece.ended) for piece in self.pieces], len(probe.prompts),
                                     probe.high_frequency_ids, probe.tokenizer.all_special_ids, self.config.share_tolerance)  # fmt: skip
        start = self.config.start_step
        self.start_step = stability.config.controller.warmup_steps if start is None else start
        self.watch_state = Watch(self.config.patience)
        self.stop, self.said, self.reason = False, "", ""
        self.end_ids = torch.tensor(probe.end_ids, dtype=torch.long, device=self.engine.device)
        self.counts = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        if stability.alarm_state is not None:
            self.load_state_dict(stability.alarm_state)

    @torch.no_grad()
    def watch(self, inputs: dict) -> Callable[[], Any]:
        """What counts the end tokens of a micro-batch, among the inputs and among the labels, once it is trained on. No host sync."""
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        if ids is None or labels is None:
            return lambda: None
        end_ids = self.end_ids.to(ids.device)
        supervised = labels != IGNORE_INDEX
        ended = torch.isin(labels, end_ids) & supervised
        present = inputs.get("attention_mask")
        present = torch.ones_like(ids, dtype=torch.bool) if present is None or present.shape != ids.shape else present.bool()
        row = [torch.isin(ids, end_ids) & present, present, ended, supervised]
        found = torch.stack([mask.sum() for mask in row]).to(self.counts.device)
        return lambda: self.counts.add_(found)

    def check(self, step: int, probed: dict[str, float | None]) -> dict[str, float | None]:
        """Judge the probe's values of `step`; returns the alarm's tags. A collective: call it on every rank."""
        if step < self.start_step:
            return {}
        cross_entropy, entropy = self._score()
        totals = self.counts.clone()
        dist.all_reduce(totals, group=self.engine.seq_data_parallel_group)
        reading = Reading(probed["probe/sample/entropy"], cross_entropy, probed["probe/sample/seq_rep_4"],
                          probed["probe/sample/high_frequency_share"], probed["probe/sample/end_rate"],
                          *(int(total) for total in totals.tolist()))  # fmt: skip
        sentences = decide(reading, self.bands, self.config)
        for cause in self.watch_state.update(sentences):
            self.said = f"step {step}: {sentences[cause]}"
            if dist.get_rank() == 0:
                logger.warning(f"alarm at {self.said}")
            if cause == "collapse":
                self._act()
        tags = {f"alarm/{cause}": int(cause in self.watch_state.active) for cause in CAUSES}
        return {**tags, "alarm/reference_cross_entropy": cross_entropy, "alarm/reference_entropy": entropy}

    def _act(self) -> None:
        if self.config.action == "stop":
            self.stop, self.reason = True, self.said
        elif self.config.action == "govern":
            self.engine.stability.start_governor()  # which has begun already, at a second collapse

    def state_dict(self) -> dict:
        """JSON-ready, the same on every rank. Collective."""
        totals = self.counts.clone()
        dist.all_reduce(totals, group=self.engine.seq_data_parallel_group)
        return {"watch": self.watch_state.state_dict(), "counts": totals.tolist()}

    def load_state_dict(self, state: dict) -> None:
        self.watch_state.load_state_dict(state["watch"])
        self.counts.zero_()
        if dist.get_rank() == 0:  # the counts are global already: one rank brings them in again
            self.counts += torch.tensor(state["counts"], dtype=torch.float64, device=self.counts.device)

    def _score(self) -> tuple[float | None, float | None]:
        """(cross-entropy, predictive entropy) of the model on the pieces of the reference text, nats a token.

        What fails on one rank is raised on all: none waits for another.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        count = max(BATCH, 2 * len(self.probe.prompts))  # as many tokens as the samples have, or twice that
        mine = self.pieces[:: max(1, len(self.pieces) // count)][rank::world]
        sums = torch.zeros(3, dtype=torch.float64, device=self.engine.device)
        batch = min(BATCH, self.engine.train_micro_batch_size_per_gpu())  # so many fit beside the optimizer
        failure: Exception | None = None
        with standalone_module(self.engine) as module:
            try:
                for first in range(0, len(mine), batch):
                    sums += self._score_batch(module, mine[first : first + batch])
            except Exception as error:  # raised below, after the ranks have heard of it
                failure = error
        _raise_everywhere(failure)
        dist.all_reduce(sums, group=self.engine.seq_data_parallel_group)
        nats, entropy, tokens = sums.tolist()
        return (nats / tokens, entropy / tokens) if tokens else (None, None)

    def _score_batch(self, module, pieces: list[Piece]) -> torch.Tensor:
        rows = [piece.context + piece.ids for piece in pieces]
        width = max(map(len, rows))
        device = self.engine.device
        ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # padding on the right is not seen
        scored_BT = torch.tensor([[len(piece.context) <= t < len(row) for t in range(width)]
                                  for piece, row in zip(pieces, rows, strict=True)], device=device)  # fmt: skip
        logits_NV = module(input_ids=ids_BT, use_cache=False).logits[:, :-1][scored_BT[:, 1:]]
        surprisal_N, entropy_N, *_ = token_statistics(logits_NV, ids_BT[:, 1:][scored_BT[:, 1:]], None)
        return torch.stack([surprisal_N.double().sum(), entropy_N.double().sum(), surprisal_N.new_tensor(len(surprisal_N)).double()])


def _raise_everywhere(failure: Exception | None) -> None:
    """RuntimeError on every rank if there is a failure on any. Collective."""
    failures: list[str | None] = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(failures, None if failure is None else repr(failure))
    failed = [(rank, text) for rank, text in enumerate(failures) if text is not None]
    if failed:
        raise RuntimeError(f"alarm failed on rank {failed[0][0]}: {failed[0][1]}") from failure


def alarm_from_file(probe: "Probe") -> Alarm:
    """The alarm of a script that only calls `enable`: its reference text comes from a file.

    Raises:
        StabilityConfigError: the block names none. UserError: it cannot be read, or is too short.
    """
    path = probe.engine.stability.config.alarm.reference_file
    if path is None:
        raise StabilityConfigError(
            "stability.alarm.reference_file: null is not allowed; must be a text file, from which this trainer's alarm takes its bands"
        )
    context = max(len(prompt) for prompt in probe.prompts)
    blocks = blocks_of_file(str(Path(path)), probe.tokenizer, 4 * (context + probe.config.max_new_tokens))
    return Alarm(probe, blocks, context)
