"""The `ds-stability` command. Each subcommand is one `add_...` function: it adds its parser and says what to run.

    ds-stability inspect ds_configs/zero3_bf16.json --stability_level 0:0,200:0.5

A mistake of the user ends with exit code 2 and one line, `error: ...`, on stderr; a full or failing file system with 74 and one line.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ds_stability.errors import StorageError, UserError
from ds_stability.failures import storage_reason
from ds_stability.safe_text import safe_line


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors; flags are written out, as in the launched scripts."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        print(f"error: {safe_line(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(UserError.exit_code)


def _epilog(example: str, codes: str) -> dict[str, Any]:
    """What stands below the flags in --help: an example, and what the exit code says."""
    return {"epilog": f"example:\n  {example}\n\nexit codes:\n  {codes}", "formatter_class": argparse.RawDescriptionHelpFormatter}


def add_inspect(subparsers: Any) -> None:
    """`inspect FILE`: the resolved block, the loss path and warnings; `inspect --data FILE...`: rows as they are trained."""
    parser = subparsers.add_parser(
        "inspect", help="show the resolved stability block of a DeepSpeed JSON, or training data as it will be trained",
        **_epilog("ds-stability inspect ds_configs/zero3_bf16.json --stability_level 0:0,200:0.5\n"
                  "  ds-stability inspect --data chats.jsonl --tokenizer_name models/base --assistant_only_loss",
                  "0 the file and its block, or the rows, are valid; 2 one of them is not"),
    )  # fmt: skip
    parser.add_argument("file", nargs="?", help="DeepSpeed JSON with a stability block")
    parser.add_argument("--stability_level", metavar="LEVEL", help='override the level: "0.5" or "0:0,200:0.5"')
    parser.add_argument("--script", metavar="FILE", help="a training script: say whether it would read the block")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="show the first rows of these files, supervised tokens marked")
    parser.add_argument("--html", metavar="OUT.html", help="write them as a page as well")
    parser.add_argument("--rows", type=int, default=3, help="how many rows of --data (default: 3)")
    _add_data_flags(parser)
    parser.set_defaults(run=_run_inspect)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of launchers/train.py that decide how rows become tokens."""
    parser.add_argument("--tokenizer_name", metavar="NAME", help="tokenizer or model folder, or hub name; default: a BPE of the data")
    parser.add_argument("--vocab_size", type=int, default=1024, help="size of a BPE trained on the data (default: 1024)")
    parser.add_argument("--block_size", type=int, default=512, help="tokens per block (default: 512)")
    for flag, default in (("text_field", "text"), ("messages_field", "messages"), ("text_document", "file")):
        parser.add_argument(f"--{flag}", default=default, metavar="NAME", help=f"as for training (default: {default})")
    parser.add_argument("--packing", default="pack", metavar="HOW", help="pack or pad; training may find out (default: pack)")
    parser.add_argument("--truncation", default="auto", metavar="HOW", help="of rows longer than a block, as for training (default: auto)")
    for flag in ("assistant_only_loss", "unwrap"):
        parser.add_argument(f"--{flag}", action="store_true", help="as for training")


def _run_inspect(args: argparse.Namespace) -> int:
    if (args.file is None) == (args.data is None):
        raise UserError(f"inspect: {'both' if args.file else 'neither'} a DeepSpeed JSON and --data FILE... "
                        f"{'are' if args.file else 'is'} given; give one of them")
    if args.data is not None:
        return _inspect_data(args)
    from ds_stability.inspect_config import inspect_config, render

    report = inspect_config(args.file, args.stability_level, args.script)
    print(json.dumps(report.to_dict(), indent=2, allow_nan=False) if args.json else render(report))
    return 0


def _inspect_data(args: argparse.Namespace) -> int:
    from ds_stability.console import quiet_libraries

    quiet_libraries()
    from ds_stability.atomic import write_atomic
    from ds_stability.data import DataSpec
    from ds_stability.data.inspection import view_data
    from ds_stability.data.inspection_page import as_html, as_text

    if args.json or args.stability_level is not None:
        raise UserError(f"{'--json' if args.json else '--stability_level'} belongs to a DeepSpeed JSON; leave it out with --data")
    spec = DataSpec(train_files=tuple(args.data), text_field=args.text_field, messages_field=args.messages_field,
                    text_document=args.text_document, unwrap=args.unwrap, assistant_only_loss=args.assistant_only_loss,
                    packing=args.packing, truncation=args.truncation)  # fmt: skip
    view = view_data(spec, args.tokenizer_name, args.vocab_size, args.block_size, args.rows)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    encoding = sys.stdout.encoding or "utf-8"  # the text has characters that an ASCII terminal lacks
    print(as_text(view, color, max(20, width)).encode(encoding, "backslashreplace").decode(encoding))
    if args.html:
        try:
            write_atomic(args.html, as_html(view))
        except OSError as error:
            raise UserError(f"--html {args.html}: cannot be written ({error.strerror})") from None
        print(f"\nwritten to {safe_line(args.html)}")
    return 0


