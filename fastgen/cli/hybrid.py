"""Base model and student in one picture (--base_steps), and the picture of every step (--visualize_dt)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastgen.cli.generator import Generator
from fastgen.core.errors import UserError
from fastgen.core.files import placed
from fastgen.roles.roles import Student
from fastgen.sampling.hybrid import Handover, estimates, handover
from fastgen.sampling.solvers import teacher_grid

DT_FILE, DT_ROWS = "dt.png", 8
"""the picture of the steps, and how many samples it shows"""


class Hybrid(Generator):
    """The base model takes the first steps, the student the rest; guidance acts on the base model."""

    def __init__(self, student: Generator, base: Generator, base_steps: int, start: int):
        """Two contenders made ready; base_steps: the base model's grid, start: the student's first step."""
        assert isinstance(student.role, Student)
        self.role, self.base, self.codec, self.null = student.role, base.role, student.codec, base.null
        self.guidance, self.is_student, self.nasa_scale = base.guidance if base.null else 1.0, True, 0.0
        self.steps = len(student.role.times)
        self.plan = handover(base.role, student.role, base_steps, start)

    @property
    def name(self) -> str:
        return f"hybrid, {self.plan.base_steps} base and {self.steps - self.plan.start} student steps"

    @property
    def nfe(self) -> int:
        return self.plan.nfe(self.role, self.guidance)

    def __call__(self, cond: dict, seeds: list[int], device) -> Tensor:
        *_, (_, _, x0) = step_estimates(self, cond, seeds, device)
        return self._decoded(x0)


def with_base(student: Generator, base: Generator, base_steps: int, start: int) -> Hybrid:
    """The hybrid of two contenders; a UserError where the student has no step left to take."""
    if not isinstance(student.role, Student):
        found = "the model is no few-step student, whose first steps a base model could take"
        raise UserError("--base_steps", found, "leave it out")
    if start >= student.steps:
        found = f"found {start}, which leaves none of the student's {student.steps} steps to it"
        raise UserError("--handover", found, f"give less than {student.steps}, or more --steps")
    return Hybrid(student, base, base_steps, start)


def step_estimates(
    generator: Generator, cond: dict, seeds: list[int], device
) -> Iterator[tuple[str, float, Tensor]]:
    """(who, time, denoised estimate) of every step of any contender."""
    shape, w = generator.codec.shape, generator.guidance if generator.null else 1.0
    uncond = cond | {k: v.expand(len(seeds), *v.shape[1:]) for k, v in generator.null.items()}
    base, student, plan = None, None, Handover((), 0, 1.0)
    if isinstance(generator, Hybrid):
        base, student, plan = generator.base, generator.role, generator.plan
    elif isinstance(generator.role, Student):
        student = generator.role
    else:
        base = generator.role
        plan = Handover(tuple(teacher_grid(base.schedule, generator.steps)), 0, 1.0)
    with generator.negative():
        yield from estimates(base, student, plan, seeds, shape, cond, uncond, w, device)


@torch.no_grad()
def draw_steps(generators: list[Generator], cond: dict, seeds, out: Path, device) -> Path:
    """Write dt.png: of each contender a row for each of the first samples and a column for each step."""
    from fastgen.core.batch import select

    seeds = list(seeds)[:DT_ROWS]
    rows = len(next(iter(cond.values()))) if cond else 1
    asked = {k: v.to(device) for k, v in select(cond, torch.arange(len(seeds)) % rows).items()}
    tables = []
    for generator in generators:
        found = [(who, t, D) for who, t, D in step_estimates(generator, asked, seeds, device)]
        images = torch.stack([generator.codec.decode(D).cpu() for _, _, D in found])
        tables.append((generator.name, [f"{who} {t:.4g}" for who, t, _ in found], images))
    with placed(out / DT_FILE) as path:
        sheet(tables).save(path)
    return out / DT_FILE


def sheet(tables: list[tuple[str, list[str], Tensor]]):
    """One picture of (name, heads of the columns, images [columns, rows, C, H, W]) below each other."""
    from PIL import Image, ImageDraw

    from fastgen.data.clips import filmstrip
    from fastgen.data.media import to_pil

    pictures = [(name, heads, filmstrip(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if x.ndim == 6 else x)
                for name, heads, x in tables]  # fmt: skip
    scale = max(1, 64 // pictures[0][2].shape[-1])
    height, width = (n * scale + 2 for n in pictures[0][2].shape[-2:])
    wide = max(width, 88)
    blocks = [34 + len(images[0]) * height for *_, images in pictures]
    canvas = Image.new("RGB", (max(len(heads) for _, heads, _ in pictures) * wide, sum(blocks)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (name, heads, images) in enumerate(pictures):
        top = sum(blocks[:k])
        pen.text((4, top + 2), name, fill="black")
        for column, (head, found) in enumerate(zip(heads, images)):
            pen.text((column * wide + 4, top + 18), head, fill="black")
            for row, image in enumerate(found):
                tile = to_pil(image).convert("RGB").resize((width - 2, height - 2), Image.Resampling.NEAREST)
                canvas.paste(tile, (column * wide, top + 34 + row * height))
    return canvas
