"""The high-frequency set: the most frequent tokens that together make up a share of the training corpus."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..safe_read import read_json

IGNORE = -100
MAX_TOKENS = 5_000_000
FILE_NAME = "high_frequency.json"


@dataclass(frozen=True)
class HighFrequencySet:
    """Token ids by falling count (ties by id), and what they were counted on.

    coverage: the share asked for; coverage_reached: the share of the `tokens` counted that the set makes up (special
    tokens excluded from both). corpus_fingerprint and tokenizer_hash say where the ids are valid.
    """

    token_ids: tuple[int, ...]
    coverage: float
    coverage_reached: float
    tokens: int
    vocab_size: int
    corpus_fingerprint: str = ""
    tokenizer_hash: str = ""

    def save(self, path: str) -> None:
        """Write as JSON, whole or not at all."""
        from ..run_dir import write_atomic

        write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str, vocab_size: int | None = None, tokenizer_hash: str | None = None) -> "HighFrequencySet":
        """Read what `save` wrote. UserError if it is not that, or is for another vocabulary or tokenizer."""
        try:
            values = read_json(path)
            result = cls(**{**values, "token_ids": tuple(values["token_ids"])})
            valid = bool(result.token_ids) and all(type(token) is int and 0 <= token < 2**31 for token in result.token_ids)
            if not result._has_right_types():
                raise TypeError("a value of another kind")
        except OSError as error:
            raise UserError(f"high_frequency_file {path}: cannot be read ({error.strerror or error})") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"high_frequency_file {path}: is not a high-frequency set; give a {FILE_NAME} that a run "
                            "wrote") from error
        if not valid:
            raise UserError(f"high_frequency_file {path}: token_ids must be a list of token ids, with at least one")
        result._check(path, vocab_size, tokenizer_hash)
        return result

    def _has_right_types(self) -> bool:
        shares = all(isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 for value in (self.coverage, self.coverage_reached))
        return shares and all(type(value) is int for value in (self.tokens, self.vocab_size)) and all(
            isinstance(value, str) for value in (self.corpus_fingerprint, self.tokenizer_hash))  # fmt: skip

    def _check(self, path: str, vocab_size: int | None, tokenizer_hash: str | None) -> None:
        if tokenizer_hash is not None and self.tokenizer_hash and tokenizer_hash != self.tokenizer_hash:
            raise UserError(f"high_frequency_file {path}: was made with another tokenizer ({self.tokenizer_hash[:12]}, "
                            f"this run has {tokenizer_hash[:12]}); give the file of a run with the same one, or none")
        if vocab_size is not None and max(self.token_ids) >= vocab_size:
            raise UserError(f"high_frequency_file {path}: token id {max(self.token_ids)} is not in the model's vocabulary "
                            f"of {vocab_size}; give the file of a run with the same tokenizer, or none")


def count_tokens(
    blocks: Iterable[dict[str, Any]], vocab_size: int, max_tokens: int = MAX_TOKENS, special_ids: Iterable[int] = ()
) -> np.ndarray:
    """Counts int64 [vocab_size] of the first `max_tokens` supervised tokens (label other than -100) of `blocks`.

    Special tokens are neither counted nor among the `max_tokens`.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    skipped = np.array(sorted({IGNORE, *special_ids}))
    left = max_tokens
    for block in blocks:
        labels = np.asarray(block["labels"]).reshape(-1)
        kept = labels[~np.isin(labels, skipped)][:left]
        counts += np.bincount(kept, minlength=vocab_size)
        left -= len(kept)
        if left <= 0:
            break
    return counts


def high_frequency_set(counts: np.ndarray, coverage: float) -> tuple[list[int], float]:
    """The fewest most frequent token ids that make up `coverage` (0..1] of `counts` or more, and the share they reach."""
    if not 0 < coverage <= 1:
        raise UserError(f"high_frequency_coverage {coverage}: allowed is a share above 0 and up to 1")
    total = int(counts.sum())
    if total == 0:
        raise UserError("no supervised token to count the high-frequency set on; check the training data and "
                        "--assistant_only_loss")
    order = np.lexsort((np.arange(len(counts)), -counts))
    cumulative = np.cumsum(counts[order])
    # In whole tokens: a rounding error in coverage * total must not ask for one token more.
    size = int(np.searchsorted(cumulative, coverage * total - 1e-9 * total)) + 1
    return order[:size].tolist(), float(cumulative[size - 1] / total)


def make_high_frequency_set(
    blocks: Iterable[dict[str, Any]], tokenizer: Any, vocab_size: int, coverage: float = 0.5,
    corpus_fingerprint: str = "", max_tokens: int = MAX_TOKENS,
) -> HighFrequencySet:
    """Count `blocks` and return their high-frequency set; `vocab_size` is the model's."""
    from .tokenizer import special_token_ids, tokenizer_hash

    counts = count_tokens(blocks, vocab_size, max_tokens, special_token_ids(tokenizer))
    token_ids, reached = high_frequency_set(counts, coverage)
    return HighFrequencySet(tuple(token_ids), coverage, reached, int(counts.sum()), vocab_size, corpus_fingerprint,
                            tokenizer_hash(tokenizer))
