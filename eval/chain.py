"""Recipes that start from another recipe's run: the whole chain, what it costs, and running it.

A recipe needs another where its config names runs/OTHER/... as an input. A student then costs what its own
run takes and all that the runs before it take: minutes, optimizer steps, and teacher calls, which are network
calls of the teacher for one sample each (a guided call counts two), as the methods declare them.
"""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from eval.evidence import config_sha256, load_recipe, recipe_files
from fastgen.config.parse import read_files
from fastgen.config.run import RunConfig, validate
from fastgen.core.errors import UserError
from fastgen.data.bundled import NAMES, load_labels
from fastgen.objectives import requirements_of

INPUT = re.compile(r"^runs/([^/]+)/")
FIRST_EPOCH = "teacher (first epoch)"


class Cost(NamedTuple):
    """Of one run, or of a chain of them."""

    minutes: float
    steps: int
    teacher_calls: float

    def __add__(self, other):
        return Cost(*(a + b for a, b in zip(self, other)))


def needed(cfg: RunConfig) -> list[str]:
    """Recipes whose runs a config reads, in the order it names them."""
    found: list[str] = []

    def look(value: object) -> None:
        if isinstance(value, dict):
            for child in value.values():
                look(child)
        elif isinstance(value, str) and (match := INPUT.match(value)):
            found.append(match[1])

    values = cfg.model_dump(mode="json")
    values.pop("output_dir")
    look(values)
    return list(dict.fromkeys(found))


@cache
def chain(recipe: str) -> tuple[str, ...]:
    """A recipe after all that it needs, each once, in an order that can be run."""
    found: list[str] = []

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UserError("--recipe", f"{' needs '.join((*above, name))}", "break the circle")
        if name not in found:
            for other in needed(load_recipe(name)):
                add(other, (*above, name))
            found.append(name)

    add(recipe, ())
    return tuple(found)


@cache
def work(recipe: str) -> tuple[int, float]:
    """(optimizer steps, teacher calls) of a recipe's own run."""
    cfg = load_recipe(recipe)
    steps, calls = 0, 0.0
    drawn = cfg.student.guidance_embedding
    for stage in cfg.all_stages():
        needs = requirements_of(stage.objective)
        guidance = drawn[1] if drawn else needs.learned_guidance(cfg.teacher.guidance)
        num = stage.num_steps or len(cfg.student.timesteps or ()) or cfg.student.num_steps
        length = stage.max_train_steps
        samples = length * cfg.train.train_batch_size * cfg.train.gradient_accumulation_steps
        steps += length
        for role, per_sample in needs.network_calls(guidance, num).items():
            if role == FIRST_EPOCH:
                calls += per_sample * min(samples, _pairs(cfg, stage.objective))
            elif role.partition("+")[0] == "teacher":
                calls += per_sample * samples
    return steps, calls


def _pairs(cfg: RunConfig, objective) -> int:
    """How many different pairs there are to make."""
    num = len(load_labels(cfg.data.name, "train")[0]) if cfg.data.name in NAMES else sys.maxsize
    return min(num, cfg.data.limit or num) * max(1, getattr(objective, "noises", 1))


def cost(recipe: str, documents: list[dict]) -> tuple[Cost, bool]:
    """(of the whole chain, whether the time of every run in it is known); seeds are averaged."""
    total, whole = Cost(0, 0, 0), True
    for name in chain(recipe):
        minutes = _minutes(name, documents)
        whole = whole and minutes > 0
        total = total + Cost(minutes, *work(name))
    return total, whole


def _minutes(recipe: str, documents: list[dict]) -> float:
    """Mean over the seeds of one run; 0 where there is no evidence of it."""
    times = [d["results"].get("train", {}).get("seconds") for d in documents if d["recipe"] == recipe]
    known = [t / 60 for t in times if t]
    return sum(known) / len(known) if known else 0.0


def cells(recipe: str, documents: list[dict]) -> list[str]:
    """Minutes, steps and thousands of teacher calls of the chain; the run's own minutes where others come
    before it, and a > where the time of one of them is not known.
    """
    try:
        found, whole = cost(recipe, documents)
    except UserError:  # evidence of a recipe that is gone, which `outdated` reports
        return [f"{_minutes(recipe, documents):.0f}", "", ""]
    minutes = f"{'' if whole else '> '}{found.minutes:.0f}"
    if len(chain(recipe)) > 1:
        minutes += f" (own {_minutes(recipe, documents):.0f})"
    return [minutes, f"{found.steps}", f"{found.teacher_calls / 1000:.0f}"]


# -- running a chain
def finished(recipe: str, folder: Path) -> bool:
    """Whether a folder holds a finished run of the recipe; UserError where it is a run of something else."""
    if not (folder / "config.yaml").is_file():
        return False
    own = validate(read_files([str(folder / "config.yaml")]))
    if config_sha256(own) != config_sha256(load_recipe(recipe)):
        raise UserError("--recipe", f"{folder} is a run of another config than {recipe}", "move it away")
    return (folder / "results.json").is_file() and (folder / "export").is_dir()


def run(recipe: str, seed: int | None = None, dry: bool = False) -> int:
    """Run what a recipe needs and is not there yet, then itself; runs/ is where recipes look for each other.

    An unfinished run is resumed. `seed` is for the recipe itself. The exit code is that of the first call
    that fails.
    """
    names = chain(recipe)
    for name in names:
        folder = Path("runs") / name
        if finished(name, folder):
            print(f"{name}: finished in {folder}", flush=True)
            continue
        command = [sys.executable, "-m", "fastgen", "train", "--config", *map(str, recipe_files(name))]
        command += ["--output_dir", str(folder)]
        if name == recipe and seed is not None:
            command += ["--train.seed", str(seed)]
        if (folder / "config.yaml").is_file():
            command.append("--resume")
        steps, calls = work(name)
        print(f"{name}: {steps} steps, {calls / 1000:.0f} thousand teacher calls, into {folder}", flush=True)
        if not dry and (code := subprocess.run(command).returncode):
            return code
    return 0
