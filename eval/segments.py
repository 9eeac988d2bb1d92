"""Words and ends of sentences in text of any script: one definition for all metrics. Both follow UAX #29 and say where they do not.

A word is a run of letters, digits and the marks that combine with them. An apostrophe, a middle dot or a full stop between
two letters is inside ("isn't", "e.g", "example.com"), as are a quotation mark between two Hebrew ones, the marks within
Armenian words, and one of . , ' between two digits ("3.5", "1,000"). Hyphens, dashes and, unlike in UAX #29, underscores and
colons part words. In Chinese and Japanese every Han or Hiragana character is a word, and a run of Katakana. Thai, Lao, Khmer
and Burmese would need a dictionary: there a word is the run between spaces. Text is read in its composed form (NFC) and
without format characters such as joiners and soft hyphens; the zero-width space parts words.

A sentence ends at a full stop or another mark with the property STerm ("! ? 。 । ؟" and some 160 more) or at an ellipsis,
closing quotes and brackets included. After ". ! ? …" whitespace, a dash, a Chinese or Japanese character or the end of the
text must follow; marks of other scripts need nothing. It does not end

- before a lower-case letter, dashes and opening brackets skipped ('"Is it so?" she asked.', "Ah!--so you say"), if the text
  has an upper-case one at all, and before a comma, semicolon or colon; UAX #29 has the first rule for the full stop only;
- after TITLES, LATIN, LOWER, REFERENCES before a number, and after SHORT, initials and dotted abbreviations ("U.S.", "p.m.") but
  before one of STARTERS; UAX #29 knows no abbreviations. They are English ones and some titles of other languages;
- after a number that begins a line or a sentence ("1. Open the file").
"""

import re
from collections.abc import Iterator
from unicodedata import normalize

import regex

_APART = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_RUN = rf"[^\W\p{{Pc}}\p{{M}}{_APART}][^\W\p{{Pc}}{_APART}]*+"
_INSIDE = r"(?:['‘’.·״׳՚՛՜՞՟‧](?<=[\p{L}\p{M}].)(?=\p{L})|\"(?<=[\p{Hebrew}].)(?=\p{Hebrew})|[.,'’٫٬](?<=\p{Nd}.)(?=\p{Nd}))"
WORD = regex.compile(
    rf"{_RUN}(?:{_INSIDE}{_RUN})*+|(?=\w)(?:[\p{{Katakana}}ー][\p{{M}}\p{{Katakana}}ー]*+|[\p{{Han}}\p{{Hiragana}}][\p{{M}}ー]*+)")
# The same words, in half the time, of text in ASCII and typographic quotes and dashes.
_SIMPLE = re.compile(r"[\x00-\x7f‐-―‘-‟…]*")
_SIMPLE_WORD = re.compile(r"[A-Za-z0-9]+(?:(?:['‘’.](?<=[A-Za-z].)(?=[A-Za-z])|[.,'’](?<=[0-9].)(?=[0-9]))[A-Za-z0-9]+)*")
_FORMAT = regex.compile(r"[\p{Cf}--\u200b]", regex.V1)
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Line_Break=SA}]")

UNSPACED_NOTE = "most words are Han or Hiragana characters, or runs between spaces of Thai, Lao, Khmer or Burmese"

# Ends a sentence never, even at the end of the text.
TITLES = frozenset("""mr mrs ms mx messrs mme mmes mlle dr drs prof rev hon st ste capt col cmdr gen lieut lt maj sgt cpl pvt adm
    gov sen rep pres supt insp hr frl sra srta dra""".split())
LATIN = frozenset("e.g i.e eg cf viz vs approx resp z.b d.h".split())
LOWER = frozenset("v al ca".split())  # likewise, but not as "V.", "Al." and "CA."
# No end before a number, in digits or Roman.
REFERENCES = frozenset("""no nos nr vol vols fig figs eq eqs sec secs sect ch chap art ed p pp par para pt ver op bk tab app ref refs
    jan feb mar apr jun jul aug sep sept oct nov dec""".split())
# Ends a sentence before STARTERS only.
SHORT = frozenset("inc ltd co corp jr sr bros esq ave blvd rd dept univ mt ft".split())
STARTERS = frozenset("""the a an i he she it we you they this that these those there here then thus his her its our my your
    their in on at as if when while where what who how why for from to with by after before during since because although and
    but or so not no yes one all both many some most each every another however""".split())

