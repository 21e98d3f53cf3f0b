"""The text of train.py --help: every key of a config with its meaning and value, whole or by section."""

import contextlib
import io
from collections.abc import Iterator

from pydantic import BaseModel

from fastgen.config.catalogue import methods
from fastgen.config.parse import model_in
from fastgen.config.run import RunConfig, load
from fastgen.core.errors import UserError, suggest
from fastgen.objectives import REGISTRY


def help_text(base: RunConfig) -> str:
    """Every key of this config with its text and value."""
    import tyro

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
        tyro.cli(
            RunConfig, prog="train.py", default=base, args=["--help"], config=markers, use_underscores=True
        )
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    first = next(i for i, line in enumerate(lines) if "--output_dir" in line)
    return "\n".join(["keys", *lines[first:], "", *_unset_sections(base, "--")]) + "\n"


def _unset_sections(section: BaseModel, prefix: str) -> Iterator[str]:
    """Lines for sections that are null and so have no keys to list."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _unset_sections(value, f"{prefix}{name}.")
        elif value is None and (model := model_in(field.annotation)):
            keys = ", ".join(model.model_fields)
            yield f"  {prefix}{name} {{{keys}}}"
            yield f"        {field.description} (default: null)"


def sections(base: RunConfig) -> dict[str, str]:
    """Name -> meaning of what --help takes: the top sections of the config, and its stages."""
    found = {}
    for name, field in type(base).model_fields.items():
        if isinstance(getattr(base, name), BaseModel):
            found[name] = field.description or ""
    for i, stage in enumerate(base.stages):
        found[f"stages.{i}"] = f"stage {stage.name}: {stage.objective.name}, its steps and optimizers"
    return found


def section_text(base: RunConfig, name: str) -> str:
    """The keys of one section (teacher, optim.student, stages.0) or of one method's objective."""
    if name in REGISTRY:
        flat = load([], ["--objective.name", name, "--data.name", "digits", *_sampler(name)])
        return f"{methods()[name]}\n\n" + _blocks(help_text(flat), "objective")
    text = _blocks(help_text(base), name)
    if not text:
        known = [*sections(base), *REGISTRY]
        found = f"found {name[:40]!r}{suggest(name, known)}"
        raise UserError("--help", found, f"give all, {', '.join(known)}")
    return text


def _sampler(method: str) -> list[str]:
    """What makes a bare config of this method valid, if its students need a sampler or count of their own."""
    for flags in (
        [],
        ["--student.sampler", "ode"],
        ["--student.sampler", "ode", "--student.num_steps", "20"],
    ):
        with contextlib.suppress(UserError):
            load([], ["--objective.name", method, "--data.name", "digits", *flags])
            return flags
    return []


def _blocks(text: str, name: str) -> str:
    """The blocks of `help_text` that are about a section and those inside it."""
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.endswith(" options") and line.startswith(" ") and " " not in line.strip()[:-8]:
            title = line.strip().removesuffix(" options")
            inside = title == name or title.startswith(f"{name}.")
        if inside:
            kept.append(line)
    return "\n".join(kept)
