"""Evaluate models: samples, scores on text, grammar and downstream tasks, each model a cell of --output_dir.

    deepspeed --num_gpus 2 eval/run.py --model runs/a runs/b --suite standard --seeds 0 --output_dir evals/a_and_b

MODEL is a run's folder (its final/ is meant), any from_pretrained folder, or a hub name. The models are evaluated one after
another, each by all ranks of all nodes. A cell that is DONE is skipped; one that was killed goes on with any number of
ranks, and its results are the same bytes. On a machine without GPUs set DS_ACCELERATOR=cpu, which the launcher reads.
At the end rank 0 prints a table of all cells of --output_dir and draws their page.

Exit codes: 0 done, 2 a mistake in what was given (one line says which), 69 another rank or host was lost, 73 the cells are done
but their page could not be made (74: the disk is full), else something failed; the journal stays: the same command goes on.
"""

import contextlib
import dataclasses
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_stability.console import agree, quiet_libraries, run_script

quiet_libraries()

from ds_stability.errors import UserError  # noqa: E402
from ds_stability.eval.command import check, run_parser  # noqa: E402
from ds_stability.eval.suite import Suite  # noqa: E402
from ds_stability.launch_environment import complete_environment  # noqa: E402
from ds_stability.safe_text import safe_line  # noqa: E402

SEEN_SECONDS = 10.0  # a network file system may show a new file late


@dataclasses.dataclass(frozen=True)
class Plan:
    """One model of the command. `done`: its cell is complete and is left as it is."""

    cell_id: str
    model: Any  # cell.ModelPath
    source: Any  # texts.TextSource
    identity: dict[str, Any]
    done: bool


