"""What there is to choose from, a line each: registered methods, bundled teachers and recipes."""

import importlib
import re
from pathlib import Path

from fastgen.core.paths import config
from fastgen.core.yaml_text import read_yaml
from fastgen.objectives import REGISTRY


def head_comment(file: Path) -> str:
    """The comment at the head of a YAML file, as one paragraph."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, without it."""
    return re.split(r"\. |\.$", text, maxsplit=1)[0]


def bundled(kind: str) -> list[Path]:
    """The config files of a folder of configs/: teachers, objectives, recipes or ablations."""
    return sorted(config(kind).glob("*.yaml"))


def methods() -> dict[str, str]:
    """Name of each registered method -> the title of its module, plugins included."""
    found = {}
    for name, cls in sorted(REGISTRY.items()):
        lines = (importlib.import_module(cls.__module__).__doc__ or "").strip().splitlines()
        found[name] = lines[0].removesuffix(".") if lines else ""
    return found


def teachers() -> dict[str, str]:
    """What --teacher takes for each bundled teacher config -> what it is."""
    found = {}
    for file in bundled("teachers"):
        found[teacher_path(file)] = first_sentence(head_comment(file))
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith("assets:")))


def teacher_path(file: Path) -> str:
    """What a config of configs/teachers/ is about: a model of the hub, or a bundled one, which it trains."""
    values = read_yaml(file, "--config")["teacher"]
    return f"assets:teachers/{file.stem}" if "blueprint" in values else values["path"]


def recipes() -> dict[str, str]:
    """What --config takes for each recipe -> what it makes."""
    found = bundled("recipes")
    return {f"configs:recipes/{file.name}": first_sentence(head_comment(file)) for file in found}


KINDS = {"methods": methods, "teachers": teachers, "recipes": recipes}


def listing(kinds: tuple[str, ...] = tuple(KINDS)) -> str:
    """The chosen kinds as plain text, a line each under the name of the kind."""
    lines: list[str] = []
    for kind in kinds:
        rows = KINDS[kind]()
        width = max(map(len, rows), default=0)
        lines += ["", kind, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items())]
    return "\n".join(lines[1:])
