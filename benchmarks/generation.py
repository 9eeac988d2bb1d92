"""Throughput of the harness' static generation as a ratio to plain batched `model.generate` and to continuous batching.

    python benchmarks/generation.py [--output runs/generation] [--model models/SmolLM2-135M-Instruct] [--dtype float32]

All continue the same prompts of several lengths, as one batch, for the same number of tokens (no text may end early), in one
process, in turns; each round gives one ratio, to plain generate greedily and to plain generate under the same decoding. The
harness also takes entropies and log-probabilities in fp64 on the way. Without --model: a tiny random LLaMA with 2,048 words of
vocabulary. Writes OUTPUT/generation.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import training
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from ds_stability.eval.backends import cache_size, state_kept
from ds_stability.eval.decoding import DEFAULT_DECODINGS, sample_key
from ds_stability.eval.generation import Generator, pad_left
from ds_stability.eval.loading import DTYPES, load
from ds_stability.eval.work import Progress
from ds_stability.run_dir import write_json_atomic

PLAIN, GREEDY, CONTINUOUS = "model.generate, greedy", "ours, greedy", "model.generate_batch, greedy"
SAMPLED = ("sample", "top_p_95", "top_k_40")
FIRST_WORD = 3  # ids before it are BOS, EOS and padding in the tiny model


def main() -> int:
    arguments = parse_arguments()
    started, output = time.monotonic(), common.output_folder(arguments.output)
    model, name = make_model(arguments)
    prompts = make_prompts(arguments, model.config.get_text_config().vocab_size)
    arms = make_arms(model, prompts, arguments.new_tokens)
    seconds, texts = measure(arms, arguments.rounds)
    settings = {key: vars(arguments)[key] for key in ("rounds", "batch_size", "prompt_tokens", "new_tokens", "dtype")}
    result = common.describe_measurement("generation", {"seed": 0}, settings | {"threads": torch.get_num_threads()})
    same = [one == other for one, other in zip(texts[PLAIN], texts[GREEDY], strict=True)]
    result |= {"seconds": round(time.monotonic() - started, 1), "model": name, "same_texts": sum(same) / len(same),
               "arms": summarize(seconds, len(prompts) * arguments.new_tokens)}  # fmt: skip
    write_json_atomic(output / "generation.json", result)
    print(f"{title(result)}\n{common.text_table(*generation_table(result))}\n\n{output / 'generation.json'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/generation")
    parser.add_argument("--model", help="folder or hub name; default: a tiny random LLaMA")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each arm")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--prompt_tokens", type=int, default=32, help="of the longest prompt; the shortest has half of them")
    parser.add_argument("--new_tokens", type=int, default=128)
    arguments = parser.parse_args()
    for name, least in (("rounds", 2), ("batch_size", 1), ("prompt_tokens", 2), ("new_tokens", 1)):
        if vars(arguments)[name] < least:
            parser.error(f"--{name} {vars(arguments)[name]}: allowed are numbers from {least}")
    return arguments


def make_model(arguments: argparse.Namespace) -> tuple[Any, str]:
    """The model on its device, and its name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.model:
        return load(arguments.model, device, arguments.dtype).model, Path(arguments.model).name
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(common.REPOSITORY / "ds_configs" / "models" / "llama_tiny.json", vocab_size=2048)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[arguments.dtype])
    return model.to(device).eval(), "tiny LLaMA, vocabulary 2,048"


