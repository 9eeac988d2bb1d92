"""Every N steps: generate from fixed prompts, at temperature 1 and greedily, and measure the texts.

Weights are gathered once per probe (gathered.py); the training does not change by one bit. A sample depends on the
weights, the seed and the number of its prompt only, not on ranks: token t of prompt i is drawn by inverting the
cumulative distribution at a uniform number that is fixed by (seed, i, t). Prompts of one length form a batch, so that
nothing is ever padded on the left. (Batches differ with the number of ranks, and with them the last bits of a logit.)
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_stability.data.text_files import iter_lines
from ds_stability.data.tokenizer import prompt_ids
from ds_stability.errors import UserError
from ds_stability.gathered import base_model, is_partitioned, standalone_module, weight_bytes
from ds_stability.run_dir import RunDir, write_atomic
from ds_stability.text_metrics import Mean, distinct_n, high_frequency_share, mean_seq_rep_n, seq_rep_n

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from transformers import PreTrainedTokenizerBase

    from ds_stability.config import ProbeConfig

logger = logging.getLogger("ds_stability")

DECODINGS = ("sample", "greedy")
MAX_BATCH = 16  # prompts generated together
MAX_CHARACTERS = 1_000_000  # of a prompt: a tokenizer takes a gigabyte for a word of ten million letters


@dataclass(frozen=True)
class Sample:
    """One generated text. `entropy` sums H(p_t) in nats over the steps, the one that drew the end token included."""

    prompt_index: int
    decoding: str
    prompt_ids: list[int]
    completion_ids: list[int]  # without the end token
    finish_reason: str  # "eos" or "length"
    entropy: Mean


class Probe:
    """Fixed prompts for one engine. Make it, and call `run`, on every rank.

    Args:
        tokenizer: decodes the samples; its special tokens do not count for the high-frequency share.
        config: the `probe` section of the stability block.
        high_frequency_ids: the high-frequency set; None leaves its share unknown.
        prompts: token ids, the same on every rank; rank r generates prompts[r::world].

    Raises:
        UserError: no prompt, an empty one, or one that leaves no room for `max_new_tokens` in the model's context.
    """

    def __init__(
        self,
        engine: "DeepSpeedEngine",
        tokenizer: "PreTrainedTokenizerBase",
        config: "ProbeConfig",
        high_frequency_ids: Collection[int] | None,
        run_dir: RunDir,
        prompts: Sequence[Sequence[int]],
        seed: int = 0,
    ):
        self.engine, self.tokenizer, self.config, self.run_dir, self.seed = engine, tokenizer, config, run_dir, seed
        self.high_frequency_ids = high_frequency_ids
        self.prompts = [[int(token) for token in prompt] for prompt in prompts]
        model = base_model(engine.module)
        _check_prompts(self.prompts, config.max_new_tokens, model)
        self.end_ids = _end_ids(tokenizer, model)
        self._warned = False

    def due(self, step: int) -> bool:
        return self.config.interval > 0 and step > 0 and step % self.config.interval == 0

    def run(self, step: int) -> dict[str, float | None]:
        """Generate, write samples/step-N.jsonl on rank 0, and return the probe/ metrics, the same on every rank.

        Call between optimizer steps. Returns {} when the gathered weights would exceed `max_gather_gib`.
        """
        if self._too_large():
            return {}
        samples = self._generate_everywhere()
        if torch.distributed.get_rank() == 0:
            lines = (json.dumps(self._row(step, sample), ensure_ascii=False, allow_nan=False) for sample in samples)
            write_atomic(self.run_dir.sample_file(step), "".join(line + "\n" for line in lines))
        metrics: dict[str, float | None] = {}
        special = self.tokenizer.all_special_ids
        for decoding in DECODINGS:
            chosen = [sample for sample in samples if sample.decoding == decoding]
            for name, value in measure(chosen, self.high_frequency_ids, special).items():
                metrics[f"probe/{decoding}/{name}"] = value
        return metrics

    @property
    def oversize(self) -> str:
        """Why the probe is skipped for the size of the weights, or ""."""
        gib = weight_bytes(self.engine) / 2**30
        if not is_partitioned(self.engine) or gib <= self.config.max_gather_gib:
            return ""
        return f"the gathered weights take {gib:.1f} GiB and probe.max_gather_gib is {self.config.max_gather_gib:g}"

    def _too_large(self) -> bool:
        if not self.oversize:
            return False
        if not self._warned and torch.distributed.get_rank() == 0:
            logger.warning(f"probe skipped: {self.oversize}")
        self._warned = True
        return True

    def _generate_everywhere(self) -> list[Sample]:
        """All samples, by prompt, on every rank. What fails on one rank is raised on all: none waits for another."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = list(enumerate(self.prompts))[rank::world]
        samples: list[Sample] = []
        failure: Exception | None = None
        with standalone_module(self.engine) as module:
            try:
                samples = self._generate(module, mine)
            except Exception as error:  # raised below, after the ranks have heard of it
                failure = error
        gathered: list[Any] = [None] * world
        torch.distributed.all_gather_object(gathered, (samples, None if failure is None else repr(failure)))
        failed = [(r, text) for r, (_, text) in enumerate(gathered) if text is not None]
        if failed:
            raise RuntimeError(f"probe failed on rank {failed[0][0]}: {failed[0][1]}") from failure
        return sorted((s for part, _ in gathered for s in part), key=lambda s: (s.decoding, s.prompt_index))

    def _generate(self, module: torch.nn.Module, prompts: list[tuple[int, list[int]]]) -> list[Sample]:
        from transformers import GenerationConfig

        # generate() fills what we leave open (penalties, forced tokens) from here; the scope puts the old one back.
        base_model(module).generation_config = GenerationConfig()
        samples = []
        for length in sorted({len(prompt) for _, prompt in prompts}):
            same = [item for item in prompts if len(item[1]) == length]
            for start in range(0, len(same), MAX_BATCH):
                for decoding in DECODINGS:
                    samples += self._generate_batch(module, same[start : start + MAX_BATCH], decoding)
        return samples

    def _generate_batch(self, module, batch: list[tuple[int, list[int]]], decoding: str) -> list[Sample]:
        from transformers import GenerationConfig, LogitsProcessorList

        length = len(batch[0][1])
        prompt_ids = torch.tensor([prompt for _, prompt in batch], device=self.engine.device)
        uniforms = None
        if decoding == "sample":
            rows = [uniform_numbers(self.seed, index, self.config.max_new_tokens) for index, _ in batch]
            uniforms = torch.stack(rows).to(self.engine.device)
        picker = TokenPicker(length, uniforms)
        output = module.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=self.config.max_new_tokens,
                eos_token_id=self.end_ids or None,
                pad_token_id=self.end_ids[0] if self.end_ids else None,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([picker]),
            synced_gpus=False,  # the weights are whole: ranks need not wait for each other's longest text
        )
        entropies = torch.stack(picker.entropies, dim=1).tolist()
        completions = output[:, length:].tolist()
        return [
            self._sample(index, decoding, prompt, completion, entropy)
            for (index, prompt), completion, entropy in zip(batch, completions, entropies, strict=True)
        ]

    def _sample(self, index: int, decoding: str, prompt: list[int], completion: list[int], entropy: list[float]):
        end = next((t for t, token in enumerate(completion) if token in self.end_ids), None)
        steps = len(completion) if end is None else end + 1
        return Sample(
            prompt_index=index,
            decoding=decoding,
            prompt_ids=prompt,
            completion_ids=completion[:end],
            finish_reason="length" if end is None else "eos",
            entropy=Mean(math.fsum(entropy[:steps]), steps),
        )

    def _row(self, step: int, sample: Sample) -> dict[str, Any]:
        entropy = sample.entropy.value
        return {
            "step": step,
            "prompt_index": sample.prompt_index,
            "decoding": sample.decoding,
            "prompt": self.tokenizer.decode(sample.prompt_ids),
            "completion": self.tokenizer.decode(sample.completion_ids),
            "finish_reason": sample.finish_reason,
            "entropy": entropy if entropy is not None and math.isfinite(entropy) else None,
            "seq_rep_4": seq_rep_n(sample.completion_ids, 4),
            "distinct_2": distinct_n([sample.completion_ids], 2).value,
            "prompt_ids": sample.prompt_ids,
            "completion_ids": sample.completion_ids,
        }


