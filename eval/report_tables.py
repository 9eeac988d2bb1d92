"""Tables of the report: the order and names of its measures, the rows of the big table, CSV that no spreadsheet runs."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from .records import REFERENCE
from .report_cells import Key
from .report_samples import visible
from .verdict import ENTROPY, HIGH_FREQUENCY

HEADLINE = (
    ENTROPY, HIGH_FREQUENCY, Key("distinct_2", "sample"), Key("seq_rep_4", "sample"), Key("generation_entropy", "sample"),
    Key("top1_mass", None, "held_out"), Key("cross_entropy", None, "held_out"), Key("bits_per_byte", None, "held_out"),
)  # fmt: skip
ARM_KEYS = (ENTROPY, HIGH_FREQUENCY, Key("distinct_2", "sample"), Key("cross_entropy", None, "held_out"))
PLACES = {"held_out": "held-out", "train": "training text", "sample": "T\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}1", "top_p_95": "top-p 0.95", "top_k_40": "top-k 40",
          "beam_4": "beam 4", "greedy": "greedy", REFERENCE: "human text"}  # fmt: skip
NAMES = {"high_frequency_share": "high-frequency share", "high_frequency_word_share": "high-frequency word share",
         "high_frequency_mass": "high-frequency mass", "cross_entropy": "cross-entropy", "top1_mass": "top-1 mass",
         "self_bleu_4": "self-BLEU-4", "mtld": "MTLD", "hdd": "HD-D", "eos_rate": "EOS rate", "length_cap_rate": "length-cap rate",
         "kl_unigram": "KL, unigrams", "kl_bigram": "KL, bigrams", "vendi_score": "Vendi score",
         "knn_coverage": "k-NN coverage", "zipf_exponent": "Zipf exponent",
         **{f"{name}_{n}": f"{name.replace('_', '-')}-{n}" for name in ("distinct", "seq_rep") for n in range(1, 5)}}  # fmt: skip
UNITS = {"share": "", "": "", None: "", "-": ""}

TABLE_COLUMNS = ["metric", "where", "architecture", "arm", "level", "value", "low", "high", "se", "unit", "seeds", "units",
                 "difference", "d low", "d high", "d p", "per seed", "note"]  # fmt: skip


def metric_title(key: Key, unit: str | None) -> str:
    """"distinct 2, T = 1" or "cross entropy, held-out (nats)"."""
    place = PLACES.get(key.where, key.where)
    name = NAMES.get(key.metric, key.metric.replace("_", " "))
    shown = f" ({unit})" if UNITS.get(unit, unit) else ""
    return f"{name}{', ' + place if place else ''}{shown}"


def metric_family(key: Key) -> str:
    """Which figure of small multiples a measure belongs to."""
    if key.decoding:
        return f"Samples, {PLACES.get(key.decoding, key.decoding)}"
    return f"Teacher-forced, {PLACES.get(key.split, key.split)}" if key.split in ("held_out", "train") else "Tasks"


def table_rows(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Lines of the page's big table, in TABLE_COLUMNS."""
    return [
        [row["metric"], row["decoding"] or row["split"] or "", row["architecture"], row["arm"], row["level"], row["value"],
         row["ci_low"], row["ci_high"], row["stderr"], row["unit"] or "", row["seeds"], row["units"], row["difference"],
         row["difference_low"], row["difference_high"], row["difference_p"],
         " ".join("null" if value is None else f"{value:.4g}" for value in row["values"].values()), row["note"]]
        for row in rows
    ]  # fmt: skip


def csv_text(lines: Sequence[dict[str, Any]]) -> str:
    """CSV with a header. A text that a spreadsheet would take for a formula gets a quote before it; numbers stay numbers."""
    file = io.StringIO()
    columns = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_harmless(name) for name in columns])
    for line in lines:
        writer.writerow([_harmless(line.get(name)) for name in columns])
    return file.getvalue()


def _harmless(value: Any) -> Any:
    if isinstance(value, str):
        value = visible(value)  # a carriage return, too: it is not quoted, and a spreadsheet begins a new row there
        return f"'{value}" if value.lstrip().startswith(("=", "+", "-", "@")) or value.startswith("\t") else value
    return value
