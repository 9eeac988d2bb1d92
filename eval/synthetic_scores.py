"""Scores of a model that was trained on builtin:synthetic, against the language and against its training sentences.

The language's next-token distribution is known, so that every divergence is an exact sum over the vocabulary at each
prefix; only the prefixes are a sample. Work is of five kinds:

    truth      sentences drawn from the language: forward KL, entropy gap, agreement
    samples    sentences drawn from the model (T = 1, untruncated): grammaticality, reverse KL, its unigrams and bigrams
    training   training sentences: forward KL to the empirical distribution over sentences
    prefixes   the prefixes that the training sentences share most: KL to what followed them there
    modes      the language's k most probable sentences: their probability under the model

The figures are made in synthetic_measures.py. All arithmetic is fp64; nats throughout. Shape suffixes: T positions of a
sentence, V ids of the model.
"""

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_stability.data.readers import synthetic_documents
from ds_stability.data.spec import DataSpec
from ds_stability.data.synthetic import BOS_ID, EOS_ID, SyntheticLanguage
from ds_stability.errors import UserError
from ds_stability.run_dir import write_atomic

from .decoding import DEFAULT_DECODINGS, sample_key
from .generation import Generator
from .records import Measured
from .scoring import evenly_spaced, padded_logits

Record = dict[str, Any]


@dataclass(frozen=True)
class SyntheticSettings:
    """What is measured, the same for all cells of a suite.

    sentences, samples, training_sentences: how many of each; modes: k; min_count: how often a prefix must stand in the
    training sentences; max_prefixes: that many of them, the commonest first; alpha: added to each cell of a unigram or
    bigram table and of what followed a prefix; epsilon: share of the uniform distribution mixed into the true one before
    it may stand in a denominator (reverse KL); max_new_tokens: cap of a sample.
    """

    sentences: int = 512
    samples: int = 1024
    training_sentences: int = 512
    modes: int = 100
    min_count: int = 20
    max_prefixes: int = 256
    alpha: float = 0.5
    epsilon: float = 1e-4
    max_new_tokens: int = 64
    batch_size: int = 64
    seed: int = 0


def training_sentences(spec: DataSpec, language: SyntheticLanguage, max_tokens: int | None = None) -> list[list[int]]:
    """The sentences of a run on builtin:synthetic as ids, EOS included, BOS not; those within the first `max_tokens` tokens."""
    index = {word: number for number, word in enumerate(language.vocabulary)}
    sentences, tokens = [], 0
    for document in synthetic_documents(spec, "train"):
        ids = [*(index[word] for word in document.text.split()), EOS_ID]
        tokens += len(ids) + 1  # BOS
        if max_tokens is not None and tokens > max_tokens:
            break
        sentences.append(ids)
    return sentences


def common_prefixes(sentences: Sequence[Sequence[int]], min_count: int, limit: int) -> list[tuple[tuple[int, ...], Counter[int]]]:
    """(prefix, how often each token followed it) of the `limit` commonest prefixes that occur at least `min_count` times."""
    found: list[tuple[tuple[int, ...], Counter[int]]] = []
    pending: list[tuple[tuple[int, ...], list[Sequence[int]]]] = [((), list(sentences))]
    while pending:
        prefix, group = pending.pop()
        if len(group) < min_count:
            continue
        following: dict[int, list[Sequence[int]]] = {}
        for sentence in group:
            if len(sentence) > len(prefix):
                following.setdefault(sentence[len(prefix)], []).append(sentence)
        if following:
            found.append((prefix, Counter({token: len(rest) for token, rest in following.items()})))
            pending += [((*prefix, token), rest) for token, rest in following.items()]
    found.sort(key=lambda item: (-item[1].total(), item[0]))
    return found[:limit]


def true_distributions(language: SyntheticLanguage, ids: Sequence[int], width: int) -> np.ndarray:
    """P(next token | prefix) before each token of `ids` up to and including the first impossible one, fp64 [T, width]."""
    possible = np.isfinite(language.token_logprobs([BOS_ID, *ids]))  # BOS: a sentence may not begin with another one
    count = len(ids) if possible.all() else int(np.argmin(possible)) + 1
    table = np.zeros((count, width))
    for position in range(count):
        table[position, : language.vocab_size] = language.next_token_distribution([BOS_ID, *ids[:position]])
    return table


