"""Students that make clips block after block, or begin them with a frame, on clips twice as long as trained.

python -m eval longer --run runs/moving-wan_self_forcing
python -m eval longer --run runs/moving-wan-i2v_dmd2       two windows, the second begun by the end of one

The same requests and noise for each run: the first half of a clip and its second, which begins where training
ended, each measured as a clip by itself. What a student accumulates of its own errors shows in the second.
`seconds_per_frame` is of both halves together, one thread.
"""

import json
from pathlib import Path

import torch

from eval.evidence import FIGURES, run_name
from fastgen.cli.generator import Generator
from fastgen.cli.windows import Windowed, windowed
from fastgen.core.batch import select
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.data import moving
from fastgen.data.loader import image_rows, shown_frames
from fastgen.evaluation.metrics.fvd_mini import ClipMeasurer
from fastgen.evaluation.metrics.speed import interleaved
from fastgen.evaluation.sample_grids import save_grid
from fastgen.export.load import load_export

NUM, BATCH, SEED, SHOWN = 200, 25, 4321, 6
KEPT = (
    "fvd_mini",
    "fd_mini",
    "agreement",
    "agreement_colour",
    "agreement_motion",
    "frame_consistency",
    "dynamic_degree",
)


def drawer(model: str, times: int = 2) -> Generator:
    """What draws clips `times` as long as the student of this run was trained for."""
    loaded = load_export(model, key="--run")
    if not loaded.is_student or loaded.info is None:
        raise UserError("--run", f"{model} is no student", "give the folder of a run")
    if loaded.codec.needs_image:
        return windowed(Generator(loaded, 0, loaded.info.guidance, {}), times)
    if not loaded.info.causal:
        found = f"{model} neither goes block by block nor begins with a frame"
        raise UserError("--run", found, "give a run with student.causal, or of image to video")
    loaded = load_export(model, key="--run", size={"num_frames": times * moving.FRAMES})
    return Generator(loaded, 0, loaded.info.guidance, {})


@torch.no_grad()
def study(model: str, num: int = NUM) -> tuple[dict, torch.Tensor]:
    """(what the halves score, the first clips [N, C, F, H, W])."""
    generator, measurer = drawer(model), ClipMeasurer()
    index = range(min(num, moving.count("heldout")))
    captions, wanted = moving.captions(index, "heldout"), moving.attributes(index, "heldout")
    cond, rows = generator.codec.prompts(captions), torch.arange(len(captions)).split(BATCH)
    begun = isinstance(generator, Windowed)
    if begun:
        cond |= image_rows(generator.codec, shown_frames(generator.codec, moving.ends(index, "heldout")))[0]
    draw = lambda part: generator(select(cond, part), [SEED + int(i) for i in part], "cpu")  # noqa: E731
    clips = torch.cat([draw(part) for part in rows])
    second = moving.FRAMES - begun  # windows share a frame
    halves = {"first": clips[:, :, : moving.FRAMES], "second": clips[:, :, second:]}
    scores = {name: measurer.compare(half, wanted) for name, half in halves.items()}
    seconds = interleaved({"student": lambda: draw(rows[0])}, len(rows[0]), repeats=3)["student"]
    found = {
        "num_samples": len(captions),
        "seed": SEED,
        "frames": clips.shape[2],
        "seconds_per_frame": seconds / clips.shape[2],
        "floor": {k: v for k, v in measurer.floor(len(captions)).items() if k in KEPT},
        **{name: {k: row[k] for k in KEPT} for name, row in scores.items()},
    }
    return found, clips[:SHOWN]


def record(model: str, folder: Path) -> Path:
    """Measure; write assets/results/benchmarks/longer_<run>.json and filmstrips among the figures."""
    name = run_name(model)
    measured, clips = study(model)
    document = {"model": name, "command": f"python -m eval longer --run runs/{name}", **measured}
    file = folder / f"longer_{name}.json"
    write_text(file, json.dumps(document, indent=1) + "\n")
    save_grid(clips, FIGURES / f"longer_{name}.png")
    (FIGURES / f"longer_{name}.gif").unlink(missing_ok=True)
    return file
