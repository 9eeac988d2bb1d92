"""Held-out statistics and samples of a saved model, in this process: the same code for a trained model and an untouched one."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_stability.loss import IGNORE_INDEX, TokenAccumulator, chunk_tokens, shift_labels, token_statistics
from ds_stability.probe import TokenPicker, uniform_numbers
from ds_stability.statistics import TOKEN_FIELDS
from ds_stability.text_metrics import distinct_n, high_frequency_share, mean_seq_rep_n

BATCH = 8  # blocks in one forward, prompts in one generation


class Text(NamedTuple):
    prompt: list[int]
    completion: list[int]  # without the end token


def load_model(path: str | Path, dtype: torch.dtype):
    from transformers.utils import logging

    from ds_stability.weights import load_causal_lm

    logging.disable_progress_bar()
    return load_causal_lm(path, f"model {path}", dtype=dtype)  # in eval mode


@torch.no_grad()
def held_out_statistics(model, blocks: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Teacher-forced means over the supervised tokens of packed blocks: cross_entropy and entropy (nats), top1_mass,
    log_partition, and the number of tokens; as train.py evaluates (ds_stability/loss.py), without DeepSpeed."""
    accumulator = TokenAccumulator("cpu")
    for start in range(0, len(blocks), BATCH):
        batch = [blocks[i] for i in range(start, min(start + BATCH, len(blocks)))]
        inputs = {key: torch.stack([block[key] for block in batch]) for key in ("input_ids", "position_ids")}
        logits = model(**inputs, use_cache=False).logits
        logits_NV = logits.reshape(-1, logits.shape[-1])
        _accumulate(accumulator, logits_NV, shift_labels(torch.stack([block["labels"] for block in batch])))
    sums = dict(zip(TOKEN_FIELDS, accumulator.sums_K.tolist(), strict=True))
    tokens = sums["tokens"]
    names = {"cross_entropy": "surprisal", "entropy": "entropy", "top1_mass": "top1_mass", "log_partition": "log_partition"}
    return {name: sums[field] / tokens for name, field in names.items()} | {"held_out_tokens": tokens}


def _accumulate(accumulator: TokenAccumulator, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
    chunk = chunk_tokens(logits_NV, None)
    for start in range(0, len(targets_N), chunk):
        targets_C = targets_N[start : start + chunk]
        s, entropy, top1, log_partition, high = token_statistics(logits_NV[start : start + chunk], targets_C.clamp(min=0), None)
        one = torch.ones_like(s)
        rows = [one, s, s * s, one, s, s * s, one, entropy, top1, log_partition, high, s]
        accumulator.add(torch.stack([row.double() for row in rows]), targets_C != IGNORE_INDEX)


@torch.no_grad()
def sample_texts(model, end_id: int, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int) -> list[Text]:
    """One pure sample (temperature 1, nothing cut off) for each prompt; all prompts have the same length.

    As the probe draws them: token t of prompt i by a number fixed by (seed, i, t), so that two models with the same
    weights give the same texts, and a difference between two texts comes from the models.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    model.generation_config = GenerationConfig()  # else generate() fills what we leave open from here
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=end_id, pad_token_id=end_id)
    texts = []
    for start in range(0, len(prompts), BATCH):
        batch = [list(prompt) for prompt in prompts[start : start + BATCH]]
        uniforms = torch.stack([uniform_numbers(seed, start + i, new_tokens) for i in range(len(batch))])
        ids = torch.tensor(batch)
        picker = LogitsProcessorList([TokenPicker(ids.shape[1], uniforms)])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                                logits_processor=picker)  # fmt: skip
        for prompt, completion in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            texts.append(Text(prompt, completion[: completion.index(end_id)] if end_id in completion else completion))
    return texts


def text_statistics(texts: Sequence[Text], frequent: Collection[int], special: Collection[int]) -> dict[str, Any]:
    """Diversity, repetition and concentration of samples (text_metrics.py), with the number of tokens they stand on."""
    completions = [text.completion for text in texts]
    return {
        "sample/distinct_2": distinct_n(completions, 2).value,
        "sample/seq_rep_4": mean_seq_rep_n(completions, 4).value,
        "sample/high_frequency_share": high_frequency_share(completions, frequent, special).value,
        "sample/tokens": sum(len(completion) for completion in completions),
        "sample/texts": len(completions),
    }
