"""The texts of a cell: held-out and training documents, prompts with their human continuations, references, counts.

Held-out documents are exactly those that the run did not train on: they are split off again as its manifest says, and the
corpus must still be the same bytes. A model that is no run of ours needs --held_out_file (or --text_from RUN).
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ds_stability.data.chat import render_chat
from ds_stability.data.fingerprint import corpus_fingerprint, file_fingerprint
from ds_stability.data.loading import separate_validation
from ds_stability.data.readers import read_documents
from ds_stability.data.spec import DataSpec, Document, check_file
from ds_stability.data.splitting import is_held_out, split_stream
from ds_stability.data.tokenizer import special_token_ids
from ds_stability.data.tokens import encode_documents
from ds_stability.errors import UserError

from .prompts import Cut, cut_prompts, prompts_from_file
from .records import Bigrams, Prompt
from .suite import Suite

# Enough for any suite; a corpus of terabytes is not read to its end for an evaluation.
HELD_OUT_CHARACTERS = 2_000_000
TRAIN_CHARACTERS = 10_000_000
COVERAGE = 0.5  # of the high-frequency words, as of the high-frequency tokens


@dataclass(frozen=True)
class TextSource:
    """Where a cell's texts come from.

    Attributes:
        spec: the training data of the run, None for a model that is no run of ours.
        recorded: corpus fingerprint in the run's manifest.
        held_out_files, train_files: files that take the place of the run's held-out and training text.
        trained_tokens: the run trained on so many tokens from the front only (--max_train_samples); None: on all.
        where: what to name in messages.
    """

    spec: DataSpec | None = None
    recorded: str | None = None
    held_out_files: tuple[str, ...] = ()
    train_files: tuple[str, ...] = ()
    trained_tokens: int | None = None
    where: str = "the model"

    @classmethod
    def of_run(cls, manifest: dict[str, Any] | None, where: str, held_out_files: Sequence[str] = (),
               train_files: Sequence[str] = ()) -> "TextSource":  # fmt: skip
        """From RUN/manifest.json (None: no run) and flags. UserError for a manifest or files that cannot be used."""
        for flag, files in (("--held_out_file", held_out_files), ("--train_file", train_files)):
            for file in files:
                check_file(file, flag)
        files = {"held_out_files": tuple(held_out_files), "train_files": tuple(train_files), "where": where}
        if manifest is None:
            return cls(**files)
        try:
            data = manifest["data"]
            values, block_size, recorded = dict(data["spec"]), int(data["block_size"]), str(data["corpus_fingerprint"])
            here = Path(manifest.get("working_directory", "."))
            for key in ("train_files", "validation_files"):
                values[key] = tuple(str(here / file) for file in values[key])
            spec = DataSpec(**values)
            spec.check_kinds()
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{where}: its manifest.json does not say what it was trained on; give --held_out_file and "
                            "--train_file") from None  # fmt: skip
        tokens = None if spec.max_train_samples is None else spec.max_train_samples * block_size
        return cls(spec=spec, recorded=recorded, trained_tokens=tokens, **files)

    @property
    def uses_run(self) -> bool:
        return self.spec is not None and not (self.held_out_files and self.train_files)

    @property
    def has_train(self) -> bool:
        return bool(self.train_files) or self.spec is not None

    @property
    def is_synthetic(self) -> bool:
        """Whether the run was trained on the synthetic language."""
        return self.spec is not None and self.spec.dataset_name == "builtin:synthetic"

    def fingerprint(self) -> str:
        """sha256 (hex) of the bytes of all texts and of how they are read.

        Raises:
            UserError: a file is gone, or is not what the run was trained on.
        """
        content: dict[str, Any] = {
            "held_out": [file_fingerprint(file) for file in self.held_out_files],
            "train": [file_fingerprint(file) for file in self.train_files],
            "trained_tokens": self.trained_tokens,
            "reading": [self.spec.text_document, self.spec.unwrap, self.spec.text_field] if self.spec else None,
        }
        if self.uses_run:
            content["corpus"] = self._corpus()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _corpus(self) -> str:
        advice = "give --held_out_file and --train_file, or --text_from another run"
        for file in (*self.spec.train_files, *self.spec.validation_files):
            if not Path(file).is_file():
                raise UserError(f"{self.where}: its training data {file} is no longer there; {advice}")
        found = corpus_fingerprint(self.spec)
        if self.recorded is not None and found != self.recorded:
            raise UserError(f"{self.where}: its training data has changed since (fingerprint {self.recorded[:12]} then, "
                            f"{found[:12]} now), so what was held out cannot be told; {advice}")
        return found

    def documents(self) -> tuple[list[Document], list[Document]]:
        """(held-out, training) documents, up to HELD_OUT_CHARACTERS and TRAIN_CHARACTERS of each, in reading order."""
        held_out, train = run_documents(self.spec) if self.uses_run else ([], [])
        if self.held_out_files:
            held_out = _first(read_documents(self._reading(self.held_out_files)), HELD_OUT_CHARACTERS)
        if self.train_files:
            train = _first(read_documents(self._reading(self.train_files)), TRAIN_CHARACTERS)
        return held_out, train

    def _reading(self, files: tuple[str, ...]) -> DataSpec:
        """Files are read as the run's own were: what a document is, and whether lines are joined."""
        return dataclasses.replace(self.spec or DataSpec(), train_files=files, validation_files=(), dataset_name=None,
                                   dataset_validation_split=None, assistant_only_loss=False, streaming=False)  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """What a cell's tasks work on; made on one rank, sent to all.

    Attributes:
        held_out, train: documents as text.
        references: human continuations other than those of the prompts, as (ids, text), for comparison.
        training_unigrams, training_bigrams: as in records.ScoringContext; None without training text.
        high_frequency_words: the words that make up half of the training text; None without any.
        facts: sizes and notes for cell.json.
    """

    prompts: tuple[Prompt, ...]
    held_out: tuple[str, ...]
    train: tuple[str, ...]
    reference_ids: tuple[tuple[int, ...], ...] = ()
    reference_texts: tuple[str, ...] = ()
    training_unigrams: np.ndarray | None = None
    training_bigrams: Bigrams | None = None
    high_frequency_words: tuple[str, ...] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def run_documents(spec: DataSpec) -> tuple[list[Document], list[Document]]:
    """(held-out, training) documents of a run, split as `ds_stability.data.load_blocks` splits them."""
    separate = separate_validation(spec)
    fraction = 0.0 if separate else spec.validation_split_percentage / 100
    if spec.streaming:  # a stream is split by key alone, however few its documents
        stream = ((document, is_held_out(document, fraction, spec.seed)) for document in read_documents(spec))
    else:
        stream = split_stream(read_documents(spec), fraction, spec.seed)[1]
    held_out, train, sizes = [], [], [0, 0]
    wanted = HELD_OUT_CHARACTERS if fraction else 0
    for document, is_eval in stream:
        limit = HELD_OUT_CHARACTERS if is_eval else TRAIN_CHARACTERS
        if sizes[is_eval] < limit:
            (held_out if is_eval else train).append(document)
            sizes[is_eval] += _size(document)
        if sizes[0] >= TRAIN_CHARACTERS and sizes[1] >= wanted:
            break
    if separate:
        held_out = _first(read_documents(spec, "validation"), HELD_OUT_CHARACTERS)
    return held_out, train


