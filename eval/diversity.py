"""Whether hybrid sampling brings back the variety that distillation loses, on Tinted Fashion.

python -m eval diversity --run runs/tinted-sd_tdm_full

Several images of each of some captions by the base model, by its few-step student, and by both together
(fastgen/sampling/hybrid.py): the mean distance of two images of one caption and the effective number of
different ones (Vendi score), in the features of the measuring net; what the captions find; calls and seconds.
`decided` has the distances of the denoised estimates step by step: when a picture's content is fixed.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from eval.evidence import FIGURES, run_name
from fastgen.cli.generator import Generator
from fastgen.cli.hybrid import Hybrid, draw_steps, step_estimates
from fastgen.core.batch import select
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.data.bundled import VOCABULARY, all_captions, attributes_of
from fastgen.evaluation.metrics.fd_mini import Measurer
from fastgen.evaluation.metrics.speed import interleaved
from fastgen.evaluation.metrics.variety import vendi_score, within_groups
from fastgen.export.load import load_export
from fastgen.networks.codecs import TextCodec

SETTINGS = ((4, 1), (8, 1), (20, 1), (4, 2), (20, 2))
"""(grid of the base model, first step of the student) of each hybrid"""
CAPTIONS, SIZE, BATCH = 45, 10, 90
FIGURE = FIGURES / "steps.png"


def contenders(model: str) -> dict[str, Generator]:
    """Base model, student and hybrids of a run, by name."""
    loaded = load_export(model, key="--run")
    if not loaded.is_student or not isinstance(loaded.codec, TextCodec) or len(loaded.student.times) < 3:
        raise UserError("--run", f"{model} is no text-to-image student of three steps or more", "give one")
    info, base = loaded.info, loaded.reference()
    assert info is not None, "a student's export describes it"
    null = loaded.codec.null(1)
    student = Generator(loaded, 0, info.guidance, null)
    steps = info.teacher_steps or 20
    found = {"base": Generator(base, steps, info.guidance, null), "student": student}
    found[f"base, {student.steps} steps"] = Generator(base, student.steps, info.guidance, null)
    for num, start in SETTINGS:
        hybrid = Hybrid(student, found["base"], num, start)
        found[f"hybrid, grid of {num}, student from step {start}"] = hybrid
    plain = Generator(base, steps, 1.0, null)
    found["hybrid, grid of 20 without guidance, student from step 1"] = Hybrid(student, plain, 20, 1)
    return found


def requests(codec) -> tuple[dict, dict[str, Tensor]]:
    """(conditions, attributes asked for) of SIZE images in a row for each of CAPTIONS captions."""
    captions = all_captions()[:: len(all_captions()) // CAPTIONS][:CAPTIONS]
    rows = torch.arange(len(captions)).repeat_interleave(SIZE)
    ids = {k: torch.tensor([attributes_of(c)[k] for c in captions])[rows] for k in VOCABULARY}
    return select(codec.prompts(captions), rows), ids


def scores(measurer: Measurer, images: Tensor, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Distance of two images of one caption, Vendi score of a caption's, and the usual ones."""
    features = measurer.features(images)
    pairs = within_groups(features, SIZE, lambda a, b: (a - b).norm(dim=1))
    vendi = [vendi_score(group).value for group in features.unflatten(0, (-1, SIZE))]
    found = measurer.compare(images, wanted)
    own = {"distance": pairs.value, "vendi": sum(vendi) / len(vendi)}
    return own | {k: found[k] for k in ("fd_mini", "agreement", "recall")}


@torch.no_grad()
def study(model: str, seed: int = 0) -> dict:
    """Every contender's scores; the distances of the estimates of base model and student by step."""
    found = contenders(model)
    measurer, codec = Measurer("tinted"), found["base"].codec
    cond, wanted = requests(codec)
    rows, num = {}, CAPTIONS * SIZE
    few = {k: v[:20] for k, v in cond.items()}
    seconds = interleaved({n: lambda g=g: g(few, list(range(20)), "cpu") for n, g in found.items()}, 20, 3)
    for name, generator in found.items():
        parts = [torch.arange(i, min(i + BATCH, num)) for i in range(0, num, BATCH)]
        images = [generator(select(cond, part), [seed + int(i) for i in part], "cpu") for part in parts]
        about = {"nfe": generator.nfe, "seconds_per_sample": seconds[name]}
        rows[name] = about | scores(measurer, torch.cat(images), wanted)
        print(name, {k: round(v, 4) for k, v in rows[name].items()}, flush=True)
    decided = {}
    for name in ("base", "student"):
        steps = step_estimates(found[name], few, list(range(seed, seed + 20)), "cpu")
        decided[name] = [
            {"time": time, "distance": _distance(measurer, codec.decode(D))} for _, time, D in steps
        ]
    return {"images": num, "captions": CAPTIONS, "seed": seed, "contenders": rows, "decided": decided}


def _distance(measurer: Measurer, images: Tensor) -> float:
    return within_groups(measurer.features(images), SIZE, lambda a, b: (a - b).norm(dim=1)).value


def record(model: str, folder: Path) -> Path:
    """Measure; write assets/results/benchmarks/diversity_<run>.json and the picture of the steps."""
    name = run_name(model)
    found = study(model) | {"model": name, "command": f"python -m eval diversity --run runs/{name}"}
    file = folder / f"diversity_{name}.json"
    write_text(file, json.dumps(found, indent=1) + "\n")
    shown = contenders(model)
    names = ("student", f"hybrid, grid of {SETTINGS[0][0]}, student from step 1", f"base, {4} steps")
    cond = shown["base"].codec.prompts(["a red boot on a white background"] * 4)
    picture = draw_steps([shown[n] for n in names if n in shown], cond, range(4), FIGURE.parent, "cpu")
    picture.replace(FIGURE)
    return file
