"""The catalogue of configs/: how recipes are named, and the tables of configs/README.md."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from eval.evidence import methods_of, teacher_name
from eval.ladder import paper
from eval.results_table import cell, distance, markdown, numbers, teacher_value
from fastgen.config.catalogue import first_sentence, head_comment
from fastgen.config.parse import read_files
from fastgen.config.run import RunConfig, validate
from fastgen.core.errors import UserError, suggest
from fastgen.core.paths import PACKAGE
from fastgen.objectives import REGISTRY

CONFIGS = PACKAGE.parent / "configs"
PAGE = CONFIGS / "README.md"
UNNAMED = ("quickstart",)  # what `python train.py` runs; the one recipe that no teacher and method name


class Variant(NamedTuple):
    """A word at the end of a recipe's name."""

    means: str
    holds: Callable[[RunConfig], bool]


VARIANTS = {
    "full": Variant(
        "a full student, of a method whose plain recipe trains a LoRA", lambda c: c.student.kind == "full"
    ),
    "lora": Variant(
        "a LoRA student, of a method whose plain recipe trains a full one", lambda c: c.student.kind == "lora"
    ),
    "unguided": Variant("the teacher without guidance", lambda c: c.teacher.guidance == 1),
    "gan": Variant("with a GAN term (SiDA)", lambda c: c.objective.gan_weight > 0),
    "lsg": Variant("long and short guidance (SiD-LSG)", lambda c: c.objective.score_guidance is not None),
    "clip": Variant("with the image-text loss", lambda c: c.objective.clip_weight > 0),
    "v2": Variant("SwiftBrush v2: fused with a second student", lambda c: bool(c.student.fuse)),
    "causal": Variant(
        "a student that makes clips block after block, of a method whose plain recipe makes them at once",
        lambda c: c.student.causal is not None,
    ),
    "amortised": Variant(
        "a network that makes the asset of any prompt, of a method whose plain recipe makes one asset",
        lambda c: c.student.asset is not None and c.student.asset.generator is not None,
    ),
    "hyper": Variant(
        "Hyper-SD's last stage, from a TSCD student or after TSCD's own stages",
        lambda c: "_tscd/" in c.student.init or c.all_stages()[0].objective.name == "tscd",
    ),
    "stages": Variant(
        "ProlificDreamer's three stages: a field, its geometry, its colours",
        lambda c: {s.asset.train for s in c.all_stages() if s.asset} == {"geometry", "colours"},
    ),
    "several": Variant("more than one class or word forgotten", lambda c: len(c.objective.forget) > 1),
    "whole": Variant(
        "all stages of a system in one run", lambda c: len({s.objective.name for s in c.all_stages()}) > 2
    ),
    "seedance": Variant(
        "Seedance 1.0's stages, of which rewards are the last",
        lambda c: [s.objective.name for s in c.all_stages()] == ["tscd", "tdm", "ladd", "feedback"],
    ),
    "magic": Variant(
        "Magic 1-For-1: the teacher's guidance into one pass first",
        lambda c: c.all_stages()[0].objective.name == "guidance_distillation",
    ),
}


class Name(NamedTuple):
    """<teacher>_<method>[_<variant>], taken apart."""

    teacher: str
    method: str
    variants: tuple[str, ...]


def parse_name(stem: str) -> Name:
    """A recipe's name, taken apart; a UserError where it has no such form."""
    teacher, _, rest = stem.partition("_")
    methods = [m for m in REGISTRY if f"{rest}_".startswith(f"{m}_")]
    if not methods:
        raise UserError(
            f"recipe {stem}", "its name has no method", "call it <teacher>_<method>[_<variant>].yaml"
        )
    method = max(methods, key=len)
    words = tuple(filter(None, rest.removeprefix(method).split("_")))
    for word in words:
        if word not in VARIANTS and not re.fullmatch(r"\d+step", word):
            raise UserError(
                f"recipe {stem}",
                f"unknown variant {word!r}{suggest(word, VARIANTS)}",
                f"use one of {', '.join(VARIANTS)} or Nstep, or declare it in eval/catalogue.py",
            )
    return Name(teacher, method, words)


def misnamed(stem: str, cfg: RunConfig) -> list[str]:
    """What a recipe's name says that its content does not."""
    name, wrong = parse_name(stem), []
    if name.teacher != teacher_name(cfg, stem):
        wrong.append(f"{stem} distils {teacher_name(cfg, stem)}")
    if name.method != cfg.all_stages()[-1].objective.name:
        wrong.append(f"{stem} ends with {cfg.all_stages()[-1].objective.name}")
    for word in name.variants:
        steps = re.fullmatch(r"(\d+)step", word)
        holds = cfg.student.num_steps == int(steps[1]) if steps else VARIANTS[word].holds(cfg)
        if not holds:
            wrong.append(f"{stem} is not of the variant {word}")
    return wrong


def summary(file: Path) -> str:
    """The comment at the head of a YAML file, as a cell of a table."""
    return head_comment(file).replace("|", "\\|")


def _link(file: Path, text: str = "") -> str:
    return f"[{text or file.stem}]({file.relative_to(CONFIGS).as_posix()})"


