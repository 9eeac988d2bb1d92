"""A suite: everything that fixes what is measured of a model, read from YAML, with one-line errors.

    suite = Suite.load("quick")            # eval/suites/quick.yaml
    suite = Suite.load("my/suite.yaml")

Two cells are comparable if they were evaluated under the same suite. What a unit of work holds (its texts, its padding)
follows from the suite alone, so that results do not depend on how many ranks did the work.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from ds_stability.config_describe import KeyInfo, describe_model, translate
from ds_stability.config_errors import InvalidValue, did_you_mean, one_line, show_value
from ds_stability.errors import UserError
from ds_stability.safe_read import is_text, read_yaml

from .records import REFERENCE

SUITES = Path(__file__).parent / "suites"
MAX_COUNT = 10**9
MAX_NAME = 200


def _text(value: str) -> str:
    if not is_text(value):  # most are paths or names of files
        raise InvalidValue("", value, "a text without a NUL character")
    return value


_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
_Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
_Number = Annotated[int, Field(ge=0, le=MAX_COUNT)]
_Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_text)]
_DECODINGS_ALLOWED = "an object with one entry per decoding: name: null for a default one, or name: {kind: sample, top_p: 0.9}"


def _names(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise InvalidValue("", value, "a list of names, or null for all")
    for index, name in enumerate(value):
        if not isinstance(name, str) or not name or len(name) > MAX_NAME or not is_text(name):
            raise InvalidValue(f"[{index}]", name, f"a name of at most {MAX_NAME} characters")
        if name in value[:index]:
            raise InvalidValue(f"[{index}]", name, "a name that is not in the list yet")
    return list(value)


def _list(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise InvalidValue("", value, "a list of names ([] for none)")
    return _names(value)


def _decodings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidValue("", value, _DECODINGS_ALLOWED)
    for name, mapping in value.items():
        if not isinstance(name, str) or not (name.isidentifier() and name.isascii()) or name == REFERENCE or len(name) > MAX_NAME:
            raise InvalidValue("", name, f'named by letters, digits and _, other than "{REFERENCE}", for each decoding')
        if mapping is not None and not isinstance(mapping, dict):
            raise InvalidValue(f".{name}", mapping, "null for a default decoding, or an object such as {kind: greedy}")
    return dict(value)


def _synthetic(value: Any) -> bool | str:
    if isinstance(value, bool) or value == "auto":
        return value
    raise InvalidValue("", value, 'true, false, or "auto" (measure where the run was trained on builtin:synthetic)')


class _Section(BaseModel):
    model_config = _STRICT


class PromptsConfig(_Section):
    source: Literal["held_out", "file"] = Field(
        "held_out", description="cut prompts from held-out text, or read them from a file"
    )
    file: _Text | None = Field(None, description=".txt with a prompt a line, or .jsonl with prompt and reference")
    count: _Count = Field(64, description="prompts at most")
    tokens: _Number = Field(16, description="tokens of a prompt that is cut from text, the BOS token not counted")


class TextConfig(_Section):
    held_out_windows: _Number = Field(64, description="windows of held-out text to score at most; 0 = none")
    train_windows: _Number = Field(64, description="windows of training text to score at most; 0 = none")
    window: Annotated[int, Field(ge=2, le=MAX_COUNT)] = Field(256, description="tokens of a window")


class MinimalPairsConfig(_Section):
    enabled: bool = Field(True, description="score minimal pairs of English sentences")
    per_phenomenon: _Count = Field(60, description="pairs of each phenomenon")


class DownstreamConfig(_Section):
    tasks: Annotated[Any, PlainValidator(_list)] = Field(
        [], description="tasks of lm-evaluation-harness, ours or its own, by name (extra `lm-eval`)",
        json_schema_extra={"allowed": "a list of names ([] for none)"},
    )  # fmt: skip
    limit: _Count | None = Field(None, description="items of a task at most; null = all")
    num_fewshot: _Number | None = Field(None, description="examples before each item; null = what the task says")


class ExactMatchConfig(_Section):
    task: _Text = Field(description="file of a generative task, or the name of one in eval/suites/tasks")
    samples: Annotated[int, Field(ge=1, le=1000)] = Field(8, description="samples of an item")
    limit: _Count | None = Field(None, description="items at most; null = all")
    max_new_tokens: _Count | None = Field(None, description="tokens of an answer at most; null = 16")


class Suite(_Section):
    """What is measured of a model. Build it with `load` or `parse`, for one-line errors."""

    name: _Text = Field(description="name of the suite")
    batch_size: _Count = Field(16, description="texts of a unit of work, which are generated or scored together")
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="threads of a process on CPU")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the model's weights; auto = as saved"
    )
    max_new_tokens: _Count = Field(64, description="tokens of a sample at most")
    samples_per_prompt: _Count = Field(1, description="samples of each prompt per seed (greedy and beam search: always 1)")
    backend: Literal["static", "continuous", "vllm"] = Field(
        "static", description="how samples are generated; only static promises the same bytes on every run"
    )
    decodings: Annotated[Any, PlainValidator(_decodings)] = Field(
        {"greedy": None, "sample": None, "top_p_95": None, "top_k_40": None, "beam_4": None},
        description="decodings by name; null = the default one of this name",
        json_schema_extra={"allowed": _DECODINGS_ALLOWED},
    )
    prompts: PromptsConfig = Field(PromptsConfig(), description="what is continued")
    text: TextConfig = Field(TextConfig(), description="teacher-forced scores")
    metrics: Annotated[Any, PlainValidator(_names)] = Field(
        None, description="metrics of samples; null = all",
        json_schema_extra={"allowed": "a list of names, or null for all"},
    )  # fmt: skip
    minimal_pairs: MinimalPairsConfig = Field(MinimalPairsConfig(), description="grammatical minimal pairs")
    synthetic: Annotated[Any, PlainValidator(_synthetic)] = Field(
        "auto", description="exact scores on the synthetic language",
        json_schema_extra={"allowed": 'true, false, or "auto"'},
    )  # fmt: skip
    downstream: DownstreamConfig = Field(DownstreamConfig(), description="lm-evaluation-harness")
    exact_match: ExactMatchConfig | None = Field(None, description="a generative task scored by exact match; null = none")

    @classmethod
    def load(cls, name: str) -> "Suite":
        """The suite eval/suites/NAME.yaml, or the one in a YAML file (a name that ends in .yaml or .yml, or has a /).

        Raises:
            UserError: no such suite, no YAML, not UTF-8, or a wrong suite.
        """
        path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
        if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
            known = sorted(file.stem for file in SUITES.glob("*.yaml"))
            near = did_you_mean(name, known)
            raise UserError(f"--suite {one_line(name, 200)}: no such suite{f'; did you mean {near}?' if near else ''}; give "
                            f"one of {', '.join(known)}, or a YAML file")
        return cls.parse(read_yaml(path, f"--suite {path}"), f"--suite {path}", base=path.parent)

    @classmethod
    def parse(cls, block: Any, source: str = "suite", base: Path | None = None) -> "Suite":
        """Validate a mapping; `base` is the folder that relative files in it are relative to.

        Raises:
            UserError: one line with the key, the value and what is allowed.
        """
        if not isinstance(block, dict):
            raise UserError(f"{source}: holds {show_value(block)}; a suite is a mapping with any of the keys "
                            f"{', '.join(cls.model_fields)}")
        if "bootstrap" in block:
            raise UserError(f"{source}: bootstrap is no key any more, as intervals are computed without resampling; take it out")
        try:
            suite = cls.model_validate(block)
        except ValidationError as error:
            raise UserError(_wrong(error, source)) from None
        return suite._located(source, base)._checked(source)

    def _located(self, source: str, base: Path | None) -> "Suite":
        """With absolute paths: a suite means the same wherever it is read again."""
        if base is None:
            return self
        update: dict[str, Any] = {}
        if self.prompts.file is not None:
            update["prompts"] = self.prompts.model_copy(update={"file": str((base / self.prompts.file).resolve())})
        if self.exact_match is not None and os.path.isfile(base / self.exact_match.task):
            update["exact_match"] = self.exact_match.model_copy(update={"task": str((base / self.exact_match.task).resolve())})
        return self.model_copy(update=update)

    def _checked(self, source: str) -> "Suite":
        if (self.prompts.source == "file") != (self.prompts.file is not None):
            raise UserError(f"{source}: prompts.source is {self.prompts.source} and prompts.file is "
                            f"{show_value(self.prompts.file)}; give both source: file and file: PATH, or neither")
        try:
            self.parsed_decodings()
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        if self.metrics is not None:
            _check_metrics(self.metrics, source)
        return self

    def parsed_decodings(self) -> dict[str, Any]:
        """Decoding by name, in the suite's order."""
        from .decoding import DEFAULT_DECODINGS, Decoding

        decodings = {}
        for name, mapping in self.decodings.items():
            if mapping is None and name not in DEFAULT_DECODINGS:
                near = did_you_mean(name, DEFAULT_DECODINGS)
                raise UserError(f"decodings.{name} is null, and no default decoding has this name"
                                f"{f'; did you mean {near}?' if near else ''}; defaults are {', '.join(DEFAULT_DECODINGS)}")
            decodings[name] = Decoding.parse(name, mapping)
        return decodings

    def require_files(self) -> None:
        """UserError, naming the key, if a file that the suite names cannot be read."""
        from ds_stability.data.spec import check_file

        from .exact_match import load_items

        if self.prompts.file is not None:
            check_file(self.prompts.file, f"suite {self.name}: prompts.file")
        if self.exact_match is not None:
            load_items(self.exact_match.task)

    def changed(self, **values: Any) -> "Suite":
        """This suite with other values where `values` holds one (None: as it is). UserError as in `parse`."""
        given = {key: value for key, value in values.items() if value is not None}
        return self.parse({**self.to_dict(), **given}, "suite") if given else self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every key present; `parse` reads them back to an equal object."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """sha256 (hex) of what the suite holds, its name aside."""
        content = {key: value for key, value in self.to_dict().items() if key != "name"}
        content["decodings"] = [[name, decoding.to_dict()] for name, decoding in self.parsed_decodings().items()]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def _wrong(error: ValidationError, source: str) -> str:
    kinds = {problem["type"]: problem["loc"] for problem in error.errors(include_url=False)}
    if "missing" in kinds and "extra_forbidden" not in kinds:  # a misspelled key is why another one is missing
        return f"{source}: {'.'.join(map(str, kinds['missing']))} is missing; give it a value"
    return translate(error, Suite, f"{source}:").replace(":.", ": ")


def describe() -> list[KeyInfo]:
    """Every key of a suite in order, with default, what is allowed and its meaning."""
    return list(describe_model(Suite))


def _check_metrics(names: list[str], source: str) -> None:
    from .metrics import METRIC_NAMES

    for index, name in enumerate(names):
        if name not in METRIC_NAMES:
            near = did_you_mean(name, METRIC_NAMES)
            raise UserError(f"{source}: metrics[{index}]: unknown metric {show_value(name)}"
                            f"{f'; did you mean {near}?' if near else ''}; known are {', '.join(METRIC_NAMES)}")
