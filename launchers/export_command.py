"""`ds-stability export RUN`."""

import argparse
import os

from ds_stability.console import quiet_libraries
from ds_stability.errors import UserError

quiet_libraries()

from ds_stability.export_run import export_run  # noqa: E402
from ds_stability.locks import TRAIN_LOCK, try_lock  # noqa: E402
from ds_stability.run_dir import RunDir  # noqa: E402


def run(args: argparse.Namespace) -> int:
    folder = RunDir(args.directory)
    folder.read_manifest()  # no lock is left in a folder that is no run's
    lock = try_lock(folder.path / TRAIN_LOCK)
    if lock is None:
        raise UserError(f"{folder.path}: a process is training in this folder; wait for it to end")
    try:
        step, complete = export_run(folder.path, args.trust_remote_code)
    finally:
        os.close(lock)
    note = "" if complete else "; the run is not complete, so there is no DONE"
    print(f"{folder.final}: the weights after step {step}{note}")
    return 0
