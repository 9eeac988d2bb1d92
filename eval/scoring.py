"""Teacher-forced scores of a model on text: how surprised it is, how sure, how much it looks at what came before.

A document becomes one stream of tokens, BOS (if the tokenizer writes one before a text by itself) and then the text; the
stream is cut into windows of `window` targets that do not overlap, so that every token is scored once. A window's first
target is conditioned on the one token before it: BOS, or the last token of the window before. Without a BOS the first
token of a document is not scored, and its bytes are not counted; a BOS that the model never saw before a text (often the
mark of a chat turn) would upset the window. No end token is scored: it has no bytes.

rep/l and wrep/l: Welleck et al. 2020 (arXiv 1908.04319), section 6. Bits per byte: Gao et al. 2020, The Pile, section 3.1.
"""

import hashlib
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_stability.data.tokenizer import tokenizer_hash
from ds_stability.data.tokens import leading_ids
from ds_stability.errors import UserError
from ds_stability.loss import chunk_tokens, token_statistics
from ds_stability.run_dir import write_atomic

from .records import Measured, jackknife_units

REPETITION_LENGTHS = (16, 32, 128)
BATCH_PARTS = 8  # of a batch, at most: what is pooled over tokens is kept part by part, for the jackknife
_REPETITION = [f"{kind}_l_{length}" for kind in ("rep", "wrep") for length in REPETITION_LENGTHS]


@dataclass(frozen=True)
class Window:
    """`targets` are predicted from `inputs`, token by token; both have the same length.

    unit: "document/window". num_bytes: UTF-8 bytes of the text that the targets stand for, or None where the tokenizer
    cannot say. text_start: index in `inputs` of the first token that is text (1 after a BOS).
    """

    unit: str
    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    num_bytes: int | None
    text_start: int


def cut_windows(tokenizer: Any, documents: Sequence[str], window: int) -> Iterator[Window]:
    """The windows of all documents, in order. A document without a token that can be scored has none."""
    prefix = leading_ids(tokenizer)
    for number, text in enumerate(documents):
        ids, sizes = encode_with_bytes(tokenizer, text)
        stream, shift = [*prefix, *ids], len(prefix)  # stream[i] is ids[i - shift]
        for index, start in enumerate(range(0, len(stream) - 1, window)):
            stop = min(start + window, len(stream) - 1)
            num_bytes = None if sizes is None else sum(sizes[start + 1 - shift : stop + 1 - shift])
            yield Window(f"{number}/{index}", tuple(stream[start:stop]), tuple(stream[start + 1 : stop + 1]), num_bytes,
                         shift if start == 0 else 0)  # fmt: skip


_kept: dict[tuple, list[Window]] = {}  # of the last two texts: the cells of a sweep share their held-out and training text


def chosen_windows(tokenizer: Any, documents: Sequence[str], window: int, limit: int | None) -> list[Window]:
    """At most `limit` windows of all documents, evenly spaced."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    key = (tokenizer_hash(tokenizer), digest.hexdigest(), window, limit)
    if key not in _kept:
        windows = list(cut_windows(tokenizer, documents, window))
        while len(_kept) > 1:
            _kept.pop(next(iter(_kept)))
        _kept[key] = [windows[index] for index in evenly_spaced(len(windows), limit)]
    return _kept[key]


def encode_with_bytes(tokenizer: Any, text: str) -> tuple[list[int], list[int] | None]:
    """Ids of `text` without special tokens, and the bytes of each: they sum to those of the text.

    A token owns the text from the end of the token before it to its own end; what follows the last token belongs to it.
    Of a character that is split over tokens the first owns all bytes. None for a tokenizer without offsets (slow).
    """
    if not tokenizer.is_fast:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = np.maximum.accumulate([0, *(end for _, end in encoded["offset_mapping"])])
    if len(ends) > 1:
        ends[-1] = len(text)
    sizes = [len(text[start:end].encode("utf-8", "surrogatepass")) for start, end in itertools.pairwise(ends)]
    return encoded["input_ids"], sizes


@torch.no_grad()
def padded_logits(loaded: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [B, T, V] of `rows`, padded on the right to the longest; positions beyond a row's end mean nothing."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[loaded.pad_id] * (length - len(row))] for row in rows], device=loaded.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=loaded.device)
    return loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` indices, spread evenly: the first ones may all come from one document."""
    if limit is None or limit >= count:
        return list(range(count))
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def repetition_counts(window: Window, predicted: Sequence[int]) -> dict[str, int]:
    """rep/l: predictions (the argmax) found among the l text tokens before their target; wrep/l: those of them that are wrong."""
    counts = dict.fromkeys(_REPETITION, 0)
    last: dict[int, int] = {}
    for position, (token, target, guess) in enumerate(zip(window.inputs, window.targets, predicted, strict=True)):
        if position >= window.text_start:
            last[token] = position
        if guess not in last:
            continue
        for length in REPETITION_LENGTHS:
            if position - last[guess] < length:
                counts[f"rep_l_{length}"] += 1
                counts[f"wrep_l_{length}"] += guess != target
    return counts


