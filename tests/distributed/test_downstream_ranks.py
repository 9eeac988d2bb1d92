"""Downstream figures do not depend on the number of ranks, nor on what was done before a kill, by how many."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ds_stability.data.tokenizer import train_bpe
from ds_stability.eval.downstream import run_lm_eval

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm-eval")
HERE = Path(__file__).parent
RANKS = 2
SAMPLED = """
task: sampled
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: says
repeats: 3
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5, do_sample: true, temperature: 1.0}}
filter_list: [{{name: all, filter: [{{function: take_first_k, k: 3}}, {{function: majority_vote}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match}}]
"""


def settings(tasks, **more):
    return {"tasks": tasks, "batch_size": 4, **more}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = train_bpe(["the cat sat on the mat and the capital of the sea is hot " * 4], 290)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2, initializer_range=0.3,
                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"text": f"the cat {n}", "says": "no"} for n in range(5)]
    (folder / "sampled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sampled.yaml").write_text(SAMPLED.format(data=folder / "sampled.jsonl"))
    return folder, model, tokenizer


@pytest.fixture(scope="module")
def runs(place):
    folder = place[0]
    sampled = str(folder / "sampled.yaml")
    return {
        "few_shot": {"settings": settings(["ds_facts", "ds_cloze"], limit=9, num_fewshot=2)},
        "claims": {"settings": settings(["ds_facts", "ds_cloze"], limit=9, num_fewshot=2), "claims": True},
        "fewer_documents_than_ranks": {"settings": settings(["ds_cloze"], limit=1)},
        "one_model": {"settings": settings(["ds_cloze"], limit=9), "without_model": [0]},
        "sampled": {"settings": settings([sampled])},
        "stock": {"settings": settings(["ds_cloze"], limit=9), "stock": True},
    }


def start(folder, out, ranks, runs):
    out.mkdir()
    spec = {"model": str(folder / "model"), "out": str(out), "store": str(out / "store"),
            "runs": [{"name": name, "cell": str(out / "cells" / name), **run} for name, run in runs.items()]}  # fmt: skip
    (out / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(HERE / "downstream_worker.py"), str(out / "spec.json")]
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}  # fmt: skip
    return [subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
            for rank in range(ranks)]  # fmt: skip


@pytest.fixture(scope="module")
def by_rank(place, runs):
    out = place[0] / "two"
    processes = start(place[0], out, RANKS, runs)
    for process in processes:
        try:
            _, errors = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            for one in processes:
                one.kill()
            raise
        assert process.returncode == 0, errors[-4000:]
    return {name: [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in range(RANKS)] for name in runs}


@pytest.fixture(scope="module")
def alone(place, runs):
    folder, model, tokenizer = place
    names = [name for name in runs if name not in ("stock", "claims")]
    return {name: as_json(run_lm_eval(model, tokenizer, runs[name]["settings"], folder / "one" / name)) for name in names}


def as_json(measures):
    return [[m.metric, [str(unit) for unit in m.units], m.totals.tolist(), m.counts.tolist(), json.loads(json.dumps(m.settings))]
            for m in measures]  # fmt: skip


def answers(folder):
    """{batch: answers} of all journals of a cell."""
    lines = [line for path in folder.rglob("rank-*.jsonl") for line in path.read_text().splitlines()]
    assert len({json.loads(line)["batch"] for line in lines}) == len(lines), "a batch was done twice"
    return {json.loads(line)["batch"]: json.loads(line)["answers"] for line in lines}


@pytest.mark.parametrize("name", ["few_shot", "fewer_documents_than_ranks", "one_model", "sampled"])
def test_every_rank_gets_what_one_rank_gets(place, by_rank, alone, name):
    assert by_rank[name] == [alone[name]] * RANKS
    # Batches, and each log-likelihood in them, to the bit.
    assert answers(place[0] / "two" / "cells" / name) == answers(place[0] / "one" / name)


def test_work_was_shared(place, by_rank):
    cells = place[0] / "two" / "cells"
    assert len(list((cells / "few_shot").rglob("rank-*.jsonl"))) == RANKS
    assert [path.name for path in (cells / "one_model").rglob("rank-*.jsonl")] == ["rank-00001.jsonl"]


def test_claimed_batches_are_the_same(place, by_rank):
    assert by_rank["claims"] == by_rank["few_shot"]
    assert answers(place[0] / "two" / "cells" / "claims") == answers(place[0] / "two" / "cells" / "few_shot")


def test_lm_evals_own_division_gives_the_same(by_rank, alone):
    found, other = by_rank["stock"]
    assert other is None
    acc = {str(document): value for document, value in zip(*alone["one_model"][0][1:3], strict=True)}
    assert found["ds_cloze"] == acc and len(acc) == 9


def test_another_number_of_ranks_goes_on_with_a_killed_one(place, runs, by_rank, alone, monkeypatch):
    folder, model, tokenizer = place
    cell = folder / "two" / "cells" / "few_shot"
    whole = answers(cell)
    torn = cell / "downstream" / "rank-00001.jsonl"
    torn.write_bytes(torn.read_bytes()[:-20])
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    again = run_lm_eval(model, tokenizer, runs["few_shot"]["settings"], cell)
    assert as_json(again) == alone["few_shot"] and len(calls) == 1
    with open(torn, "ab") as file:  # rank 1 would do this when it opens its journal
        file.truncate(torn.read_bytes().rfind(b"\n") + 1)
    assert answers(cell) == whole


def test_the_sampled_task_has_three_samples_of_each_document(place, by_rank):
    texts = [text for batch in answers(place[0] / "two" / "cells" / "sampled").values() for text in batch]
    assert len(texts) == 15 and len(set(texts)) > 10
