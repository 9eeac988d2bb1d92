"""How the next token is chosen, and the numbers that choose it.

A text is drawn by inverting the cumulative distribution, in fp64 and in the order of the vocabulary, at numbers that depend
on its key and on the position alone: not on the batch, the rank, or how often a run was killed.

Shape suffixes: B texts of a batch, V vocabulary, N positions.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from ds_stability.errors import UserError

from .truncated_draw import draw_truncated

KINDS = ("greedy", "sample", "beam")
CPU_ELEMENTS = 2**17  # of one pass on a CPU: what stays in its cache


@dataclass(frozen=True)
class Decoding:
    """A way to continue a prompt.

    Attributes:
        name: as in the suite and in the tables; part of the key that a text is drawn under.
        kind: "greedy", "sample", or "beam" (the best of `num_beams` by log-probability over length, see generation.py).
        temperature: logits are divided by it; sampling only, as the two below.
        top_p: keep the fewest likeliest tokens that together reach this probability (Holtzman et al. 2020); 1 keeps all.
        top_k: keep the k likeliest tokens (Fan et al. 2018); 0 keeps all. Of either, what ties with the last is kept too.
        num_beams: beams of a beam search.
    """

    name: str
    kind: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1

    @property
    def sampled(self) -> bool:
        """Whether a text depends on random numbers, so that a prompt has more than one."""
        return self.kind == "sample"

    def to_dict(self) -> dict[str, Any]:
        """The settings without the name, as a suite has them."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}

    @classmethod
    def parse(cls, name: str, mapping: Mapping[str, Any] | None) -> "Decoding":
        """Read a suite's entry; None means the default of that name.

        Raises:
            UserError: an unknown name or key, or a value of the wrong type or range; one line.
        """
        if mapping is None:
            if name not in DEFAULT_DECODINGS:
                raise UserError(f"decodings.{name}: has no settings and is none of the defaults "
                                f"({', '.join(DEFAULT_DECODINGS)}); give at least kind: {' or '.join(KINDS)}")
            return DEFAULT_DECODINGS[name]
        if not isinstance(mapping, Mapping):
            raise UserError(f"decodings.{name}: {mapping!r} is no mapping; write for example {{kind: sample, top_p: 0.9}}")
        allowed = [field.name for field in fields(cls) if field.name != "name"]
        for key in mapping:
            if key not in allowed:
                raise UserError(f"decodings.{name}.{key}: unknown key; allowed are {', '.join(allowed)}")
        _check_values(name, mapping)
        return cls(name, mapping["kind"], float(mapping.get("temperature", 1.0)), float(mapping.get("top_p", 1.0)),
                   mapping.get("top_k", 0), mapping.get("num_beams", 1))


def _check_values(name: str, mapping: Mapping[str, Any]) -> None:
    kind = mapping.get("kind")
    if kind not in KINDS:
        raise UserError(f"decodings.{name}.kind: {kind!r}; allowed are {', '.join(KINDS)}")
    _check_number(name, mapping, "temperature", "a finite number above 0", lambda x: 0 < x < math.inf)
    _check_number(name, mapping, "top_p", "a number above 0 and up to 1", lambda x: 0 < x <= 1)
    _check_number(name, mapping, "top_k", "a whole number from 0 (0 keeps all)", lambda x: x >= 0 and type(x) is int)
    _check_number(name, mapping, "num_beams", "a whole number from 1", lambda x: x >= 1 and type(x) is int)
    if kind != "sample":
        for key, neutral in (("temperature", 1), ("top_p", 1), ("top_k", 0)):
            if mapping.get(key, neutral) != neutral:
                raise UserError(f"decodings.{name}.{key}: {mapping[key]} has no effect with kind: {kind}; leave it out or "
                                "use kind: sample")  # fmt: skip
    if (kind == "beam") != (mapping.get("num_beams", 1) > 1):
        raise UserError(f"decodings.{name}.num_beams: {mapping.get('num_beams', 1)} with kind: {kind}; beam needs 2 or more, "
                        "the other kinds have 1")  # fmt: skip


def _check_number(name: str, mapping: Mapping[str, Any], key: str, allowed: str, holds: Any) -> None:
    value = mapping.get(key)
    if key in mapping and (type(value) not in (int, float) or not holds(value)):
        raise UserError(f"decodings.{name}.{key}: {value!r}; allowed is {allowed}")


DEFAULT_DECODINGS = {
    decoding.name: decoding
    for decoding in (
        Decoding("greedy", "greedy"),
        Decoding("sample", "sample"),
        Decoding("top_p_95", "sample", top_p=0.95),
        Decoding("top_k_40", "sample", temperature=0.7, top_k=40),
        Decoding("beam_4", "beam", num_beams=4),
    )
}


