"""What a cell needs to be worked on: the model on its device, the tasks of a suite, and downstream tasks."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ds_stability.data.frequency import HighFrequencySet
from ds_stability.data.tokenizer import tokenizer_hash
from ds_stability.errors import UserError

from .cell import CellDir, file_sha
from .ranks import Ranks
from .records import Measured, ScoringContext, Task
from .suite import Suite
from .texts import Texts, TextSource


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank's model lives; `works` is False on ranks whose GPU belongs to another rank's model."""

    device: str
    kind: str
    works: bool


def find_place(ranks: Ranks, gpus_per_model: int) -> Place:
    """cuda:LOCAL_RANK, with `gpus_per_model` > 1 the first of that many GPUs; the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        if gpus_per_model > 1:
            raise UserError(f"--gpus_per_model {gpus_per_model}: there is no GPU here; leave it out")
        return Place("cpu", "cpu", True)
    if torch.cuda.device_count() % gpus_per_model:
        raise UserError(f"--gpus_per_model {gpus_per_model}: does not divide the {torch.cuda.device_count()} GPUs of this machine")
    kind = torch.cuda.get_device_name(ranks.local_rank)
    return Place(f"cuda:{ranks.local_rank}", kind, ranks.local_rank % gpus_per_model == 0)


def files_fingerprint(suite: Suite) -> str:
    """sha256 (hex) of the files that a suite names: prompts, and the items of its exact-match task."""
    content: list[Any] = [file_sha(None if suite.prompts.file is None else Path(suite.prompts.file))]
    if suite.exact_match is not None:
        from .exact_match import load_items

        content += [dataclasses.astuple(item) for item in load_items(suite.exact_match.task)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_model(path: str, args: Any, suite: Suite, place: Place) -> Any:
    """eval/loading.Loaded, or None on a rank that only waits."""
    from .loading import load

    if not place.works:
        return None
    return load(path, place.device, dtype=suite.dtype, max_memory_gib=args.max_memory_gib, gpus_per_model=args.gpus_per_model,
                trust_remote_code=args.trust_remote_code)  # fmt: skip


def high_frequency(reference_file: str | None, loaded: Any) -> HighFrequencySet | None:
    """The set of the file given, else of the model's folder, else None (the share is then null)."""
    if loaded is None:
        return None
    if reference_file is None:
        return loaded.high_frequency
    try:
        return HighFrequencySet.load(reference_file, loaded.vocab_size, tokenizer_hash(loaded.tokenizer))
    except UserError as error:  # named as the flag that gave it
        raise UserError(str(error).replace("high_frequency_file", "--reference_file", 1)) from error


def scoring_context(loaded: Any, frequent: HighFrequencySet | None, texts: Texts) -> ScoringContext:
    return ScoringContext(
        vocab_size=loaded.vocab_size,
        special_ids=tuple(loaded.special_ids),
        high_frequency_ids=None if frequent is None else frequent.token_ids,
        high_frequency_words=texts.high_frequency_words,
        reference_ids=texts.reference_ids,
        reference_texts=texts.reference_texts,
        training_unigrams=texts.training_unigrams,
        training_bigrams=texts.training_bigrams,
    )


def build_tasks(suite: Suite, loaded: Any, texts: Texts, args: Any, context: ScoringContext, source: TextSource) -> list[Task]:
    """The tasks of a cell, in the order of their units; see records.Task."""
    from .backends import make_backend
    from .generation_task import GenerationTask
    from .minimal_pairs import MinimalPairsTask
    from .scoring import ScoringTask

    decodings = list(suite.parsed_decodings().values())
    generator = make_backend(suite.backend, loaded, decodings, args.gpus_per_model, args.trust_remote_code)
    tasks: list[Task] = []
    if decodings:
        tasks.append(GenerationTask(generator, loaded.tokenizer, list(texts.prompts), decodings, args.seeds,
                                    suite.samples_per_prompt, suite.max_new_tokens, suite.batch_size, context, suite.metrics))  # fmt: skip
    for split, documents, windows in (("held_out", texts.held_out, suite.text.held_out_windows),
                                      ("train", texts.train, suite.text.train_windows)):  # fmt: skip
        if documents and windows:
            tasks.append(ScoringTask(loaded, documents, split, suite.text.window, suite.batch_size, windows,
                                     context.high_frequency_ids))  # fmt: skip
    if suite.minimal_pairs.enabled:
        tasks.append(MinimalPairsTask(loaded, suite.minimal_pairs.per_phenomenon, suite.batch_size))
    if suite.exact_match is not None:
        tasks.append(_exact_match(suite, generator, loaded, args.seeds))
    check_synthetic(suite, source)
    if suite.synthetic is True or (suite.synthetic == "auto" and source.is_synthetic):
        tasks.append(_synthetic(suite, loaded, source))
    return tasks


def _exact_match(suite: Suite, generator: Any, loaded: Any, seeds: list[int]) -> Task:
    from .exact_match import MAX_NEW_TOKENS, ExactMatchTask, load_items

    asked = suite.exact_match
    return ExactMatchTask(generator, loaded.tokenizer, load_items(asked.task, asked.limit), seeds, samples=asked.samples,
                          max_new_tokens=asked.max_new_tokens or MAX_NEW_TOKENS, batch_size=suite.batch_size,
                          context_length=loaded.context_length, source=Path(asked.task).stem)  # fmt: skip


def check_synthetic(suite: Suite, source: TextSource) -> None:
    """UserError if the suite wants exact scores of a model that the synthetic language's truth does not apply to."""
    if suite.synthetic is True and not source.is_synthetic:
        raise UserError(f"{source.where}: was not trained on builtin:synthetic, and suite {suite.name} has synthetic: true; give a "
                        "run that was, or set it to auto or false")  # fmt: skip


def _synthetic(suite: Suite, loaded: Any, source: TextSource) -> Task:
    from ds_stability.data.synthetic import SyntheticLanguage

    from .synthetic_scores import SyntheticTask, training_sentences

    language = SyntheticLanguage(seed=source.spec.synthetic_seed)
    # Its own batch size: batches are the units of its intervals, and its sentences are short.
    return SyntheticTask(loaded, language, training_sentences(source.spec, language, source.trained_tokens))


def run_downstream(suite: Suite, loaded: Any, cell: CellDir, ranks: Ranks, gpus_per_model: int) -> list[Measured]:
    """The figures of lm-eval's tasks. Every rank calls it; ranks without a model only take part in the collectives."""
    if not suite.downstream.tasks:
        return []
    from .downstream import run_lm_eval

    if gpus_per_model == 1:
        tokenizer, context_length = loaded.tokenizer, loaded.context_length
    else:  # ranks that only wait have loaded nothing
        tokenizer, context_length = ranks.from_first(lambda: (loaded.tokenizer, loaded.context_length))
    settings = {**suite.downstream.model_dump(), "batch_size": suite.batch_size}
    return run_lm_eval(None if loaded is None else loaded.model, tokenizer, settings, cell.path, ranks.rank, ranks.world_size,
                       context_length=context_length, store=ranks.store if ranks.world_size > 1 else None)  # fmt: skip