class TokenPicker:
    """Logits processor that leaves one token: the likeliest, or the one at a given uniform number; keeps entropies.

    Sampling is at temperature 1 from the whole distribution. Arithmetic in fp64; a probability of 0 adds 0 to an
    entropy and is never drawn.

    Args:
        prompt_length: tokens before the first generated one.
        uniforms: numbers in [0, 1), [B, max_new_tokens]; None for greedy decoding.
    """

    def __init__(self, prompt_length: int, uniforms: torch.Tensor | None):
        self.prompt_length, self.uniforms = prompt_length, uniforms
        self.entropies: list[torch.Tensor] = []  # per step, [B], nats

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities_BV = torch.softmax(scores.double(), dim=-1)
        self.entropies.append(torch.special.entr(probabilities_BV).sum(dim=-1))
        if self.uniforms is None:
            return scores
        cumulative_BV = probabilities_BV.cumsum(dim=-1)
        step = input_ids.shape[1] - self.prompt_length
        # Times the last sum, which rounding may leave a little off 1.
        points_B1 = self.uniforms[:, step : step + 1] * cumulative_BV[:, -1:]
        tokens_B1 = torch.searchsorted(cumulative_BV, points_B1, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -math.inf).scatter(1, tokens_B1, 0.0)


def uniform_numbers(seed: int, prompt_index: int, count: int) -> torch.Tensor:
    """The fp64 numbers in [0, 1) that draw the tokens of one prompt, [count]; the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{prompt_index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def measure(
    samples: Sequence[Sample], high_frequency_ids: Collection[int] | None, special_ids: Collection[int]
) -> dict[str, float | None]:
    """The probe's metrics over texts of one decoding; None where a text gives none."""
    texts = [sample.completion_ids for sample in samples]
    entropy = Mean(math.fsum(s.entropy.total for s in samples), sum(s.entropy.count for s in samples))
    share = None
    if high_frequency_ids is not None:
        share = high_frequency_share(texts, high_frequency_ids, special_ids).value
    return {
        "entropy": entropy.value,
        "seq_rep_4": mean_seq_rep_n(texts, 4).value,
        "distinct_2": distinct_n(texts, 2).value,
        "high_frequency_share": share,
        "end_rate": Mean(sum(s.finish_reason == "eos" for s in samples), len(samples)).value,
    }


