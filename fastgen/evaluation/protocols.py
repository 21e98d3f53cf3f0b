"""Published ways to measure, as files configs/eval/NAME.yaml: how many images of what, compared with what.

A number made in another way than its protocol says (fewer images, other metrics) is labelled so.
"""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastgen.core.errors import UserError, suggest
from fastgen.core.paths import config
from fastgen.core.yaml_text import read_yaml


class Protocol(BaseModel):
    """One file. prompts, reference, guidance and notes are for people, but for a `reference` that is the
    name of a bundled image set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    num_samples: int = Field(ge=2)
    group_size: int = Field(default=1, ge=1)
    resolution: int = Field(default=0, ge=0)
    """both sets are cropped to the middle square and brought to this size (Lanczos); 0: as they are"""
    metrics: tuple[str, ...] = ()
    equal_counts: bool = True
    """whether precision and its companions take equally many images of both sets; false: all there are"""
    clip: str = "vit-g-14"
    layout: Literal["", "geneval", "dpg", "vbench"] = ""
    """of the tool that measures in our place"""
    prompts: str
    reference: str = ""
    guidance: str
    notes: str = ""
    used_by: tuple[str, ...] = ()
    name: str = ""
    sha256: str = ""


def names() -> list[str]:
    """All that come with the package."""
    return sorted(p.stem for p in config("eval").glob("*.yaml"))


def read(name: str) -> Protocol:
    """The protocol of that name, or of a YAML file of the user's."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name in names():
        path = config(f"eval/{name}.yaml")
    else:
        known = names()
        found = f"found {name!r}{suggest(name, known)}"
        raise UserError("--protocol", found, f"choose one of {', '.join(known)}, or give a .yaml file")
    values = read_yaml(path, "--protocol")
    try:
        made = Protocol(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise UserError("--protocol", f"{path.name}: {where}: {first['msg']}", "correct the file") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return made.model_copy(update={"name": path.stem, "sha256": digest[:12]})


def table() -> str:
    """Markdown: every protocol that comes with the package."""
    lines = [
        "| protocol | images | pixels | metrics | compared with | used by |",
        "|---|---|---|---|---|---|",
    ]
    for name in names():
        one = read(name)
        metrics = ", ".join(f"`{m}`" for m in one.metrics) or f"by its own tool, layout `{one.layout}`"
        pixels = str(one.resolution) if one.resolution else "as generated"
        cells = (f"`{name}`", f"{one.num_samples:,}", pixels, metrics, one.reference, ", ".join(one.used_by))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def departures(protocol: Protocol, num: int, metrics: list[str]) -> list[str]:
    """In what a measurement is not the protocol's."""
    found = []
    if num != protocol.num_samples:
        found.append(f"{num:,} images in place of {protocol.num_samples:,}")
    if set(metrics) - set(protocol.metrics):
        found.append(f"metrics beside its own: {', '.join(sorted(set(metrics) - set(protocol.metrics)))}")
    return found
