"""The documentation says what the code does: generated tables, links, JSON blocks, commands and flags."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from ds_stability.cli import build_parser
from ds_stability.config import split_config
from ds_stability.eval.command import run_parser

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("launchers/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z]\w*(?:-\w+)*")
#: Flags of other tools that the text names.
FOREIGN_FLAGS = {
    "--nproc_per_node", "--num_processes", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--config_file",  # torchrun, accelerate
    "--nodes", "--ntasks-per-node", "--gpus-per-node", "--gpus-per-task", "--dependency", "--signal",  # sbatch, srun
}  # fmt: skip


def page_id(path):
    return str(path.relative_to(REPOSITORY))


def text_of(path):
    return path.read_text(encoding="utf-8")


def fences(language):
    found = [(page_id(page), body) for page in PAGES for kind, body in FENCE.findall(text_of(page)) if kind == language]
    return [pytest.param(body, id=f"{name} {number}") for number, (name, body) in enumerate(found)]


def without_fences(path):
    return FENCE.sub("", text_of(path))


@pytest.fixture(scope="module")
def train_parser():
    from ds_stability.launchers import arguments

    kinds = (arguments.ModelArguments, arguments.DataArguments, arguments.StabilityArguments, arguments.TrainArguments)
    parser = arguments._Parser(kinds, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


@pytest.fixture(scope="module")
def launcher_flags():
    """Flags of the `deepspeed` command, from its source: importing it would start an accelerator."""
    source = Path(importlib.util.find_spec("deepspeed").origin).parent / "launcher" / "runner.py"
    return set(re.findall(r'"(--\w+)"', source.read_text(encoding="utf-8")))


def commands():
    """(page, words) of every command line in a ```bash block, without comments and environment assignments."""
    found = []
    for page in PAGES:
        for language, body in FENCE.findall(text_of(page)):
            if language != "bash":
                continue
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words:
                    found.append((page_id(page), words))
    return found


def eval_flags():
    """Flags of `ds-stability` and of eval/run.py."""
    subparsers = next(action for action in build_parser()._actions if action.dest == "command")
    parsers = [*subparsers.choices.values(), run_parser()]
    return {flag for parser in parsers for flag in parser._option_string_actions}


def train_commands():
    return [pytest.param(words, id=f"{page}: {' '.join(words)[:60]}") for page, words in commands() if "launchers/train.py" in words]


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower())
    return text.replace(" ", "-")


def anchors(path):
    return {slug(heading) for heading in HEADING.findall(without_fences(path))}


def test_generated_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate_docs", REPOSITORY / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    before = text_of(generate.REFERENCE)
    assert re.findall(r"<!-- generated: (\w+) -->", before) == list(generate.TABLES)
    assert generate.filled(before) == before, "run python docs/generate.py"
    changed = before.replace("| `level` | `0.0` |", "| `level` | `0.5` |")
    assert changed != before and generate.filled(changed) == before


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_resolve(page):
    for target in LINK.findall(without_fences(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() and file.is_relative_to(REPOSITORY), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("body", fences("json"))
def test_json_blocks_are_json_and_stability_blocks_are_valid(body):
    config = json.loads(body)
    _, stability = split_config(config)
    if "stability" in config:
        assert stability.to_dict() == type(stability).parse(config["stability"]).to_dict()


def test_there_are_stability_blocks_to_check():
    assert sum('"stability"' in parameter.values[0] for parameter in fences("json")) >= 5


@pytest.mark.parametrize("body", fences("python"))
def test_python_blocks_compile_and_import_what_exists(body):
    compile(body, "docs", "exec")
    for module, names in re.findall(r"^from (ds_stability\S*) import (.+)$", body, re.MULTILINE):
        loaded = importlib.import_module(module)
        for name in names.split(", "):
            assert name in vars(loaded), f"{module}.{name}"


@pytest.mark.parametrize("words", train_commands())
def test_flags_of_train_commands_exist(words, train_parser, launcher_flags):
    place = words.index("launchers/train.py")
    if words[0] == "deepspeed":
        assert {word.split("=")[0] for word in words[1:place] if word.startswith("--")} <= launcher_flags
    train_parser.parse_args([word for word in words[place + 1 :] if word != "..."])  # raises for an unknown flag or a wrong value


def test_flags_of_eval_commands_exist(launcher_flags):
    found = [words for _, words in commands() if "eval/run.py" in words]
    assert found
    for words in found:
        place = words.index("eval/run.py")
        assert {word for word in words[1:place] if word.startswith("--")} <= launcher_flags
        run_parser().parse_args(words[place + 1 :])


def test_every_metric_of_samples_is_explained():
    from ds_stability.eval.metrics import METRIC_NAMES

    page = text_of(REPOSITORY / "docs" / "evaluation.md")
    ranges = {"seq_rep": range(1, 5), "distinct": range(1, 5), "top": ()}
    for name in METRIC_NAMES:
        stem = name.rsplit("_", 1)[0]
        explained = f"`{name}`" in page or (stem in ranges and f"`{stem}_1` to" in page) or name.startswith("top_")
        assert explained or f"`{name.removesuffix('_reverse')}`" in page, name


def test_every_phenomenon_is_counted():
    from ds_stability.eval.minimal_pairs_templates import PHENOMENA

    assert f"each of {len(PHENOMENA)} English phenomena" in text_of(REPOSITORY / "docs" / "evaluation.md")


def test_train_commands_name_existing_configs():
    for page, words in commands():
        for flag in ("--deepspeed", "--config_name", "--hostfile"):
            if flag in words and "launchers/train.py" in words:
                assert (REPOSITORY / words[words.index(flag) + 1]).exists(), (page, flag)


def test_other_commands_exist():
    targets = re.findall(r"^(\w[\w-]*):", text_of(REPOSITORY / "Makefile"), re.MULTILINE)
    seen = set()
    for page, words in commands():
        if words[0] == "ds-stability":
            build_parser().parse_args(words[1:])
        elif words[0] == "make":
            assert words[-1] in targets, (page, words)
        elif words[0] == "python":
            assert (REPOSITORY / words[1]).exists(), (page, words)
        else:
            assert words[0] in ("pip", "deepspeed", "torchrun", "tensorboard"), (page, words)
        seen.add(words[0])
    assert {"ds-stability", "make", "deepspeed"} <= seen


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_in_the_text_exist(page, train_parser, launcher_flags):
    known = set(train_parser._option_string_actions) | launcher_flags | eval_flags() | FOREIGN_FLAGS
    unknown = set(FLAG.findall(without_fences(page))) - known
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_metric_keys_in_the_text_exist(page):
    from ds_stability.tags import TAGS

    named = re.findall(r"`((?:stability|eval|probe)/[a-z0-9_/]+)`", text_of(page))
    rows = re.findall(r'row\["([^"]+)"\]', text_of(page))
    assert not (set(named) | set(rows)) - TAGS.keys() - {"eval/", "probe/"}


def test_every_paper_in_the_code_is_in_the_index():
    code = [p for folder in ("ds_stability", "launchers", "benchmarks", "eval") for p in (REPOSITORY / folder).rglob("*.py")]
    cited = {number for path in code for number in re.findall(r"arXiv (\d{4}\.\d{5})", text_of(path))}
    index = text_of(REPOSITORY / "docs" / "papers.md")
    assert cited and all(f"arXiv {number}" in index for number in cited), [n for n in cited if n not in index]
    for name in re.findall(r"`((?:ds_stability|benchmarks|eval)/[\w/]+\.py)`", index):
        assert (REPOSITORY / name).exists(), name


def test_figures_of_the_theory_are_those_of_the_code():
    from ds_stability.histogram import NUM_BINS
    from ds_stability.measures import MIN_WINDOW, NOISE_SCALE_DECAY, WINDOW
    from ds_stability.statistics import VECTOR_SIZE

    theory = text_of(REPOSITORY / "docs" / "theory.md")
    for words in (f"{VECTOR_SIZE} doubles", f"{NUM_BINS} bins", f"last {WINDOW} applied steps", f"fewer than {MIN_WINDOW} values",
                  f"decay {NOISE_SCALE_DECAY:g}".replace("0.", ".")):  # fmt: skip
        assert words in theory, words
