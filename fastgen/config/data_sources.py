"""Which of several data sources a run takes: data.name, data.images and data.prompts exclude each other.

A later file, and the command line after all files, replaces the source of an earlier one, in one line. Two
sources in one place are an error.
"""

SOURCES = ("name", "images", "prompts")


def given(section: object) -> list[str]:
    """Keys of the data sources that a data section names."""
    return [key for key in SOURCES if section.get(key)] if isinstance(section, dict) else []


def replaced(base: dict, over: dict) -> dict:
    """base without the data sources that `over` replaces by one of its own, with one line of notice."""
    new, old = given(over.get("data")), given(base.get("data"))
    gone = [key for key in old if new and key not in new and key not in over["data"]]
    if not gone:
        return base
    for key in gone:
        print(f"data.{key}: {base['data'][key]!r} is replaced by data.{new[0]}, which was given later")
    return base | {"data": {k: v for k, v in base["data"].items() if k not in gone}}


def competing(data) -> str:
    """What is wrong with a data section that names two sources, or an empty text."""
    found = [key for key in SOURCES if getattr(data, key)]
    if len(found) < 2:
        return ""
    both = " and ".join(f"{key} {getattr(data, key)!r}" for key in found)
    return f"data: found {both}; give one of them, and set the others to ''"
