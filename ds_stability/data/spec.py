"""What to train on: `DataSpec`, its checks that need no data, and the `Document` that every reader yields."""

import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import UserError

BUILTIN_CORPORA = ("builtin:prose", "builtin:synthetic")
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + (".parquet",)
TEXT_DOCUMENTS = ("file", "paragraph", "line")
PACKINGS = ("auto", "pack", "pad")
TRUNCATIONS = ("auto", "split", "drop", "keep_start", "keep_end")


@dataclass(frozen=True)
class Document:
    """One training document: a text, or a chat; `where` names its origin in error messages.

    messages and tools are in the form of messages.py; `masked` numbers the turns, from 0, that are not to be supervised.
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    where: str = ""
    tools: list[dict[str, Any]] | None = None
    masked: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataSpec:
    """Where documents come from and how they are read.

    One source: `train_files`, or `dataset_name` (a hub data set, a local data set folder, or one of BUILTIN_CORPORA).
    Held-out data: `validation_files`, or `dataset_validation_split`, else `validation_split_percentage` of the training
    documents. `text_document` says what a document of a plain text file is; `unwrap` joins hard-wrapped lines.
    `packing` "pad" gives every document rows of its own, "auto" is "pack" where nobody asked the model; `truncation` says what
    happens to a document longer than a block ("auto": chats are dropped, texts split). `max_train_samples` and
    `max_eval_samples` count blocks. `shuffle_buffer` (blocks) serves streaming only.
    """

    train_files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_validation_split: str | None = None
    dataset_revision: str | None = None
    text_field: str = "text"
    messages_field: str = "messages"
    text_document: str = "file"
    unwrap: bool = False
    assistant_only_loss: bool = False
    validation_split_percentage: float = 5.0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 0
    packing: str = "auto"
    truncation: str = "auto"
    seed: int = 0
    synthetic_tokens: int = 1_000_000
    synthetic_seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def check_kinds(self) -> None:
        """UserError for a value of another kind: of a spec that was read from a file."""
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            kinds = (int,) if field.name.startswith("max_") else (str,) if default is None else (type(default),)
            kinds += (int,) if kinds == (float,) else ()
            if not ((value is None and default is None) or (isinstance(value, kinds) and isinstance(value, bool) == (kinds == (bool,)))):
                raise UserError(f"{field.name}: {value!r} is no {kinds[0].__name__}")
        self._check_values()

    def check(self) -> None:
        """Raise UserError for whatever is wrong before any file is read or any process group is started."""
        self._check_source()
        self._check_values()
        for flag, files in (("--train_file", self.train_files), ("--validation_file", self.validation_files)):
            for path in files:
                check_file(path, flag)
                if self.assistant_only_loss and file_kind(path) == "text":
                    raise UserError(f"{flag} {path}: plain text has no assistant turns; drop --assistant_only_loss or "
                                    "give chat messages as JSONL or Parquet")

    def _check_source(self) -> None:
        if self.train_files and self.dataset_name:
            raise UserError(f"both --train_file ({self.train_files[0]}) and --dataset_name ({self.dataset_name}) are "
                            "given; drop one of them")
        if not self.train_files and not self.dataset_name:
            raise UserError("no training data is given; pass --train_file FILE or --dataset_name NAME (hub name, "
                            f"{', '.join(BUILTIN_CORPORA)})")
        name = self.dataset_name or ""
        if name.startswith("builtin:") and name not in BUILTIN_CORPORA:
            raise UserError(f"--dataset_name {name}: no such built-in corpus; allowed are {', '.join(BUILTIN_CORPORA)}")
        if name.startswith("builtin:") and self.assistant_only_loss:
            raise UserError(f"--dataset_name {name} has no assistant turns; drop --assistant_only_loss")
        if self.dataset_validation_split and (self.train_files or name.startswith("builtin:")):
            raise UserError("--dataset_validation_split needs a hub data set in --dataset_name; use --validation_file or "
                            "--validation_split_percentage instead")

    def _check_values(self) -> None:
        if self.text_document not in TEXT_DOCUMENTS:
            raise UserError(f"--text_document {self.text_document!r}: allowed are {', '.join(TEXT_DOCUMENTS)}")
        for name, value, allowed in (("packing", self.packing, PACKINGS), ("truncation", self.truncation, TRUNCATIONS)):
            if value not in allowed:
                raise UserError(f"--{name} {value!r}: allowed are {', '.join(allowed)}")
        if self.unwrap and self.text_document == "line":
            raise UserError("--unwrap joins lines and --text_document line splits at them; drop one of the two flags")
        if not 0 <= self.validation_split_percentage < 100:
            raise UserError(f"--validation_split_percentage {self.validation_split_percentage}: allowed is 0 (no "
                            "held-out data) up to, but not including, 100")
        for name, value in (("max_train_samples", self.max_train_samples), ("max_eval_samples", self.max_eval_samples)):
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: allowed is a number of blocks from 1; leave the flag out for all")
        if self.shuffle_buffer < 0:
            raise UserError(f"--shuffle_buffer {self.shuffle_buffer}: allowed is a number of blocks from 0 (none)")
        if self.synthetic_tokens < 1:
            raise UserError(f"--synthetic_tokens {self.synthetic_tokens}: allowed is a number of tokens from 1")


def file_kind(path: str) -> str:
    """"text", "json" or "parquet" by suffix (`.gz` is looked through for the first two). UserError for any other."""
    name = os.path.basename(path).lower()
    suffix = os.path.splitext(name.removesuffix(".gz"))[1]
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in JSON_SUFFIXES:
        return "json"
    if suffix == ".parquet" and not name.endswith(".gz"):
        return "parquet"
    raise UserError(f"{path}: unknown file extension; allowed are {', '.join(SUFFIXES)} (text and JSON also with .gz)")


def check_file(path: str, flag: str) -> None:
    """Raise UserError unless `path` is a readable, non-empty regular file of a known kind."""
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: no such file")
    if os.path.isdir(path):
        raise UserError(f"{flag} {path}: is a directory; give the files in it, or the folder as --dataset_name")
    file_kind(path)
    if os.path.getsize(path) == 0:
        raise UserError(f"{flag} {path}: the file is empty (0 bytes); give a file with text in it")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: the file may not be read by this user; change its permissions")
