"""Runs the README's own loop as it stands there, in a folder that has what it names. Usage: readme_worker.py README."""

import os
import re
import sys
from pathlib import Path

import torch

if os.environ["RANK"] != "0":
    sys.stdout = open(os.devnull, "w")
block = re.search(r"\*\*Your own loop\*\*.*?```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL).group(1)
assert "from_pretrained" in block
ids = torch.randint(0, 64, (8 * 40, 16), generator=torch.Generator().manual_seed(0)).square() // 64  # skewed, as words are
names = {"dataset": [{"input_ids": row, "labels": row} for row in ids]}
exec(compile(block, "README.md", "exec"), names)
assert not names["model"].training  # as from_pretrained returned it
engine = names["engine"]
if engine.global_rank == 0:
    Path("DONE").write_text(str(engine.stability.metrics["stability/tokens"]))
sys.stdout.flush()
os._exit(0)
