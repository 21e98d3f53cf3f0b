"""What a knob between faithful and real trades: a student of `oftsr` at several fidelities, beside its
teacher in one step and in its own, and the bicubic enlargement, on the same held-out pictures and noise.

python -m eval frontier --run runs/digits-sr_oftsr

PSNR and SSIM (of pictures as large as its window) say how near a picture is to its original, `perceptual` the
same in the feature maps of the measuring net (LPIPS without learned weights), fd_mini how real the pictures
are together. `variance` is that of the pixels over the originals'.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eval.evidence import FIGURES, run_name
from fastgen.cli.generator import Generator
from fastgen.cli.pictures import grid
from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.files import placed, write_text
from fastgen.data.bundled import load_images
from fastgen.data.degradation import shown
from fastgen.diffusion.losses import feature_distance
from fastgen.evaluation.metrics.fd_mini import Measurer
from fastgen.evaluation.metrics.pixels import fidelity
from fastgen.export.load import Loaded, load_export
from fastgen.networks.codecs import PictureCodec

FIDELITIES = (0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.01)
NUM, BATCH, SEED = 1000, 50, 4321
COLUMNS = 10
"""pictures of each contender in the grid"""

Draw = Callable[[dict, list[int]], Tensor]
"""images [B, C, H, W] in [0, 1] of conditions, one seed each"""


def contenders(loaded: Loaded) -> dict[str, tuple[int, Draw]]:
    """(network calls, what draws) by name: the student at each fidelity, its teacher in 1 and in its own."""
    info = loaded.info
    assert info is not None and info.fidelity_range is not None, "checked before"
    low, high = info.fidelity_range
    found: dict[str, tuple[int, Draw]] = {}
    for value in (f for f in FIDELITIES if low <= f <= high):
        role = loaded.student.with_fidelity(value)
        one = Generator(Loaded(role, loaded.teacher, info, loaded.path), 0, 1.0, {})
        found[f"student, fidelity {value:g}"] = 1, lambda c, s, g=one: g(c, s, "cpu")
    base = loaded.reference()
    for steps in (1, info.teacher_steps):
        one = Generator(base, steps, 1.0, {})
        found[f"teacher, {steps} step{'s' * (steps > 1)}"] = steps, lambda c, s, g=one: g(c, s, "cpu")
    return found


def scores(
    measurer: Measurer, images: Tensor, originals: Tensor, wanted: dict[str, Tensor]
) -> dict[str, float]:
    """How near the images are to their originals, and how real they are together."""
    pairs = zip(images.split(BATCH), originals.split(BATCH))
    maps = measurer.net.maps
    apart = [float(feature_distance(maps(a), maps(b))) * len(a) for a, b in pairs]
    found = measurer.compare(images, wanted)
    near = fidelity(images, originals) | {"perceptual": sum(apart) / len(images)}
    spread = {"variance": float(images.var() / originals.var())}
    return near | spread | {k: found[k] for k in ("fd_mini", "recall", "agreement")}


@torch.no_grad()
def study(run: Path, num: int = NUM) -> tuple[dict, list[tuple[str, Tensor]]]:
    """(the scores of every contender, the first images of each)."""
    loaded = load_export(run, key="--run")
    info, codec = loaded.info, loaded.codec
    if info is None or info.fidelity_range is None or not isinstance(codec, PictureCodec):
        raise UserError("--run", f"{run} has no fidelity to choose", "give a run of oftsr over a restorer")
    name = str((loaded.teacher.info or {}).get("measure") or "")
    if not name or not (run / "config.yaml").is_file():
        raise UserError("--run", f"{run} is no run over a bundled teacher", "give its run folder")
    section = validate(read_files([str(run / "config.yaml")])).data.degradation
    assert section is not None, "a restorer is trained with a degradation"
    held = load_images(name, "heldout")
    pictures = held.images[:num]
    enlarged = shown(pictures, section.factor, section.kind)
    wanted = {k: v[:num] for k, v in (held.attributes or {"class": held.labels}).items()}
    num, originals, measurer = len(pictures), pictures.float() / 255, Measurer(name)
    rows, seen = {}, [("bicubic", enlarged[:COLUMNS].float() / 255)]
    rows["bicubic"] = {"nfe": 0, **scores(measurer, enlarged.float() / 255, originals, wanted)}
    for title, (nfe, draw) in contenders(loaded).items():
        parts = torch.arange(num).split(BATCH)
        conds = (codec.image_rows(enlarged[part].float() / 127.5 - 1)[0] for part in parts)
        images = torch.cat([draw(c, [SEED + int(i) for i in part]) for c, part in zip(conds, parts)])
        rows[title] = {"nfe": nfe, **scores(measurer, images, originals, wanted)}
        print(title, {k: round(v, 4) for k, v in rows[title].items()}, flush=True)
        seen.append((title, images[:COLUMNS]))
    seen.append(("original", originals[:COLUMNS]))
    about = {"images": num, "seed": SEED, "factor": section.factor, "set": name}
    return {**about, "contenders": rows}, seen


def record(model: str, folder: Path) -> Path:
    """Write assets/results/benchmarks/frontier_<run>.json, and docs/figures/frontier_<run>.png."""
    name = run_name(model)
    found, seen = study(Path(model))
    document = {"model": name, "command": f"python -m eval frontier --run runs/{name}", **found}
    picture = grid([images for _, images in seen], [title for title, _ in seen], columns=COLUMNS)
    figure = FIGURES / f"frontier_{name}.png"
    with placed(figure) as temporary:
        picture.save(temporary, "PNG")
    file = folder / f"frontier_{name}.json"
    write_text(file, json.dumps(document, indent=1) + "\n")
    return file
