"""The built-in corpus `builtin:prose`: the prose of `pydoc_data.topics`, which ships with every Python.

Its text differs between Python versions, so that a run is identified by `prose_fingerprint`, not by the name alone.
"""

import hashlib
import re
from collections.abc import Iterator

MIN_WORDS = 8
MIN_LETTERS = 0.75  # share of letters and spaces: below it a paragraph is a table, a grammar or code
SECTION_CHARACTERS = 1500

_UNDERLINE = re.compile(r"^\s*([*=\-~^\"'#])\1{2,}\s*$")
_NOT_PROSE = re.compile(r">>>|::=|\+--|\|\s|\s\||^\s*(def|class|import|from|for|while|if|return|print)\b.*[:)]\s*$", re.M)
_BULLET = re.compile(r"^\s*(?:[*\-]|\d+\.|\[\d+\])\s+")
_TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-",
                             "\u2026": "...", "\u00a0": " "})
_FOOTNOTE = re.compile(r"\s*\[\d+\]")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([^\s*](?:[^*]*[^\s*])?)\*{1,2}(?![\w*])")


def prose_documents() -> list[str]:
    """Documents of at least about 1,500 characters: paragraphs of running English, unwrapped, blank line between them.

    A paragraph that several topics share (they quote each other at length) is kept once, so that no held-out document
    repeats a training document. Longest topics first: they keep their paragraphs together.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    section: list[str] = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        for paragraph in clean_paragraphs(topics[name]):
            if paragraph in seen:
                continue
            seen.add(paragraph)
            section.append(paragraph)
            if sum(map(len, section)) >= SECTION_CHARACTERS:
                documents.append("\n\n".join(section))
                section = []
    return documents + ["\n\n".join(section)] * bool(section)


def clean_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of reStructuredText-like `text` that are prose: one line each, without markup."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").split("\n")
        if any(_UNDERLINE.match(line) for line in lines) or _NOT_PROSE.search(block):
            continue
        for item in _items(lines):
            paragraph = _FOOTNOTE.sub("", " ".join(item.split())).translate(_TYPOGRAPHY)
            paragraph = _EMPHASIS.sub(r"\1", paragraph)
            if is_prose(paragraph):
                yield paragraph


def _items(lines: list[str]) -> list[str]:
    """Bullets of a list become paragraphs of their own."""
    items: list[list[str]] = [[]]
    for line in lines:
        if _BULLET.match(line):
            items.append([_BULLET.sub("", line)])
        else:
            items[-1].append(line)
    return ["\n".join(item) for item in items if item]


def is_prose(paragraph: str) -> bool:
    """Whether `paragraph` reads as sentences: long enough, mostly letters, begun and ended as a sentence is."""
    if len(paragraph.split()) < MIN_WORDS or paragraph[-1] not in ".:?!)":
        return False
    if not (paragraph[0].isupper() or paragraph[0] in "\"'("):
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return letters >= MIN_LETTERS * len(paragraph)


def prose_fingerprint() -> str:
    """sha256 of the documents as text, in order."""
    digest = hashlib.sha256()
    for document in prose_documents():
        digest.update(document.encode("utf-8") + b"\0")
    return digest.hexdigest()