def add_sweep(subparsers: Any) -> None:
    """`sweep FILE.yaml`: train every cell of a grid, then evaluate them."""
    parser = subparsers.add_parser(
        "sweep", help="train every cell of a grid under the deepspeed launcher, then evaluate them",
        **_epilog("ds-stability sweep launchers/sweeps/example.yaml --set max_steps=50 --dry_run",
                  "0 all cells are done; 1 a cell or the evaluation failed; 2 a mistake in what was given;\n"
                  "  128 + N ended by signal N. The same command goes on where it stopped."),
    )  # fmt: skip
    parser.add_argument("file", help="the sweep's YAML, or the name of one that ships, such as reproduce")
    parser.add_argument("--output_dir", help="folder of the sweep; default runs/NAME")
    parser.add_argument("--num_gpus", type=int, help="processes that a cell is trained by; default the file's")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
                        help="change a flag, stability.KEY, grid.AXIS or evaluate.KEY of the file; may be given often")  # fmt: skip
    parser.add_argument("--retries", type=int, default=1, help="how often a cell that failed is tried again")
    parser.add_argument("--dry_run", action="store_true", help="check all cells and list them, and train nothing")
    parser.add_argument("--no_evaluate", action="store_true", help="train only")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", help="train each cell on all hosts of this file")
    where.add_argument("--slurm", nargs="*", metavar="KEY=VALUE",
                       help="train the cells as a Slurm array (extra `slurm`); submitit parameters such as slurm_partition=gpu")  # fmt: skip
    parser.set_defaults(run=_run_sweep)


def _run_sweep(args: argparse.Namespace) -> int:
    from ds_stability.launchers.sweep_command import run

    return run(args)


def add_eval(subparsers: Any) -> None:
    """`eval MODEL...`: evaluate models, each as a cell of --output_dir."""
    from ds_stability.eval.command import add_flags

    parser = subparsers.add_parser(
        "eval", help="evaluate models: samples, scores on text, grammar and downstream tasks",
        **_epilog("ds-stability eval runs/first --suite quick --num_gpus 2 --output_dir evals/first",
                  "0 all cells are done; 2 a mistake in what was given; 73 the cells are done, but not their page; 130 interrupted;\n"
                  "  else something failed.\n"
                  "  The same command goes on where it stopped, with any number of processes."),
    )  # fmt: skip
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a run or a model, or hub name")
    add_flags(parser)
    parser.add_argument("--num_gpus", type=int, metavar="N", help="processes on each machine, one per GPU (default: 1)")
    parser.add_argument("--hostfile", metavar="FILE", help="machines to use, as for `deepspeed --hostfile`")
    parser.add_argument("--master_port", type=int, metavar="PORT", help="port of the launcher's process group")
    parser.set_defaults(run=_run_eval)


def _run_eval(args: argparse.Namespace) -> int:
    from ds_stability.eval.command import run_command

    return run_command(args)


def add_report(subparsers: Any) -> None:
    """`report DIR`: one HTML page with figures and tables from the cells that `eval` wrote."""
    parser = subparsers.add_parser(
        "report", help="make the report of evaluated cells: one page, figures, tables",
        **_epilog("ds-stability report evals/reproduce --predictions eval/predictions.yaml",
                  "0 the page is written (a table and its path are printed); 2 a mistake in what was given, or nothing to report on"),
    )  # fmt: skip
    parser.add_argument("directory", metavar="DIR", help="evals/NAME, the --output_dir of ds-stability eval")
    parser.add_argument("--output", metavar="DIR", help="folder of the page (default: DIR/report)")
    parser.add_argument("--baseline_level", type=float, default=0.0, help="level that the others are compared to (default: 0)")
    parser.add_argument("--predictions", metavar="FILE", help="predictions to judge (default: DIR/predictions.yaml, if there)")
    parser.set_defaults(run=_run_report)


def _run_report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ds_stability.eval.conclusion import conclude

    output, predictions = (Path(value) if value else None for value in (args.output, args.predictions))
    conclude(Path(args.directory), None, output, args.baseline_level, predictions)
    return 0


def add_export(subparsers: Any) -> None:
    """`export RUN`: final/ from the newest whole checkpoint of a run."""
    parser = subparsers.add_parser(
        "export", help="write final/ of a run from its newest whole checkpoint, on the CPU, in one process",
        **_epilog("ds-stability export runs/first",
                  "0 final/ is written, and DONE if the run was trained to its end; 2 a mistake in what was given; 74 the disk is full"),
    )  # fmt: skip
    parser.add_argument("directory", metavar="RUN", help="folder of the run, the --output_dir of launchers/train.py")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that the model of the run came with")
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> int:
    from ds_stability.launchers.export_command import run

    return run(args)


SUBCOMMANDS = (add_inspect, add_export, add_eval, add_sweep, add_report)


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
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is written", file=sys.stderr)
        return 130  # as a shell counts SIGINT
    except BrokenPipeError:  # the reader (head, less) went away: nothing is lost, and Python must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as error:
        print(f"error: {safe_line(error.filename or 'a file')}: {error.strerror}", file=sys.stderr)
        return UserError.exit_code
    except Exception as error:
        reason = storage_reason(error)
        if reason is None:
            raise
        print(f"error: writing failed ({safe_line(reason)}); make room, then give the same command again", file=sys.stderr)
        return StorageError.exit_code


if __name__ == "__main__":
    sys.exit(main())
