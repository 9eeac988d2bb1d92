"""`ds-stability sweep`: from its arguments to the runner, on this machine, the hosts of a hostfile, or Slurm."""

import argparse
import sys
from pathlib import Path

from ds_stability.console import quiet_libraries
from ds_stability.errors import UserError

quiet_libraries()

from ds_stability.launchers.sweep import Sweep  # noqa: E402
from ds_stability.launchers.sweep_check import check_cells  # noqa: E402
from ds_stability.launchers.sweep_folder import SweepFolder  # noqa: E402
from ds_stability.launchers.sweep_hosts import (  # noqa: E402
    TRAIN_SCRIPT,
    Hosts,
    Interrupted,
    count_slots,
    default_processes,
    ending_on_signals,
)
from ds_stability.launchers.sweep_plan import Plan, load_plan  # noqa: E402
from ds_stability.launchers.sweep_slurm import Array, parse_parameters  # noqa: E402


def run(args: argparse.Namespace) -> int:
    """Exit code: 0, 1 if a cell or the evaluation failed, 128 + signal if it was ended."""
    if args.retries < 0:
        raise UserError(f"--retries {args.retries}: allowed is a number from 0")
    processes, parameters = args.num_gpus, None
    if args.hostfile is not None:
        processes = count_slots(args.hostfile)
        if args.num_gpus not in (None, processes):
            raise UserError(f"--num_gpus {args.num_gpus}: {args.hostfile} has {processes} slots, and each cell takes all; leave it out")
    if args.slurm is not None:
        parameters = parse_parameters(args.slurm)
        processes = processes or parameters.get("gpus_per_node")
    plan = load_plan(args.file, args.settings, processes, default_processes())
    hosts = Hosts(plan.num_gpus, args.hostfile and str(Path(args.hostfile).resolve()))
    hosts.command(TRAIN_SCRIPT, [], 0)  # raises what is wrong with the hosts before anything is written
    folder = SweepFolder(args.output_dir or Path("runs") / plan.name)
    if plan.evaluate is not None and not args.no_evaluate:
        from ds_stability.eval.suite import Suite

        Suite.load(plan.evaluate["suite"]).require_files()  # not only after hours of training
    if args.dry_run:
        return _dry_run(plan, hosts, folder)
    try:
        with ending_on_signals():
            return _run(Sweep(plan, folder, hosts, args.retries), parameters, not args.no_evaluate)
    except Interrupted as interrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return interrupt.exit_code
    except OSError as error:
        raise UserError(f"{error.filename or folder.path}: {error.strerror or error}") from None


def _run(sweep: Sweep, slurm: dict | None, with_evaluation: bool) -> int:
    sweep.begin()
    array = None if slurm is None else Array(sweep, slurm)
    outcome = sweep.train() if array is None else array.train()
    complete = True
    if with_evaluation and sweep.plan.evaluate is not None and sweep.progress.done:
        complete = sweep.evaluate() if array is None else array.evaluate()
    if outcome.failed:
        print(f"error: {outcome.report()}", file=sys.stderr)
    return 0 if complete and not outcome.failed else 1


def _dry_run(plan: Plan, hosts: Hosts, folder: SweepFolder) -> int:
    commands = check_cells(plan, folder.path)
    for cell in plan.cells:
        state = "done" if folder.is_done(cell) else "to train"
        print(f"{cell.id}  {commands[cell.id].training['max_steps']} steps  {state}{f'  after {cell.needs[0]}' if cell.needs else ''}")
    print(f"{len(plan.cells)} cells of {plan.source}, {hosts.processes} processes each, in {folder.path}")
    return 0
