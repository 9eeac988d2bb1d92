"""Whether a training script gives its engine the `stability` block at all. The script is read, not run."""

import ast
from pathlib import Path

from ds_stability.config_errors import one_line
from ds_stability.errors import UserError

READERS = ("enable", "initialize", "attach")


def calls_ds_stability(path: str) -> bool:
    """Whether the script imports ds_stability and calls `enable`, `initialize` or `attach` of it, in its own text.

    Raises:
        UserError: the file cannot be read, or is no Python.
    """
    try:
        tree = ast.parse(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"--script {one_line(path, 200)}: cannot be read ({error.strerror})") from None
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"--script {one_line(path, 200)}: is no Python script ({error})") from None
    modules, functions = set(), set()  # names of ds_stability or a module of it, and of READERS
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names if _ours(alias.name)}
        elif isinstance(node, ast.ImportFrom) and _ours(node.module or ""):
            for alias in node.names:
                (functions if alias.name in READERS else modules).add(alias.asname or alias.name)
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any((isinstance(function, ast.Name) and function.id in functions)
               or (isinstance(function, ast.Attribute) and function.attr in READERS and _root(function) in modules)
               for function in called)  # fmt: skip


def _ours(module: str) -> bool:
    return module.partition(".")[0] == "ds_stability"


def _root(node: ast.expr) -> str:
    """The first name of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""

