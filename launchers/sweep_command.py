"""`ds-stability sweep`: from its arguments to the runner."""

import argparse

from ds_stability.console import quiet_libraries
from ds_stability.errors import UserError

quiet_libraries()

from ds_stability.launchers.sweep import check_cells, run_sweep  # noqa: E402
from ds_stability.launchers.sweep_folder import SweepFolder  # noqa: E402
from ds_stability.launchers.sweep_hosts import Hosts  # noqa: E402
from ds_stability.launchers.sweep_plan import Plan, load_plan  # noqa: E402


def run(args: argparse.Namespace) -> int:
    """Exit code of the command."""
    if args.retries < 0:
        raise UserError(f"--retries {args.retries}: allowed is a number from 0")
    plan = load_plan(args.file, args.settings, args.num_gpus)
    hosts = Hosts.of(plan.num_gpus, args.hostfile)
    if args.dry_run:
        return _dry_run(plan, hosts, args.output_dir)
    return run_sweep(plan, args.output_dir, hosts, args.retries, not args.no_evaluate)


def _dry_run(plan: Plan, hosts: Hosts, output_dir: str | None) -> int:
    folder = SweepFolder(output_dir or f"runs/{plan.name}")
    commands = check_cells(plan, folder)
    for cell in plan.cells:
        state = "done" if folder.is_done(cell) else "to train"
        print(f"{cell.id}  {commands[cell.id].training['max_steps']} steps  {state}{f'  after {cell.needs[0]}' if cell.needs else ''}")
    print(f"{len(plan.cells)} cells of {plan.source}, {hosts.processes} processes each, in {folder.path}")
    return 0
