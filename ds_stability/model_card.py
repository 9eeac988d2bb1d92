"""README.md of an exported model: how it was trained, as plain text that no value can turn into markup."""

import json
import re
from collections.abc import Mapping
from typing import Any

MAX_VALUE = 300  # characters


def model_card(metadata: Mapping[str, Any]) -> str:
    """Markdown with a YAML header.

    Args:
        metadata: name -> value, any depth of mappings; written as a table in the order given. `base_model` (a hub
            name) and `license` also go into the header.
    """
    header = {"library_name": "transformers", "tags": ["ds_stability"]}
    header |= {key: str(metadata[key]) for key in ("base_model", "license") if metadata.get(key)}
    # JSON is YAML: quoting and escapes of strings are those that YAML reads.
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items())
    rows = "".join(f"| {plain(key)} | {plain(value)} |\n" for key, value in _flatten(metadata))
    return (
        f"---\n{front}---\n\n# Model card\n\n"
        "Trained with ds_stability, a DeepSpeed ZeRO-3 extension that trains at a controlled stabilization level: "
        "0 is plain training, towards 1 the model concentrates its mass on few modes.\n\n"
        f"| training | value |\n| --- | --- |\n{rows}\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")\ntokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n'
    )


def card_of(block: Mapping[str, Any], step: int, trained: int, averaged_steps: int | None) -> dict[str, Any]:
    """What an exported model's card says of a run.

    Args:
        block: the resolved stability block. step: of the weights in the export. trained: steps of the run, more than `step` where
            the best weights were chosen. averaged_steps: steps in the average of the weights, if that is what was exported.
    """
    card: dict[str, Any] = {"level": block["level"], "steps": step}
    if step != trained:
        card["chosen"] = f"the best of the evaluations in {trained} steps"
    if block["controller"].get("mode") == "governor":
        card["governor"] = {key: block["controller"][key] for key in ("statistic", "target", "actuator")}
    if averaged_steps is not None:
        card["ema"] = dict(block["ema"]) | {"averaged_steps": averaged_steps}
    return card


def plain(value: Any) -> str:
    """A value as one line of Markdown that renders as itself: no markup, HTML, links, or end of a table cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A colon or an "at" in a bare address would make it a link.
    text = text.replace("://", ":&#47;&#47;").replace("@", "&#64;").replace("www.", "www&#46;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            rows += _flatten(item, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", item))
    return rows
