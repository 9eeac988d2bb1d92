"""What strangers hand in does no harm: in the terminal, in the file system, in TensorBoard, and not as code."""

import ast
import csv
import io
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import report_data  # noqa: E402

from ds_stability import safe_read  # noqa: E402
from ds_stability.data import DataSpec, text_files  # noqa: E402
from ds_stability.data.readers import read_documents  # noqa: E402
from ds_stability.errors import StabilityConfigError, UserError  # noqa: E402
from ds_stability.eval import report  # noqa: E402
from ds_stability.eval.cell import cell_ids, resolve_model  # noqa: E402
from ds_stability.eval.downstream import check_downstream  # noqa: E402
from ds_stability.eval.prompts import prompts_from_file  # noqa: E402
from ds_stability.eval.report_tables import csv_text  # noqa: E402
from ds_stability.eval.suite import Suite  # noqa: E402
from ds_stability.launchers.sweep_plan import load_plan  # noqa: E402
from ds_stability.launchers.sweep_values import flag_words  # noqa: E402
from ds_stability.model_card import model_card  # noqa: E402
from ds_stability.safe_text import safe_line, safe_text  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
TERMINAL = "\x1b[31m\x1b]0;title\x07\x1b]52;c;cm0=\x07\x9b2J\u202e\u2066\r\n\0\x08\u200b"
SWEEP = """name: x
flags: {deepspeed: ds_configs/zero3_cpu.json, config_name: ds_configs/models/gpt2_tiny.json, dataset_name: "builtin:prose"}
"""


def refused(action, *parts: str) -> str:
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert text.isprintable() and len(text) < 2100 and all(part in text for part in parts), text
    return text


# The terminal


def test_lines_for_a_terminal():
    assert safe_line(f"a{TERMINAL}b") == (
        "a\\x1b[31m\\x1b]0;title\\x07\\x1b]52;c;cm0=\\x07\\x9b2J\\u202e\\u2066\\r\\n\\x00\\x08\\u200bb")  # fmt: skip
    assert safe_line("caf\u00e9 \u4f60\u597d \U0001f600") == "caf\u00e9 \u4f60\u597d \U0001f600"
    assert safe_line("\ud800\ue000\u2028") == "\\ud800\\ue000\\u2028"
    assert len(safe_line("x" * 10**7)) < 2010 and len(safe_line("\x1b" * 10**7, 100)) < 110
    assert safe_line("x" * 5000 + "END").endswith("END"), "the advice at the end of a message stays"
    assert safe_text("one\r\n\ttwo\x1b[2J\rthree\n") == "one\n\ttwo\\x1b[2J\\rthree\n"


@pytest.mark.parametrize("kind", [UserError, StabilityConfigError])
def test_every_message_to_a_user_is_one_printable_line(kind):
    assert str(kind(f"--model {TERMINAL}: no such folder")).isprintable()
    assert len(str(kind("x" * 10**6))) < 2010


@pytest.mark.parametrize("arguments", [["inspect", f"{TERMINAL.replace(chr(0), '')}.json"], ["report", "\x1b[31m"], ["eval", "\x1b[2Jm", "--output_dir", "x"],
                                       ["sweep", "\x1b[2J.yaml"], ["eval", "m", "--output_dir", "x", "--text_from", "\u202e\x07"]])  # fmt: skip
def test_the_command_line_prints_no_control_character(arguments, capsys, monkeypatch, tmp_path):
    from ds_stability.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out + printed.err).rstrip("\n").isprintable()
    assert printed.err.startswith("error: ") and {path.name for path in tmp_path.iterdir()} <= {"x"}


def test_an_unknown_flag_prints_no_control_character(capsys):
    from ds_stability.cli import main

    with pytest.raises(SystemExit):
        main(["inspect", "x.json", f"--x{TERMINAL}"])
    assert capsys.readouterr().err.rstrip("\n").isprintable()


