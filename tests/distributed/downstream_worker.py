"""One rank of downstream evaluations: python downstream_worker.py SPEC.json. Writes OUT/NAME.RANK.json for each run.

Sets up gloo by a file, without a launcher; the local rank is set to 0 everywhere, as on nodes with one process each.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_stability.eval.downstream import _load, run_lm_eval
from ds_stability.eval.downstream_batches import BatchRunner, Journal


def as_json(measures):
    return [[m.metric, [str(unit) for unit in m.units], m.totals.tolist(), m.counts.tolist(), m.settings] for m in measures]


def stock(model, tokenizer, run, rank, world):
    """lm-eval's own division of the documents over ranks, with the adapter's global rank."""
    from lm_eval.evaluator import evaluate

    from ds_stability.eval.downstream_model import HarnessModel

    lm = HarnessModel(model, tokenizer, BatchRunner(Journal(Path(run["cell"]), rank), 4, rank, world))
    assert (lm.rank, lm.world_size) == (rank, world)
    loaded = _load(run["settings"]["tasks"], None)
    results = evaluate(lm=lm, task_dict=loaded, limit=run["settings"]["limit"], bootstrap_iters=0, log_samples=True)
    if rank > 0:
        assert results is None
        return None
    return {name: {s["doc_id"]: s["acc"] for s in found} for name, found in results["samples"].items()}


def main(spec):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{spec['store']}", rank=rank, world_size=world)
    store = dist.FileStore(f"{spec['store']}.claims", world)
    model = AutoModelForCausalLM.from_pretrained(spec["model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    for run in spec["runs"]:
        if run.get("stock"):
            result = stock(model, tokenizer, run, rank, world)
        else:
            mine = None if rank in run.get("without_model", []) else model
            claims = store if run.get("claims") else None
            result = as_json(run_lm_eval(mine, tokenizer, run["settings"], run["cell"], rank, world, store=claims))
        Path(spec["out"], f"{run['name']}.{rank}.json").write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