def make_prompts(arguments: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    """Random tokens; lengths evenly from half of --prompt_tokens to all of them."""
    lengths = np.linspace(-(-arguments.prompt_tokens // 2), arguments.prompt_tokens, arguments.batch_size).round().astype(int)
    random = np.random.default_rng(0)
    return [random.integers(FIRST_WORD, vocab_size, length).tolist() for length in lengths]


def make_arms(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Callable[[], list[list[int]]]]:
    """Each makes the texts of one batch, without an end token."""
    generator = Generator(model, (), 0)
    ids_BT, mask_BT = pad_left(prompts, 0, model.device)
    model.generation_config = GenerationConfig()  # no end token from there

    def plain(name: str) -> list[list[int]]:
        decoding = DEFAULT_DECODINGS[name]
        warping = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k} if decoding.sampled else {}
        config = GenerationConfig(do_sample=decoding.sampled, max_new_tokens=new_tokens, pad_token_id=0, **warping)
        output_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)
        return output_BT[:, ids_BT.shape[1] :].tolist()

    def continuous() -> list[list[int]]:
        config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0)
        with state_kept(model):
            outputs = model.generate_batch(prompts, config, ContinuousBatchingConfig(**cache_size(prompts, new_tokens)))
        return [output.generated_tokens for output in outputs.values()]

    def ours(name: str) -> list[list[int]]:
        keys = [sample_key(0, name, prompt, 0) for prompt in range(len(prompts))]
        texts = generator.generate_keyed(prompts, DEFAULT_DECODINGS[name], keys, new_tokens)
        return [text.token_ids for text in texts]

    arms = {PLAIN: lambda: plain("greedy"), CONTINUOUS: continuous, GREEDY: lambda: ours("greedy")}
    for name in SAMPLED:
        arms |= {f"model.generate, {name}": lambda name=name: plain(name), f"ours, {name}": lambda name=name: ours(name)}
    return arms


def measure(arms: dict[str, Callable[[], list[list[int]]]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each arm in each round, in turns that start with another arm each time, and the texts. One round before
    them pays for allocations."""
    names, seconds, texts = list(arms), {name: [] for name in arms}, {}
    progress = Progress("generation", (1 + rounds) * len(names))
    for number in range(1 + rounds):
        shift = number % len(names)
        for place, name in enumerate(names[shift:] + names[:shift], 1):
            start = time.perf_counter()
            made = arms[name]()  # ends in a copy to the host, so that nothing is left in flight
            if number:
                seconds[name].append(time.perf_counter() - start)
            else:
                texts[name] = made
            progress.show(number * len(names) + place)
    return seconds, texts


def summarize(seconds: dict[str, list[float]], tokens: int) -> dict[str, dict[str, Any]]:
    """Per arm: median tokens per second; its throughput as a ratio to plain greedy generate in each round, their median with a
    95 % bootstrap interval over rounds; and the same to plain generate under the arm's own decoding."""
    arms = {}
    for name, values in seconds.items():
        same = f"model.generate, {name.split(', ')[1]}"
        arms[name] = {"tokens_per_second": tokens / statistics.median(values), **_ratio("ratio", seconds[PLAIN], values),
                      **_ratio("same_decoding", seconds[same], values)}  # fmt: skip
    return arms


def _ratio(name: str, plain: list[float], mine: list[float]) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(plain, mine, strict=True)]
    return {f"{name}s": ratios, name: statistics.median(ratios), f"{name}_interval": common.bootstrap_median(ratios)}


def title(result: dict[str, Any]) -> str:
    s = result["settings"]
    return (f"{result['model']}, {s['dtype']}, {s['batch_size']} prompts of up to {s['prompt_tokens']} tokens, "
            f"{s['new_tokens']} new tokens each, {s['rounds']} rounds in turns, threads: {s['threads']}; greedy texts the same as plain generate's: "
            f"{result['same_texts']:.0%}")  # fmt: skip


def generation_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), one row per arm."""
    rows = []
    columns = {"ratio": "ratio to generate, greedy [95 %]", "same_decoding": "ratio to generate, same decoding [95 %]"}
    columns = {key: title for key, title in columns.items() if key in result["arms"][PLAIN]}  # older results have the first alone
    for name, arm in result["arms"].items():
        cells = [f"{arm[key]:.3f} [{arm[f'{key}_interval'][0]:.3f}, {arm[f'{key}_interval'][1]:.3f}]" for key in columns]
        rows.append([name, common.number(arm["tokens_per_second"], 0), *cells])
    return ["generation", "tokens per second", *columns.values()], rows


if __name__ == "__main__":
    sys.exit(training.run_main(main))
