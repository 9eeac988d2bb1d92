"""YAML 1.2's core rules for plain scalars: `no`, `on`, `20:0.5`, `1_000` and dates are text, 1e-4 is a float, 010 is ten.

PyYAML reads YAML 1.1, where these are False, True, 1200.5, 1000, a date, text, and eight.
"""

import re
from typing import ClassVar

import yaml

_SCALARS = {  # as in section 10.3.2 of the YAML 1.2.2 specification, and the merge key of 1.1
    "null": (r"null|Null|NULL|~|", "nN~\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
              "-+.0123456789"),
    "merge": (r"<<", "<"),
}  # fmt: skip


class CoreLoader(yaml.SafeLoader):
    """SafeLoader by the rules of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """ValueError for text that is no integer (`!!int x`)."""
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


for _name, (_pattern, _first) in _SCALARS.items():
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"),
                                     [character.replace("\0", "") for character in _first])  # fmt: skip
CoreLoader.add_constructor("tag:yaml.org,2002:int", CoreLoader.construct_core_int)
