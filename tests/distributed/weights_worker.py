"""Loads each FOLDER as under Trainer with ZeRO-3. Usage: weights_worker.py OUT FOLDER ...

Every rank writes OUT/rankN.json: {folder: error of one line, or null}; OUT/DONE is last.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

from ds_stability.console import agree
from ds_stability.errors import UserError
from ds_stability.weights import load_causal_lm

out, *folders = map(Path, sys.argv[1:])
deepspeed.init_distributed()
config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
errors = {}
for folder in folders:
    try:
        model = agree(lambda folder=folder: load_causal_lm(folder, "--model_name_or_path x"))
        assert all(parameter.ds_tensor.numel() > 0 for parameter in model.parameters())
        errors[folder.name] = None
    except UserError as error:
        errors[folder.name] = str(error)
(out / f"rank{dist.get_rank()}.json").write_text(json.dumps(errors))
dist.barrier()
if dist.get_rank() == 0:
    (out / "DONE").write_text("")
