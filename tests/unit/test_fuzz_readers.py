"""Every file that is read, fuzzed: random bytes, and good files with pieces cut, repeated or replaced by what readers hate.

The outcome is a result, or a UserError of one printable line: never another exception, never more than a few seconds.
DS_STABILITY_FUZZ=20 tries twenty times as many cases, and other ones each time (docs/security.md).
"""

import gzip
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import report_data  # noqa: E402
from fuzz_support import JUNK, PIECES, assert_one_line, fuzz, mangled, with_junk  # noqa: E402

from ds_stability.data import DataSpec  # noqa: E402
from ds_stability.data.frequency import HighFrequencySet  # noqa: E402
from ds_stability.data.readers import read_documents  # noqa: E402
from ds_stability.data.tokenizer import train_bpe  # noqa: E402
from ds_stability.data.tokens import encode_documents  # noqa: E402
from ds_stability.errors import UserError  # noqa: E402
from ds_stability.eval.cell import CellDir, describe_run  # noqa: E402
from ds_stability.eval.downstream_batches import Journal as AnswerJournal  # noqa: E402
from ds_stability.eval.exact_match import load_items  # noqa: E402
from ds_stability.eval.loading import load, weight_files  # noqa: E402
from ds_stability.eval.predictions import load_predictions  # noqa: E402
from ds_stability.eval.prompts import prompts_from_file  # noqa: E402
from ds_stability.eval.report_cells import read_evaluation  # noqa: E402
from ds_stability.eval.report_page import script_json, settings_rows  # noqa: E402
from ds_stability.eval.report_samples import clean, collect  # noqa: E402
from ds_stability.eval.suite import Suite  # noqa: E402
from ds_stability.eval.texts import TextSource  # noqa: E402
from ds_stability.eval.work import Journal, read_journal  # noqa: E402
from ds_stability.launchers.arguments import parse_command  # noqa: E402
from ds_stability.launchers.sweep_folder import SweepFolder  # noqa: E402
from ds_stability.launchers.sweep_hosts import count_slots  # noqa: E402
from ds_stability.launchers.sweep_plan import load_plan  # noqa: E402
from ds_stability.launchers.sweep_progress import last_step  # noqa: E402
from ds_stability.probe import prompts_from_file as probe_prompts  # noqa: E402
from ds_stability.recorder import read_metrics  # noqa: E402
from ds_stability.run_dir import RunDir  # noqa: E402
from ds_stability.stabilizers.feedback import read_gains  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]


def outcome(action):
    """What `action` gives, or the one line of its UserError."""
    try:
        return action()
    except UserError as error:
        return assert_one_line(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_bpe(["the cat sat on the mat"] * 4, 300)
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    return tokenizer


def read_all(path, tokenizer, **options):
    """Through the reader and the tokenizer, as training does."""
    spec = DataSpec(train_files=(str(path),), **options)
    spec.check()
    return [list(encoded.ids) for encoded in encode_documents(read_documents(spec), tokenizer)]


ROWS = [{"text": "the cat\n\nsat"}, {"text": ""}, {"text": "on the mat \u2028 caf\u00e9", "id": 3}]
CHATS = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]}] * 2


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


@fuzz(250)
@given(data=st.one_of(mangled(lines(ROWS)), mangled(lines(CHATS)), with_junk(ROWS[:2]).map(lambda v: json.dumps(v).encode()),
                      st.lists(with_junk(CHATS[0]), min_size=1, max_size=2).map(lines)),
       suffix=st.sampled_from([".jsonl", ".json", ".jsonl.gz"]))  # fmt: skip
def test_training_data_as_json(folder, tokenizer, data, suffix):
    path = folder / f"data{suffix}"
    path.write_bytes(gzip.compress(data, 1) if suffix.endswith(".gz") and len(data) % 7 else data)
    outcome(lambda: read_all(path, tokenizer))


@fuzz(100)
@given(data=mangled(b"One line.\nTwo lines.\n\nA paragraph\nof lines.\n"), kind=st.sampled_from(["file", "paragraph", "line"]))
def test_training_data_as_text(folder, tokenizer, data, kind):
    path = folder / "data.txt"
    path.write_bytes(data)
    outcome(lambda: read_all(path, tokenizer, text_document=kind))


