"""What train.py starts from: config files, or a method and a teacher alone; and its help."""

import argparse
import re
from pathlib import Path
from typing import Any

from fastgen.config.competing import spelled
from fastgen.config.recommended import Recommendation
from fastgen.config.run import RunConfig, load, shortened, validate, with_flags
from fastgen.core.errors import UserError
from fastgen.core.paths import config
from fastgen.data.kinds import PICTURES

READ_ON = """
read on
  --help SECTION     its keys with their text and values of this run; a method (--help dmd2) shows its own
  --help all         every key
  --list             methods, teachers and recipes
  docs/commands.md, docs/methods.md (which method when), docs/data.md (your own images)"""


def starting_config(known: argparse.Namespace, rest: list[str], switches: tuple[str, ...]) -> RunConfig:
    """The config that the flags ask for; `known.recipe` becomes the short YAML of a recommended one."""
    known.recipe = ""
    if known.method or known.teacher:
        cfg = _recommended(known, rest, switches)
    else:
        cfg = load(known.config or [str(config("recipes/quickstart.yaml"))], rest, switches)
        cfg = _smoke(known, cfg)
    return cfg


def _smoke(known: argparse.Namespace, cfg: RunConfig) -> RunConfig:
    """The config of a smoke run, where --max_steps asks for one."""
    if known.max_steps is not None:
        if known.max_steps < 1:
            raise UserError("--max_steps", f"found {known.max_steps}", "give 1 or more")
        cfg = shortened(cfg, known.max_steps)
        steps = ", ".join(f"{s.name} {s.max_train_steps}" for s in cfg.all_stages())
        print(f"--max_steps {known.max_steps}: steps {steps}; {cfg.eval.num_samples} samples are measured")
    return cfg


def _recommended(known: argparse.Namespace, rest: list[str], switches: tuple[str, ...]) -> RunConfig:
    """The recommended settings for --method on --teacher, under the flags."""
    from fastgen.config.parse import overrides

    if known.config:
        raise UserError("--method", "found with --config", "give either; a file says the method itself")
    if not known.method:
        raise UserError("--teacher", "found without --method", "add --method NAME, or use --teacher.path")
    return recommended_config(known, overrides(rest, RunConfig, switches))


def recommended_config(known: argparse.Namespace, over: dict[str, Any]) -> RunConfig:
    """The recommended settings for `known.method` on `known.teacher`, under the nested values `over`;
    `known.recipe` becomes their short YAML.
    """
    from fastgen.config.recommended import recommend

    if known.teacher and "path" in (over.get("teacher") or {}):
        raise UserError("--teacher", "found with --teacher.path", "give one of them")
    known.teacher = known.teacher or "assets:teachers/fashion"
    found = recommend(known.method, known.teacher)
    name = re.sub(r"[^\w.+-]+", "-", Path(found.path.replace(":", "/")).name) or "teacher"
    if not known.dry_run:
        _without_gpu(found)
    values = with_flags(found.values, over, f"runs/{name}_{known.method}")
    _check_data(known, values)
    cfg = _smoke(known, validate(values))
    known.recipe = found.text({**spelled(found.values, over), "output_dir": cfg.output_dir})
    for note in found.notes:
        print(f"--method {known.method}: {note}")
    return cfg


def _without_gpu(found: Recommendation) -> None:
    """Settings of half precision are for a GPU; without one they become float32, which every CPU computes."""
    import torch

    half = found.values["teacher"].get("dtype"), found.values.get("train", {}).get("mixed_precision", "no")
    if torch.cuda.is_available() or half in ((None, "no"), ("null", "no")):
        return
    found.own["teacher"] = found.own.get("teacher", {}) | {"dtype": None}
    found.own["train"] = found.own.get("train", {}) | {"mixed_precision": "no"}
    found.notes.append("float32: these settings are of half precision, for a GPU, and there is none")


def _check_data(known: argparse.Namespace, values: dict[str, Any]) -> None:
    """Say which data are missing, and which methods need none, before the config says it in its own words."""
    from fastgen.cli.pairs import working
    from fastgen.core.paths import is_analytic
    from fastgen.objectives import REGISTRY, requirements_of

    data, objective = values.get("data") or {}, values.get("objective")
    if any(data.get(key) for key in PICTURES) or objective is None or is_analytic(values["teacher"]["path"]):
        return
    settings = REGISTRY[known.method].config.model_validate(objective)
    if not requirements_of(settings).real_data:
        return
    way = "give --data.images FOLDER"
    if getattr(settings, "gan_weight", 0):
        plain = settings.model_copy(update={"gan_weight": 0.0})
        if not requirements_of(plain).real_data:
            way += ", or --objective.gan_weight 0 with --data.prompts FILE"
    free = ", ".join(working(known.teacher, without_images=True))
    raise UserError("--method", f"{known.method} learns from images too", f"{way}; without any: {free}")


def refused(error: UserError, known: argparse.Namespace) -> UserError:
    """A refusal of the config as one of the pair of --method and --teacher: why, and which methods can."""
    from fastgen.cli.pairs import working

    about = error.key.partition(".")[0] in ("teacher", "student", "critic", "objective", "config")
    if not known.method or not about or error.key == "teacher.path":
        return error
    able = [m for m in working(known.teacher) if m != known.method]
    why = f"{known.method} does not work on {known.teacher}: {error.key}: {error.found}"
    return UserError("--method", why, f"{error.instruction}; methods that do: {', '.join(able)}")


def help_page(flags: argparse.ArgumentParser, cfg: RunConfig, about: list[str]) -> str:
    """The text of --help (short), --help SECTION ... and --help all."""
    from fastgen.config.help_text import help_text, section_text, sections

    if about == ["all"]:
        return flags.format_help() + "\n" + help_text(cfg)
    if about:
        return "\n\n".join(section_text(cfg, name) for name in about)
    rows = {"output_dir": "run folder", **sections(cfg)}
    width = max(map(len, rows)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in rows.items()]
    return "\n".join(
        [flags.format_help(), "sections of the config, whose keys are flags too", *lines, READ_ON]
    )
