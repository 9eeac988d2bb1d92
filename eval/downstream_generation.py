"""Generation until a stop text, for lm-eval's requests: greedy, beams, or sampled from counter-based numbers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ds_stability.errors import UserError

from .decoding import Decoding, next_tokens, uniform_numbers

# lm-eval's names for one thing, in the order in which it takes them.
NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLE_NAMES = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class GenerationSettings:
    """A request's generation_kwargs.

    Attributes:
        until: texts that end a generation; they are cut off. max_new_tokens: the cap.
        sample: temperature, top_p, top_k where it samples, else None.
        options: what else a greedy or beam search takes (num_beams, repetition_penalty, ...).
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sample: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any], default_new_tokens: int) -> "GenerationSettings":
        """As lm-eval reads them: temperature 0, or none, is greedy unless do_sample says otherwise.

        Raises:
            UserError: sampling together with something that a sampled generation does not take.
        """
        left = dict(given)
        until = left.pop("until", None) or []
        caps = [left.pop(name, None) for name in NEW_TOKENS_NAMES]
        cap = next((value for value in caps if value is not None), default_new_tokens)
        temperature = float(left.pop("temperature", None) or 0.0)
        do_sample = left.pop("do_sample", None)
        sampled = temperature > 0 and do_sample is not False
        truncation = {name: left.pop(name) for name in SAMPLE_NAMES if name in left}
        if sampled and left:
            raise UserError(
                f"generation_kwargs: {', '.join(sorted(left))} with sampling; allowed are until, {NEW_TOKENS_NAMES[0]}, "
                f"do_sample, {', '.join(SAMPLE_NAMES)}"
            )
        until = (until,) if isinstance(until, str) else tuple(until)
        sample = {"temperature": temperature, **truncation} if sampled else None
        return cls(tuple(text for text in until if text), int(cap), sample, left)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _NextToken(LogitsProcessor):
    """Notes rows whose logits are not finite, and draws the token where sampling is asked for.

    A token that is drawn here is the only one left, so that the search around it cannot but take it.
    """

    def __init__(self, decoding: Decoding | None, uniforms: np.ndarray | None):
        self.decoding, self.uniforms, self.step = decoding, uniforms, 0
        self.broken: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        broken = ~torch.isfinite(scores.amax(dim=-1))  # NaN, +inf, or nothing but -inf
        self.broken = broken if self.broken is None else self.broken | broken
        scores = torch.where(broken[:, None], torch.zeros_like(scores), scores)
        if self.decoding is not None:
            uniforms = torch.from_numpy(self.uniforms[:, self.step]).to(scores.device)
            tokens = next_tokens(scores, self.decoding, uniforms)[0]
            scores = torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
        self.step += 1
        return scores


class _StopTexts(StoppingCriteria):
    """A row is done once one of the texts stands in what it generated; the end is decoded, not the whole, each step."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt_width: int):
        self.tokenizer, self.texts, self.prompt_width = tokenizer, texts, prompt_width
        # A text may come in other pieces than the tokenizer cuts it into: at most one token per byte, and the next.
        self.look_back = 2 + max((len(text.encode()) for text in texts), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ends = self.tokenizer.batch_decode(input_ids[:, self.prompt_width :][:, -self.look_back :])
        done = [any(text in end for text in self.texts) for end in ends]
        return torch.tensor(done, device=input_ids.device)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """End tokens of the tokenizer and of the model's generation config (which may have several)."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return sorted({*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


@contextmanager
def _plain_generation_config(model: Any, ends: list[int], pad: int) -> Iterator[None]:
    """The folder's generation_config.json would fill in whatever a request leaves open: temperature, penalties."""
    theirs = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = theirs


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    device: torch.device,
    prompts: list[list[int]],
    settings: GenerationSettings,
    uniform_keys: Sequence[str | None],
) -> list[str | None]:
    """Texts that continue `prompts`, cut at the first stop text; None where the model gave NaN or infinity.

    Args:
        prompts: token ids, none empty. They are padded on the left.
        uniform_keys: of the counter-based numbers that sample each row; None where nothing is sampled.
    """
    width, ends = max(map(len, prompts)), _end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    decoding = uniforms = None
    if settings.sample is not None:
        decoding = Decoding.parse("lm-eval", {"kind": "sample", **settings.sample})
        uniforms = np.stack([uniform_numbers(key, settings.max_new_tokens) for key in uniform_keys])
    watch = _NextToken(decoding, uniforms)
    stops = StoppingCriteriaList([_StopTexts(tokenizer, settings.until, width)] if settings.until else [])
    with _plain_generation_config(model, ends, pad):
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False,
            logits_processor=LogitsProcessorList([watch]), stopping_criteria=stops, max_new_tokens=settings.max_new_tokens, **settings.options,
        )  # fmt: skip
    broken = watch.broken.reshape(len(prompts), -1).any(dim=1).tolist()  # a row of each beam
    texts = [_text(tokenizer, row, ends, settings.until) for row in output[:, width:].tolist()]
    return [None if bad else text for text, bad in zip(texts, broken, strict=True)]


def _text(tokenizer: Any, ids: list[int], ends: Sequence[int], until: Sequence[str]) -> str:
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:length], skip_special_tokens=True)
    for stop in until:
        text = text.split(stop)[0]
    return text
