"""Which trainings of a test this CPU can run: DeepSpeed trains in fp16 only where a CPU has AVX-512 FP16 or AMX.

DS_STABILITY_TEST_NO_FP16=1 hides fp16, so that a machine that has it shows what the tests do on one that has not.
"""

import functools
import os

import pytest

HIDE_FP16 = "DS_STABILITY_TEST_NO_FP16"


@functools.cache
def supports_fp16() -> bool:
    """Whether DeepSpeed's CPU accelerator, on which all ranks of the tests run, supports fp16."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    return bool(CPU_Accelerator().is_fp16_supported())


def missing_fp16() -> str | None:
    """Why no test trains in fp16 here; None where they do."""
    if os.environ.get(HIDE_FP16) == "1":
        return f"{HIDE_FP16}=1 hides fp16"
    return None if supports_fp16() else "DeepSpeed's CPU accelerator has no fp16 on this machine (it takes AVX-512 FP16 or AMX)"


def without_missing(runs: list[dict]) -> tuple[list[dict], dict[str, str]]:
    """(runs that can be run here, {name of each other: the reason}); see distributed/train_data.py for a run."""
    left_out = {run["name"]: reason for run in runs
                if run.get("ds", {}).get("fp16", {}).get("enabled") and (reason := missing_fp16()) is not None}  # fmt: skip
    return [run for run in runs if run["name"] not in left_out], left_out


class Results(dict):
    """{name: result} of trainings; the test that asks for one that was left out is skipped, and its neighbours are not."""

    def __init__(self, left_out: dict[str, str], **results):
        super().__init__(**results)
        self.left_out = left_out

    def __missing__(self, name: str):
        if name in self.left_out:
            pytest.skip(self.left_out[name])
        raise KeyError(name)
