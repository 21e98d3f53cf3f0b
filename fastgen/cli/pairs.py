"""Which methods work on a teacher, as far as their settings say, before anything is trained."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from fastgen.config.recommended import load_shapes, recommend
from fastgen.config.run import RunConfig, validate, with_flags
from fastgen.core.errors import UserError
from fastgen.networks.teacher import Teacher
from fastgen.objectives import REGISTRY
from fastgen.training.checks import check_fits

PLACEHOLDER = {"images": "images"}
"""a data section for methods that are only asked whether they could run"""


def working(teacher: str, without_images: bool = False) -> list[str]:
    """Methods whose recommended settings fit this teacher; `without_images`: those that read none."""
    shapes: Teacher | None = None
    found = []
    for method in sorted(REGISTRY):
        try:
            if shapes is None:
                shapes = load_shapes(recommend(method, teacher).values)
            with redirect_stdout(StringIO()):  # notices of settings that nobody uses
                cfg = _config(recommend(method, teacher, shapes).values)
            check_fits(shapes, cfg.teacher, cfg.student, cfg.all_stages())
        except UserError:
            continue
        if not (without_images and cfg.reads_data()):
            found.append(method)
    return found


def _config(values: dict[str, Any]) -> RunConfig:
    """A config of these values, with images where they name no data."""
    data = values.get("data") or {}
    if not (data.get("name") or data.get("images")):
        values = with_flags(values, {"data": PLACEHOLDER})
    return validate(values)
