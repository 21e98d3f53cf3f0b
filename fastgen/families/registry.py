"""All families, and which of them a model folder belongs to.

To add one: subclass `base.Family` and list it in the FAMILIES of its module, which is found automatically
(docs/families.md).
"""

import importlib
import pkgutil
from pathlib import Path

from fastgen.core.errors import UserError, suggest
from fastgen.families.base import Family

HERE = Path(__file__).parent
DECLARE = "or declare a family under teacher.family (docs/families.md)"


def _collect() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules([str(HERE)]):
        if module.name in ("registry", "__main__"):
            continue
        for family in getattr(importlib.import_module(f"fastgen.families.{module.name}"), "FAMILIES", ()):
            assert family.name not in found, family.name
            found[family.name] = family
    return found


FAMILIES: dict[str, Family] = _collect()


def detect(index: dict, config: dict) -> Family:
    """The family of a model_index.json (which may be empty) and a denoiser's config.json: one with the
    pipeline of the index, else the first that matches the network. A network that is not in the form in which
    families have that pipeline is refused: it would be asked without what the pipeline gives it.
    """
    net_class = config.get("_class_name", "")
    matching = [f for f in FAMILIES.values() if f.net_class == net_class and f.matches(index, config)]
    exact = [f for f in matching if index.get("_class_name") in f.pipelines]
    known_pipeline = any(
        index.get("_class_name") in f.pipelines for f in FAMILIES.values() if f.net_class == net_class
    )
    if exact or (matching and not known_pipeline):
        return (exact or matching)[0]
    known = sorted({f.net_class for f in FAMILIES.values()})
    if net_class in known:
        found = f"no family for {net_class} in the form of {index.get('_class_name', 'this config')}"
        alike = [p for f in FAMILIES.values() if f.net_class == net_class for p in f.pipelines]
        raise UserError("teacher.path", found, f"use a model of {', '.join(alike)}, {DECLARE}")
    raise UserError(
        "teacher.path",
        f"no family for {net_class!r}{suggest(net_class, known)}",
        f"use a model of a known class ({', '.join(known)}), {DECLARE}",
    )
