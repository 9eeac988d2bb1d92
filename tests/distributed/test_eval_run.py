"""Evaluations by real processes: killed and resumed with another number of ranks, they end with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_stability.data.tokenizer import train_bpe
from ds_stability.errors import UserError
from ds_stability.eval import run as eval_run

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT, WORKER = REPOSITORY / "eval" / "run.py", Path(__file__).with_name("eval_worker.py")
WORDS = "the quick brown fox jumps over a lazy dog while seven bright stars shine on cold water near old stone walls".split()
SUITE = {
    "name": "tiny", "batch_size": 4, "max_new_tokens": 12, "samples_per_prompt": 2,
    "prompts": {"count": 8, "tokens": 6}, "text": {"held_out_windows": 8, "train_windows": 8, "window": 32},
    "minimal_pairs": {"enabled": False},
}  # fmt: skip
RESULTS = ("samples.jsonl", "scores.json", "items.parquet", "records/text_held_out.jsonl", "records/text_train.jsonl")


def prose(seed):
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choice(WORDS) for _ in range(80)) + "." for _ in range(30))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny random model (and a second one), texts and a suite."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "held.txt").write_text(prose(0))
    (folder / "train.txt").write_text(prose(1))
    (folder / "suite.yaml").write_text(json.dumps(SUITE))
    tokenizer = train_bpe([prose(1)], 300)
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def arguments(place, output, *more):
    return ["--model", str(place / "model"), "--cell_names", "cell", "--suite", str(place / "suite.yaml"), "--held_out_file",
            str(place / "held.txt"), "--train_file", str(place / "train.txt"), "--output_dir", str(output), *more]  # fmt: skip


def results(output, cell="cell"):
    folder = Path(output) / "cells" / cell
    assert (folder / "DONE").exists()
    assert not (folder / "journal").exists() and not (folder / "scratch").exists()
    return {name: (folder / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def undisturbed(place, run_ranks):
    done = run_ranks(SCRIPT, *arguments(place, place / "undisturbed"), ranks=2, timeout=120)
    assert (place / "undisturbed" / "cells" / "cell" / "DONE").exists(), done.stderr[-3000:]
    return results(place / "undisturbed")


def resume_alone(place, output):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, SCRIPT, *arguments(place, output)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def journaled(output):
    return sum(path.read_bytes().count(b"\n") for path in (output / "cells" / "cell" / "journal").glob("rank-*.jsonl"))


def test_an_undisturbed_run_of_two_ranks(place, undisturbed):
    rows = [json.loads(line) for line in undisturbed["samples.jsonl"].decode().splitlines()]
    order = ["greedy", "sample", "top_p_95", "top_k_40", "beam_4"]
    keys = [(order.index(row["decoding"]), row["prompt"], row["sample"]) for row in rows]
    assert keys == sorted(set(keys)) and len(keys) == 8 * (1 + 2 + 2 + 2 + 1)
    scored = json.loads(undisturbed["scores.json"])
    assert b"seconds" not in undisturbed["scores.json"]
    found = {(row["metric"], row["decoding"], row["split"]): row for row in scored["rows"]}
    assert found["distinct_2", "reference", None]["value"] > 0
    gap = found["bits_per_byte", None, "held_out"]["value"] - found["bits_per_byte", None, "train"]["value"]
    assert found["memorization_gap", None, None]["value"] == pytest.approx(gap)
    cell = json.loads((place / "undisturbed" / "cells" / "cell" / "cell.json").read_text())
    assert cell["world_size"] == 2 and cell["run"] is None and cell["suite"]["name"] == "tiny"


def test_a_killed_run_goes_on_with_one_rank_to_the_same_bytes(place, undisturbed, start_distributed):
    output = place / "killed"
    process = start_distributed(WORKER, *arguments(place, output), output=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while journaled(output) < 7 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    done = journaled(output)
    assert 7 <= done < 20 and not (output / "cells" / "cell" / "DONE").exists()
    files = [path for path in (output / "cells" / "cell" / "journal").glob("rank-*.jsonl") if path.stat().st_size]
    assert len(files) == 2  # both ranks had done some
    files[0].write_bytes(files[0].read_bytes()[:-9])  # as if the kill had come in the middle of a line
    assert "20 of 20 units" in resume_alone(place, output)
    assert results(output) == undisturbed


@pytest.mark.parametrize("end", ["kill", pytest.param("fail", marks=pytest.mark.slow)])
def test_one_rank_that_dies_ends_the_run_and_loses_nothing(place, undisturbed, run_distributed, end):
    output = place / end
    environment = {"EVAL_RANK": "1", "EVAL_UNITS": "3", "EVAL_END": end}
    died = run_distributed(WORKER, *arguments(place, output), timeout=120, env=environment)
    assert died.returncode != 0 and not (output / "cells" / "cell" / "DONE").exists()
    if end == "fail":
        assert "failed on purpose" in died.stderr
    assert journaled(output) >= 3
    eval_run.main(arguments(place, output))
    assert results(output) == undisturbed


def test_several_models_then_nothing_left_to_do(place, undisturbed, capsys):
    """In this process: one after another, and a finished cell is left alone."""
    output = place / "both"
    command = ["--model", str(place / "model"), str(place / "other"), "--cell_names", "cell", "second",
               *arguments(place, output)[4:]]  # fmt: skip
    eval_run.main(command)
    assert results(output) == undisturbed
    assert results(output, "second")["samples.jsonl"] != undisturbed["samples.jsonl"]
    capsys.readouterr()
    cells = output / "cells"
    before = {path: path.stat().st_mtime_ns for path in cells.rglob("*") if path.is_file()}
    eval_run.main(command)
    out, err = capsys.readouterr()
    assert err.count("is done already") == 2 and f"page: {output}/report/index.html" in out and "bits per byte, held-out" in out
    assert {path: path.stat().st_mtime_ns for path in cells.rglob("*") if path.is_file()} == before, "the page alone is made again"
    for changed, part in ((["--seeds", "1"], "another seeds"), (["--dtype", "bfloat16"], "another suite"),
                          (["--text_from", str(output)], "not the folder of a run")):  # fmt: skip
        with pytest.raises(UserError, match=part):
            eval_run.main([*command, *changed])


def test_a_changed_model_is_not_the_same_cell(place, undisturbed):
    with pytest.raises(UserError, match="was evaluated with another model"):
        eval_run.main(["--model", str(place / "other"), *arguments(place, place / "undisturbed")[2:]])