@fuzz(60)
@given(where=st.integers(0, 2000), piece=st.binary(min_size=1, max_size=8))
def test_training_data_as_parquet(folder, tokenizer, where, piece):
    import pyarrow
    import pyarrow.parquet

    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["the cat", "sat", None]}), path)
    data = bytearray(path.read_bytes())
    data[where % len(data) : where % len(data) + len(piece)] = piece
    path.write_bytes(data)
    outcome(lambda: read_all(path, tokenizer))


@fuzz(200)
@given(data=st.one_of(mangled(b"Once upon a time\nThe cat\n"), mangled(lines([{"prompt": "The cat", "reference": "sat"}])),
                      with_junk({"prompt": "The cat", "reference": "sat"}).map(lambda row: lines([row]))),
       suffix=st.sampled_from([".txt", ".jsonl"]))  # fmt: skip
def test_prompts(folder, tokenizer, data, suffix):
    path = folder / f"prompts{suffix}"
    path.write_bytes(data)
    prompts = outcome(lambda: prompts_from_file(str(path), tokenizer, 5, 4))
    assert isinstance(prompts, str) or all(prompt.token_ids for prompt in prompts)
    outcome(lambda: probe_prompts(path, tokenizer, 5))


@fuzz(150)
@given(data=st.one_of(mangled(lines([{"prompt": "2 + 2 =", "answer": "4", "kind": "sum"}])), with_junk({"prompt": "a", "answer": "4"}).map(lambda row: lines([row]))))
def test_items_of_exact_match(folder, data):
    path = folder / "items.jsonl"
    path.write_bytes(data)
    outcome(lambda: load_items(str(path)))


SUITE = b"""name: mine
batch_size: 4
decodings: {greedy: null, warm: {kind: sample, temperature: 1.5, top_p: 0.9}}
prompts: {source: held_out, count: 8, tokens: 4}
text: {held_out_windows: 4, window: 32}
metrics: [distinct_2, seq_rep_4]
downstream: {tasks: [ds_cloze], limit: 3}
exact_match: {task: arithmetic, samples: 2}
minimal_pairs: {enabled: false}
"""


@fuzz(300)
@given(mangled(SUITE))
def test_suites(folder, data):
    path = folder / "suite.yaml"
    path.write_bytes(data)
    suite = outcome(lambda: Suite.load(str(path)))
    if isinstance(suite, Suite):
        assert Suite.parse(suite.to_dict()) == suite and len(suite.fingerprint()) == 64


@fuzz(150)
@given(JUNK)
def test_suites_of_any_value(value):
    outcome(lambda: Suite.parse(value))


SWEEP = b"""name: example
num_gpus: 2
flags: {deepspeed: ds_configs/zero3_cpu.json, config_name: ds_configs/models/gpt2_tiny.json, dataset_name: "builtin:prose", max_steps: 5}
grid:
  stability.level: [0, 0.5]
  architecture:
    gpt2: {config_name: ds_configs/models/gpt2_tiny.json}
  seed: [0, 1]
arms:
  feedback: {}
  replay: {flags: {stability.stabilizers.feedback.replay: "{cell:arm=feedback,level=0.5}/metrics.jsonl"}, grid: {stability.level: [0.5]}}
exclude: [{arm: feedback, level: 0, seed: 1}]
evaluate: {suite: quick, seeds: [0]}
"""


@fuzz(300)
@given(data=mangled(SWEEP))
def test_sweeps(folder, data):
    path = folder / "sweep.yaml"
    path.write_bytes(data)
    plan = outcome(lambda: load_plan(path))
    if not isinstance(plan, str):
        assert all("/" not in cell.id and not cell.id.startswith(".") and cell.id.isprintable() for cell in plan.cells)


@fuzz(40)
@given(text=st.one_of(st.text(max_size=30), st.tuples(st.sampled_from(["seed", "grid.seed", "stability.level", "evaluate.suite", "name", "max_steps"]), st.sampled_from(
    [piece.decode("utf-8", "replace") for piece in PIECES])).map("=".join)))  # fmt: skip
