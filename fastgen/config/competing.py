"""Settings that say the same thing in two places. Of those in COMPETING the later one wins, in one line of
notice (a file over its bases, a later file, the command line after all files), or both are named in an error:
nothing is left without effect in silence. Every other key decides alone.
"""

from collections.abc import Mapping
from typing import Any

from fastgen.core.errors import UserError
from fastgen.data.kinds import OWN, SOURCES

COMPETING = {
    "the data": tuple(f"data.{key}" for key in SOURCES),
    "the student's steps": ("student.num_steps", "student.timesteps", "stages.num_steps"),
    "the teacher's network": ("teacher.path", "teacher.blueprint", "teacher.layout"),
    "the method": ("objective", "stages.objective"),
    "the optimizers": ("optim", "stages.optim"),
    "the length": ("train.max_train_steps", "stages.max_train_steps"),
}
"""keys by what they say; stages.KEY is that of any stage, objective and optim are whole sections"""
FLAT = {"objective": "objective", "optim": "optim", "train": "max_train_steps", "student": "num_steps"}
"""sections of a run whose settings stages have too, and the key of a stage"""


def given(section: object) -> list[str]:
    """Keys of the data sources that a data section names."""
    return [key for key in SOURCES if section.get(key)] if isinstance(section, dict) else []


def replaced(base: dict, over: dict) -> dict:
    """base without what `over` says in another key, with one line of notice for each."""
    out = _without(base, "data", _other_sources(base, over))
    out = _without(out, "student", _other_times(base, over))
    return _without(out, "teacher", _other_network(base, over))


def spelled(base: dict, over: dict) -> dict:
    """`over` with what it replaces of `base` set to nothing, for a file that is read over `base` again."""
    gone = {"data": _other_sources(base, over), "student": _other_times(base, over)}
    gone["teacher"] = _other_network(base, over)
    empty: dict[str, Any] = {"timesteps": [], "blueprint": None, "layout": None}
    out = dict(over)
    for section, keys in gone.items():
        if keys:
            out[section] = {**out[section], **{k: empty.get(k, "") for k in keys}}
    return out


def _without(base: dict, section: str, keys: Mapping[str, str]) -> dict:
    """base without some keys of a section; `keys` says what replaces each."""
    if not keys:
        return base
    for key, by in keys.items():
        value = base[section][key]
        shown = "" if isinstance(value, dict) else f" {value!r}"
        print(f"{section}.{key}:{shown} is replaced by {by}, which was given later")
    return base | {section: {k: v for k, v in base[section].items() if k not in keys}}


def _section(values: dict, name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _other_sources(base: dict, over: dict) -> dict[str, str]:
    new = given(over.get("data"))
    gone = [key for key in given(base.get("data")) if new and key not in over["data"]]
    return {key: f"data.{new[0]}" for key in gone}


def _other_times(base: dict, over: dict) -> dict[str, str]:
    """Sampling times, where another number of steps comes later."""
    new, times = _section(over, "student"), _section(base, "student").get("timesteps")
    if not times or "num_steps" not in new or "timesteps" in new:
        return {}
    num = len(times) if isinstance(times, (list, tuple)) else 1
    return {} if str(new["num_steps"]) == str(num) else {"timesteps": "student.num_steps"}


def _other_network(base: dict, over: dict) -> dict[str, str]:
    """What describes a network without its folder, where another folder comes later."""
    new, old = _section(over, "teacher"), _section(base, "teacher")
    if not new.get("path") or new["path"] == old.get("path"):
        return {}
    return {k: "teacher.path" for k in ("blueprint", "layout") if old.get(k) and k not in new}


def check_stages(values: dict, over: dict) -> None:
    """A UserError for a flag in `over` that every stage of `values` sets itself, so that it does nothing."""
    stages = values.get("stages")
    if not isinstance(stages, (list, tuple)) or not stages:
        return
    for section, key in FLAT.items():
        flag = section if section == key else f"{section}.{key}"
        asked = section in over if section == key else key in _section(over, section)
        if section == "student":
            asked = asked and all(isinstance(s, dict) and s.get(key) is not None for s in stages)
        if asked:
            found = f"given beside stages.N.{key}, which decides in each of the {len(stages)} stages"
            raise UserError(flag, found, f"set stages.0.{key} and so on")


def competing(data, stages=()) -> str:
    """What is wrong with a data section that names two sources in one place, or with a stage that takes the
    first examples of several, or an empty text.
    """
    for i, stage in enumerate(stages):
        if stage.limit and data.sources:
            there = f"stages.{i}.limit: found {stage.limit} beside data.sources, whose weights it would lose"
            return f"{there}; set data.limit, which is of each source"
    for i, source in enumerate(data.sources):
        if len(keys := [key for key in OWN if getattr(source, key)]) != 1:
            some = " and ".join(keys) or "none"
            return f"data.sources.{i}: found {some}; give one of {', '.join(OWN)}"
    found = [key for key in SOURCES if getattr(data, key)]
    if data.sources and (len(found) != 1 or found[0] not in OWN):
        return f"data.sources: found beside {' and '.join(found) or 'none'}; give one of {', '.join(OWN)}"
    if data.views is not None and found:
        return (
            f"data.views: found beside {' and '.join(found)}; a 3D asset has no other data, leave those out"
        )
    if len(found) < 2:
        return ""
    both = " and ".join(f"{key} {getattr(data, key)!r}" for key in found)
    return f"data: found {both}; give one of them, and set the others to ''"
