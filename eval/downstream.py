"""Downstream tasks by lm-evaluation-harness (an optional extra), on a model that is loaded, over all ranks.

Tasks are ours, from eval/suites/tasks (offline), or lm-eval's own by name. Each score comes in units (documents), with the
level of guessing in its settings. What is promised: prompts, few-shot examples, batches and their padding depend on the
tasks, the limit, the number of examples and the batch size only, not on the number of ranks; a batch's answers are
journaled in CELL/downstream, so that a killed evaluation goes on with any number of ranks and ends with the same numbers to
the bit on the same kind of device. A sampled generation is keyed by (seed, task, document, repetition) and never taken for
another repetition.

lm_eval is imported inside functions: the package works without it.
"""

import difflib
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_stability.console import agree
from ds_stability.errors import UserError
from ds_stability.safe_read import parse_yaml

from .records import Measured

TASKS = Path(__file__).parent / "suites" / "tasks"
FOLDER = "downstream"
DEFAULT_BATCH_SIZE = 16
# As lm_eval.simple_evaluate seeds the generators that some of its tasks draw choices from.
PYTHON_SEED, OTHER_SEED = 0, 1234


def local_tasks() -> dict[str, Path]:
    """YAML files of our own tasks, by task name."""
    return {parse_yaml(path.read_text(encoding="utf-8"))["task"]: path for path in sorted(TASKS.glob("*.yaml"))}


def local_config(path: Path) -> dict[str, Any]:
    """Config of one of our tasks, its data files made absolute: lm-eval would look for them in the working directory."""
    config = parse_yaml(path.read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {split: str(path.parent / name) for split, name in files.items()}
    return config


def check_downstream(names: Sequence[str], trust_remote_code: bool = False) -> None:
    """Whether lm-eval is there and knows the tasks; cheap where all are ours, seconds otherwise. Loads no data.

    Raises:
        UserError: it is missing or too old, a name is unknown (with near ones), or is a file and `trust_remote_code` is False:
            lm-eval runs the Python functions that a file names (!function), and its templates are not sandboxed.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    if files and not trust_remote_code:
        raise UserError(f"downstream.tasks: {files[0]} is a file, and lm-eval runs the code that stands in it (!function, templates); "
                        "read it, then give --trust_remote_code")  # fmt: skip
    _task_manager(names)


def _task_manager(names: Sequence[str]) -> Any:
    try:
        from lm_eval.tasks import TaskManager

        TaskManager.load  # noqa: B018 - 0.4.13 is the first to have it
    except (ImportError, AttributeError):
        try:
            found = f"lm-eval {metadata.version('lm-eval')} is too old or cannot be imported"
        except metadata.PackageNotFoundError:
            found = "lm-eval is not installed"
        raise UserError(
            f"downstream.tasks: {found}; pip install 'ds_stability[lm-eval]', or leave downstream tasks out of the suite"
        ) from None
    ours = local_tasks()
    theirs = [name for name in names if name not in ours and (not _is_file(name) or "group:" in Path(name).read_text("utf-8"))]
    manager = TaskManager(include_path=str(TASKS), include_defaults=bool(theirs))  # theirs take seconds to index
    for name in names:
        if name not in manager.task_index and not _is_file(name):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3) or sorted(ours)
            raise UserError(f"downstream.tasks: unknown task {name!r}; near ones: {', '.join(near)}")
    return manager


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and os.path.isfile(name)


def _load(names: Sequence[str], num_fewshot: int | None) -> dict[str, Any]:
    """lm-eval's {"tasks": {name: Task}, "groups": ...}, ready to be evaluated.

    Raises:
        UserError: an unknown name, a task whose data or packages are not there, or one that runs generated code.
    """
    manager, ours = _task_manager(names), local_tasks()
    specs = [local_config(ours[name]) if name in ours else name for name in names]
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name, spec in zip(names, specs, strict=True):
        try:
            part = manager.load([spec])
        except (OSError, ImportError, RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"downstream.tasks: {name} cannot be loaded ({reason})") from None
        for kind in loaded:
            loaded[kind].update(part.get(kind, {}))
    for name, task in loaded["tasks"].items():
        if task.get_config("unsafe_code"):
            raise UserError(f"downstream.tasks: {name} runs code that the model writes, which is not allowed here")
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default != 0:  # a 0 in a task's config is meant, as for simple_evaluate
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=OTHER_SEED)
    return loaded


@contextmanager
def _reproducible_and_quiet() -> Iterator[None]:
    """The same random series on every rank and in every process, given back afterwards; no progress bar per rank."""
    import datasets
    import lm_eval.api.task
    from tqdm import tqdm

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    bar = lm_eval.api.task.tqdm
    bars, logger = datasets.are_progress_bars_disabled(), logging.getLogger("lm_eval")
    level = logger.level
    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # it has no switch of its own
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def run_lm_eval(
    model: Any,
    tokenizer: Any,
    settings: Mapping[str, Any],
    cell_dir: str | Path,
    rank: int = 0,
    world_size: int = 1,
    *,
    context_length: int | None = None,
    seed: int = 0,
    store: Any = None,
) -> list[Measured]:
    """Score a model on lm-eval's tasks. Every rank calls it, and every rank gets all figures.

    Args:
        model: a causal LM on any device or devices; None on a rank that has none and only takes part in the collectives.
        settings: tasks (names), limit (documents of a task at most), num_fewshot, batch_size.
        cell_dir: the cell's folder; answers are journaled in its folder "downstream".
        rank, world_size: global ones, of the default process group (gloo, or any that gathers objects).
        context_length: positions of the model; default: its config's.
        seed: of tasks that sample.
        store: a torch.distributed store: ranks then claim batches one by one instead of having them dealt out.

    Raises:
        UserError: lm-eval is missing, a task is unknown or cannot be loaded.
    """
    names = list(settings.get("tasks") or [])
    if not names:
        return []
    batch_size = settings.get("batch_size") or DEFAULT_BATCH_SIZE
    agree(partial(_task_manager, names))
    with _reproducible_and_quiet():
        loaded = agree(partial(_load, names, settings.get("num_fewshot")))
        from .downstream_batches import BatchRunner, Journal
        from .downstream_measures import group_measures, task_measures
        from .downstream_model import HarnessModel, Undivided

        if model is not None:
            model.eval()
        journal = agree(partial(Journal, Path(cell_dir) / FOLDER, rank))
        label = f"{FOLDER}/{Path(cell_dir).resolve()}"
        runner = BatchRunner(journal, batch_size, rank, world_size, works=model is not None, store=store, label=label)
        harness = HarnessModel(model, tokenizer, runner, context_length, seed)
        results = _evaluate(Undivided(harness), loaded, settings.get("limit"))
        fixed = {"limit": settings.get("limit"), "batch_size": batch_size, "lm_eval": metadata.version("lm-eval")}
        measures = []
        for name, task in loaded["tasks"].items():
            unanswered = {document for of_task, document in harness.unanswered if of_task == name}
            version = {"version": results["versions"].get(name)}
            measures += task_measures(task, results["samples"][name], unanswered, {**fixed, **version})
        return measures + group_measures(loaded["groups"].values(), measures)


def _evaluate(model: Any, loaded: dict[str, Any], limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    # Their standard errors are not used: documents are units, and intervals are made from those.
    return evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