def test_settings_of_sweeps(folder, text):
    path = folder / "good.yaml"
    path.write_bytes(SWEEP)
    outcome(lambda: load_plan(path, [text]))


RECIPE = (REPOSITORY / "launchers" / "recipes" / "tiny_llama_prose.yaml").read_bytes()


@fuzz(40)
@given(data=mangled(RECIPE))
def test_recipes(folder, data):
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    outcome(lambda: parse_command(["--config", str(path), "--output_dir", str(folder / "run")]))


PREDICTIONS = b"""- {id: P1, statement: It falls., metric: predictive_entropy, split: held_out, direction: decreasing, levels: [.25, 1], architectures: [gpt2]}
- {id: P2, statement: It holds., metric: distinct_2, decoding: sample, minimum: .1, maximum: 1, level: 1, arm: feedback}
"""


@fuzz(250)
@given(data=st.one_of(mangled(PREDICTIONS), with_junk([{"id": "P1", "statement": "s", "metric": "m", "split": "held_out", "minimum": 0.5, "levels": [1]}]).map(
    lambda value: json.dumps(value).encode())), suffix=st.sampled_from([".yaml", ".json"]))  # fmt: skip
def test_predictions(folder, data, suffix):
    path = folder / f"predictions{suffix}"
    path.write_bytes(data)
    outcome(lambda: load_predictions(path))


METRICS = lines([{"step": step, "loss": 2.5, "stability/gain": 0.5, "skipped": False, "stability/variance_ratio": None} for step in (1, 2, 3)])


@fuzz(250)
@given(data=st.one_of(mangled(METRICS), with_junk({"step": 1, "stability/gain": 0.5, "loss": 1.0}).map(lambda row: lines([row, row]))))
def test_metrics(folder, data):
    path = folder / "metrics.jsonl"
    path.write_bytes(data)
    steps = outcome(lambda: read_metrics(path))
    assert isinstance(steps, str) or all(type(row["step"]) is int for row in steps)
    gains = outcome(lambda: read_gains(str(path)))
    assert isinstance(gains, str) or (gains and all(0 <= gain < float("inf") for gain in gains))
    assert type(last_step(path)) is int


UNITS = [{"task": "samples", "unit": "0", "records": [{"text": "a"}]}, {"task": "train", "unit": "1", "records": []}]


@fuzz(200)
@given(data=st.one_of(mangled(lines(UNITS)), with_junk(UNITS[0]).map(lambda row: lines([row]))))
def test_journals(folder, data):
    path = folder / "journal" / "rank-00000-0001.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    units = outcome(lambda: read_journal(path))
    assert isinstance(units, str) or all(isinstance(records, list) for _, records in units)
    outcome(Journal(path.parent).read)
    answers = folder / "downstream"
    answers.mkdir(exist_ok=True)
    (answers / "rank-00000.jsonl").write_bytes(data.replace(b"task", b"batch").replace(b"records", b"answers"))
    AnswerJournal(answers, 0).read()


FREQUENT = {"token_ids": [3, 1], "coverage": 0.5, "coverage_reached": 0.55, "tokens": 10, "vocab_size": 8, "corpus_fingerprint": "a", "tokenizer_hash": "b"}


@fuzz(250)
@given(data=st.one_of(mangled(json.dumps(FREQUENT).encode()), with_junk(FREQUENT).map(lambda value: json.dumps(value).encode())))
def test_high_frequency_sets(folder, data):
    path = folder / "high_frequency.json"
    path.write_bytes(data)
    found = outcome(lambda: HighFrequencySet.load(str(path), 8, "b"))
    assert isinstance(found, str) or all(0 <= token < 8 for token in found.token_ids)


MANIFEST = {
    "working_directory": "/nowhere", "seeds": {"seed": 1}, "world_size": 2, "identity": {"a": 1}, "config": {"stability": {"level": 0.5}},
    "data": {"spec": DataSpec(train_files=("a.txt",), validation_files=("b.txt",)).to_dict(), "block_size": 64, "corpus_fingerprint": "f" * 64},
}  # fmt: skip
PLANNED = {"cells": [{"id": "run", "arm": "feedback", "axes": {"level": 0.5, "architecture": "gpt2"}}], "removed": []}