class ScoringTask:
    """Teacher-forced scores of the windows of `documents`; see the module's docstring.

    Args:
        loaded: model and tokenizer (eval/loading.py).
        documents: texts.
        split: "held_out" or "train".
        window: tokens predicted at once, at most.
        batch_size: windows in one forward; which ones depends on nothing else.
        max_windows: that many, evenly spaced; None takes all.
        high_frequency_ids: the high-frequency set; None takes the one in the model's folder, if there is one.

    Raises:
        UserError: the window is longer than the model's context.
    """

    def __init__(self, loaded: Any, documents: Sequence[str], split: str, window: int, batch_size: int,
                 max_windows: int | None = None, high_frequency_ids: Sequence[int] | None = None) -> None:  # fmt: skip
        if loaded.context_length is not None and window > loaded.context_length:
            raise UserError(f"text window {window}: the model's context is {loaded.context_length} tokens; lower text.window "
                            "in the suite")  # fmt: skip
        self.name, self.split, self.loaded, self.batch_size, self.window = f"text_{split}", split, loaded, batch_size, window
        self.windows = chosen_windows(loaded.tokenizer, documents, window, max_windows)
        if high_frequency_ids is None and loaded.high_frequency is not None:
            high_frequency_ids = loaded.high_frequency.token_ids
        self.high_frequency_ids = high_frequency_ids

    def units(self) -> list[str]:
        return [f"{index:05d}" for index in range(math.ceil(len(self.windows) / self.batch_size))]

    def run(self, unit: str, scratch: Path) -> list[dict[str, Any]]:
        """One record per window: sums over its tokens. The sums of p_t over the finite windows of each part of the batch, fp64
        [parts, V], go to `scratch`."""
        first = int(unit) * self.batch_size
        batch = self.windows[first : first + self.batch_size]
        logits_BTV = padded_logits(self.loaded, [window.inputs for window in batch])
        parts = min(BATCH_PARTS, len(batch))
        records, mass_PV = [], np.zeros((parts, logits_BTV.shape[-1]))
        for place, (window, logits_TV) in enumerate(zip(batch, logits_BTV, strict=True)):
            record, window_mass_V = self._score(window, logits_TV[: len(window.targets)])
            part = place * parts // len(batch)
            records.append({"unit": unit, "part": part, **record})
            if record["finite"]:
                mass_PV[part] += window_mass_V
        buffer = io.BytesIO()
        np.save(buffer, mass_PV)
        write_atomic(self.mass_path(scratch, unit), buffer.getvalue())
        return records

    def mass_path(self, scratch: Path, unit: str) -> Path:
        return scratch / f"{self.name}-{unit}.npy"

    def _high_frequency_mask(self, logits_TV: torch.Tensor) -> torch.Tensor | None:
        if self.high_frequency_ids is None:
            return None
        mask_V = torch.zeros(logits_TV.shape[-1], device=logits_TV.device)
        mask_V[list(self.high_frequency_ids)] = 1.0
        return mask_V

    def _score(self, window: Window, logits_TV: torch.Tensor) -> tuple[dict[str, Any], np.ndarray]:
        """(record, sum of p_t fp64 [V]) of one window, in chunks of tokens."""
        targets_T = torch.tensor(window.targets, device=logits_TV.device)
        high_V = self._high_frequency_mask(logits_TV)
        sums, mass_V, predicted = np.zeros(4), np.zeros(logits_TV.shape[-1]), []
        chunk = chunk_tokens(logits_TV, None)
        for start in range(0, len(targets_T), chunk):
            logits_CV = logits_TV[start : start + chunk].float()
            surprisal, entropy, top1, log_partition, high = token_statistics(logits_CV, targets_T[start : start + chunk], high_V)
            sums += torch.stack([surprisal, entropy, top1, high]).double().sum(dim=1).cpu().numpy()
            mass_V += (logits_CV - log_partition.unsqueeze(1)).exp().sum(dim=0, dtype=torch.float64).cpu().numpy()
            predicted += logits_CV.argmax(dim=-1).tolist()
        finite = bool(np.isfinite(sums).all() and np.isfinite(mass_V).all())
        values: dict[str, Any] = dict(zip(("nats", "entropy", "top1_mass", "high_frequency_mass"), sums.tolist(), strict=True))
        if high_V is None:
            values["high_frequency_mass"] = None
        values |= repetition_counts(window, predicted)
        if not finite:  # one bad position and no figure of this window can be trusted
            values = dict.fromkeys(values)
        return {"window": window.unit, "tokens": len(predicted), "bytes": window.num_bytes, "finite": finite, **values}, mass_V

    def measure(self, records: list[dict[str, Any]], scratch: Path) -> list[Measured]:
        """Figures with windows as units, and context_information with parts of batches as units (jackknife)."""
        figures = _Figures(self, records, scratch)
        measured = [figures.per_token("cross_entropy", "nats", "nats"), figures.per_token("predictive_entropy", "entropy", "nats"),
                    figures.calibration_gap(), figures.bits_per_byte(), figures.per_token("top1_mass", "top1_mass"),
                    figures.high_frequency_mass()]  # fmt: skip
        measured += [figures.per_token(name, name) for name in _REPETITION]
        return [*measured, figures.context_information(), figures.non_finite_windows()]


