"""eval/run.py, slowed down, whose rank EVAL_RANK kills itself (EVAL_END=kill) or fails (EVAL_END=fail) after EVAL_UNITS units."""

import os
import signal
import sys
import time

from ds_stability.console import run_script
from ds_stability.eval import run
from ds_stability.eval.generation_task import GenerationTask

whole_run = GenerationTask.run
units = 0


def run_slowly(self, unit, scratch):
    global units
    time.sleep(float(os.environ.get("EVAL_PAUSE", "0.2")))
    if os.environ["RANK"] == os.environ.get("EVAL_RANK") and units == int(os.environ["EVAL_UNITS"]):
        if os.environ["EVAL_END"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("failed on purpose")
    units += 1
    return whole_run(self, unit, scratch)


GenerationTask.run = run_slowly
sys.exit(run_script(run.main))