@fuzz(250)
@given(manifest=st.one_of(mangled(json.dumps(MANIFEST).encode()), with_junk(MANIFEST).map(lambda value: json.dumps(value).encode())),
       planned=st.one_of(st.just(json.dumps(PLANNED).encode()), mangled(json.dumps(PLANNED).encode()), with_junk(PLANNED).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_manifests(folder, manifest, planned):
    run = folder / "sweep" / "run"
    (run / "final").mkdir(parents=True, exist_ok=True)
    (run / "manifest.json").write_bytes(manifest)
    (folder / "sweep" / "sweep.json").write_bytes(planned)
    (run / "final" / "config.json").write_bytes(planned)
    (run / "metrics.jsonl").write_bytes(planned + b"\n")
    read = outcome(RunDir(run).read_manifest)
    if isinstance(read, dict):
        source = outcome(lambda: TextSource.of_run(read, "the run"))
        if isinstance(source, TextSource):
            outcome(source.fingerprint)
    outcome(lambda: describe_run(str(run)))
    outcome(SweepFolder(folder / "sweep")._read_manifest)


CELL_FILES = ("cell.json", "scores.json", "samples.jsonl", "prompts.jsonl")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = report_data.write_evaluation(tmp_path_factory.mktemp("evals") / "fuzzed", ("gpt2",), (0.0,), (0,), units=3, decodings=("sample",))
    cell = next((folder / "cells").iterdir())
    return folder, cell, {name: (cell / name).read_bytes() for name in CELL_FILES if (cell / name).exists()}


@fuzz(80)
@given(data=st.data())
def test_results_of_others(evaluation, data):
    folder, cell, files = evaluation
    name = data.draw(st.sampled_from(sorted(files)))
    for other, content in files.items():
        (cell / other).write_bytes(content)
    if name.endswith(".json") and data.draw(st.booleans()):
        (cell / name).write_text(json.dumps(data.draw(with_junk(json.loads(files[name])))))
    else:
        (cell / name).write_bytes(data.draw(mangled(files[name])))
    found = outcome(lambda: read_evaluation(folder))
    if not isinstance(found, str):
        samples = collect(found)
        page = [script_json(clean(samples)), *(text for row in settings_rows(found) for text in row), *found.problems]
        assert "</script" not in page[0].lower()
    outcome(lambda: CellDir(folder, cell.name).check({"suite": "x"}))


@fuzz(150)
@given(data=mangled(b"# hosts\nnode-1 slots=2\nnode-2 slots=4\n"))
def test_hostfiles(folder, data):
    path = folder / "hostfile"
    path.write_bytes(data)
    slots = outcome(lambda: count_slots(str(path)))
    assert isinstance(slots, str) or slots >= 1


INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@fuzz(150)
@given(data=st.one_of(mangled(json.dumps(INDEX).encode()), with_junk(INDEX).map(lambda value: json.dumps(value).encode())))
def test_indices_of_weights(folder, data):
    model = folder / "sharded"
    model.mkdir(exist_ok=True)
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors"):
        (model / name).write_text("{}")
    (model / "model.safetensors.index.json").write_bytes(data)
    files = outcome(lambda: weight_files(model))
    assert isinstance(files, str) or all(file.parent == model for file in files)


@fuzz(30)
@given(data=st.data())
def test_models_of_strangers(folder, tokenizer, data):
    model = folder / "model"
    if not model.exists():
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=16)).save_pretrained(model)
        tokenizer.save_pretrained(model)
        for path in model.iterdir():
            path.rename(path.with_name(path.name + ".good"))
    for path in model.glob("*.good"):
        path.with_suffix("").write_bytes(path.read_bytes())
    chosen = data.draw(st.sampled_from(["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]))
    (model / chosen).write_bytes(data.draw(mangled((model / chosen).read_bytes()[:20_000])))
    outcome(lambda: load(model, "cpu"))