def make_texts(source: TextSource, suite: Suite, tokenizer: Any, vocab_size: int, context_length: int | None) -> Texts:
    """Read, split and cut everything that a cell needs.

    Raises:
        UserError: no held-out text where the suite needs some, no room for prompts in the context, or a wrong file.
    """
    held_out, train = source.documents()
    held_out_texts = [document_text(document, tokenizer) for document in held_out]
    train_texts = [document_text(document, tokenizer) for document in train]
    _require(source, suite, held_out_texts)
    prompts, references = _prompts(suite, held_out_texts, tokenizer)
    check_context(prompts, suite, context_length)
    kept = references or [prompt for prompt in prompts if prompt.reference_ids]
    train_texts, unigrams, bigrams = _trained(train_texts, source.trained_tokens, tokenizer, vocab_size)
    words = high_frequency_words(train_texts) if train_texts else None
    facts = {
        "prompts": len(prompts), "prompts_asked": suite.prompts.count, "references": len(kept),
        "references_disjoint_from_prompts": bool(references), "held_out_documents": len(held_out_texts),
        "held_out_characters": sum(map(len, held_out_texts)), "train_documents": len(train_texts),
        "train_characters": sum(map(len, train_texts)),
        "train_tokens_counted": None if unigrams is None else int(unigrams.sum()),
        "high_frequency_words": None if words is None else len(words),
        # What the report compares by: unit k of two cells is the same one only if its text is.
        "prompts_sha": texts_sha(prompt.text for prompt in prompts), "held_out_sha": texts_sha(held_out_texts),
        "train_sha": texts_sha(train_texts),
    }  # fmt: skip
    return Texts(tuple(prompts), tuple(held_out_texts), tuple(train_texts), tuple(p.reference_ids for p in kept),
                 tuple(p.reference_text for p in kept), unigrams, bigrams, words, facts)  # fmt: skip