def test_a_field_name_in_data_prints_no_control_character(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({TERMINAL: 1, "x" * 10**6: 2}) + "\n")
    refused(lambda: list(read_documents(DataSpec(train_files=(str(path),)))), "no field 'text'")


# The file system


@pytest.mark.parametrize("name", ["../x", "/abs", "..", ".hidden", "a/b", "a\0b", "a\nb", "\x1b[2J", "a b", "$(id)", "x" * 201, "", "\u00e9"])
def test_names_of_cells_cannot_leave_their_folder(tmp_path, name):
    refused(lambda: cell_ids([resolve_model(str(tmp_path))], [name]), "--cell_names")


@pytest.mark.parametrize("name", ["..", "$(id)", "a b", "\x1b[2J", "x" * 200, "\u202e", "-rf", "a;b"])
def test_names_of_folders_become_names_of_cells_that_are_safe(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    cell_id = cell_ids([resolve_model(str(folder))])[0]
    assert "/" not in cell_id and not cell_id.startswith(".") and cell_id.isascii() and cell_id.isprintable() and " " not in cell_id


@pytest.mark.parametrize("text", ["arms: {../../x: {}}", "arms: {/x: {}}", "arms: {.x: {}}", 'arms: {"a\\eb": {}}', "arms: {a b: {}}", "grid: {../x: [1]}",
                                  "name: ../x", "name: .x", "arms: {a: {grid: {../x: [1]}}}", f"arms: {{{'x' * 101}: {{}}}}"])  # fmt: skip
def test_names_in_a_sweep_cannot_leave_its_folder(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text((SWEEP.replace("name: x\n", "") if text.startswith("name") else SWEEP) + text + "\n")
    refused(lambda: load_plan(path), "allowed are")


def test_values_in_a_sweep_cannot_leave_its_folder(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP + 'grid: {model: {"../../a": {vocab_size: 300}, "/b; rm -rf x": {vocab_size: 400}, "\\u202e\\e[2J$(id)": {vocab_size: 500}}}\n')
    ids = [cell.id for cell in load_plan(path).cells]
    assert len(set(ids)) == 3 and all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.+-ABCDEFGHIJKLMNOPQRSTUVWXYZ") for name in ids)
    assert all(not name.startswith(".") for name in ids)


def test_a_weight_index_cannot_leave_its_folder(tmp_path):
    from ds_stability.eval.loading import weight_files

    (tmp_path / "secret.safetensors").write_text("x")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "..", 5):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        refused(lambda: weight_files(model), "is no index of weights")


@pytest.mark.parametrize("key", ["exact_match: {task: \"a\\0b\"}", "prompts: {source: file, file: \"\\0\"}", "name: \"\\0\"", "downstream: {tasks: [\"\\0\"]}"])
def test_nul_in_a_path_of_a_suite(tmp_path, key):
    path = tmp_path / "suite.yaml"
    path.write_text(f"name: x\n{key}\n" if not key.startswith("name") else key)
    refused(lambda: Suite.load(str(path)), "NUL")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".yaml", "a/" * 3000 + "b", "\0.yaml", "\ud800.yaml", "/dev/null/x.yaml", "."])
def test_names_that_no_file_can_have(name):
    refused(lambda: Suite.load(name), "no such suite")
    refused(lambda: load_plan(name), "no such sweep file")
    refused(lambda: Suite.parse({"name": "x", "exact_match": {"task": name}}) and _items(name))


def _items(name):
    from ds_stability.eval.exact_match import load_items

    return load_items(name)


# Work without end


