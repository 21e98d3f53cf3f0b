"""YAML files and dotted flags as nested values; pydantic's errors as one line: key, what was found, what is
allowed.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fastgen.config.competing import replaced
from fastgen.core.errors import UserError, suggest
from fastgen.core.paths import config, expand
from fastgen.core.yaml_text import parse_yaml, read_yaml
from fastgen.objectives import REGISTRY

BUNDLED = "configs:"
"""what the name of a bundled config starts with, as assets: does for a bundled asset"""


def merge(base: dict, over: dict) -> dict:
    """Deep merge. {"0": ...} over a list changes its first item, {"0": None} leaves it out; an objective of
    another `name` replaces the whole section.
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
    combine = lambda old, new: merge(old, new) if isinstance(old, dict) and isinstance(new, dict) else new  # noqa: E731
    kept = [i for i in range(len(items)) if i not in over or over[i] is not None]
    merged = [combine(items[i], over[i]) if i in over else items[i] for i in kept]
    return merged + [v for i, v in sorted(over.items()) if i >= len(items)]


def read_files(files: list[str]) -> dict:
    """The values of YAML files, each over the files that its own `base` key names, deep-merged left to right.

    A name is a path, or configs:NAME for a file that comes with the package.
    """
    merged: dict = {}
    for name in files:
        values = _read_over_bases(_locate(name, Path(), "--config"), ())
        merged = merge(replaced(merged, values), values)
    return merged


def _read_over_bases(file: Path, above: tuple[Path, ...]) -> dict:
    """The values of one file over those of its bases; `above` are the files whose base it is."""
    if file.resolve() in above:
        circle = " -> ".join(p.name for p in (*above, file))
        raise UserError("base", f"{circle} is a circle", "remove one of these base keys")
    values = read_yaml(file, "base" if above else "--config")
    found = values.pop("base", [])
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        wanted = "give the path of one YAML file, or a list of paths"
        raise UserError("base", f"{file} has {repr(found)[:80]}", wanted)
    merged: dict = {}
    for name in names:
        base = _locate(name, file.parent, "base", f" (the base of {file})")
        if base.suffix not in (".yaml", ".yml"):
            raise UserError("base", f"{file} has {name!r}", "give the path of a .yaml file")
        merged = merge(merged, _read_over_bases(base, (*above, file.resolve())))
    return merge(replaced(merged, values), values)


def _locate(name: str, folder: Path, key: str, where: str = "") -> Path:
    """The file of a name: a path (relative to `folder`), or configs:NAME inside the bundled configs."""
    if not name.startswith(BUNDLED):
        path = folder / expand(name)
        if not path.exists():
            raise UserError(key, f"{path}{where} does not exist", "give the path of a YAML file")
        return path
    root = config("").resolve()
    path = (root / name.removeprefix(BUNDLED)).resolve()
    if not (path.is_relative_to(root) and path.is_file()):
        close = suggest(name, (f"{BUNDLED}{p.relative_to(root).as_posix()}" for p in root.rglob("*.yaml")))
        raise UserError(
            key,
            f"{name}{where} is no bundled config{close}",
            f"name a file of {root} as {BUNDLED}FOLDER/NAME.yaml",
        )
    return path


def run_folder(files: list[str]) -> str:
    """Where a run of these config files goes by default: runs/A, or runs/A+B for A.yaml and B.yaml."""
    return "runs/" + "+".join(Path(name.removeprefix(BUNDLED)).stem for name in files)


def overrides(argv: list[str], model: type[BaseModel], switches: tuple[str, ...] = ()) -> dict:
    """`--optim.student.lr 1e-4` pairs as a nested dict; - and _ are the same; several values make a list."""
    nested: dict = {}
    i = 0
    while i < len(argv):
        flag, equals, inline = argv[i].partition("=")
        if not flag.startswith("--"):
            raise UserError("command line", f"found {argv[i]!r}", "write settings as --section.key value")
        i += 1
        values = [inline] if equals else []
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            values.append(argv[i])
            i += 1
        path = flag[2:].replace("-", "_").split(".")
        if not values:
            raise _missing_value(flag, path, model, switches)
        parsed = [_value(flag, v) for v in values]
        _set(nested, path, parsed[0] if len(parsed) == 1 else parsed, flag)
    return nested


def _set(nested: dict, path: list[str], value: object, flag: str) -> None:
    """Set the value at a path of keys, creating sections."""
    for part in path[:-1]:
        nested = nested.setdefault(part, {})
        if not isinstance(nested, dict):
            raise UserError(
                flag, f"{part} is already set as a whole", "set the section or its keys, not both"
            )
    if path[-1] in nested:
        raise UserError(flag, "given twice", "give each flag once")
    nested[path[-1]] = value


def _missing_value(
    flag: str, path: list[str], model: type[BaseModel], switches: tuple[str, ...]
) -> UserError:
    """The error of a flag without a value: a misspelt switch, a misspelt key, or a key that needs a value."""
    for depth, part in enumerate(path):
        known = known_keys(model, tuple(path[:depth]))
        if known and part not in known:
            close = suggest(part, [*known, *(switches if len(path) == 1 else ())])
            return UserError(flag, f"unknown key{close}", f"allowed: {', '.join(known)}")
    return UserError(flag, "found no value", f"give one, as in {flag} VALUE")


def _value(flag: str, text: str) -> object:
    """Lists, mappings and null are parsed as YAML; everything else stays text, which the schema converts."""
    if text.startswith(("[", "{")):
        try:
            return parse_yaml(text, repr(text[:80]), flag)
        except UserError as error:
            raise UserError(flag, error.found, "write a list as [1, 2], or its values one by one") from None
    return None if text in ("null", "None") else text


def known_keys(model: type[BaseModel], path: tuple) -> list[str]:
    """Names of the fields at a path of keys, for suggestions; of an objective those of the named method."""
    at: type[BaseModel] | None = model
    for before, part in zip((None, *path), path):
        if before == "objective" and part in REGISTRY:
            at = REGISTRY[part].config
        elif not str(part).isdigit():
            at = model_in(getattr(at.model_fields.get(str(part)), "annotation", None)) if at else None
    return list(at.model_fields) if at else []


def model_in(annotation: object) -> type[BaseModel] | None:
    """The one section type in an annotation such as `X`, `X | None` or `tuple[X, ...]`, else None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [m for m in map(model_in, get_args(annotation)) if m is not None]
    return found[0] if len(set(found)) == 1 else None


def as_user_error(error: ValidationError, model: type[BaseModel]) -> UserError:
    """All errors that pydantic found, in one line."""
    return UserError("config", " | ".join(_finding(item, model) for item in error.errors()), "")


def _finding(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One of pydantic's errors as "key: what was found; what is allowed"."""
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