def prompts_from_blocks(blocks: Iterable[Sequence[int]], num_prompts: int, prompt_length: int) -> list[list[int]]:
    """Fixed prompts: the first `prompt_length` tokens of `num_prompts` blocks spread evenly over the held-out ones.

    With fewer blocks than prompts, blocks give several prompts each, from pieces that do not overlap.

    Raises:
        UserError: the blocks are too few or too short.
    """
    whole_blocks = [[int(token) for token in block] for block in blocks]
    depth = max((len(block) for block in whole_blocks), default=0) // prompt_length if prompt_length > 0 else 0
    starts = [piece * prompt_length for piece in range(depth)]
    pieces: list[list[int]] = []
    for start in starts:
        level = [block[start : start + prompt_length] for block in whole_blocks]
        level = [piece for piece in level if len(piece) == prompt_length]
        wanted = num_prompts - len(pieces)
        pieces += [level[i * len(level) // min(wanted, len(level))] for i in range(min(wanted, len(level)))]
        if len(pieces) == num_prompts:
            return pieces
    raise UserError(
        f"probe.num_prompts is {num_prompts}, but the held-out text gives only {len(pieces)} prompts of "
        f"{prompt_length} tokens; lower probe.num_prompts, or give more held-out text or a probe.prompts_file"
    )


def prompts_from_file(
    path: str | Path, tokenizer: "PreTrainedTokenizerBase", num_prompts: int | None = None
) -> list[list[int]]:
    """One prompt per line of a UTF-8 text file, blank lines left out; the first `num_prompts` of them."""
    prompts: list[list[int]] = []
    try:
        for number, line in iter_lines(os.fspath(path)):
            if len(line) > MAX_CHARACTERS:
                raise UserError(f"{path} line {number}: has {len(line)} characters, at most {MAX_CHARACTERS} are allowed")
            if line.strip():
                prompts.append(prompt_ids(line.rstrip("\n"), tokenizer))
            if len(prompts) == num_prompts:
                break
    except UserError as error:
        raise UserError(f"probe.prompts_file {error}") from None
    if not prompts:
        raise UserError(f"probe.prompts_file {path}: holds no prompt; write one prompt per line")
    return prompts


def _end_ids(tokenizer: "PreTrainedTokenizerBase", model) -> list[int]:
    """Token ids that end a text: the tokenizer's end token, and those of the model's generation config.

    Of the latter only what the tokenizer holds for special: a config's default may be an ordinary word here.
    """
    declared = model.generation_config.eos_token_id
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = {token for token in (declared if isinstance(declared, list) else [declared]) if token in special}
    return sorted(ids | ({tokenizer.eos_token_id} - {None}))


def _check_prompts(prompts: list[list[int]], max_new_tokens: int, model) -> None:
    if not prompts or not all(prompts):
        raise UserError("probe: there is no prompt, or an empty one; check probe.prompts_file and probe.num_prompts")
    if not model.can_generate():
        raise UserError(f"probe: {type(model).__name__} cannot generate text; set probe.interval to 0")
    # Models without a fixed context (state space, ALiBi) do not declare one.
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt) for prompt in prompts)
    if context is not None and longest + max_new_tokens > context:
        raise UserError(
            f"probe.max_new_tokens is {max_new_tokens}, but a prompt has {longest} tokens and the model's context is "
            f"{context}; lower probe.max_new_tokens or shorten the prompts"
        )
