"""A scene with known materials taken apart twice: progressively, and by plain inverse rendering.

python -m eval relight

The same photographs, splat, first normals, light and steps for both.
Albedo, normals and images under lights that were never seen, against the truth.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from eval.evidence import FIGURES
from fastgen.cli.relight import strip_of
from fastgen.core.files import write_text
from fastgen.threed.cameras import middle, turntable
from fastgen.threed.files import write_gif
from fastgen.threed.gaussians import GaussianAsset
from fastgen.threed.radiance_distillation import Materials, Settings, distil, fit_splat, look
from fastgen.threed.relight import LIGHTS, maps, of_gaussians, relit
from fastgen.threed.relight_scores import RANGES, photographs, scores
from fastgen.threed.still_life import photograph

VIEWS, SIZE, POINTS, STEPS, SEEDS = 32, 40, 400, 260, (0,)
CONTENDERS = {"progressive": Settings(steps=500), "plain": Settings(steps=500, plain=True)}
SHOWN = turntable(1, 30.0)
"""the view of the pictures"""


def row(asset: GaussianAsset, found: Materials, progress: Tensor, size: int) -> list[Tensor]:
    """Pictures [3, size, size] of one method's row: image, albedo, normal, roughness, progress, evening."""
    shown = maps(asset, found, progress, SHOWN, size)
    S = relit(asset, found, SHOWN, size, found.light, 1.0)[0]
    return [S, *shown.values(), relit(asset, found, SHOWN, size, LIGHTS["evening"], 1.0)[0]]


def truth_row(size: int) -> list[Tensor]:
    """The same of the scene itself; no progress."""
    photos, truth = photograph(SHOWN, size)
    white = 1 - photos.alpha[0]
    evening = photograph(SHOWN, size, LIGHTS["evening"], lamps=False)[0].rgb[0]
    hit = truth.hit[0]
    parts = [truth.albedo[0], hit * (0.5 + 0.5 * truth.normal[0]), truth.roughness[0].expand(3, -1, -1)]
    nothing = torch.ones(3, size, size)
    return [photos.rgb[0] + white, *(p + (1 - hit) for p in parts), nothing, evening + white]


def record(folder: Path, views: int = VIEWS, points: int = POINTS, steps: int = STEPS) -> Path:
    """Measure; write assets/results/benchmarks/relight_still_life.json, a picture and a turntable."""
    from PIL import Image

    torch.set_num_threads(1)
    photos = photographs(views, SIZE)
    asset = fit_splat(photos, points, steps, tell=print)
    pixels = look(asset, photos)
    measured: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    rows = [truth_row(SIZE)]
    for name, settings in CONTENDERS.items():
        for seed in SEEDS:
            found, progress = distil(asset, pixels, replace(settings, seed=seed), print)
            each = of_gaussians(pixels, progress)
            measured[name].append(scores(asset, found, each, SIZE))
            if seed == SEEDS[0]:
                rows.append(row(asset, found, each, SIZE))
            if name == "progressive" and seed == SEEDS[0]:
                frames = relit(asset, found, middle(RANGES, 24), 64, LIGHTS["evening"])
                write_gif(frames, FIGURES / "relight_still_life.gif", scale=3)
    strips = [torch.from_numpy(strip_of(one)) for one in rows]
    picture = Image.fromarray(torch.cat(strips).numpy())
    twice = (2 * picture.width, 2 * picture.height)
    picture.resize(twice, Image.Resampling.NEAREST).save(FIGURES / "relight_still_life.png")
    document = {
        "model": "still_life",
        "command": "python -m eval relight",
        "settings": {"views": views, "size": SIZE, "points": points, "splat_steps": steps}
        | asdict(CONTENDERS["progressive"]),
        "measured": measured,
    }
    file = folder / "relight_still_life.json"
    write_text(file, json.dumps(document, indent=1) + "\n")
    return file
