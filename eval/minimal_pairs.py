"""Minimal pairs: does the model find the grammatical sentence likelier than its ungrammatical twin?

A sentence's score is its total log-probability, full stop included, as in BLiMP (Warstadt et al. 2020). Two sentences of a
pair have the same number of words; where they differ in tokens, length matters, so that two controls stand beside the
overall accuracy: the mean log-probability per token, and the pairs with equal token counts alone. Chance is .5: a tie
counts half. Sentences come from our own templates.

Before the sentence stands what the model has learned to begin a text with: the BOS that its tokenizer writes. Where the
tokenizer writes none, a line break: a special token that the model never saw before text (often the mark of a chat turn)
upsets the whole sentence; with it a model can fail on phenomena that it masters after a line break.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ds_stability.data.tokens import leading_ids
from ds_stability.errors import UserError
from ds_stability.loss import chunk_tokens, token_statistics

from .minimal_pairs_templates import PHENOMENA, make_pairs
from .records import Measured
from .scoring import padded_logits

CHANCE = 0.5
TIE = 1e-6  # nats: rounding of fp32 sums, far below any preference


class Pair(NamedTuple):
    phenomenon: str
    index: int
    good: str
    bad: str


def all_pairs(per_phenomenon: int) -> list[Pair]:
    """That many pairs of each phenomenon, the same on every machine.

    Raises:
        UserError: a phenomenon has fewer.
    """
    pairs = []
    for phenomenon in PHENOMENA:
        found = make_pairs(phenomenon)
        if not 1 <= per_phenomenon <= len(found):
            raise UserError(f"minimal_pairs.per_phenomenon {per_phenomenon}: allowed is a number from 1 to {len(found)} ({phenomenon} "
                            "has no more); lower it in the suite")  # fmt: skip
        pairs += [Pair(phenomenon, index, *pair) for index, pair in enumerate(found[:per_phenomenon])]
    return pairs


def sentence_logprobs(loaded: Any, rows: Sequence[Sequence[int]], prefix: int = 1) -> list[float | None]:
    """log P(row[prefix:] | row[:prefix]) of each row in nats, summed in fp64; None where the model gave NaN or Inf."""
    logits_BTV = padded_logits(loaded, [row[:-1] for row in rows])
    sums: list[float | None] = []
    for row, logits_TV in zip(rows, logits_BTV, strict=True):
        targets_T = torch.tensor(row[prefix:], device=logits_TV.device)
        logits_TV = logits_TV[prefix - 1 :]
        total, chunk = 0.0, chunk_tokens(logits_TV, None)
        for start in range(0, len(targets_T), chunk):
            targets_C = targets_T[start : start + chunk]
            total -= token_statistics(logits_TV[start : start + len(targets_C)], targets_C, None)[0].double().sum().item()
        sums.append(total if math.isfinite(total) else None)
    return sums


def sentence_prefix(tokenizer: Any) -> tuple[str, list[int]]:
    """(name, ids) of what stands before a sentence: the first that there is of BOS if the tokenizer writes it by itself, a
    line break, BOS, EOS.

    Raises:
        UserError: the tokenizer has none of them.
    """
    line_break = [token for token in tokenizer("\n", add_special_tokens=False)["input_ids"] if token != tokenizer.unk_token_id]
    for name, ids in (("bos", leading_ids(tokenizer)), ("line break", line_break), ("bos", [tokenizer.bos_token_id]),
                      ("eos", [tokenizer.eos_token_id])):  # fmt: skip
        if ids and ids[0] is not None:
            return name, ids
    raise UserError("the tokenizer has neither a BOS, a line break nor an EOS token to put before a sentence; set bos_token in its "
                    "tokenizer_config.json, or minimal_pairs.enabled to false in the suite")  # fmt: skip


class MinimalPairsTask:
    """Accuracy on minimal pairs, by phenomenon and overall. `batch_size` counts sentences; a pair stays together.

    Raises:
        UserError: more pairs asked for than there are, a sentence longer than the context, or see `sentence_prefix`.
    """

    name = "minimal_pairs"

    def __init__(self, loaded: Any, per_phenomenon: int = 60, batch_size: int = 32) -> None:
        self.prefix_name, self.prefix = sentence_prefix(loaded.tokenizer)
        self.loaded, self.per_phenomenon = loaded, per_phenomenon
        self.pairs = all_pairs(per_phenomenon)
        self.rows = [[self._row(pair.good), self._row(pair.bad)] for pair in self.pairs]
        longest = max(len(row) for rows in self.rows for row in rows)
        if loaded.context_length is not None and longest > loaded.context_length:
            raise UserError(f"minimal pairs: a sentence has {longest} tokens and the model's context only {loaded.context_length}; set "
                            "minimal_pairs.enabled to false in the suite")  # fmt: skip
        self.pairs_per_batch = max(1, batch_size // 2)

    def _row(self, sentence: str) -> list[int]:
        return [*self.prefix, *self.loaded.tokenizer(sentence, add_special_tokens=False)["input_ids"]]

    def units(self) -> list[str]:
        return [f"{index:05d}" for index in range(math.ceil(len(self.pairs) / self.pairs_per_batch))]

    def run(self, unit: str, scratch: Path) -> list[dict[str, Any]]:
        """One record per pair: log-probabilities (nats) and token counts of both sentences."""
        first = int(unit) * self.pairs_per_batch
        pairs = self.pairs[first : first + self.pairs_per_batch]
        rows = [row for both in self.rows[first : first + self.pairs_per_batch] for row in both]
        logprobs = sentence_logprobs(self.loaded, rows, len(self.prefix))
        return [
            {"phenomenon": pair.phenomenon, "pair": f"{pair.phenomenon}/{pair.index}", "good": pair.good, "bad": pair.bad,
             "good_logprob": logprobs[2 * i], "bad_logprob": logprobs[2 * i + 1],
             "good_tokens": len(rows[2 * i]) - len(self.prefix), "bad_tokens": len(rows[2 * i + 1]) - len(self.prefix)}
            for i, pair in enumerate(pairs)]  # fmt: skip

    def measure(self, records: list[dict[str, Any]], scratch: Path) -> list[Measured]:
        """Accuracies with pairs as units. Pairs with a non-finite score are left out, and counted in the note."""
        equal = [record for record in records if record["good_tokens"] == record["bad_tokens"]]
        by_phenomenon = {name: [record for record in records if record["phenomenon"] == name] for name in PHENOMENA}
        return [
            self._accuracy("minimal_pairs", records, _total),
            self._accuracy("minimal_pairs_per_token", records, _per_token, length="mean log-probability per token"),
            self._accuracy("minimal_pairs_equal_tokens", equal, _total, length="pairs with equal token counts"),
            *(self._accuracy(f"minimal_pairs_{name}", chosen, _total) for name, chosen in by_phenomenon.items()),
        ]

    def _accuracy(self, metric: str, records: list[dict[str, Any]], score: Callable, length: str = "none") -> Measured:
        settings = {"chance": CHANCE, "per_phenomenon": self.per_phenomenon, "length_control": length, "prefix": self.prefix_name}
        finite = [record for record in records if None not in (record["good_logprob"], record["bad_logprob"])]
        lost = len(records) - len(finite)
        note = f"{lost} of {len(records)} pairs left out: the model gave NaN or Inf" if lost else None
        note = note or (None if records else "no such pairs under this tokenizer")
        wins = [preference(score(record, "good"), score(record, "bad")) for record in finite]
        return Measured(metric, [record["pair"] for record in finite], wins, np.ones(len(wins)), settings=settings, note=note)


def preference(good: float, bad: float) -> float:
    """1 if the good sentence is likelier, 0 if the bad one is, .5 for a tie."""
    return 0.5 if abs(good - bad) <= TIE else float(good > bad)


def _total(record: dict[str, Any], which: str) -> float:
    return record[f"{which}_logprob"]


def _per_token(record: dict[str, Any], which: str) -> float:
    return record[f"{which}_logprob"] / record[f"{which}_tokens"]
