"""YAML as configs are written: one document of mappings, lists and plain values, read within bounds.

PyYAML reads YAML 1.1, where `no` is false, `1e-4` is text, `010` is eight, 12:30:00 is a number and
2024-01-01 a date. Here only true and false are truth values, numbers are decimal, and all else is text, which
the schema converts as it does for flags. A key that is given twice, a tag, and aliases that expand to more
than a config can hold are refused.
"""

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fastgen.core.errors import UserError
from fastgen.core.reading import read_text

MAX_BYTES = 2**20
MAX_NODES = 20_000
"""values in one file, each alias counted with everything that it stands for"""
MAX_DEPTH = 32
FREE = ("blueprint", "family", "layout", "net")
"""sections of any keys, which go to diffusers as they are: there yes and no would stay text"""
CORE = "tag:yaml.org,2002:"
INT, FLOAT = r"[-+]?(?:0|[1-9][0-9]*)", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|(?:0|[1-9][0-9]*)(?=[eE]))"
PATTERNS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (INT, "-+0123456789"),
    "float": (rf"{FLOAT}(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    "merge": (r"<<", "<"),
}


class _Mistake(ValueError):
    """What is wrong with a document, and on which line."""

    def __init__(self, node: yaml.Node, text: str):
        super().__init__(f"line {node.start_mark.line + 1}: {text}")


class _Loader(yaml.SafeLoader):
    """Composes nodes with these patterns, and stops at the bounds."""

    yaml_implicit_resolvers: ClassVar[dict] = {}
    nodes = depth = 0

    def compose_node(self, parent, index):
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.nodes > MAX_NODES or self.depth > MAX_DEPTH:
            event: Any = self.peek_event()
            raise _Mistake(event, f"more than {MAX_NODES} values, or nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that either reader would take for something else."""


for _name, (_pattern, _first) in PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(CORE + _name, re.compile(f"(?:{_pattern})\\Z"), list(_first))


def read_yaml(file: Path, key: str) -> dict[str, Any]:
    """The sections of a YAML file; {} for an empty one. `key` is the setting that an error names."""
    text = read_text(file, key, "give a YAML file of sections and keys", MAX_BYTES)
    values = parse_yaml(text, str(file), key)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(key, f"{file} holds a {type(values).__name__}", "expected a mapping of sections")
    return values


def parse_yaml(text: str, where: str, key: str) -> Any:
    """The value of a YAML text; `where` names the text in an error."""
    try:
        node = _Loader(text).get_single_node()
        if node is None:
            return None
        _size(node, {}, ())
        return _value(node, False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}: " if mark else ""
        found = at + " ".join(str(error.problem or error.context).split())
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, LookupError) as error:
        found = " ".join(str(error).split()) or type(error).__name__
    raise UserError(key, f"{where} is not valid YAML ({found[:200]})", "correct the file")


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML text that `parse_yaml`, and any other reader, reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)


def _size(node: yaml.Node, known: dict[yaml.Node, tuple[int, int]], above: tuple) -> tuple[int, int]:
    """(values, depth) of a node with its aliases expanded."""
    if node in known:
        return known[node]
    if node in above:
        raise _Mistake(node, "an alias inside of what it stands for")
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes = [_size(child, known, (*above, node)) for child in children]
    total, depth = 1 + sum(s[0] for s in sizes), 1 + max((s[1] for s in sizes), default=0)
    if total > MAX_NODES or depth > MAX_DEPTH:
        raise _Mistake(node, f"its aliases stand for more than {MAX_NODES} values or {MAX_DEPTH} levels")
    known[node] = total, depth
    return known[node]


def _value(node: yaml.Node, free: bool) -> Any:
    """The Python value of a node; `free` inside a section that diffusers reads."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, free)
    if isinstance(node, yaml.SequenceNode) and node.tag == CORE + "seq":
        return [_value(child, free) for child in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == CORE + "map":
        return _mapping(node, free)
    raise _Mistake(node, f"the tag {node.tag!r} is not read")


def _mapping(node: yaml.MappingNode, free: bool) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Mistake(key, "a key is a list or a mapping")
        name = key.value
        if name in lines:
            raise _Mistake(key, f"the key {name!r} is given twice, first on line {lines[name]}")
        lines[name] = key.start_mark.line + 1
        if key.tag == CORE + "merge":
            sources = child.value if isinstance(child, yaml.SequenceNode) else [child]
            for source in reversed(sources):  # the first one counts
                if not isinstance(source, yaml.MappingNode):
                    raise _Mistake(source, "<< takes a mapping, or a list of them")
                merged |= _value(source, free)
        else:
            own[_text(key)] = _value(child, free or name in FREE)
    return merged | own


def _text(node: yaml.ScalarNode) -> str:
    """Text of a node: what no file name and no UTF-8 file can hold is refused."""
    if "\0" in node.value or any("\ud800" <= c <= "\udfff" for c in node.value):
        raise _Mistake(node, "a character that is no text")
    return node.value


def _scalar(node: yaml.ScalarNode, free: bool) -> str | int | float | bool | None:
    text, kind = _text(node), node.tag.removeprefix(CORE)
    if free and not node.style and text.lower() in ("yes", "no", "on", "off"):
        raise _Mistake(node, f"{text} is no truth value here; write true, false, or '{text}' in quotes")
    if kind in ("str", "merge"):
        return text
    pattern = PATTERNS.get(kind, ("", ""))[0]
    if not pattern or not re.fullmatch(pattern, text):
        raise _Mistake(node, f"the tag of {text[:40]!r} is not read")
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text) if len(text) < 100 else text
    if kind == "float":
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return text if math.isinf(value) and "inf" not in text.lower() else value
    return None
