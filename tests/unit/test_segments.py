"""Words and sentences: real sentences marked by hand, scripts, normal forms, and any Unicode at all."""

from unicodedata import normalize

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from ds_stability.eval.segments import WORD, find_words, is_unspaced, plain, sentence_ends, words_of
from ds_stability.eval.structure import sentence_lengths

ANY = st.text(st.characters(exclude_categories=()), max_size=60)  # half surrogate pairs and unassigned ones too
SCRIPTS = "aB9é'’.,-·_ :ßİΣσﬁ हिन्दीभाषा שָׁלוֹם عَرَ中文ひーカ한\u0301\u200d\u200b\xad।。！?\n٣ไทย👩\ud800"
MIXED = st.lists(st.sampled_from([*SCRIPTS, "Mr. ", "U.S. ", "3.5", '" ', ". ", "...", "\n\n"]), max_size=30).map("".join)


@pytest.mark.parametrize(
    "text, words",
    [
        ("It's the King's; isn't it?", ["it's", "the", "king's", "isn't", "it"]),
        ("«Été»—naïve_café 42", ["été", "naïve", "café", "42"]),
        ("don’t 'quote' dogs'", ["don't", "quote", "dogs"]),
        ("a well-known man--he said", ["a", "well", "known", "man", "he", "said"]),
        ("3.5 1,000 10:30 3/4 1,2 v2.0. x_y __init__", ["3.5", "1,000", "10", "30", "3", "4", "1,2", "v2.0", "x", "y", "init"]),
        ("e.g. the U.S. at example.com.", ["e.g", "the", "u.s", "at", "example.com"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("বাংলা ভাষা, தமிழ் மொழி", ["বাংলা", "ভাষা", "தமிழ்", "மொழி"]),
        ("السَّلَامُ عَلَيْكُمْ", ["السَّلَامُ", "عَلَيْكُمْ"]),
        ("שָׁלוֹם עולם צה״ל", ["שָׁלוֹם", "עולם", "צה״ל"]),
        ("می‌خواهم بروم", ["میخواهم", "بروم"]),
        ("e\u0301te\u0301 co\xadop \u200ebidi\u200f", ["été", "coop", "bidi"]),
        ("ភាសា\u200bខ្មែរ ภาษาไทย", ["ភាសា", "ខ្មែរ", "ภาษาไทย"]),
        ("中文字。ひらカタカナー語", ["中", "文", "字", "ひ", "ら", "カタカナー", "語"]),
        ("한국어 문장", ["한국어", "문장"]),
        ('צה"ל אמר "לא" ג׳ירפה', ['צה"ל', "אמר", "לא", "ג׳ירפה"]),
        ("Ինչպե՞ս ես։", ["ինչպե՞ս", "ես"]),
        ("Hawai‘i ‘tis", ["hawai'i", "tis"]),
        ("👩‍👩‍👧 \u0301 \ud800", []),
        ("", []),
    ],
)  # fmt: skip
def test_words(text, words):
    words = [normalize("NFC", word) for word in words]
    assert words_of(text) == words and words_of(normalize("NFD", text)) == words


def test_words_are_those_of_unicode():
    """`regex` knows the default word boundaries of UAX #29; without colon, underscore and Thai they are ours."""
    pieces = ["ab", "é", "e\u0301", "हिन्दी", "עול", "عَرَ", "中", "ひ", "カタ", "한글", "1", "23", "Ж", ".", " ", ",", "’", "-", "·", "!", "。"]
    for i in range(len(pieces) ** 3):
        text = pieces[i % 21] + pieces[i // 21 % 21] + pieces[i // 441]
        parts = regex.split(r"\b", text, flags=regex.WORD | regex.V1)
        assert WORD.findall(text) == [part for part in parts if regex.search(r"[^\W\p{M}]", part)], text


@given(st.text(st.characters(max_codepoint=0x7F), max_size=60) | st.text("aZ9'‘’.,“”…— -", max_size=40))
def test_simple_text_has_the_same_words_by_the_fast_way(text):
    assert find_words(text) == WORD.findall(text)


@given(ANY | MIXED, ANY | MIXED)
@example("a.カ b", "あ！ー")
@example("Σ", "Σ'σ")
def test_words_and_sentences_of_any_text(first, second):
    words = words_of(first)
    assert all(words) and words_of(first + " " + second) == words + words_of(second)
    for form in ("NFC", "NFD"):
        assert words_of(normalize(form, first)) == words and sentence_lengths(normalize(form, first)) == sentence_lengths(first)
    lengths, loose = sentence_lengths(first)
    assert sum(lengths) + loose == len(words)
    both = sentence_lengths(f"{first}\n\nAa\n\n{second}")
    alone, other = sentence_lengths(f"Aa\n\n{first}"), sentence_lengths(f"Aa\n\n{second}")
    assert both == (alone[0] + other[0], alone[1] + other[1] - 1)


# "|" is where a sentence ends, by a reader. Jane Austen's novels, then technical prose.
MARKED = [
    "Mr. Woodhouse was to be talked into an acquiescence.| He had met Mr. Elton, and found to his great surprise, that he "
    "was on the road.|",
    '"Oh!" she cried in evident embarrassment.| "Ah! my dear William, do not tell!"|',
    '"With whom are you going to dance?" asked Mr. Knightley.| She hesitated a moment.|',
    '"Poor girl!" said Emma again.|',
    "What an escape!|--Dear Mrs. and Miss Bates!| Well, I am glad she is safe.| Papa, if Mr. and Mrs. John Knightley come--",
    "He came to Miss A. E.--, by the coach.| Dr. and Mrs. Grant, and Mr. Crawford, were with him.|",
    "She could only say, 'Yes, sir.'| So she began.| _Now_, he said, he was sure.|",
    "Objects, e.g. lists (i.e. Sequences), etc. are mutable.| See Fig. 3, No. 5 and Vol. II of the manual.| No.| It is not so.|",
    "1. Open the file.|\n2. Read 3.5 MB of it.| Version 2.0 is new.| It has 12.| Done",
    "In the U.S. Senate.| In the U.S.| He left at 5 p.m. Monday, Dec. 4.| J. R. R. Tolkien wrote it.| So am I.| He ate at Smith & Co. Ltd.|",
    "Saint Maximus (died 250) is a martyr.[1]| The saint is venerated.[2][3]| Let's ask Jane and co.| It is Mt. Fuji at 5th st. near it.|",
    "This is art.| I like it.| See Sec. I of it, and art. IV.|",
    "Wait ... and see.| He went…| Well?!| Yes ...| No.|",
    "It was Henry V.| He fell.| Call me Al.| Weird.| He lives in CA.| Mobile is in AL.| Smith v. Jones, ca. 1900.| He left.|",
    "« Vraiment ? » dit-elle.| « Oui ! »| Il dit : « Non. »| Er kam.| »Nein!« rief er.| «Sì!», disse.|",
    "He read Smith et al. (2009) vs. Jones.| Done.)| [Ref. 7 says so.]| The end",
]


@pytest.mark.parametrize("marked", MARKED)
def test_sentences_end_where_readers_say(marked):
    text = marked.replace("|", "")
    places, wanted = [], []
    for char in marked:
        wanted.append(len(places)) if char == "|" else places.append(char)
    assert list(sentence_ends(text)) == wanted


@pytest.mark.parametrize(
    ("text", "lengths", "loose"),
    [
        ("Mr. Smith went to St. Ives. He ate 3.5 pies.", [6, 4], 0),
        ("the cat sat. it saw mr. smith.", [3, 4], 0),  # without capitals, case says nothing
        ("He met Mr.", [], 3),
        ("今日は。「行く。」と言った。そう？ はい！", [3, 2, 4, 2, 2], 0),
        ("你好!再见", [2], 2),
        ("यह है। वह नहीं है॥ कौन?", [2, 3, 1], 0),
        ("هل هذا؟ نعم۔ لا", [2, 1], 1),
        ("Այո։ ဟုတ်။ ។ ខ្មែរ។ ሰላም።", [1, 1, 1, 1], 0),
        ("Ça va\u00a0? Oui\u00a0! «\u00a0Bien.\u00a0» Fin", [2, 1, 1], 1),
    ],
)
def test_sentence_lengths(text, lengths, loose):
    assert sentence_lengths(text) == (lengths, loose)


@pytest.mark.parametrize("unit", [".", ". ", "! (", "A. ", "1. ", "a.", '."', ".[1]", "\u0301", "1,000", "a'", "।", "\n "])
def test_degenerate_text_takes_linear_time(unit):
    """A collapsed model writes one mark for ever: at 200,000 characters what is quadratic takes minutes."""
    text = "é" + unit * (200_000 // len(unit)) + "é"
    lengths, loose = sentence_lengths(text)
    assert sum(lengths) + loose == len(words_of(text))


def test_unspaced_words():
    assert all(map(is_unspaced, ["中", "ひ", "ภาษาไทย", "ខ្មែរ", "ລາວ"]))
    assert not any(map(is_unspaced, ["a", "é", "한국어", "カタ", "हिन्दी"]))
    assert plain("\ufeffe\u0301\u200d") == "é" and plain("a\u200bb") == "a\u200bb"