_LONGEST = 8  # characters of an abbreviation that matter
# The mark of a footnote too, and the quotation mark that French sets off by a space.
_CLOSING = r"[\p{Pe}\p{Pf}\p{Pi}\"'*_]*+(?:\[\d{1,3}\])*+(?:\s»(?=[\s\p{P}]|\Z))?+"
_SPACED = r".!?…．"
_END = regex.compile(
    rf"(?<![\p{{STerm}}{_SPACED}])(?P<marks>[\p{{STerm}}{_SPACED}]++)(?:(?<![{_SPACED}])[\p{{Pe}}\p{{Pf}}\"']*+"
    rf"|(?P<closing>{_CLOSING})(?=\s|\Z|--|[–—\p{{Han}}\p{{Hiragana}}\p{{Katakana}}]))")  # fmt: skip
_BREAK = regex.compile(r"[^\w.]|_")
_NEXT = regex.compile(r"[\s.…(\[{–—-]{0,40}+(.?)", regex.DOTALL)
_GOES_ON = frozenset(",;:")
_NEXT_WORD = regex.compile(r"[\W_]{0,40}+(\w++)(\.?)")
_BARE = regex.compile(r"[\W_]*+")
_ROMAN = regex.compile(r"[IVXLCDM]+")
_DOTTED = regex.compile(r"\p{L}{1,2}(?:\.\p{L}{1,2})+")


def plain(text: str) -> str:
    """The text in NFC without format characters, but for the zero-width space; canonically equal texts become one."""
    return text if text.isascii() else normalize("NFC", _FORMAT.sub("", text))


def words_of(text: str) -> list[str]:
    """The words of a text in order, in lower case, with plain apostrophes."""
    return find_words(plain(text).lower().replace("’", "'").replace("‘", "'"))


def find_words(text: str) -> list[str]:
    """The words of a `plain` text as they are written."""
    return (_SIMPLE_WORD if _SIMPLE.fullmatch(text) else WORD).findall(text)


def is_unspaced(word: str) -> bool:
    """Whether a word is of a script without spaces between words: a character of Chinese, a run of Thai."""
    return not word.isascii() and _UNSPACED.search(word) is not None


def count_unspaced(text: str) -> int:
    """How many words of a `plain` text are of such scripts."""
    return sum(map(is_unspaced, find_words(text))) if is_unspaced(text) else 0


def sentence_ends(paragraph: str, cased: bool = True) -> Iterator[int]:
    """Places after the end marks of a paragraph, which has no blank line and is `plain`.

    Args:
        cased: whether case tells: the text that the paragraph is from has an upper-case letter.
    """
    start = 0
    for found in _END.finditer(paragraph):
        stop, end, closing = found.start(), found.end(), found["closing"]
        if closing is not None:  # marks that need a space
            follows = _NEXT.match(paragraph, end)[1]
            if follows in _GOES_ON or (cased and follows.islower()):
                continue
            if not closing and found["marks"] == "." and _is_short(paragraph, start, stop, cased):
                continue
        yield end
        start = end


def _is_short(paragraph: str, start: int, stop: int, cased: bool) -> bool:
    """Whether the full stop at `stop` belongs to an abbreviation or a number of a list; the sentence began at `start`."""
    token = _BREAK.split(paragraph[max(start, stop - _LONGEST) : stop])[-1]
    low = token.lower()
    if low in LATIN or token in LOWER or (low in TITLES and (token[0].isupper() or not cased)):
        return True
    if token.isdecimal():
        line = max(start, stop - 40)
        line = max(line, paragraph.rfind("\n", line, stop) + 1)
        return len(token) < 4 and _BARE.match(paragraph, line, stop).end() == stop - len(token)
    initial, short = len(token) == 1 and token.isupper(), low in SHORT or _DOTTED.fullmatch(token)
    following = _NEXT_WORD.match(paragraph, stop) if initial or short or low in REFERENCES else None
    if not following:
        return False
    word = following[1]
    if low in REFERENCES:
        roman = low != "no" and _ROMAN.fullmatch(word) is not None
        return word[0].isdecimal() or (roman and (word != "I" or token[0].isupper()))  # "Sec. I", but "This is art. I like it."
    if len(word) == 1 and word.isupper() and following[2]:  # another initial follows
        return True
    return token != "I" and word.lower() not in STARTERS
