"""YAML files and dotted flags to nested values, and pydantic's findings to one line that names key,
finding and choice.
"""

import difflib
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError

from fastgen.config.data_sources import replaced
from fastgen.core.errors import UserError, suggest
from fastgen.objectives import REGISTRY


def merge(base: dict, over: dict) -> dict:
    """Deep merge; {"0": ...} over a list reaches its first item; another `name` of an objective replaces
    the section.
    """
    out = dict(base)
    for key, value in over.items():
        if (
            isinstance(out.get(key), list)
            and isinstance(value, dict)
            and all(str(k).isdigit() for k in value)
        ):
            out[key] = _merge_items(out[key], value)
            continue
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        if both and not (
            key in ("objective", "host") and value.get("name", out[key].get("name")) != out[key].get("name")
        ):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def _merge_items(items: list, over: dict) -> list:
    over = {int(k): v for k, v in over.items()}
    both = lambda old, new: merge(old, new) if isinstance(old, dict) and isinstance(new, dict) else new  # noqa: E731
    merged = [both(v, over[i]) if i in over else v for i, v in enumerate(items)]
    return merged + [v for i, v in sorted(over.items()) if i >= len(items)]


def read_files(files: list[str]) -> dict:
    """YAML files deep-merged left to right."""
    merged: dict = {}
    for name in files:
        path = Path(name)
        if not path.is_file():
            raise UserError("--config", f"{name} does not exist", "give the path of a YAML file")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise UserError(
                "--config", f"{name} is not valid YAML ({' '.join(str(error).split())})", ""
            ) from None
        if not isinstance(values, dict):
            raise UserError(
                "--config", f"{name} holds a {type(values).__name__}", "expected a mapping of sections"
            )
        merged = merge(replaced(merged, values), values)
    return merged


def overrides(argv: list[str], model: type[BaseModel], switches: tuple[str, ...] = ()) -> dict:
    """`--optim.student.lr 1e-4` pairs as a nested dict; - and _ are the same; several values make a list."""
    nested: dict = {}
    i = 0
    while i < len(argv):
        flag, equals, inline = argv[i].partition("=")
        if not flag.startswith("--"):
            raise UserError("command line", f"found {argv[i]!r}", "overrides look like --section.key value")
        i += 1
        values = [inline] if equals else []
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            values.append(argv[i])
            i += 1
        path = flag[2:].replace("-", "_").split(".")
        if not values:
            _refuse_bare(flag, path, model, switches)
        parsed = [_value(flag, v) for v in values]
        _put(nested, path, parsed[0] if len(parsed) == 1 else parsed, flag)
    return nested


def _put(nested: dict, path: list[str], value: object, flag: str) -> None:
    for part in path[:-1]:
        nested = nested.setdefault(part, {})
        if not isinstance(nested, dict):
            raise UserError(
                flag, f"{part} was given a value of its own", "set the section or its keys, not both"
            )
    nested[path[-1]] = value


def _refuse_bare(flag: str, path: list[str], model: type[BaseModel], switches: tuple[str, ...]) -> None:
    """A flag without a value: a misspelt switch, a misspelt key, or a key that needs one."""
    for depth, part in enumerate(path):
        known = known_keys(model, tuple(path[:depth]))
        if known and part not in known:
            close = suggest(part, [*known, *(switches if len(path) == 1 else ())])
            raise UserError(flag, f"unknown key{close}", f"allowed: {', '.join(known)}")
    raise UserError(flag, "found no value", f"give one, as in {flag} VALUE")


def _value(flag: str, text: str) -> object:
    """YAML for lists and null; everything else stays text, which the schema converts."""
    if text.startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(flag, f"found {text!r}", "a list is written [1, 2] or as several words") from None
    return None if text in ("null", "None") else text


def known_keys(model: type[BaseModel], path: tuple) -> list[str]:
    """Field names allowed at a dotted path, for suggestions; a union of objectives answers with the tag's
    own fields.
    """
    at: type[BaseModel] | None = model
    for before, part in zip((None, *path), path):
        if before == "objective" and part in REGISTRY:
            at = REGISTRY[part].config
        elif not str(part).isdigit():
            at = model_in(getattr(at.model_fields.get(str(part)), "annotation", None)) if at else None
    return list(at.model_fields) if at else []


def model_in(annotation: object) -> type[BaseModel] | None:
    """The one section type in an annotation such as `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [m for m in map(model_in, get_args(annotation)) if m is not None]
    return found[0] if len(set(found)) == 1 else None


def complain(error: ValidationError, model: type[BaseModel]) -> UserError:
    """All of pydantic's findings as one line."""
    return UserError("config", " | ".join(_finding(item, model) for item in error.errors()), "")


def _finding(item: dict, model: type[BaseModel]) -> str:
    loc, kind = item["loc"], item["type"]
    path = [p for i, p in enumerate(loc) if not (i and loc[i - 1] == "objective" and p in REGISTRY)]
    key = ".".join(map(str, path)) or "config"
    tags = f"allowed: {', '.join(REGISTRY)}"
    if kind == "extra_forbidden":
        known = known_keys(model, loc[:-1])
        return f"{key}: unknown key{suggest(str(loc[-1]), known)}; allowed: {', '.join(known)}"
    if kind == "union_tag_invalid":
        tag = str(item["ctx"]["tag"]).strip("'")
        return f"{key}.name: unknown {tag!r}{suggest(tag, REGISTRY)}; {tags}"
    if kind == "union_tag_not_found" or (kind == "missing" and key.endswith("objective")):
        return f"{key}.name: not given; {tags}"
    if kind == "missing":
        return f"{key}: not given, and it has no default"
    if kind == "value_error":
        return f"{key}.{item['ctx']['error']}" if loc else str(item["ctx"]["error"])
    found, hint = repr(item["input"]), ""
    if kind == "literal_error":
        choices = item["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        hint = (
            suggest(str(item["input"]), choices)
            if difflib.get_close_matches(str(item["input"]), choices)
            else ""
        )
    found = found if len(found) <= 80 else found[:77] + "..."
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}; found {found}{hint}"
