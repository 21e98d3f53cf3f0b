"""The families there are, and which of them a folder belongs to. A module here that holds FAMILIES joins by
existing.
"""

import importlib
import pkgutil
from pathlib import Path

from fastgen.core.errors import UserError, suggest
from fastgen.families.base import Family

HERE = Path(__file__).parent
DECLARE = "declare yours under teacher.family (see docs/families.md)"


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
    """The family of a model_index.json (which may be empty) and a denoiser's config.json: one whose pipeline
    is the index's, else the first that claims the network.
    """
    net_class = config.get("_class_name", "")
    claims = [f for f in FAMILIES.values() if f.net_class == net_class and f.matches(index, config)]
    exact = [f for f in claims if index.get("_class_name") in f.pipelines]
    if exact or claims:
        return (exact or claims)[0]
    known = sorted({f.net_class for f in FAMILIES.values()})
    if net_class in known:
        told = f"no family for {net_class} as {index.get('_class_name', 'its config')} has it"
        alike = [p for f in FAMILIES.values() if f.net_class == net_class for p in f.pipelines]
        raise UserError("teacher.path", told, f"known with it: {', '.join(alike)}; {DECLARE}")
    raise UserError(
        "teacher.path",
        f"no family for {net_class!r}{suggest(net_class, known)}",
        f"known: {', '.join(known)}; {DECLARE}",
    )