class Clock:
    """Seconds by phase, for cell.json."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 3), now


def require_shared(output_dir: Path, ranks: Any) -> None:
    """All ranks must see one folder: their journals are merged there.

    Raises:
        UserError: a rank does not see what rank 0 wrote, or the folder cannot be written.
    """
    def write() -> str:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            name = f".seen-{secrets.token_hex(8)}"
            (output_dir / name).touch()
        except OSError as error:
            raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror})") from None
        return name

    token = output_dir / ranks.from_first(write)
    deadline = time.monotonic() + SEEN_SECONDS
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [rank for rank, seen in enumerate(ranks.all_say(token.exists())) if not seen]
    if ranks.is_first:
        token.unlink(missing_ok=True)
    if blind:
        raise UserError(f"--output_dir {output_dir}: rank {blind[0]} does not see the files of rank 0 there; give a folder on "
                        "a file system that all nodes share")  # fmt: skip


def plan_cells(args: Any, suite: Suite, device_kind: str) -> list[Plan]:
    """What to do for each model, before any is loaded; rank 0 only.

    Raises:
        UserError: two cells of one id, a model that is not there, or a folder that holds other results.
    """
    from ds_stability.eval.cell import CellDir, cell_ids, file_sha, high_frequency_file, resolve_model

    suite.require_files()
    models = _once([resolve_model(model) for model in args.models], args.cell_names)
    ids = cell_ids(models, args.cell_names)
    from ds_stability.eval.loading import fingerprint
    from ds_stability.eval.results import SCORES_VERSION
    from ds_stability.eval.tasks import files_fingerprint
    from ds_stability.eval.texts import TextSource
    from ds_stability.run_dir import RunDir

    if suite.downstream.tasks:
        from ds_stability.eval.downstream import check_downstream

        check_downstream(suite.downstream.tasks, args.trust_remote_code)
    plans = []
    for cell_id, model in zip(ids, models, strict=True):
        run = Path(args.text_from) if args.text_from is not None else model.run
        manifest = None if run is None else RunDir(run).read_manifest()
        source = TextSource.of_run(manifest, str(run or f"--model {model.given}"), args.held_out_file, args.train_file)
        identity = {
            "suite": suite.fingerprint(), "seeds": list(args.seeds), "model": fingerprint(model.load),
            "texts": source.fingerprint(), "task_files": files_fingerprint(suite),
            "high_frequency_set": file_sha(high_frequency_file(model, args.reference_file)), "device": device_kind,
            "scores_version": SCORES_VERSION,
        }  # fmt: skip
        plans.append(Plan(cell_id, model, source, identity, CellDir(args.output_dir, cell_id).check(identity)))
    _warn_of_sets(plans)
    return plans


def _once(models: list[Any], names: list[str] | None) -> list[Any]:
    """`models` without those that were given before (in other words, perhaps), which stderr names; with `names` for each: all."""
    places = [os.path.realpath(model.load) if os.path.isdir(model.load) else model.load for model in models]
    kept = [number for number, place in enumerate(places) if names is not None or places.index(place) == number]
    for number in set(range(len(models))) - set(kept):
        print(safe_line(f"warning: --model {models[number].given} is given twice (as {models[places.index(places[number])].given}): "
                        "the second is left out"), file=sys.stderr)  # fmt: skip
    return [models[number] for number in kept]


def _warn_of_sets(plans: list[Plan]) -> None:
    sets = {plan.identity["high_frequency_set"] for plan in plans}
    if len(sets) > 1:
        print(f"warning: the models have {len(sets)} different high-frequency sets, so that their shares cannot be compared; give "
              "one with --reference_file", file=sys.stderr)  # fmt: skip


def check_cells(plans: list[Plan], args: Any, suite: Suite) -> None:
    """Tokenizer, high-frequency set and texts of every model, before the first is evaluated; rank 0 only.

    Raises:
        UserError: what would have stopped a later cell, with the cell's name.
    """
    from ds_stability.eval.loading import describe
    from ds_stability.eval.tasks import check_synthetic, high_frequency

    different: dict[tuple, tuple[Plan, Any]] = {}
    for plan in plans:
        if not plan.done:
            with _naming(plan, plans):
                described = describe(plan.model.load, args.trust_remote_code)
                high_frequency(args.reference_file, described)
                different.setdefault(_texts_key(plan, described), (plan, described))
    for plan, described in reversed(different.values()):  # the first cell's texts are those that stay
        with _naming(plan, plans):
            texts_of(plan, suite, described)
            check_synthetic(suite, plan.source)


@contextlib.contextmanager
def _naming(plan: Plan, plans: list[Plan]) -> Iterator[None]:
    """A mistake names its cell, where there are several."""
    try:
        yield
    except UserError as error:
        raise UserError(f"cell {plan.cell_id}: {error}" if len(plans) > 1 else str(error)) from error


_last_texts: dict[tuple, Any] = {}


def _texts_key(plan: Plan, model: Any) -> tuple:
    from ds_stability.data.tokenizer import tokenizer_hash

    return plan.identity["texts"], plan.source.spec, tokenizer_hash(model.tokenizer), model.vocab_size, model.context_length


def texts_of(plan: Plan, suite: Suite, loaded: Any) -> Any:
    """The texts of a cell. The cells of a sweep share theirs: those of the last cell are kept, by all that they depend on."""
    from ds_stability.eval.texts import make_texts

    key = _texts_key(plan, loaded)
    if key not in _last_texts:
        _last_texts.clear()
        _last_texts[key] = make_texts(plan.source, suite, loaded.tokenizer, loaded.vocab_size, loaded.context_length)
    return _last_texts[key]


def evaluate(plan: Plan, args: Any, suite: Suite, ranks: Any, place: Any) -> None:
    """One cell, from the model to DONE. Call on every rank."""
    from ds_stability.data.tokenizer import tokenizer_hash
    from ds_stability.eval.cell import CellDir
    from ds_stability.eval.results import all_measured, scores
    from ds_stability.eval.tasks import build_tasks, high_frequency, load_model, run_downstream, scoring_context
    from ds_stability.eval.work import merged, run_units

    cell, clock = CellDir(args.output_dir, plan.cell_id), Clock()
    if ranks.from_first(lambda: cell.take(plan.identity)):
        return  # another process has finished it since
    try:
        loaded = agree(lambda: load_model(plan.model.load, args, suite, place))
        frequent = agree(lambda: high_frequency(args.reference_file, loaded))
        texts = ranks.from_first(lambda: texts_of(plan, suite, loaded))
        context = scoring_context(loaded, frequent, texts) if place.works else None
        tasks = agree(lambda: build_tasks(suite, loaded, texts, args, context, plan.source) if place.works else [])
        clock.lap("loading")
        run_units(tasks, cell.journal, cell.scratch, ranks, plan.cell_id, place.works)
        clock.lap("units")
        downstream = run_downstream(suite, loaded, cell, ranks, args.gpus_per_model)
        clock.lap("downstream")

        def finish() -> None:
            records = merged(tasks, cell.journal)
            cell.write_records(records, list(suite.parsed_decodings()))
            cell.write_prompts(texts.prompts)
            measured = all_measured(tasks, records, cell.scratch, context, texts.prompts, suite) + downstream
            scored = scores(plan.cell_id, measured)
            clock.lap("measuring")
            facts = {**texts.facts, "tokenizer": tokenizer_hash(loaded.tokenizer)}
            cell.finish(describe_cell(plan, args, suite, ranks, place, facts, clock.seconds), scored, measured)

        ranks.from_first(finish)
    finally:
        cell.unlock()


def describe_cell(plan: Plan, args: Any, suite: Suite, ranks: Any, place: Any, texts: dict, seconds: dict) -> dict[str, Any]:
    """cell.json: what was evaluated, how, on what, and how long it took."""
    from ds_stability.eval.cell import CELL_VERSION, describe_run, high_frequency_file, model_type
    from ds_stability.run_dir import git_revision, package_versions, utc_now

    file = high_frequency_file(plan.model, args.reference_file)
    return {
        "version": CELL_VERSION, "id": plan.cell_id, "model": plan.model.given, "model_fingerprint": plan.identity["model"],
        "suite": suite.to_dict(), "suite_fingerprint": plan.identity["suite"], "seeds": list(args.seeds),
        "run": describe_run(plan.model), "architecture": model_type(plan.model.load), "identity": plan.identity, "texts": texts,
        "high_frequency": {"file": None if file is None else str(file), "sha": plan.identity["high_frequency_set"]},
        "world_size": ranks.world_size, "device": place.kind, "finished_at": utc_now(), "seconds": seconds,
        "versions": package_versions(), "git": git_revision(os.path.dirname(__file__)),
        "settings": {key: value for key, value in vars(args).items() if key not in ("models", "local_rank", "suite", "seeds")},
    }  # fmt: skip


def main(argv: list[str]) -> None:
    complete_environment()
    args = run_parser().parse_args(argv)
    check(args)
    suite = Suite.load(args.suite).changed(dtype=args.dtype, backend=args.backend)

    import torch  # after the checks of what was typed, which take no time

    from ds_stability.eval.ranks import Ranks
    from ds_stability.eval.tasks import find_place

    if not torch.cuda.is_available():
        torch.set_num_threads(suite.threads)  # sums depend on it, and ranks must not
    ranks = Ranks.start()
    try:
        place = agree(lambda: find_place(ranks, args.gpus_per_model))
        require_shared(Path(args.output_dir), ranks)
        plans = ranks.from_first(lambda: plan_cells(args, suite, place.kind))
        ranks.from_first(lambda: check_cells(plans, args, suite))
        for number, plan in enumerate(plans, 1):
            if ranks.is_first:
                print(f"cell {number} of {len(plans)}: {plan.cell_id}{' is done already' if plan.done else ''}", file=sys.stderr, flush=True)
            if not plan.done:
                evaluate(plan, args, suite, ranks, place)
    except BaseException as error:
        ranks.fail(error)
        raise
    ranks.stop()
    if ranks.is_first:
        from ds_stability.eval.conclusion import conclude_evaluation

        conclude_evaluation(args)


if __name__ == "__main__":
    sys.exit(run_script(main))