def test_billion_laughs_and_other_yaml(tmp_path):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    cases = {
        bomb: "more than 100000 values", "a: &a [*a]": "stands for the whole", "[" * 100_000: "nested too deeply", "[" * 100 + "]" * 100: "nested more than 60 deep",
        "name: a\nname: b": "the key name stands twice", "a: {b: 1, b: 2}": "the key b stands twice", "1: a\n1.0: b": "stands twice",
        "a: !!int 0x_": "line 1: the value 0x_ cannot be read", "\n\na: !!timestamp 2001-99-99": "line 3", "a: " + "1" * 5000: "cannot be read",
        "a: !!python/object/apply:os.system [id]": "could not determine a constructor", "a: \x1b": "not allowed", 'a: "\\ud800"': "surrogate",
        "a: " + "x" * 300_000: "larger than 256 KiB",
    }  # fmt: skip
    path = tmp_path / "x.yaml"
    for text, part in cases.items():
        path.write_text(text)
        for action in (lambda: Suite.load(str(path)), lambda: load_plan(path), lambda: safe_read.read_yaml(path, "--config")):
            refused(action, part)


def test_yaml_that_people_write_is_read():
    assert safe_read.parse_yaml("\ufeffbase: &b {lr: 1, k: 2}\r\na: {<<: *b, lr: 3}\r\nb: [*b, *b]\r\n".removeprefix("\ufeff")) == {
        "base": {"lr": 1, "k": 2}, "a": {"lr": 3, "k": 2}, "b": [{"lr": 1, "k": 2}] * 2}  # fmt: skip
    assert safe_read.parse_yaml("a: {x: &s {<<: &b {k: 3}, k: 1}}\nc: {<<: *s}") == {"a": {"x": {"k": 1}}, "c": {"k": 1}}
    assert safe_read.parse_yaml("") is None


AS_WRITTEN = ("no", "No", "NO", "yes", "on", "off", "y", "n", "20:0.5", "0:0,200:0.5", "1:30:00", "190:20:30.15", "2026-12-01", "2001-12-14t21:59:43.10-05:00",
              "1_000", "0b11", "0x_", "0o8", "1e", "e5", "+", ".", "=", "nil", "tRUE", "Inf", "nan", "1.2.3")  # fmt: skip


def test_yaml_is_read_by_the_rules_of_1_2():
    """Text that 1.1 takes for booleans, sexagesimal numbers and dates stays text; what Python writes as a float is one."""
    for text in AS_WRITTEN:
        assert safe_read.parse_yaml(f"a: {text}\n{text}: 1") == {"a": text, text: 1}, text
    numbers = {"010": 10, "-7": -7, "+7": 7, "0o17": 15, "0x1F": 31, "1e-4": 1e-4, "1E5": 1e5, "-2e+3": -2000.0, ".5": 0.5, "1.": 1.0,
               "5e-05": 5e-05, "0.1": 0.1, "-.inf": -math.inf, ".INF": math.inf, "true": True, "False": False, "~": None, "": None, "NULL": None}  # fmt: skip
    for text, value in numbers.items():
        read = safe_read.parse_yaml(f"a: {text}")["a"]
        assert read == value and type(read) is type(value), text
    assert math.isnan(safe_read.parse_yaml(".nan")) and safe_read.parse_yaml("'010'") == "010" and safe_read.parse_yaml("!!str 1") == "1"


@given(st.floats(allow_nan=False) | st.integers(-(10**30), 10**30) | st.booleans() | st.none())
def test_yaml_reads_what_json_writes(value):
    read = safe_read.parse_yaml(json.dumps(value).replace("Infinity", ".inf"))
    assert read == value and type(read) is type(value)


def test_files_without_end_are_read_no_further_than_their_limit(tmp_path):
    refused(lambda: Suite.load("/dev/zero.yaml"), "no such suite")
    refused(lambda: safe_read.read_yaml("/dev/zero", "--config /dev/zero"), "larger than 256 KiB")
    with pytest.raises(ValueError, match="larger than"):
        safe_read.read_json("/dev/zero", 1000)


def test_a_line_of_gigabytes_is_refused_before_it_is_in_memory(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b"a" * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: list(text_files.iter_lines(str(path))), "line 1", "longer than 1 MiB")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; the line has 300 MB


def test_a_prompt_of_ten_million_letters_is_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("x" * 10_000_000)
    refused(lambda: prompts_from_file(str(path), None), "10000000 characters")