def texts_sha(texts: Iterable[str]) -> str:
    """sha256 (hex) of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _prompts(suite: Suite, held_out: list[str], tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts, windows of held-out text for comparison that hold no prompt: as many as there is text for)."""
    cut = Cut([], [])
    if held_out:
        cut = cut_prompts(held_out, tokenizer, suite.prompts.count, suite.prompts.tokens, suite.max_new_tokens)
    if suite.prompts.source == "file":
        prompts = prompts_from_file(suite.prompts.file, tokenizer, suite.prompts.count, suite.max_new_tokens)
        return prompts, cut.prompts + cut.others
    # Too few windows left over would be another sample size: then the prompts' own continuations stand for human text.
    return cut.prompts, cut.others if 2 * len(cut.others) >= len(cut.prompts) else []


def _require(source: TextSource, suite: Suite, held_out: list[str]) -> None:
    needs = suite.prompts.source == "held_out" or suite.text.held_out_windows > 0
    if held_out or not needs:
        return
    why = "is no run of ours with a manifest.json" if source.spec is None else "was trained without held-out data"
    if source.held_out_files:
        raise UserError(f"--held_out_file {source.held_out_files[0]}: no document with any text in it")
    raise UserError(f"{source.where} {why}, and suite {suite.name} needs held-out text; give --held_out_file FILE or "
                    "--text_from RUN")  # fmt: skip


def check_context(prompts: Sequence[Prompt], suite: Suite, context_length: int | None) -> None:
    """Every prompt must leave room for `max_new_tokens` in the model's context."""
    if not prompts:
        raise UserError("there is no prompt: the held-out text has no document longer than "
                        f"prompts.tokens ({suite.prompts.tokens}); lower it or give more with --held_out_file")
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length = len(longest.token_ids)
    if context_length is not None and length + suite.max_new_tokens > context_length:
        raise UserError(f"prompt {longest.index + 1} has {length} tokens and suite {suite.name} asks for max_new_tokens "
                        f"{suite.max_new_tokens}, but the model's context is {context_length}; shorten the prompts or lower "
                        "max_new_tokens")  # fmt: skip


def document_text(document: Document, tokenizer: Any) -> str:
    """The text of a document; a chat as it is trained on."""
    if document.text is not None:
        return document.text
    if tokenizer.chat_template is None:
        raise UserError(f"{document.where}: has chat messages, but the model's tokenizer has no chat template; give text "
                        "with --held_out_file and --train_file")  # fmt: skip
    return render_chat(document, tokenizer)


def _trained(texts: list[str], limit: int | None, tokenizer: Any, vocab_size: int) -> tuple[list[str], np.ndarray | None, Bigrams | None]:
    """(the texts up to `limit` tokens, counts of their tokens without special ones or None, likewise of pairs in a text)."""
    if not texts:
        return [], None, None
    pairs: list[np.ndarray] = []
    counts, kept, left = np.zeros(vocab_size, dtype=np.int64), [], limit
    special = np.array(special_token_ids(tokenizer))
    for text, encoded in zip(texts, encode_documents(_documents(texts), tokenizer), strict=False):
        ids = np.asarray(encoded.ids)
        if left is not None and len(ids) > left:
            ids = ids[:left]
            text = tokenizer.decode(ids, skip_special_tokens=True)
        usual = ~np.isin(ids, special) & (ids < vocab_size)
        counts += np.bincount(ids[usual], minlength=vocab_size)
        both = usual[:-1] & usual[1:]
        pairs.append(ids[:-1][both].astype(np.int64) * vocab_size + ids[1:][both])
        kept.append(text)
        if left is not None:
            left -= len(ids)
            if left <= 0:
                break
    keys, times = np.unique(np.concatenate(pairs), return_counts=True)
    return [text for text in kept if text], counts, (np.stack(np.divmod(keys, vocab_size), axis=1), times)


def high_frequency_words(texts: Iterable[str], coverage: float = COVERAGE) -> tuple[str, ...]:
    """The fewest most frequent words that make up `coverage` of all words, as for tokens; ties by spelling."""
    from .segments import words_of

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words_of(text))
    chosen, covered, total = [], 0, sum(counts.values())
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= coverage * total - 1e-9 * total:
            break
        chosen.append(word)
        covered += count
    return tuple(chosen)


def _documents(texts: Iterable[str]) -> Iterator[Document]:
    return (Document(text=text) for text in texts)


def _size(document: Document) -> int:
    return len(document.text) if document.text is not None else len(json.dumps(document.messages))


def _first(documents: Iterable[Document], characters: int) -> list[Document]:
    """Whole documents until there are so many characters."""
    chosen, size = [], 0
    for document in documents:
        chosen.append(document)
        size += _size(document)
        if size >= characters:
            break
    return chosen
