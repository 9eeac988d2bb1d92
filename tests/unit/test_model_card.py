import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ds_stability.model_card import MAX_VALUE, model_card, plain


@given(st.text(max_size=200))
def test_a_value_is_one_line_without_markup(text):
    shown = plain(text)
    assert "\n" not in shown and "\r" not in shown and "<" not in shown and ">" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|~$]", shown), shown
    assert "://" not in shown and "@" not in shown


def test_ordinary_values_read_as_they_are():
    for value, shown in [(0.5, "0.5"), (1e-05, "1e-05"), (True, "true"), (None, "null"), ("llama-3", "llama-3")]:
        assert plain(value) == shown
    assert plain([[0, 0.5]]) == r"\[\[0, 0.5\]\]"
    assert len(plain("x" * 1000)) == MAX_VALUE


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


NAMES = ["HuggingFaceTB/SmolLM2-135M", "a: b\n---\nevil: [1", 'quote " and \\ slash', "no", "12"]


@pytest.mark.parametrize("name", NAMES)
def test_the_header_is_yaml_whatever_the_name(name):
    found = header(model_card({"base_model": name}))
    assert found == {"library_name": "transformers", "tags": ["ds_stability"], "base_model": name}


def test_table_is_flat_and_in_order():
    card = model_card({"stability": {"level": 0.5, "stabilizers": {"feedback": {}}}, "steps": 10})
    rows = re.findall(r"^\| (.*) \| (.*) \|$", card, flags=re.MULTILINE)[2:]
    assert rows == [("stability.level", "0.5"), ("stability.stabilizers.feedback", "{}"), ("steps", "10")]
    json.dumps(header(card))
