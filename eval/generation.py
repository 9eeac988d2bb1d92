"""Texts from a model, batch by batch: what comes out depends on the batch alone, whoever runs it and whenever.

transformers' `generate` prepares the cache, and a model's own methods the masks and positions of each step, as they do for any
architecture; what is ours is the loop around them, the choice of each token (decoding.py), and the cache's memory. Prompts are padded on the left. A text
that has ended stays in its batch as padding, so that the shapes, and with them the last bits of the others, do not change.

Shape suffixes: B texts of a batch, T positions, V vocabulary, N new tokens.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .decoding import Decoding, next_tokens, token_scores, uniform_numbers
from .kv_cache import right_sized_cache

SCORE_ELEMENTS = 2**26  # logits of one scoring pass: 256 MiB in fp32
DEAD_BEAM = -1e6  # below any real beam, and above the -1e9 by which the beam search marks a beam that is not there


@dataclass(frozen=True)
class Generated:
    """One generated text.

    Attributes:
        token_ids: without the end token; empty where the model gave a non-finite distribution.
        finish: "eos", "length" or "non_finite" (records.FINISH_REASONS).
        entropy_sum, logprob_sum: sums over `scored_tokens` positions, the end token's included, of the entropy of the
            untruncated distribution at temperature 1 and of the log-probability of the token in it, nats, fp64; None
            where they are not known.
    """

    token_ids: list[int]
    finish: str
    entropy_sum: float | None
    logprob_sum: float | None
    scored_tokens: int


NON_FINITE = Generated([], "non_finite", None, None, 0)


class Generator:
    """Generates with a transformers causal LM, sharded or not.

    Args:
        model: in eval mode; its generation config is set aside while texts are made.
        eos_ids: tokens that end a text; none: every text runs to the cap.
        pad_id: fills the batch; masked, so that its value does not matter.
        device: where inputs go; default: the device of the model's first weight (the CPU if that one is on disk).
    """

    def __init__(self, model: Any, eos_ids: Sequence[int], pad_id: int, device: torch.device | str | None = None):
        first = next(model.parameters()).device
        self.device = torch.device(device or ("cpu" if first.type == "meta" else first))
        self.model, self.eos_ids, self.pad_id = model, tuple(eos_ids), pad_id
        # A step is thousands of small calls, which cost less than under no_grad. Not where weights come and go with each call:
        # what is made of them would be inference tensors, and of no use elsewhere.
        self.whole = not any(weight.is_meta for weight in model.parameters())

    def generate_keyed(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, keys: Sequence[str], max_new_tokens: int
    ) -> list[Generated]:
        """As `generate`, with the numbers of each text's key (decoding.sample_key)."""
        uniforms = None
        if decoding.sampled:
            uniforms = np.stack([uniform_numbers(key, max_new_tokens) for key in keys])
        return self.generate(prompts, decoding, uniforms, max_new_tokens)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        uniforms_BN: np.ndarray | torch.Tensor | None,
        max_new_tokens: int,
    ) -> list[Generated]:
        """Continue all prompts as one batch.

        Args:
            prompts: token ids, at least one each.
            uniforms_BN: numbers in [0, 1), [B, at least max_new_tokens]; sampling only.
            max_new_tokens: the cap, end token included.
        """
        if decoding.kind == "beam":
            return self._beam_search(prompts, decoding, max_new_tokens)
        numbers_BN = torch.as_tensor(uniforms_BN, dtype=torch.float64, device=self.device) if decoding.sampled else None
        picker = TokenPicker(decoding, numbers_BN, self.eos_ids, self.pad_id)
        ids_BT, mask_BT = pad_left(prompts, self.pad_id, self.device)
        cache = right_sized_cache(self.model, ids_BT.shape[1] + max_new_tokens)
        with _own_generation_config(self.model), torch.inference_mode() if self.whole else torch.no_grad():
            self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=self._config(max_new_tokens),
                custom_generate=picker.decode,
                **({} if cache is None else {"past_key_values": cache}),
            )
        return picker.texts()

    def _config(self, max_new_tokens: int, **settings: Any) -> GenerationConfig:
        return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=self.pad_id, use_cache=True,
                                **settings)  # fmt: skip

    def _beam_search(self, prompts: Sequence[Sequence[int]], decoding: Decoding, max_new_tokens: int) -> list[Generated]:
        """The finished beam with the highest log-probability divided by its length (length_penalty 1).

        `early_stopping=False`: transformers' heuristic, which goes on until no open beam could, at its present length,
        overtake a finished one; beams at the cap count as finished. A beam whose distribution is not finite dies; a text
        without any other ends as "non_finite". The sums are taken in a second pass over prompt and text.
        """
        ids_BT, mask_BT = pad_left(prompts, self.pad_id, self.device)
        with _own_generation_config(self.model):
            output_BT = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=self._config(
                    max_new_tokens, num_beams=decoding.num_beams, early_stopping=False, length_penalty=1.0,
                    eos_token_id=list(self.eos_ids) or None),
                logits_processor=LogitsProcessorList([DeadBeams()]),
            )  # fmt: skip
        return self.score(prompts, output_BT[:, ids_BT.shape[1] :].tolist())

    @torch.no_grad()
    def score(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[Generated]:
        """Texts with their sums, teacher-forced, of outputs that are there already; one batch.

        Args:
            outputs: what followed each prompt, at least one token; what follows an end token does not count.
        """
        outputs = [self._until_end(output) for output in outputs]
        longest = max(len(output) for output in outputs)
        rows = max(1, SCORE_ELEMENTS // (longest * self.model.config.get_text_config().vocab_size))
        texts = []
        for start in range(0, len(outputs), rows):
            part = slice(start, start + rows)
            texts += self._score_rows(prompts[part], outputs[part], longest)
        return texts

    def _until_end(self, output: Sequence[int]) -> list[int]:
        """Up to the first end token, which is kept."""
        end = next((i for i, token in enumerate(output) if token in self.eos_ids), len(output))
        return list(output[: end + 1])

    def _score_rows(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[list[int]], longest: int
    ) -> list[Generated]:
        filled = [output + [self.pad_id] * (longest - len(output)) for output in outputs]
        ids_BT, mask_BT = pad_left([[*prompt, *tokens] for prompt, tokens in zip(prompts, filled, strict=True)],
                                   self.pad_id, self.device)  # fmt: skip
        for row, output in enumerate(outputs):
            if len(output) < longest:
                mask_BT[row, len(output) - longest :] = 0
        inputs = {"input_ids": ids_BT[:, :-1], "attention_mask": mask_BT[:, :-1], "use_cache": False}
        # What architectures need not take: learned positions from the mask, logits of the last positions only.
        known = inspect.signature(self.model.forward).parameters
        if "position_ids" in known:
            inputs["position_ids"] = (mask_BT[:, :-1].cumsum(dim=-1) - 1).clamp(min=0)
        if "logits_to_keep" in known:
            inputs["logits_to_keep"] = longest
        logits_BNV = self.model(**inputs).logits[:, -longest:]
        texts = []
        for row, output in enumerate(outputs):
            tokens_N = torch.tensor(output, device=logits_BNV.device)
            texts.append(self._text(output, *token_scores(logits_BNV[row, : len(output)], tokens_N)))
        return texts

    def _text(self, output: list[int], logprob_N, entropy_N, finite_N) -> Generated:
        if not bool(finite_N.all()):
            return NON_FINITE
        ended = output[-1] in self.eos_ids
        return Generated(output[:-1] if ended else output, "eos" if ended else "length", math.fsum(entropy_N.tolist()),
                         math.fsum(logprob_N.tolist()), len(output))  # fmt: skip


class TokenPicker:
    """Chooses the next token of every text, and keeps what it saw."""

    def __init__(self, decoding: Decoding, uniforms_BN: torch.Tensor | None, eos_ids: Sequence[int], pad_id: int):
        self.decoding, self.uniforms_BN, self.eos_ids, self.pad_id = decoding, uniforms_BN, eos_ids, pad_id
        self.steps: list[tuple[torch.Tensor, ...]] = []  # tokens_B, logprob_B, entropy_B, finite_B
        self.ended_B: torch.Tensor | None = None

    def decode(
        self, model: Any, input_ids: torch.Tensor, generation_config: GenerationConfig, logits_processor: Any = None,
        stopping_criteria: Any = None, **inputs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """The loop that `generate` runs (its argument custom_generate): as transformers' own, without a copy of the logits in
        fp32 and a second search for their largest. Until all texts have ended, or the cap.

        Args:
            input_ids: [B, T], left-padded. inputs: what else the model's forward takes; `generate` prepares it.

        Returns:
            [B, T + N]
        """
        with model._optimize_model_for_decode():  # as transformers' loop does: how experts are computed
            for step in range(generation_config.max_new_tokens):
                length = None if step == 0 else 1
                now = model.prepare_inputs_for_generation(input_ids, next_sequence_length=length, is_first_iteration=step == 0, **inputs)
                outputs = model(**now, return_dict=True)
                inputs = model._update_model_kwargs_for_generation(outputs, inputs, is_encoder_decoder=model.config.is_encoder_decoder)
                tokens_B = self.pick(outputs.logits[:, -1]).to(input_ids.device)
                del outputs  # the prompts' logits may be large
                input_ids = torch.cat([input_ids, tokens_B.unsqueeze(1)], dim=1)
                if self.ended_B.all():
                    break
        return input_ids

    def pick(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Tokens of the next step [B]; of a text that has ended, padding."""
        if self.ended_B is None:
            self.ended_B = torch.zeros(logits_BV.shape[0], dtype=torch.bool, device=logits_BV.device)
            self.end_ids = torch.tensor(self.eos_ids, dtype=torch.int64, device=logits_BV.device)
        uniforms_B = None if self.uniforms_BN is None else self.uniforms_BN[:, len(self.steps)].to(logits_BV.device)
        tokens_B, logprob_B, entropy_B, finite_B = next_tokens(logits_BV, self.decoding, uniforms_B)
        tokens_B = torch.where(self.ended_B, self.pad_id, tokens_B)
        self.ended_B = self.ended_B | ~finite_B | torch.isin(tokens_B, self.end_ids)
        self.steps.append((tokens_B, logprob_B, entropy_B, finite_B))
        return tokens_B

    def texts(self) -> list[Generated]:
        columns = [torch.stack(column, dim=1).tolist() for column in zip(*self.steps, strict=True)]
        return [self._text(*row) for row in zip(*columns, strict=True)]

    def _text(self, tokens: list[int], logprobs: list[float], entropies: list[float], finite: list[bool]) -> Generated:
        ends = (t for t, token in enumerate(tokens) if token in self.eos_ids or not finite[t])
        end = next(ends, None)
        if end is not None and not finite[end]:
            return NON_FINITE
        scored = len(tokens) if end is None else end + 1
        return Generated(tokens[:end], "length" if end is None else "eos", math.fsum(entropies[:scored]),
                         math.fsum(logprobs[:scored]), scored)  # fmt: skip


class DeadBeams(LogitsProcessor):
    """Gives every continuation of a beam whose distribution is not finite a hopeless score."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~torch.isfinite(scores.amax(dim=-1, keepdim=True)), DEAD_BEAM)


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_BT, padded on the left to the longest row, and the mask of what is no padding (int64)."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        ids_BT[i, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask_BT[i, longest - len(row) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    # generate() fills what we leave open (penalties, forced tokens) from the model's own.
    saved, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved
