"""What all cells of a sweep share, made once, on CPU, in one process: the tokenizer and the high-frequency set.

Figures of two cells can only be compared if both were counted in the same tokens against the same set. For fresh models
without a tokenizer of their own, one is trained on the first cell's documents (--max_train_samples does not shorten them)
and given to every such cell; the set is counted on the first cell's training blocks.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_stability.data import load_blocks
from ds_stability.data.frequency import FILE_NAME, HighFrequencySet, make_high_frequency_set
from ds_stability.data.tokenizer import tokenizer_hash
from ds_stability.errors import UserError
from ds_stability.launchers.arguments import Command
from ds_stability.launchers.setup_model import load_config, load_tokenizer
from ds_stability.run_dir import write_atomic, write_json_atomic
from ds_stability.safe_read import read_json

RECORD = "prepared.json"
TOKENIZER = "tokenizer"


def makes_tokenizer(command: Command) -> bool:
    """Whether training would make this run's tokenizer from its data."""
    return command.model.tokenizer_name is None and command.model.model_name_or_path is None


def check_comparable(cells: Sequence[tuple[str, Command]]) -> None:
    """UserError if one tokenizer cannot serve all cells (as far as flags tell; a cell with other tokens fails at its start)."""
    first_name, first = cells[0]
    for name, command in cells[1:]:
        if makes_tokenizer(command) != makes_tokenizer(first):
            raise UserError(f"cell {name}: the tokenizers of {first_name} and of this cell differ (one comes with a model, one is "
                            "trained on the data), and a sweep counts in one; give all --tokenizer_name, or make two sweeps")
        if makes_tokenizer(first) and _tokenizer_source(command) != _tokenizer_source(first):
            raise UserError(f"cell {name}: its tokenizer ({_tokenizer_source(command)}) would differ from that of {first_name} "
                            f"({_tokenizer_source(first)}), and a sweep counts in one; make two sweeps")  # fmt: skip


def prepare(command: Command, folder: Path) -> dict[str, str]:
    """Make what is not there yet in the sweep's folder; the flags that every cell gets ("tokenizer_name" for cells that
    would train one).

    Raises:
        UserError: the data cannot be read, or the folder was prepared from other data.
    """
    flags = {"high_frequency_file": str(folder / FILE_NAME)}
    if makes_tokenizer(command):
        flags["tokenizer_name"] = str(folder / TOKENIZER)
    source = _source(command)
    record = folder / RECORD
    if record.exists():
        _require_same(_read_record(record), source, folder)
        return flags
    tokenizer, config = load_tokenizer(command, load_config(command))
    frequent = _high_frequency(command, tokenizer, config)
    if makes_tokenizer(command):
        tokenizer.save_pretrained(folder / TOKENIZER)
    write_atomic(folder / FILE_NAME, json.dumps(dataclasses.asdict(frequent), indent=1) + "\n")
    write_json_atomic(record, source)  # last: what it vouches for is complete
    return flags


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path}: cannot be read; remove it, and start the sweep again") from None


def _high_frequency(command: Command, tokenizer: Any, config: Any) -> HighFrequencySet:
    vocab_size = config.get_text_config().vocab_size
    statistics = command.stability.statistics
    if statistics.high_frequency_file is not None:
        return HighFrequencySet.load(statistics.high_frequency_file, vocab_size, tokenizer_hash(tokenizer))
    blocks, _, facts = load_blocks(command.spec, tokenizer, command.data.block_size, 1, command.data.data_cache_dir)
    return make_high_frequency_set(blocks, tokenizer, vocab_size, statistics.high_frequency_coverage, facts["corpus_fingerprint"])


def _tokenizer_source(command: Command) -> str:
    if command.spec.dataset_name == "builtin:synthetic":
        return f"the words of builtin:synthetic, seed {command.spec.synthetic_seed}"
    return f"BPE, --vocab_size {command.model.vocab_size}"


def _source(command: Command) -> dict[str, Any]:
    """What the tokenizer and the set depend on, for a later start of the sweep."""
    model = command.model
    spec = {key: value for key, value in command.spec.to_dict().items() if key not in ("max_eval_samples", "shuffle_buffer")}
    return json.loads(json.dumps({
        "data": spec, "tokenizer": model.tokenizer_name or model.model_name_or_path or _tokenizer_source(command),
        "coverage": command.stability.statistics.high_frequency_coverage,
        "given": command.stability.statistics.high_frequency_file,
    }))  # fmt: skip


def _require_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for key in now:
        if before.get(key) != now[key]:
            raise UserError(f"{folder}: its tokenizer and high-frequency set were made from other settings ({key}: "
                            f"{json.dumps(before.get(key))[:200]}, now {json.dumps(now[key])[:200]}); give another --output_dir")  # fmt: skip
