"""Other makers of texts: transformers' continuous batching, and vLLM.

They keep the keys and the settings of a text, not its bytes: what they draw depends on what else is in flight, and on their
version. Their mean metrics agree with those of the static generator (generation.py) within sampling error.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from ds_stability.errors import UserError

from .decoding import Decoding, key_seed
from .generation import NON_FINITE, Generated, Generator
from .generation_task import TextSource

BACKENDS = ("static", "continuous", "vllm")
VLLM_MEMORY_SHARE = 0.5  # of a GPU: the harness' own copy of the model, for the scores, is on it too
# What a launcher sets for this process means nothing to the engine that vLLM starts.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def make_backend(
    name: str,
    loaded: Any,
    decodings: Sequence[Decoding] = (),
    gpus_per_model: int = 1,
    trust_remote_code: bool = False,
) -> TextSource:
    """What generates the texts of a cell.

    Args:
        name: "static" (the same bytes on every run), "continuous" or "vllm".
        loaded: loading.Loaded.
        decodings: what it will be asked for, so that one it cannot do is refused before anything is generated.

    Raises:
        UserError: an unknown name, a decoding that the backend cannot do, or vLLM is not installed.
    """
    if name not in BACKENDS:
        raise UserError(f"--backend {name}: allowed are {', '.join(BACKENDS)}")
    for decoding in decodings:
        _check_decoding(name, decoding)
    if name == "vllm":
        return VllmBackend(loaded, gpus_per_model, trust_remote_code)
    generator = Generator(loaded.model, loaded.eos_ids, loaded.pad_id, loaded.device)
    return generator if name == "static" else ContinuousBackend(generator)


def _check_decoding(backend: str, decoding: Decoding) -> None:
    if decoding.kind == "beam" and backend != "static":
        raise UserError(f"decodings.{decoding.name}: the {backend} backend has no beam search; use --backend static, or leave it "
                        "out of the suite")  # fmt: skip


class ContinuousBackend:
    """transformers' `generate_batch`: texts leave the batch as they end and others take their place.

    Its one seed is made from the keys of all texts. Entropies and log-probabilities are taken in a second pass over the
    texts. A NaN makes it give up the whole batch, or spreads to other texts, which share the attention's matrices: such a
    batch is generated statically.
    """

    def __init__(self, generator: Generator):
        self.generator = generator

    def generate_keyed(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, keys: Sequence[str], max_new_tokens: int
    ) -> list[Generated]:
        _check_decoding("continuous", decoding)
        model, eos_ids = self.generator.model, list(self.generator.eos_ids)
        warping = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        generation = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=decoding.sampled, **(warping if decoding.sampled else {}),
            eos_token_id=eos_ids or -1, pad_token_id=self.generator.pad_id)  # fmt: skip
        batching = ContinuousBatchingConfig(seed=key_seed("\n".join(keys)) % 2**32, **cache_size(prompts, max_new_tokens))
        with state_kept(model):
            outputs = model.generate_batch([list(prompt) for prompt in prompts], generation, batching)
        texts = [output.generated_tokens for output in outputs.values() if output.error is None]
        if len(texts) == len(prompts) and all(texts):
            scored = self.generator.score(prompts, texts)
            if NON_FINITE not in scored:
                return scored
        return self.generator.generate_keyed(prompts, decoding, keys, max_new_tokens)


def cache_size(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> dict[str, int]:
    """Room for all texts; left alone, it takes most of the memory there is."""
    page = 32
    blocks = sum(-(-(len(prompt) + max_new_tokens) // page) + 1 for prompt in prompts)
    tokens = sum(len(prompt) for prompt in prompts)
    return {"page_size": page, "num_blocks": blocks, "max_batch_tokens": max(64, tokens)}


@contextmanager
def state_kept(model: Any) -> Iterator[None]:
    """Continuous batching seeds torch's global generators and may switch the attention: put both back."""
    attention, devices = model.config._attn_implementation, range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=list(devices)):
        yield
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)


class VllmBackend:
    """vLLM's offline engine, one per rank, on the rank's GPUs. Optional extra `vllm`.

    Each text has a seed of its own, made from its key. Log-probabilities are those of the untruncated distribution (vLLM's
    default, `logprobs_mode="raw_logprobs"`); entropies are not known.
    """

    def __init__(self, loaded: Any, gpus_per_model: int = 1, trust_remote_code: bool = False):
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError("--backend vllm: vLLM is not installed; pip install vllm, or use --backend static") from error
        self.eos_ids, self.sampling_params = tuple(loaded.eos_ids), SamplingParams
        first = loaded.device.index or 0
        with _engine_environment(range(first, first + gpus_per_model)):
            self.engine = LLM(
                model=str(loaded.folder),
                dtype=str(loaded.model.dtype).removeprefix("torch."),
                tensor_parallel_size=gpus_per_model,
                trust_remote_code=trust_remote_code,
                gpu_memory_utilization=VLLM_MEMORY_SHARE,
                generation_config="vllm",  # nothing from the folder's generation_config.json
                seed=0,
            )

    def generate_keyed(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, keys: Sequence[str], max_new_tokens: int
    ) -> list[Generated]:
        _check_decoding("vllm", decoding)
        parameters = [self.sampling_params(**vllm_settings(decoding, key, self.eos_ids, max_new_tokens)) for key in keys]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.engine.generate(requests, parameters, use_tqdm=False)
        return [self._text(output.outputs[0]) for output in outputs]

    def _text(self, output: Any) -> Generated:
        tokens, logprob = list(output.token_ids), output.cumulative_logprob
        if logprob is None or not torch.isfinite(torch.tensor(logprob)):
            return NON_FINITE
        finish = "eos" if output.finish_reason == "stop" else "length"  # nothing but an end token stops a text
        kept = tokens[:-1] if tokens and tokens[-1] in self.eos_ids else tokens
        return Generated(kept, finish, None, float(logprob), len(tokens))


def vllm_settings(decoding: Decoding, key: str, eos_ids: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams for one text."""
    return {
        "temperature": decoding.temperature if decoding.sampled else 0.0,  # 0 is greedy
        "top_p": decoding.top_p,
        "top_k": decoding.top_k or -1,
        "seed": key_seed(key),
        "max_tokens": max_new_tokens,
        "ignore_eos": True,  # the tokenizer's idea of the end; ours is in stop_token_ids
        "stop_token_ids": list(eos_ids),
        "logprobs": 0,  # of the token taken, and no others
        "detokenize": False,
    }


@contextmanager
def _engine_environment(gpus: Sequence[int]) -> Iterator[None]:
    """vLLM's engine is a process of its own, which takes its GPUs and its peers from the environment."""
    saved = dict(os.environ)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(max(gpus) + 1)]
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