def sample_key(seed: int, decoding: str, prompt: int, sample: int) -> str:
    """The key of a text: `sample` counts the samples of this prompt under this seed, from 0."""
    return f"{seed}/{decoding}/{prompt}/{sample}"


def key_seed(key: str) -> int:
    """A seed of 63 bits made from a key, for engines that draw their own numbers."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def uniform_numbers(key: str, count: int) -> np.ndarray:
    """Numbers in [0, 1) of a key, fp64 [count]; number t draws token t, whatever `count` is.

    Counter-based: Philox-4x64-10 (Salmon et al. 2011) keyed by the first 128 bits of sha256(key), from counter 0. The raw
    words are used, whose order numpy guarantees across versions (that of `Generator.random` it does not).
    """
    digest = hashlib.sha256(key.encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "big"), counter=0).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@torch.no_grad()
def next_tokens(
    logits_BV: torch.Tensor, decoding: Decoding, uniforms_B: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose one token per text, greedily or at the given uniform numbers. fp64 throughout.

    Args:
        logits_BV: any float dtype. -inf (a padded vocabulary) is a probability of 0: never drawn, adds 0 to the entropy.
        decoding: kind "greedy" or "sample".
        uniforms_B: fp64 numbers in [0, 1); needed for sampling.

    Returns:
        tokens_B (int64); logprob_B of that token and entropy_B, nats, both of the *untruncated* distribution at
        temperature 1; finite_B (bool): False where the logits hold a NaN, +inf, or nothing but -inf. There the other
        three are meaningless (token 0, zeros).
    """
    on_cpu = logits_BV.device.type == "cpu"
    peak_B1, finite_B1 = _peaks(logits_BV)
    fill = not on_cpu or not bool(finite_B1.all())  # to ask an accelerator costs more than to fill
    rows = max(1, CPU_ELEMENTS // logits_BV.shape[1]) if on_cpu else len(logits_BV)
    parts = []  # of what is as long as the vocabulary; the rest is done for all texts at once
    for start in range(0, len(logits_BV), rows):
        part = slice(start, start + rows)
        shifted_BV = _shifted(logits_BV[part], peak_B1[part], finite_B1[part] if fill else None)
        exp_BV = shifted_BV.exp()
        tokens_B1 = _choose(shifted_BV, exp_BV, decoding, None if uniforms_B is None else uniforms_B[part])
        parts.append((tokens_B1, *_sums(shifted_BV, exp_BV, tokens_B1)))
    tokens_B1, *sums = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return torch.where(finite_B1, tokens_B1, 0).squeeze(-1), *_statistics(*sums, finite_B1), finite_B1.squeeze(-1)


@torch.no_grad()
def token_scores(logits_BV: torch.Tensor, tokens_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprob_B of given tokens, entropy_B and finite_B, as `next_tokens` returns them."""
    peak_B1, finite_B1 = _peaks(logits_BV)
    shifted_BV = _shifted(logits_BV, peak_B1, finite_B1)
    return *_statistics(*_sums(shifted_BV, shifted_BV.exp(), tokens_B.unsqueeze(-1)), finite_B1), finite_B1.squeeze(-1)


def _peaks(logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each text, fp64 [B, 1], NaN if there is one; and whether it is finite."""
    peak_B1 = logits_BV.amax(dim=-1, keepdim=True).to(torch.float64)
    return peak_B1, torch.isfinite(peak_B1)


def _shifted(logits_BV: torch.Tensor, peak_B1: torch.Tensor, finite_B1: torch.Tensor | None) -> torch.Tensor:
    """Logits less their largest, fp64; zeros where that is not finite. None: it is everywhere."""
    shifted_BV = logits_BV.to(torch.float64, copy=True).sub_(peak_B1)  # in place: memory traffic is what this costs
    return shifted_BV if finite_B1 is None else shifted_BV.masked_fill_(~finite_B1, 0.0)


def _choose(shifted_BV: torch.Tensor, exp_BV: torch.Tensor, decoding: Decoding, uniforms_B: torch.Tensor | None) -> torch.Tensor:
    """The token of each text, int64 [B, 1]."""
    if decoding.kind == "greedy":
        return _first_largest(shifted_BV)
    if shifted_BV.device.type == "cpu" and (decoding.top_k or decoding.top_p < 1):
        return _draw_row_by_row(shifted_BV, exp_BV, decoding, uniforms_B)
    return _draw(_truncated(shifted_BV, exp_BV, decoding), uniforms_B.unsqueeze(-1))


def _sums(shifted_BV: torch.Tensor, exp_BV: torch.Tensor, tokens_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shifted logit of the token, sum of the exponentials, and their sum weighted by the shifted logits; [B, 1] each.

    Overwrites `shifted_BV`.
    """
    chosen_B1 = shifted_BV.gather(1, tokens_B1)
    # Below -746 exp() is 0 in fp64, so the bound changes nothing but 0 * -inf.
    weighted_B1 = shifted_BV.clamp_(min=-1e4).mul_(exp_BV).sum(dim=-1, keepdim=True)
    return chosen_B1, exp_BV.sum(dim=-1, keepdim=True), weighted_B1


def _statistics(
    chosen_B1: torch.Tensor, total_B1: torch.Tensor, weighted_B1: torch.Tensor, finite_B1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """logprob_B, entropy_B from `_sums`; zeros where not finite."""
    log_total_B1 = total_B1.log()
    entropy_B1 = (log_total_B1 - weighted_B1 / total_B1).clamp(min=0)
    return torch.where(finite_B1, chosen_B1 - log_total_B1, 0).squeeze(-1), torch.where(finite_B1, entropy_B1, 0).squeeze(-1)


def _truncated(shifted_BV: torch.Tensor, exp_BV: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Unnormalized probabilities after temperature, top-k and top-p, in this order (as transformers' warpers).

    Args:
        shifted_BV: logits less their largest; exp_BV: their exponentials.
    """
    if decoding.temperature == 1 and decoding.top_k == 0 and decoding.top_p == 1:
        return exp_BV
    scores_BV = shifted_BV / decoding.temperature
    if 0 < decoding.top_k < scores_BV.shape[-1]:
        least_B1 = scores_BV.topk(decoding.top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -math.inf)
    weights_BV = scores_BV.exp()
    if decoding.top_p < 1:
        ordered_BV = _descending(weights_BV)
        cumulative_BV = prefix_sums(ordered_BV)
        # A token belongs to the nucleus if what comes before it has not reached top_p yet.
        size_B1 = (cumulative_BV - ordered_BV < decoding.top_p * cumulative_BV[:, -1:]).sum(dim=-1, keepdim=True)
        least_B1 = ordered_BV.gather(1, size_B1.clamp(min=1) - 1)
        weights_BV = weights_BV.masked_fill(weights_BV < least_B1, 0.0)
    return weights_BV


def _descending(values_BV: torch.Tensor) -> torch.Tensor:
    if values_BV.device.type == "cpu":  # vectorized, other than torch's
        return torch.from_numpy(np.sort(values_BV.numpy(), axis=-1)).flip(-1)
    return values_BV.sort(dim=-1, descending=True).values


def _first_largest(values_BV: torch.Tensor) -> torch.Tensor:
    """The first of the largest in each row, int64 [B, 1]."""
    if values_BV.device.type == "cpu":  # vectorized, other than torch's
        return torch.from_numpy(values_BV.numpy().argmax(axis=-1)).unsqueeze(-1)
    return values_BV.argmax(dim=-1, keepdim=True)


def _draw(weights_BV: torch.Tensor, uniforms_B1: torch.Tensor) -> torch.Tensor:
    """The token at each number: the first whose cumulative weight exceeds it; never one of weight 0. int64 [B, 1]."""
    cumulative_BV = prefix_sums(weights_BV)
    last_B1 = cumulative_BV[:, -1:].contiguous()
    tokens_B1 = torch.searchsorted(cumulative_BV, uniforms_B1 * last_B1, right=True)
    # A number just below 1 times the sum can round to the sum: then the last token of positive weight, not the last one.
    return tokens_B1.minimum(torch.searchsorted(cumulative_BV, last_B1))


def _draw_row_by_row(
    shifted_BV: torch.Tensor, exp_BV: torch.Tensor, decoding: Decoding, uniforms_B: torch.Tensor
) -> torch.Tensor:
    rows = zip(shifted_BV.numpy(), exp_BV.numpy(), uniforms_B.tolist(), strict=True)
    tokens = [draw_truncated(*row[:2], decoding.temperature, decoding.top_k, decoding.top_p, row[2]) for row in rows]
    return torch.tensor(tokens, dtype=torch.int64).unsqueeze(-1)


def prefix_sums(values_BV: torch.Tensor) -> torch.Tensor:
    """Cumulative sums along the last axis, with the same bits on every run.

    torch.cumsum of floats is not deterministic on CUDA; there, doubling steps (Hillis and Steele 1986) of plain additions.
    """
    if values_BV.device.type == "cpu":
        return values_BV.cumsum(dim=-1)
    sums_BV, step = values_BV, 1
    while step < values_BV.shape[-1]:
        sums_BV = torch.cat([sums_BV[..., :step], sums_BV[..., step:] + sums_BV[..., :-step]], dim=-1)
        step *= 2
    # Rounding of the different trees must not make the sequence fall: searchsorted needs it sorted.
    return sums_BV.cummax(dim=-1).values