class _Figures:
    """Records of a ScoringTask made into `Measured`; windows that are not finite are left out, and a note counts them."""

    def __init__(self, task: ScoringTask, records: list[dict[str, Any]], scratch: Path) -> None:
        self.task, self.records, self.scratch = task, records, scratch
        self.finite = [record for record in records if record["finite"]]
        lost = len(records) - len(self.finite)
        self.note = f"{lost} of {len(records)} windows left out: the model gave NaN or Inf" if lost else None
        if not records:
            self.note = "no text to score"

    def where(self, unit: str, **settings: Any) -> dict[str, Any]:
        return {"split": self.task.split, "unit": unit, "settings": {"window": self.task.window, **settings}}

    def mean(self, metric: str, totals: Sequence[float], unit: str = "share", count: str = "tokens", **settings: Any) -> Measured:
        units = [record["window"] for record in self.finite]
        counts = [record[count] for record in self.finite]
        return Measured(metric, units, totals, counts, note=self.note, **self.where(unit, **settings))

    def per_token(self, metric: str, key: str, unit: str = "share") -> Measured:
        return self.mean(metric, [record[key] for record in self.finite], unit)

    def calibration_gap(self) -> Measured:
        """Entropy minus cross-entropy: above 0 the model is less sure than it is right to be, below 0 more."""
        return self.mean("calibration_gap", [record["entropy"] - record["nats"] for record in self.finite], "nats")

    def bits_per_byte(self) -> Measured:
        if any(record["bytes"] is None for record in self.records):
            return Measured.null("bits_per_byte", "the tokenizer gives no offsets (slow tokenizer)", **self.where("bits"))
        return self.mean("bits_per_byte", [record["nats"] / math.log(2) for record in self.finite], "bits", "bytes")

    def high_frequency_mass(self) -> Measured:
        if self.task.high_frequency_ids is None:
            note = "no high-frequency set: the model's folder has none, and no file was given"
            return Measured.null("high_frequency_mass", note, **self.where("share"))
        totals = [record["high_frequency_mass"] for record in self.finite]
        return self.mean("high_frequency_mass", totals, types=len(self.task.high_frequency_ids))

    def context_information(self) -> Measured:
        """H(mean p) - mean H(p_t), nats: what the model knows from context. Plug-in, pooled over all finite windows."""
        where = self.where("nats", method=f"jackknife over batches in up to {BATCH_PARTS} parts", batch_size=self.task.batch_size)
        groups = sorted({(record["unit"], record["part"]) for record in self.finite})
        if not groups:
            return Measured.null("context_information", self.note or "no text to score", **where)
        masses = {unit: np.load(self.task.mass_path(self.scratch, unit)) for unit, _ in groups}
        mass_GV = np.stack([masses[unit][part] for unit, part in groups])
        units = [f"{unit}/{part}" for unit, part in groups]
        index = {group: place for place, group in enumerate(groups)}
        sums_G2 = np.zeros((len(units), 2))  # entropy, tokens
        for record in self.finite:
            sums_G2[index[record["unit"], record["part"]]] += record["entropy"], record["tokens"]
        mass_V, sums_2 = mass_GV.sum(axis=0), sums_G2.sum(axis=0)
        value = _information(mass_V, *sums_2)
        if len(units) == 1:
            return Measured("context_information", units, [value], [1.0], note=self.note, **where)
        without = [_information(mass_V - mass_GV[g], *(sums_2 - sums_G2[g])) for g in range(len(units))]
        return Measured("context_information", units, *jackknife_units(value, without, sums_G2[:, 1]), note=self.note, **where)

    def non_finite_windows(self) -> Measured:
        lost = [not record["finite"] for record in self.records]
        return Measured("non_finite_windows", [record["window"] for record in self.records], lost, np.ones(len(lost)),
                        split=self.task.split, note=self.note)  # fmt: skip


def _information(mass_V: np.ndarray, entropy: float, tokens: float) -> float:
    mean_V = mass_V[mass_V > 0] / tokens  # a difference of sums can leave -1e-17 where there is nothing
    return float(-(mean_V * np.log(mean_V)).sum() - entropy / tokens)
