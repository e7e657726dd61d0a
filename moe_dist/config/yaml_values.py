"""YAML as people mean it: `1e-5` is a number, `no` is a word, a key given twice is an error.

PyYAML follows YAML 1.1, where `1e-5` is a string, `no` is false, `1:30` is 90 and `010` is 8.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_MAX_DIGITS = 100
_NUMBER_STARTS = list("-+.0123456789")
_INT = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
    r"|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)


class WrittenInt(int):
    """An integer that was written in another way than Python would: `007`, `1_000`, `+1`.

    Attributes:
        text: how it was written, which counts where a name is wanted.
    """

    text: str

    @classmethod
    def of(cls, value: int, text: str) -> WrittenInt:
        """Join an integer and how it was written."""
        written = cls(value)
        written.text = text
        return written


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 scalars that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping, and refuse a key that was given before."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """Read an integer in base ten, leading zeros or not."""
        digits = node.value.replace("_", "").lstrip("+-0")
        if len(digits) > _MAX_DIGITS:
            # Python reads no number of thousands of digits; any that large is out of range.
            sign = -1 if node.value.startswith("-") else 1
            return WrittenInt.of(sign * 10**_MAX_DIGITS, node.value)
        value = int(node.value)
        return value if str(value) == node.value else WrittenInt.of(value, node.value)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, _NUMBER_STARTS)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _NUMBER_STARTS)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document to plain values; YAMLError if a key is given twice."""
    # _Loader is a SafeLoader: no object is ever built from a tag.
    return yaml.load(text, Loader=_Loader)  # noqa: S506


def hidden_syntax(text: str) -> str:
    """Find what would change or shorten a value without a word.

    Empty if the YAML value holds nothing of the kind, else such as "a comment".
    """
    end = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if "#" in text[end : token.start_mark.index]:
            return "a comment"
        if type(token) in _HIDDEN:
            return _HIDDEN[type(token)]
        end = max(end, token.end_mark.index)
    return ""


_HIDDEN = {
    yaml.TagToken: "a tag",
    yaml.AnchorToken: "an anchor",
    yaml.AliasToken: "an alias",
    yaml.DirectiveToken: "a directive",
    yaml.DocumentStartToken: "the start of a document",
    yaml.DocumentEndToken: "the end of a document",
}


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """Say in one line why YAML stopped making sense, and where, if that is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    return " ".join(str(error).split())
