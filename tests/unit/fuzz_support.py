"""What the fuzz tests share: how many examples, hostile values, and what a user's error must look like."""

import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONGEST = 2100  # characters of a message
#: Of every fuzz test, as a multiple of its usual number: DS_STABILITY_FUZZ=10 make test
FACTOR = float(os.environ.get("DS_STABILITY_FUZZ", "1"))


def fuzz(examples: int) -> settings:
    """hypothesis' settings for so many examples; derandomized, so that CI tries the same ones, unless more are asked for."""
    return settings(
        max_examples=max(1, round(examples * FACTOR)), derandomize=FACTOR == 1, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def assert_one_line(error: BaseException) -> str:
    """A message for a person: one printable line of bounded length."""
    text = str(error)
    assert text and text.isprintable(), ascii(text)
    assert len(text) <= LONGEST, len(text)
    return text


HOSTILE_TEXTS = st.sampled_from([
    "", " ", "\0", "a\0b", "auto", "nan", "null", "-1", "1e999", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\u202eevil", "\u2028",
    "\ud800", "a\nb", "a\r\nb", "../../etc/passwd", "/dev/null", "~", "$(reboot)", "`id`", "; rm -rf x", "'\"", "<script>alert(1)</script>",
    "{{ 7*7 }}", "%s%n", "__class__", "=cmd()", "\ufeff", "x" * 5000, "\U0010ffff", "e\u0301", "level", "feedback", "{cell:a=b}", "\x9b2J",
])  # fmt: skip
HOSTILE_NUMBERS = st.one_of(
    st.sampled_from([0, -0.0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, -(10**400), 0.5, 1.0, 1.0000001, 1e-320, 1e308, float("nan"),
                     float("inf"), float("-inf")]),
    st.integers(), st.floats(),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), HOSTILE_NUMBERS, HOSTILE_TEXTS, st.text(max_size=20))
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(HOSTILE_TEXTS, st.text(max_size=8)), inner, max_size=4)),
    max_leaves=8,
)

PIECES = [
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\n", b"\r", b"\xe2\x80\xa8", b"\xc2\x85", b"\x1b[2J", b"\xc2\x9b", b"\xe2\x80\xae",
    b"\\ud800", b"\\u0000", b"[" * 2000, b"{\"a\":" * 1500, b"9" * 5000, b"-9" * 3, b"1e999", b"NaN", b"Infinity", b"null", b"true", b'""', b"[]", b"{}",
    b"0x_", b"2001-99-99", b"!!bool x", b"!!timestamp x", b"!!binary x", b"!!python/object/apply:os.getcwd []", b"&a [*a]", b"&a", b"*a", b"<<: *a",
    b"? ", b"- ", b": ", b"'", b'"', b"#", b"|", b"%", b"@", b"`", b"\t", b"---", b"...", b"=", b"~", b"../../x", b"/dev/zero", b"a" * 300, b"x.yaml",
]  # fmt: skip


@st.composite
def mangled(draw, good: bytes):
    """Noise, or a good file with a few pieces changed."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=80))
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 2, 5, 20, 100])))
        data[start:end] = draw(st.one_of(st.binary(max_size=4), st.sampled_from(PIECES), st.just(bytes(data[:40]))))
    return bytes(data)


@st.composite
def with_junk(draw, good):
    """A good JSON value with up to three values in it replaced by junk, or keys removed or renamed."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        node, path = value, []
        while isinstance(node, dict | list) and node and draw(st.integers(0, 3)):
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            path.append((node, key))
            node = node[key]
        if not path:
            return draw(JUNK)
        holder, key = path[-1]
        if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
            del holder[key]
        else:
            holder[key] = draw(JUNK)
    return value
