"""The flags of an evaluation, for `eval/run.py` and `ds-stability eval`, and the start of several processes.

Importing this module is cheap: the command line is checked before torch is imported.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from ds_stability.errors import UserError

SCRIPT = Path(__file__).with_name("run.py")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("static", "continuous", "vllm")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Everything but the models, which one command takes by --model and the other by position."""
    parser.add_argument("--suite", default="quick", help="a suite of eval/suites by name, or a YAML file (default: quick)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="sampling seeds (default: 0)")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="evals/NAME; cells go to DIR/cells/ID")
    parser.add_argument("--cell_names", nargs="+", metavar="ID", help="ids of the cells, in the order of the models")
    parser.add_argument("--reference_file", metavar="FILE", help="high_frequency.json of one run, used for all models")
    parser.add_argument("--held_out_file", nargs="+", default=[], metavar="FILE", help="held-out text, instead of the run's own")
    parser.add_argument("--train_file", nargs="+", default=[], metavar="FILE", help="training text, instead of the run's own")
    parser.add_argument("--text_from", metavar="RUN", help="run whose held-out and training text all models are scored on")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the suite's)")
    parser.add_argument("--backend", choices=BACKENDS, help="how samples are generated (default: the suite's)")
    parser.add_argument("--max_memory_gib", type=float, metavar="GIB", help="memory of a device that a model may take")
    parser.add_argument("--gpus_per_model", type=int, default=1, metavar="N", help="GPUs that one copy of a model is spread over")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model, or with a file of an lm-eval task")


def run_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="eval/run.py", description="Evaluate models, each as a cell of --output_dir.", allow_abbrev=False)
    parser.add_argument("--model", dest="models", nargs="+", required=True, metavar="MODEL",
                        help="folder of a run or a model, or hub name")  # fmt: skip
    add_flags(parser)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def check(args: argparse.Namespace) -> None:
    """What can be told from the flags alone.

    Raises:
        UserError: one line.
    """
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: allowed are different numbers from 0")
    if args.gpus_per_model < 1:
        raise UserError(f"--gpus_per_model {args.gpus_per_model}: allowed is a number from 1")
    if args.max_memory_gib is not None and not args.max_memory_gib > 0:
        raise UserError(f"--max_memory_gib {args.max_memory_gib:g}: allowed is a number above 0")
    if args.reference_file is not None and not Path(args.reference_file).is_file():
        raise UserError(f"--reference_file {args.reference_file}: no such file")
    if args.text_from is not None and not (Path(args.text_from) / "manifest.json").is_file():
        raise UserError(f"--text_from {args.text_from}: is not the folder of a run (it has no manifest.json)")


def script_arguments(args: argparse.Namespace) -> list[str]:
    """The command line of eval/run.py that means `args`."""
    words = ["--model", *args.models]
    for name in ("suite", "output_dir", "reference_file", "text_from", "dtype", "backend", "max_memory_gib", "gpus_per_model"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    for name in ("seeds", "cell_names", "held_out_file", "train_file"):
        if getattr(args, name):
            words += [f"--{name}", *map(str, getattr(args, name))]
    return [*words, "--trust_remote_code"] if args.trust_remote_code else words


def run_command(args: argparse.Namespace) -> int:
    """`ds-stability eval`: in this process, or under the `deepspeed` launcher where more processes are asked for."""
    check(args)
    if args.num_gpus is not None and args.num_gpus < 1:
        raise UserError(f"--num_gpus {args.num_gpus}: allowed is a number of processes from 1")
    if args.hostfile is not None and not Path(args.hostfile).is_file():
        raise UserError(f"--hostfile {args.hostfile}: no such file")
    if args.hostfile is None and (args.num_gpus or 1) == 1:
        from ds_stability.console import quiet_libraries, run_script

        quiet_libraries()
        from ds_stability.eval.run import main

        return run_script(main, script_arguments(args))
    return subprocess.run(launch_line(args)).returncode


def launch_line(args: argparse.Namespace) -> list[Any]:
    line = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if args.hostfile is not None:
        line += ["--hostfile", args.hostfile]
    if args.num_gpus is not None:
        line += ["--num_gpus", str(args.num_gpus)]
    if args.master_port is not None:
        line += ["--master_port", str(args.master_port)]
    return [*line, str(SCRIPT), *script_arguments(args)]