# Code


def calls(name: str):
    """(file, call) of every call of a function of this name in our code."""
    for folder in ("ds_stability", "eval", "launchers"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
                    yield path.relative_to(REPOSITORY), node


def test_nothing_of_ours_is_pickled_or_run_through_a_shell():
    for folder in ("ds_stability", "eval", "launchers"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
                assert not {"dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(names), path
                assert "pickle" not in names or (path.name == "setup_model.py" and isinstance(node, ast.ImportFrom)), path  # the name of an error
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in ("eval", "exec", "os.system", "os.popen", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.safe_load"), path
                    assert not any(word.arg == "shell" or (word.arg == "allow_pickle" and ast.unparse(word.value) != "False") for word in node.keywords), path
    for path, call in calls("torch.load"):
        safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
        assert safe or path.name in ("universal.py", "universal_worker.py", "export_run.py"), path  # DeepSpeed's own checkpoint: docs/security.md
    assert {path.name for path, _ in calls("torch.save")} <= {"universal_worker.py"}, "tensors of ours are safetensors"


def test_remote_code_runs_only_where_a_flag_says_so():
    found = 0
    for name in ("from_pretrained", "from_config"):
        for path, call in calls(f".{name}"):
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            if "AutoConfig" in ast.unparse(call) or "AutoModel" in ast.unparse(call) or "AutoTokenizer" in ast.unparse(call):
                value = words.get("trust_remote_code", words.get(None, ""))
                assert value in ("", "options") or value.endswith("trust_remote_code"), (path, ast.unparse(call))
                found += value != ""
    assert found >= 6
    from ds_stability.eval.command import run_parser
    from ds_stability.launchers.arguments import ModelArguments

    assert ModelArguments().trust_remote_code is False
    assert run_parser().parse_args(["--model", "m", "--output_dir", "o"]).trust_remote_code is False


CODE = """
from transformers import PretrainedConfig
open(MARK, "w").write("ran")
class Evil(PretrainedConfig):
    model_type = "evil"
"""


def test_a_model_with_code_is_refused_and_its_code_does_not_run(tmp_path, monkeypatch):
    from ds_stability.eval.loading import load

    model, mark = tmp_path / "model", tmp_path / "mark"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "code.Evil", "AutoModelForCausalLM": "code.Evil"}}))
    (model / "code.py").write_text(CODE.replace("MARK", repr(str(mark))))
    (model / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 5))  # transformers may ask
    refused(lambda: load(model, "cpu"), "needs code from its own repository")
    assert not mark.exists()


class Bomb:
    def __reduce__(self):
        return os.mkdir, (BOMB,)


BOMB = ""


def test_a_pickle_in_place_of_weights_does_not_run(tmp_path):
    global BOMB
    import torch
    from transformers import GPT2Config

    from ds_stability.data.tokenizer import train_bpe
    from ds_stability.eval.loading import load

    BOMB = str(tmp_path / "ran")
    GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=16, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "model")
    train_bpe(["a b c"], 300).save_pretrained(tmp_path / "model")
    torch.save({"transformer.wte.weight": Bomb()}, tmp_path / "model" / "pytorch_model.bin")
    refused(lambda: load(tmp_path / "model", "cpu"), "cannot be loaded")
    assert not Path(BOMB).exists()
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)
    assert Path(BOMB).exists(), "the bomb is a real one"


def test_a_file_of_an_lm_eval_task_is_code(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text("task: x\ndataset_path: json\ndoc_to_text: !function code.run\n")
    refused(lambda: check_downstream([str(path)]), "lm-eval runs the code that stands in it", "--trust_remote_code")
    refused(lambda: check_downstream(["absent.yaml"]), "--trust_remote_code")


def test_a_chat_template_of_a_stranger_is_sandboxed(tmp_path):
    from ds_stability.data.tokenizer import train_bpe
    from ds_stability.data.tokens import encode_documents

    tokenizer = train_bpe(["a b c"], 300)
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    for template in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__.os.mkdir('x') }}"):
        tokenizer.chat_template = template
        refused(lambda: list(encode_documents(read_documents(DataSpec(train_files=(str(path),))), tokenizer)), "the chat template refuses")