def _files(kind: str) -> list[Path]:
    return sorted((CONFIGS / kind).glob("*.yaml"))


def _result(group: list[dict], documents: list[dict]) -> list[str]:
    """(all step counts, best distance, teacher's, ratio, evidence) of a recipe from its seeds."""
    if not group:
        return ["", "", "", "", "none yet"]
    metric, results = distance(group), group[0]["results"]
    paths = [("student",), *(("student_by_steps", n) for n in results.get("student_by_steps", {}))]
    calls = {path: int(numbers(group, *path, "nfe")[0]) for path in paths}
    best = min(paths, key=lambda path: sum(numbers(group, *path, metric)))
    own, teacher = numbers(group, *best, metric), teacher_value(group[0], documents, metric)
    count = f", {len(group)} seeds" if len(group) > 1 else ""
    return [
        ", ".join(map(str, sorted(set(calls.values())))),
        f"{cell(own)} at {calls[best]}",
        f"{teacher[0]:.3g} at {cell(numbers(group, 'teacher', 'nfe')[:1], '.0f')}" if teacher else "",
        ("" if teacher[1] else "~") + f"{sum(own) / len(own) / teacher[0]:.2f}" if teacher else "",
        f"[evidence](../assets/results/{group[0]['file']}){count}",
    ]


def recipes(documents: list[dict]) -> str:
    """One table a teacher: method x student x steps x result."""
    tables: dict[str, list[list[str]]] = {}
    for file in _files("recipes"):
        cfg = validate(read_files([str(file)]))
        group = [d for d in documents if d["recipe"] == file.stem]
        row = [_link(file), methods_of(cfg), cfg.student.kind, *_result(group, documents)]
        tables.setdefault(teacher_name(cfg, file.stem), []).append(row)
    header = ("recipe", "method", "student", "steps", "fd_mini", "teacher", "of teacher", "evidence")
    lines = []
    for teacher, rows in tables.items():
        metric = distance([d for d in documents if d["teacher"] == teacher])
        title = f"### {teacher}: [base](bases/{teacher}.yaml), [teacher](teachers/{teacher}.yaml)"
        lines += [title, "", *markdown((*header[:4], metric, *header[5:]), rows), ""]
    return "\n".join(lines).rstrip()


def variants(_: list[dict]) -> str:
    """The words that may end a recipe's name, and where they do."""
    rows = []
    for word in (*VARIANTS, "4step"):
        used = [f for f in _files("recipes") if f.stem.endswith(f"_{word}")]
        means = VARIANTS[word].means if word in VARIANTS else "as many student steps"
        rows.append([f"`{word}`", means, ", ".join(map(_link, used))])
    return "\n".join(markdown(("variant", "means", "recipes"), rows))


def bases(_: list[dict]) -> str:
    """What the shared settings are, and who uses them."""
    used: dict[str, int] = {}
    for file in (*_files("recipes"), *_files("teachers")):
        found = yaml.safe_load(file.read_text(encoding="utf-8")).get("base", "")
        used[found] = used.get(found, 0) + 1
    rows = [
        [_link(f), first_sentence(summary(f)), str(used.get(f"../bases/{f.name}", 0))]
        for f in _files("bases")
    ]
    return "\n".join(markdown(("base", "what", "files on it"), rows))


def teachers(_: list[dict]) -> str:
    """The models that can be distilled, with the size and guidance of their configs."""
    rows = []
    for file in _files("teachers"):
        teacher = read_files([str(file)])["teacher"]
        size = [str(teacher[k]) for k in ("num_frames", "height", "width") if k in teacher]
        guidance = teacher.get("embedded_guidance", teacher.get("guidance", 1.0))
        kind = "trained here" if "blueprint" in teacher else f"`{teacher['path']}`"
        row = [_link(file), first_sentence(summary(file)), kind, " x ".join(size), f"{guidance:g}"]
        rows.append([*row, str(teacher["num_steps"])])
    header = ("teacher", "what", "model", "frames x height x width", "guidance", "steps")
    return "\n".join(markdown(header, rows))


def objectives(_: list[dict]) -> str:
    """The published settings of each method."""
    rows = [[_link(f), paper(f.stem), first_sentence(summary(f))] for f in _files("objectives")]
    return "\n".join(markdown(("objective", "paper", "settings"), rows))


def real(_: list[dict]) -> str:
    """The recipes of released models: what was published with their settings."""
    rows = [[_link(f), summary(f)] for f in _files("recipes/real")]
    return "\n".join(markdown(("recipe", "what, and what was published"), rows))


def ablations(documents: list[dict]) -> str:
    """Changes to recipes, and which recipes they were measured on."""
    rows = []
    for file in _files("ablations"):
        on = dict.fromkeys(d["recipe"] for d in documents if d["recipe"].endswith(f"+{file.stem}"))
        rows.append([_link(file), summary(file), ", ".join(f"`{name}`" for name in on)])
    return "\n".join(markdown(("change", "what", "measured as"), rows))


TABLES = {f.__name__: f for f in (recipes, variants, bases, teachers, objectives, real, ablations)}
