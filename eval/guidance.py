"""A student that takes the guidance scale beside classifier-free guidance of its teacher, scale by scale, on
the same requests and noise; and the same file over another checkpoint of the base.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.batch import select
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.data.bundled import load_images
from fastgen.evaluation.metrics.fd_mini import Measurer
from fastgen.evaluation.metrics.speed import nfe
from fastgen.export.load import Loaded, load_export
from fastgen.networks.codecs import TextCodec
from fastgen.roles.roles import Student
from fastgen.sampling.solvers import ImageNoise, sample_student, sample_teacher

SCALES = (1.5, 3.0, 5.0, 7.5)
KEPT = ("fd_mini", "agreement", "recall")
SEED = 4321


@torch.no_grad()
def by_scale(model: str, base: str = "", num: int = 250, scales: tuple[float, ...] = SCALES) -> dict:
    """For each scale, the metrics of guided sampling and of the student, their ratios, and how far their
    pictures are apart, as a share of how far guided ones are from unguided.
    """
    loaded = load_export(model, base or None, key="--model")
    info = loaded.info
    if not loaded.is_student or info is None or not info.guidance_range or info.steps_as_guidance:
        raise UserError(
            "--model", f"{model} does not take the guidance scale", "give an export of one that does"
        )
    if not isinstance(loaded.codec, TextCodec):
        raise UserError("--model", f"{model} takes no prompts", "give a text-to-image student")
    held = load_images("tinted", "heldout")
    captions, attributes = held.captions, held.attributes
    assert captions is not None and attributes is not None, "tinted images have both"
    rows = torch.arange(num) % len(captions)
    wanted = {k: v[rows] for k, v in attributes.items()}
    draw = _Draw(loaded, [captions[i] for i in rows], info.teacher_steps)
    measurer, found = Measurer("tinted"), {}
    bare = draw.teacher(1.0)
    for w in scales:
        guided, mine = draw.teacher(w), draw.student(w)
        teacher, student = (measurer.compare(images, wanted) for images in (guided, mine))
        moved = (guided - bare).square().mean().sqrt()
        found[f"{w:g}"] = {
            "guided": {k: teacher[k] for k in KEPT},
            "student": {k: student[k] for k in KEPT},
            "ratio": {k: student[k] / teacher[k] for k in KEPT},
            "apart": float((mine - guided).square().mean().sqrt() / moved),
        }
    calls = {"guided": nfe(info.teacher_steps, 2.0), "student": len(info.times or ())}
    unguided = {k: measurer.compare(bare, wanted)[k] for k in KEPT}
    return {"num_samples": num, "seed": SEED, "nfe": calls, "unguided": unguided, "scales": found}


class _Draw:
    """Pictures of the same requests and noise by both, in batches of 50."""

    def __init__(self, loaded: Loaded, prompts: list[str], steps: int):
        unique = sorted(set(prompts))
        where = {text: i for i, text in enumerate(unique)}
        self.loaded, self.steps, self.reference = loaded, steps, loaded.reference()
        self.table, self.rows = loaded.codec.prompts(unique), torch.tensor([where[p] for p in prompts])

    def _all(self, draw) -> Tensor:
        parts = self.rows.split(50)
        starts = [50 * i for i in range(len(parts))]
        return torch.cat(
            [
                draw(select(self.table, rows), [SEED + a + i for i in range(len(rows))])
                for a, rows in zip(starts, parts)
            ]
        )

    def teacher(self, w: float) -> Tensor:
        codec = self.loaded.codec

        def draw(cond, seeds):
            noise = ImageNoise(seeds, codec.shape).first
            role, null = self.reference.role, codec.null(len(seeds))
            return codec.decode(sample_teacher(role, noise, cond, null, self.steps, w))

        return self._all(draw)

    def student(self, w: float) -> Tensor:
        role, codec = self.loaded.student.with_guidance(w), self.loaded.codec
        assert isinstance(role, Student)
        return self._all(lambda cond, seeds: codec.decode(sample_student(role, seeds, codec.shape, cond)))


def record(model: str, folder: Path, base: str = "", num: int = 250) -> Path:
    """Measure and write assets/results/benchmarks/guidance_<run>.json, or ..._on_<base>.json."""

    def named(path: str) -> str:
        place = Path(path)
        return place.parent.name if place.name == "export" else place.name

    measured = by_scale(model, base, num)
    name, command = named(model), f"python -m eval guidance --run runs/{named(model)}"
    if base:
        command += f" --base runs/{named(base)}/export"
    if num != 250:
        command += f" --num_samples {num}"
    file = folder / f"guidance_{name}{f'_on_{named(base)}' if base else ''}.json"
    document = {"model": name, **({"base": named(base)} if base else {}), "command": command, **measured}
    write_text(file, json.dumps(document, indent=1) + "\n")
    return file
