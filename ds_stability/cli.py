"""The `ds-stability` command. Each subcommand is one `add_...` function: it adds its parser and says what to run.

    ds-stability inspect ds_configs/zero3_bf16.json --stability_level 0:0,200:0.5

A mistake of the user ends with exit code 2 and one line, `error: ...`, on stderr.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ds_stability.errors import UserError


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(UserError.exit_code)


def add_inspect(subparsers: Any) -> None:
    """`inspect FILE`: the resolved block, the loss path and warnings, without a GPU."""
    parser = subparsers.add_parser(
        "inspect", help="show the resolved stability block of a DeepSpeed JSON, its loss path and warnings"
    )
    parser.add_argument("file", help="DeepSpeed JSON with a stability block")
    parser.add_argument("--stability_level", metavar="LEVEL", help='override the level: "0.5" or "0:0,200:0.5"')
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run_inspect)


def _run_inspect(args: argparse.Namespace) -> int:
    from ds_stability.inspect_config import inspect_config, render

    report = inspect_config(args.file, args.stability_level)
    print(json.dumps(report.to_dict(), indent=2, allow_nan=False) if args.json else render(report))
    return 0


SUBCOMMANDS = (add_inspect,)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ds-stability", description="Train language models at a controlled stabilization level.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in SUBCOMMANDS:
        add(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader (head, less) went away: nothing is lost, and Python must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
