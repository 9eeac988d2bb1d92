"""`ds-stability inspect --data`: what training makes of the first rows, on a terminal and as a page."""

import io
import json
import re
import unicodedata
from html.parser import HTMLParser

import pytest

from ds_stability.cli import main
from ds_stability.data import DataSpec, load_blocks
from ds_stability.data.inspection import DataView, Segment
from ds_stability.data.inspection_page import as_html, as_text
from ds_stability.data.tokenizer import train_bpe

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|eos|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")  # fmt: skip
NASTY = "<script>alert(1)</script> & \x1b[31m \u202e"
ROWS = [
    {"messages": [{"role": "user", "content": "Which\nriver?"}, {"role": "gpt", "content": f"The Seine. {NASTY}"}]},
    {"messages": [{"role": "user", "content": "日本語の長い文章" * 12}, {"role": "assistant", "content": "first", "weight": 0},
                  {"role": "user", "content": "q"}, {"role": "assistant", "content": "second"}]},
    {"messages": [{"role": "user", "content": "nobody"}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    tokenizer = train_bpe([json.dumps(ROWS)], 300)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "a.txt").write_text("One paragraph.\n\nAnother one.\n")
    return folder


@pytest.fixture
def inspect(place, capsys):
    def run(*flags):
        code = main(["inspect", *map(str, flags)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def flags(place, *more):
    return ["--data", place / "a.jsonl", "--tokenizer_name", place / "tokenizer", "--assistant_only_loss", *more]


def columns(line):
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def test_supervised_tokens_stand_in_brackets(place, inspect):
    code, out, err = inspect(*flags(place, "--block_size", 1024))
    assert (code, err) == (0, "")
    assert re.findall(r"\[\[(.*?)]]", out.partition("block 1")[2].replace("\n", ""))[-1] == "second<|eos|>"
    assert "first<|eos|>" in out and "[[first" not in out
    assert "row 1" in out and "a.jsonl line 3" in out and "<|im_start|>user↵" in out
    assert all(columns(line) <= 80 for line in out.splitlines())
    assert all(line.isprintable() for line in out.splitlines()) and "\\x1b[31m" in out and "\\u202e" in out


def test_what_is_shown_is_what_is_trained(place, inspect):
    """The supervised text of the page is that of the labels that load_blocks makes."""
    spec = DataSpec(train_files=(str(place / "a.jsonl"),), assistant_only_loss=True, validation_split_percentage=0, truncation="split")
    tokenizer = train_bpe([json.dumps(ROWS)], 300)
    tokenizer.chat_template = CHATML
    train, _, _ = load_blocks(spec, tokenizer, 64)
    labels = [block["labels"] for block in train]
    inspect(*flags(place, "--block_size", 64, "--truncation", "split", "--html", place / "out.html"))
    page = (place / "out.html").read_text(encoding="utf-8")
    sections = page.split("<section>")[1:]
    assert len(sections) >= len(labels) > 1
    for section, label in zip(sections, labels, strict=False):
        marked = "".join(re.findall(r"<mark>(.*?)</mark>", section, re.DOTALL))
        assert bool(marked) == bool((label != -100).any())


def test_the_page_escapes_everything_and_needs_no_other_file(place, inspect):
    code, out, _ = inspect(*flags(place, "--html", place / "out.html"))
    page = (place / "out.html").read_text(encoding="utf-8")
    assert code == 0 and f"written to {place / 'out.html'}" in out
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert {tag for tag, _ in tags} <= {"html", "head", "meta", "link", "title", "style", "body", "h1", "h2", "h3", "p", "mark", "pre", "section", "i"}
    assert [attributes["href"] for _, attributes in tags if "href" in attributes] == ["data:,"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\x1b[31m \\u202e" in page


def test_rows_are_cut_into_blocks_and_texts_have_no_brackets_to_speak_of(place, inspect):
    _, out, _ = inspect(*flags(place, "--rows", 1, "--block_size", 16))
    assert ("block 1" in out and "block 2" in out) or "left out, because longer than a block" in out
    code, out, _ = inspect("--data", place / "a.txt", "--text_document", "paragraph", "--rows", 1, "--vocab_size", 259)
    assert code == 0 and "Another" not in out and "One paragraph." in out.replace("[[", "").replace("]]", "")
    assert "a BPE of" in out


@pytest.mark.parametrize(("truncation", "shown", "missing"), [
    ("auto", "left out, because longer than a block", "tokens 1 to"), ("keep_start", "tokens 1 to 64 of", "second"),
    ("keep_end", "second<|eos|>", "tokens 1 to"), ("split", "tokens 65 to 128 of", "left out"),
])  # fmt: skip
def test_rows_longer_than_a_block_are_shown_as_they_are_cut(place, inspect, tmp_path, truncation, shown, missing):
    (tmp_path / "c.jsonl").write_text(json.dumps(ROWS[1]) + "\n" + json.dumps(ROWS[2]))
    code, out, _ = inspect("--data", tmp_path / "c.jsonl", "--tokenizer_name", place / "tokenizer", "--assistant_only_loss", "--block_size", 64,
                           "--truncation", truncation)  # fmt: skip
    assert code == 0 and shown in out and missing not in out
    assert inspect(*flags(place, "--truncation", "shorten"))[2].startswith("error: --truncation 'shorten': allowed are auto, split")


def test_padded_rows_have_blocks_of_their_own(place, inspect):
    _, packed, _ = inspect(*flags(place, "--block_size", 1024))
    _, padded, _ = inspect(*flags(place, "--block_size", 1024, "--packing", "pad"))
    assert packed.count("block ") < padded.count("block ") == 3 and "block 3" in padded


def test_nothing_supervised_is_said(place, inspect, tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[2]))
    _, out, _ = inspect("--data", tmp_path / "b.jsonl", "--tokenizer_name", place / "tokenizer", "--assistant_only_loss")
    assert "0 of them supervised" in out and "nothing would be learned" in out


@pytest.mark.parametrize(("more", "words"), [
    (["--rows", 0], "--rows 0: allowed is a number from 1"),
    (["--block_size", 1], "--block_size 1"),
    (["--json"], "--json belongs to a DeepSpeed JSON"),
    (["--stability_level", "0.5"], "--stability_level belongs to"),
    (["--messages_field", "turns"], "no field 'turns'"),
    (["--html", "/dev/null/a.html"], "--html /dev/null/a.html: cannot be written"),
])  # fmt: skip
def test_mistakes_are_one_line(place, inspect, more, words):
    code, _, err = inspect(*flags(place, *more))
    assert code == 2 and words in err and err.count("\n") == 1


def test_an_ascii_terminal_gets_escapes(place, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert main(["inspect", *map(str, flags(place))]) == 0
    stream.seek(0)
    assert "\\u21b5 is a line's end" in stream.read()


def test_one_of_file_and_data(place, inspect):
    assert inspect()[0] == 2 and "neither" in inspect()[2]
    assert inspect(place / "ds.json", *flags(place))[0] == 2
    assert inspect("--data", place / "no.jsonl")[2] == f"error: --data {place / 'no.jsonl'}: no such file\n"
    assert "no tokenizer could be loaded" in inspect("--data", place / "a.txt", "--tokenizer_name", place)[2]


def test_colors_are_closed_in_every_line():
    view = DataView("t", 8, 1, 8, 4, [[Segment(1, "a", 0, 8, 8, [(False, "one "), (True, "two three four five\nsix"), (False, " end")])]])
    lines = as_text(view, color=True, width=20).splitlines()
    assert all(line.count("\x1b[1;32m") == line.count("\x1b[0m") for line in lines)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert [line.strip() for line in plain[-3:]] == ["one two three", "four five↵", "six end"]
    assert "<mark>two three four five<i>↵</i>\nsix</mark> end" in as_html(view)