def kl(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sum over the last axis of p log(p / q), a probability of 0 in p adding 0; inf where q is 0 and p is not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(first > 0, first * (np.log(first) - np.log(second)), 0.0).sum(axis=-1)


def entropy(table: np.ndarray) -> np.ndarray:
    return -np.where(table > 0, table * np.log(np.where(table > 0, table, 1.0)), 0.0).sum(axis=-1)


class SyntheticTask:
    """See the module's docstring.

    Args:
        loaded: model and tokenizer (eval/loading.py).
        language: the one that the model was trained on.
        training: its training sentences (`training_sentences`).
        settings: see SyntheticSettings.

    Raises:
        UserError: the tokenizer's words are not those of the language.
    """

    name = "synthetic"

    def __init__(self, loaded: Any, language: SyntheticLanguage, training: Sequence[Sequence[int]],
                 settings: SyntheticSettings | None = None) -> None:  # fmt: skip
        words = loaded.tokenizer.convert_ids_to_tokens(list(range(min(language.vocab_size, len(loaded.tokenizer)))))
        if words != language.vocabulary or loaded.vocab_size < language.vocab_size:
            raise UserError("the model's vocabulary is not that of the synthetic language of this seed; evaluate a model that was "
                            "trained on builtin:synthetic, or set synthetic to false in the suite")  # fmt: skip
        self.loaded, self.language, self.training = loaded, language, training
        self.settings = settings or SyntheticSettings()
        room = self.settings.max_new_tokens if loaded.context_length is None else loaded.context_length - 1
        self.max_new_tokens = min(self.settings.max_new_tokens, room)

    @cached_property
    def items(self) -> dict[str, list[Any]]:
        """What each kind of work runs over, in order."""
        settings, language = self.settings, self.language
        keys = [sample_key(settings.seed, "synthetic", 0, number) for number in range(settings.samples)]
        chosen = evenly_spaced(len(self.training), settings.training_sentences)
        return {
            # A training or held-out sample has a seed from 0: this one is another.
            "truth": language.sample(n_sentences=settings.sentences, seed=-1 - settings.seed),
            "samples": keys,
            "training": [self.training[index] for index in chosen],
            "prefixes": common_prefixes(self.training, settings.min_count, settings.max_prefixes),
            "modes": language.modes(settings.modes),
        }

    @cached_property
    def sentence_counts(self) -> Counter[tuple[int, ...]]:
        return Counter(map(tuple, self.training))

    @cached_property
    def training_bigrams(self) -> np.ndarray:
        """Counts of (token before, token) in the training sentences, BOS before the first, fp64 [V, V] of the language."""
        counts = np.zeros((self.language.vocab_size,) * 2)
        before = np.concatenate([[BOS_ID, *ids[:-1]] for ids in self.training])
        np.add.at(counts, (before, np.concatenate(self.training)), 1.0)
        return counts

    def units(self) -> list[str]:
        size = self.settings.batch_size
        return [f"{kind}-{index:05d}" for kind, items in self.items.items() for index in range(math.ceil(len(items) / size))]

    def run(self, unit: str, scratch: Path) -> list[Record]:
        """One record per item of the batch. Of samples, the mean distributions per token before go to `scratch`."""
        kind, index = unit.split("-")
        first = int(index) * self.settings.batch_size
        batch = self.items[kind][first : first + self.settings.batch_size]
        work = {"truth": self._truth, "training": self._training, "prefixes": self._prefixes, "modes": self._modes}
        records = self._samples(batch, self.mass_path(scratch, unit)) if kind == "samples" else work[kind](batch)
        return [{"kind": kind, "unit": unit, "id": f"{kind}/{first + i}", **record} for i, record in enumerate(records)]

    def mass_path(self, scratch: Path, unit: str) -> Path:
        return scratch / f"{self.name}-{unit}.npy"

    def measure(self, records: list[Record], scratch: Path) -> list[Measured]:
        from .synthetic_measures import measure  # it needs this module

        return measure(self, records, scratch)

    def describe(self) -> dict[str, Any]:
        return {**asdict(self.settings), "language": self.language.fingerprint()[:12], "training_sentences_total": len(self.training)}

    # The work

    def _logprobs(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray | None]:
        """log p of the next token at each position of [BOS, *row[:-1]], fp64 [T, V]; None where not finite. Cut at the context."""
        limit = self.loaded.context_length
        logits = padded_logits(self.loaded, [[BOS_ID, *row[:-1]][:limit] for row in rows])
        tables: list[np.ndarray | None] = []
        for row, logits_TV in zip(rows, logits, strict=True):
            table = torch.log_softmax(logits_TV[: min(len(row), limit or len(row))].double(), dim=-1).cpu().numpy()
            tables.append(None if np.isnan(table).any() else table)
        return tables

    def _truth(self, batch: list[list[int]]) -> list[Record]:
        records = []
        for ids, log_TV in zip(batch, self._logprobs(batch), strict=True):
            if log_TV is None:
                records.append({"finite": False})
                continue
            p_TV = np.exp(log_TV)
            true_TV = true_distributions(self.language, ids, p_TV.shape[1])[: len(p_TV)]
            # log p instead of log of p: a p that underflows must not make the divergence infinite.
            forward = -entropy(true_TV) - np.where(true_TV > 0, true_TV * log_TV, 0.0).sum(axis=1)
            sites = [[site.distance, site.attractors, float(p_TV[site.position, list(site.correct)].sum()),
                      float(p_TV[site.position, list(site.wrong)].sum())]
                     for site in self.language.agreement_sites(ids) if site.position < len(p_TV)]  # fmt: skip
            records.append(_finite({
                "tokens": len(p_TV), "forward_kl": forward.sum(), "entropy": entropy(p_TV).sum(), "true_entropy": entropy(true_TV).sum(),
                "impossible_mass": p_TV[true_TV == 0].sum(), "cross_entropy": -_taken(log_TV, ids).sum()}) | {"sites": sites})  # fmt: skip
        return records

    def _samples(self, keys: list[str], path: Path) -> list[Record]:
        generator = Generator(self.loaded.model, self.loaded.eos_ids, self.loaded.pad_id)
        texts = generator.generate_keyed([[BOS_ID]] * len(keys), DEFAULT_DECODINGS["sample"], keys, self.max_new_tokens)
        rows = [[*text.token_ids, *[EOS_ID] * (text.finish == "eos")] for text in texts]
        kept = [row for row in rows if row]
        tables = iter(self._logprobs(kept) if kept else [])
        mass_VV: np.ndarray | None = None
        records = []
        for text, row in zip(texts, rows, strict=True):
            log_TV = next(tables) if row else None
            if text.finish == "non_finite" or log_TV is None:
                records.append({"finite": False, "finish": text.finish})
                continue
            if mass_VV is None:
                mass_VV = np.zeros((log_TV.shape[1],) * 2)
            np.add.at(mass_VV, [BOS_ID, *row[:-1]], np.exp(log_TV))
            records.append({"finish": text.finish, "ids": row, **self._sample(row, log_TV)})
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((0, 0)) if mass_VV is None else mass_VV)
        write_atomic(path, buffer.getvalue())
        return records

    def _sample(self, ids: list[int], log_TV: np.ndarray) -> Record:
        """Exact figures of a sample at the prefixes at which the language still has a next token."""
        p_TV = np.exp(log_TV)
        true_TV = true_distributions(self.language, ids, p_TV.shape[1])
        count = len(true_TV)
        wrong = not np.isfinite(self.language.token_logprobs([BOS_ID, *ids])).all()
        mixed_TV = (1.0 - self.settings.epsilon) * true_TV + self.settings.epsilon / p_TV.shape[1]
        possible_TV = np.where(true_TV > 0, p_TV[:count], 0.0)
        legal_T = possible_TV.sum(axis=1)
        possible_TV = possible_TV / np.maximum(legal_T, np.finfo(float).tiny)[:, None]
        return _finite({
            "tokens": len(ids), "possible_tokens": count, "entropy": entropy(p_TV).sum(), "reverse_kl": kl(p_TV[:count], mixed_TV).sum(),
            "reverse_kl_possible": kl(possible_TV, true_TV).sum(), "impossible_mass": (1.0 - legal_T).clip(0.0).sum(),
        }) | {"wrong": wrong, "grammatical": self.language.is_grammatical([BOS_ID, *ids])}  # fmt: skip

    def _training(self, batch: list[list[int]]) -> list[Record]:
        return [
            _unknown(log_TV, ids) or _finite({
                "tokens": len(ids), "logprob": _taken(log_TV, ids).sum(),
                "empirical_logprob": math.log(self.sentence_counts[tuple(ids)] / len(self.training))})
            for ids, log_TV in zip(batch, self._logprobs(batch), strict=True)]  # fmt: skip

    def _prefixes(self, batch: list[tuple[tuple[int, ...], Counter[int]]]) -> list[Record]:
        records = []
        tables = self._logprobs([[*prefix, EOS_ID] for prefix, _ in batch])
        for (prefix, following), log_TV in zip(batch, tables, strict=True):
            unknown = _unknown(log_TV, [*prefix, EOS_ID])
            if unknown:
                records.append(unknown)
                continue
            log_V = log_TV[len(prefix)]
            counts = np.zeros(len(log_V))
            counts[list(following)] = list(following.values())
            empirical, p = counts / counts.sum(), np.exp(log_V)
            smoothed = (counts + self.settings.alpha) / (counts + self.settings.alpha).sum()
            forward = -entropy(empirical) - np.where(empirical > 0, empirical * log_V, 0.0).sum()
            records.append(_finite({"count": counts.sum(), "forward_kl": forward, "reverse_kl": kl(p, smoothed)}))
        return records

    def _modes(self, batch: list[tuple[list[int], float]]) -> list[Record]:
        rows = [ids for ids, _ in batch]
        return [
            _unknown(log_TV, ids) or _finite({"logprob": _taken(log_TV, ids).sum(), "true_logprob": logprob}) | {"ids": ids}
            for (ids, logprob), log_TV in zip(batch, self._logprobs(rows), strict=True)]  # fmt: skip


def _taken(log_TV: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """log p of the tokens of `ids`, [T]."""
    return log_TV[np.arange(len(log_TV)), list(ids)[: len(log_TV)]]


def _unknown(log_TV: np.ndarray | None, ids: Sequence[int]) -> Record | None:
    """The record of a text whose whole probability is not known: the model failed, or the text is longer than its context."""
    if log_TV is None:
        return {"finite": False}
    return {"finite": False, "cut": True} if len(log_TV) < len(ids) else None


def _finite(values: dict[str, float]) -> Record:
    """Plain numbers, and whether all of them are finite; None for those that are not (JSON has no infinity)."""
    plain = {key: float(value) for key, value in values.items()}
    return {"finite": all(map(math.isfinite, plain.values())),
            **{key: value if math.isfinite(value) else None for key, value in plain.items()}}  # fmt: skip
