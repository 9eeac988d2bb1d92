"""What the fuzz tests share: how many examples, hostile values, and what a user's error must look like."""

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