# Words of commands, tables, cards, TensorBoard


def test_values_reach_a_command_as_words_without_a_shell():
    value = "a b; rm -rf ~ $(id) `id` 'q' \"q\" \n"
    printed = subprocess.run([sys.executable, "-c", "import sys, json; print(json.dumps(sys.argv[1:]))", *flag_words({"run_name": value})],
                             capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert json.loads(printed) == ["--run_name", value]


def test_no_cell_of_a_table_is_a_formula():
    evil = ["=cmd|' /C calc'!A0", "+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", " =1", "a\0b", "a\r=1"]
    text = csv_text([{"name": text, "n": -1.5} for text in evil])
    assert "\r" not in text
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert all(not row[0].lstrip().startswith(("=", "+", "-", "@")) and "\0" not in row[0] for row in rows[1:])
    assert rows[1][1] == "-1.5"


@pytest.mark.parametrize("name", ["x\n---\nevil: true", 'a"b', "a: b", "\u2028- x", "<script>", "\x1b[2J", "!!python/object:x", "{{ x }}"])
def test_a_name_cannot_get_into_the_header_of_a_card(name):
    import yaml

    card = model_card({"base_model": name, "license": name, name: name})
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"library_name": "transformers", "tags": ["ds_stability"], "base_model": name, "license": name}
    assert "<script>" not in card.split("---\n", 2)[2] and "\x1b" not in card


def test_tensorboard_gets_names_as_plain_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = report_data.write_evaluation(tmp_path / "evals", ("gpt2",), (0.0, 1.0), (0,), units=3, decodings=("sample",))
    cell = sorted((folder / "cells").iterdir())[0]
    meta = json.loads((cell / "cell.json").read_text())
    meta["run"]["architecture"], meta["run"]["arm"] = "<img src=x onerror=alert(1)>\x1b[2J\ud800\0", "../../x" + "y" * 10**5
    (cell / "cell.json").write_text(json.dumps(meta))
    before = {path for path in tmp_path.rglob("*")}
    analysis = report.analyze(report.read_evaluation(folder))
    report.write_tensorboard(analysis, folder / "tensorboard")
    made = {path for path in tmp_path.rglob("*")} - before
    assert made and all(path.is_relative_to(folder / "tensorboard") for path in made)
    events = EventAccumulator(str(folder / "tensorboard" / cell.name)).Reload()
    session = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"\x1b" not in session and b"onerror" in session and len(session) < 3000


def test_a_text_with_line_separators_keeps_its_place_in_the_report(tmp_path):
    folder = report_data.write_evaluation(tmp_path / "evals", ("gpt2",), (0.0,), (0,), units=3, decodings=("sample",))
    cell = next((folder / "cells").iterdir())
    (cell / "prompts.jsonl").write_text(json.dumps({"index": 0, "text": "one\u2028two\x85three"}, ensure_ascii=False) + "\n")
    from ds_stability.eval.report_samples import collect

    prompts = collect(report.read_evaluation(folder))["prompts"][0]
    assert "one" in prompts["0"] and "three" in prompts["0"] and prompts["0"].isprintable()


def test_a_file_name_that_is_not_utf_8_can_be_recorded(tmp_path):
    from ds_stability.run_dir import RunDir

    RunDir(tmp_path).write_manifest({"command": ["train.py", os.fsdecode(b"runs/\xff"), "caf\u00e9"]})
    assert RunDir(tmp_path).read_manifest()["command"] == ["train.py", "runs/\udcff", "caf\u00e9"]
    RunDir(tmp_path).write_manifest({"a": "caf\u00e9"})
    assert "caf\u00e9" in RunDir(tmp_path).manifest.read_text(encoding="utf-8")
