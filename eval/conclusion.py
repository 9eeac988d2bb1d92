"""What an evaluation or a report ends with: the table on the terminal, the page, and what one may do next."""

import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from ds_stability.errors import PageError, StorageError, UserError
from ds_stability.failures import storage_reason
from ds_stability.safe_text import safe_line


def conclude(folder: Path, again: str | None = None, output: Path | None = None, baseline_level: float = 0.0,
             predictions: Path | None = None) -> None:  # fmt: skip
    """Print the table of evals/NAME, write its page, print the page's path and the next command (`again`: with another model).

    Raises:
        UserError: nothing to report on, a wrong predictions file, or a folder that cannot be written.
    """
    from .report import read_analysis, write_page
    from .terminal_table import table_lines

    analysis = read_analysis(folder, baseline_level, predictions)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    print("\n".join(table_lines(analysis.comparison, max(60, width))), flush=True)
    page = write_page(analysis, output or folder / "report", baseline_level)
    print(f"page: {safe_line(page)}")
    if analysis.has_levels and not analysis.judged:
        print(f"next: judge predictions that were written down before, with ds-stability report {_word(folder)} --predictions FILE.yaml")
    elif again is not None:
        print(f"next: compare another model, with {again}")


def conclude_evaluation(args: Namespace) -> None:
    """`conclude` after eval/run.py; on one rank, with every cell DONE.

    Raises:
        StorageError, PageError: the page could not be made. The cells are whole.
    """
    whole = f"the cells in {args.output_dir} are done, but their page could not be made"
    try:
        conclude(Path(args.output_dir), _with_another_model(args))
    except UserError as error:
        raise PageError(f"{whole}: {error}; then: ds-stability report {_word(args.output_dir)}") from error
    except BrokenPipeError:
        raise
    except Exception as error:
        reason = storage_reason(error)
        if reason is not None:
            raise StorageError(f"{whole} ({reason}); make room, then: ds-stability report {_word(args.output_dir)}") from error
        raise PageError(f"{whole} ({type(error).__name__}: {error}); to try again: ds-stability report {_word(args.output_dir)}") from error


def _with_another_model(args: Namespace) -> str:
    """The command that evaluates one more model, in the same way and on the same texts."""
    words = ["ds-stability", "eval", "ANOTHER_MODEL", "--suite", args.suite]
    for name in ("seeds", "held_out_file", "train_file", "text_from", "reference_file", "dtype", "backend"):
        value = getattr(args, name)
        if value not in (None, [], [0]):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return safe_line(shlex.join([*words, "--output_dir", args.output_dir]))


def _word(path: Path | str) -> str:
    return safe_line(shlex.quote(str(path)))
