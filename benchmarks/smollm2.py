"""Fine-tune a pretrained LLM at several stabilization levels and compare it with the untouched model.

    python benchmarks/convert_smollm2.py --output models/SmolLM2-135M-Instruct
    python benchmarks/smollm2.py --model models/SmolLM2-135M-Instruct --train_file a.txt b.txt [--levels 0 .5 .9]

ZeRO-3 on 2 processes by the real `deepspeed` launcher, in fp32 (`--precision bf16`: with fp32 master weights); hard-wrapped lines of the text
files are joined. Every model, the untouched one first, is then read from its folder and scored by the same code. Writes
OUTPUT/smollm2.json; started again, it does not train a level that has a DONE file.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import common
import scoring
import training

from ds_stability.data.frequency import FILE_NAME, HighFrequencySet
from ds_stability.run_dir import RunDir, write_json_atomic

WARMUP, SETTLED_TO = 10, 130  # of a pretrained model; the ratio is read over steps 31..130 after warm-up
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, SHOWN = 64, 16, 64, 3
SCORES_MUST_AGREE = 0.02  # nats of held-out cross-entropy, between the engine's evaluation and the exported model's


def main() -> int:
    arguments = parse_arguments()
    output = common.output_folder(arguments.output)
    ds_config = output / "ds_config.json"
    write_json_atomic(ds_config, cpu_config(arguments.precision))
    cells = [smollm2_cell(level, arguments, ds_config, output) for level in arguments.levels]
    runs, trained = training.train_cells(cells, output, arguments.num_gpus), time.monotonic()
    scorer = Scorer(arguments, runs[cells[0].name])
    rows = [{"level": None, "name": "untouched"} | scorer.score(arguments.model)]
    rows += [trained_row(scorer, runs[cell.name], level) for cell, level in zip(cells, arguments.levels, strict=True)]
    settings = {key: getattr(arguments, key) for key in
                ("steps", "block_size", "num_gpus", "learning_rate", "precision", "per_device_train_batch_size")}  # fmt: skip
    settings |= {"tokens_per_step": arguments.block_size * arguments.per_device_train_batch_size * arguments.num_gpus,
                 "warmup_steps": WARMUP, "model": Path(arguments.model).name, "prompts": PROMPTS, "new_tokens": NEW_TOKENS,
                 "data": [Path(name).name for name in arguments.train_file]}  # fmt: skip
    result = common.describe_measurement("smollm2", {"seed": arguments.seed}, settings)
    result |= {"seconds": training.training_seconds(cells, output) + round(time.monotonic() - trained, 1), "rows": rows}
    write_json_atomic(output / "smollm2.json", result)
    print(f"\n{common.text_table(*outcome_table(rows))}\n")
    print_samples(rows)
    print(f"{output / 'smollm2.json'}\n{training.clock(result['seconds'])} min in all")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of pretrained weights")
    parser.add_argument("--train_file", nargs="+", required=True, help=".txt files")
    parser.add_argument("--output", default="runs/smollm2", help="folder of the runs and of the results")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    parser.add_argument("--steps", type=int, default=WARMUP + SETTLED_TO, help="optimizer steps, warm-up included")
    parser.add_argument("--block_size", type=int, default=272)
    parser.add_argument("--per_device_train_batch_size", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--precision", default="fp32", choices=("bf16", "fp32"), help="bf16 takes a GPU, or a CPU with AMX or AVX-512 BF16")
    parser.add_argument("--eval_blocks", type=int, default=64, help="held-out blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_gpus", type=int, default=None, help="processes; default 2, or 1 on a machine with one GPU")
    arguments = parser.parse_args()
    wrong = [level for level in arguments.levels if not 0 <= level <= 1]
    if wrong:
        parser.error(f"--levels {wrong[0]}: allowed are numbers from 0 to 1")
    missing = [name for name in [arguments.model, *arguments.train_file] if not Path(name).exists()]
    if missing:
        parser.error(f"{missing[0]}: no such file or folder")
    arguments.model = str(Path(arguments.model).resolve())
    arguments.train_file = [str(Path(name).resolve()) for name in arguments.train_file]
    arguments.levels = sorted(set(arguments.levels))
    arguments.num_gpus = arguments.num_gpus or training.default_processes()
    return arguments


def cpu_config(precision: str) -> dict[str, Any]:
    """ds_configs/zero3_cpu.json in `precision`, with buckets that suit a model of 10^8 parameters."""
    config = json.loads((common.REPOSITORY / "ds_configs" / "zero3_cpu.json").read_text(encoding="utf-8"))
    config["bf16"] = {"enabled": precision == "bf16"}
    config["zero_optimization"] |= {"reduce_bucket_size": 50_000_000, "stage3_prefetch_bucket_size": 50_000_000}
    config["stability"] = {}
    return config


def smollm2_cell(level: float, arguments: argparse.Namespace, ds_config: Path, output: Path) -> training.Cell:
    first = f"level-{arguments.levels[0]:g}"
    frequent = None if level == arguments.levels[0] else str(output / first / FILE_NAME)
    flags = {
        "model_name_or_path": arguments.model, "train_file": arguments.train_file, "unwrap": "true",
        "deepspeed": str(ds_config), "block_size": arguments.block_size, "max_eval_samples": arguments.eval_blocks,
        "per_device_train_batch_size": arguments.per_device_train_batch_size, "per_device_eval_batch_size": 4,
        "max_steps": arguments.steps, "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": min(WARMUP, arguments.steps // 4),
        "seed": arguments.seed, "stability_level": f"{level:g}", "stability_loss_path": "linear",
        "high_frequency_file": frequent, "save_strategy": "no", "disable_tqdm": "true", "logging_steps": 10,
    }  # fmt: skip
    return training.Cell(f"level-{level:g}", flags, arguments.steps)


class Scorer:
    """Scores saved models on one set of held-out blocks and prompts.

    Args:
        run: a run on the same data, which tells the high-frequency set, and whether the data is the same.
    """

    def __init__(self, arguments: argparse.Namespace, run: RunDir):
        import torch
        from transformers import AutoTokenizer

        from ds_stability.data import DataSpec, load_blocks
        from ds_stability.probe import prompts_from_blocks

        self.dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
        self.seed = arguments.seed
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        spec = DataSpec(train_files=tuple(arguments.train_file), unwrap=True, seed=arguments.seed,
                        max_eval_samples=arguments.eval_blocks)  # fmt: skip
        _, self.blocks, facts = load_blocks(spec, self.tokenizer, arguments.block_size)
        if facts["token_fingerprint"] != run.read_manifest()["data"]["token_fingerprint"]:
            raise RuntimeError(f"{run.path}: trained on other tokens than these files give; use another --output")
        self.prompts = prompts_from_blocks((b["input_ids"].tolist() for b in self.blocks), PROMPTS, PROMPT_TOKENS)
        self.frequent = HighFrequencySet.load(str(run.path / FILE_NAME)).token_ids

    def score(self, path: str | Path) -> dict[str, Any]:
        """Held-out statistics, statistics of the samples, and the first few samples as text."""
        print(f"scoring {Path(path).parent.name}/{Path(path).name}", flush=True)
        model = scoring.load_model(path, self.dtype)
        texts = scoring.sample_texts(model, self.tokenizer.eos_token_id, self.prompts, NEW_TOKENS, self.seed)
        shown = [{"prompt": self.tokenizer.decode(text.prompt), "completion": self.tokenizer.decode(text.completion)}
                 for text in texts[:SHOWN]]  # fmt: skip
        statistics = scoring.text_statistics(texts, self.frequent, self.tokenizer.all_special_ids)
        return scoring.held_out_statistics(model, self.blocks) | statistics | {"samples": shown}


def trained_row(scorer: Scorer, run: RunDir, level: float) -> dict[str, Any]:
    """The scores of a run's final/, with how well the run held its level.

    Raises:
        RuntimeError: final/ does not give the held-out cross-entropy that the engine measured.
    """
    rows, scores = common.read_run(run.path), scorer.score(run.final)
    engine_value = rows[-1]["eval/cross_entropy"]
    if abs(engine_value - scores["cross_entropy"]) > SCORES_MUST_AGREE:
        raise RuntimeError(f"{run.final}: held-out cross-entropy {scores['cross_entropy']:.4f}, "
                           f"the engine had {engine_value:.4f}")  # fmt: skip
    return {
        "level": level, "name": f"level {level:g}", "steps": rows[-1]["step"],
        **common.settled(rows, level, WARMUP, SETTLED_TO), **scores, "engine_cross_entropy": engine_value,
        **common.stability_measures(rows), "step_seconds": common.median_step_seconds(rows),
        "revision": (run.read_manifest()["git"] or {}).get("revision"),
    }  # fmt: skip


def outcome_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, rows); the first row is the untouched model."""
    header = ["model", "settled ratio", "held-out CE", "entropy", "top-1 mass", "distinct-2", "seq-rep-4", "high-freq. share"]
    body = [
        [row["name"], common.with_error(row.get("ratio"), row.get("ratio_error")), common.number(row["cross_entropy"]),
         *(common.number(row[key]) for key in
           ("entropy", "top1_mass", "sample/distinct_2", "sample/seq_rep_4", "sample/high_frequency_share"))]
        for row in rows
    ]  # fmt: skip
    return header, body


def print_samples(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['name']}:")
        for sample in row["samples"]:
            print(f"  {' '.join(sample['prompt'].split())} | {' '.join(sample['completion'].split())}")
        print()


if __name__ == "__main__":
    sys.exit(training.run_main(main))
