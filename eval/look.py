"""Whether a student's frames took over the look of data.appearance, and its clips kept their motion.

python -m eval look --run runs/moving-wan_mcm

Contrast is the mean standard deviation of a frame's values: of the pictures here, of everything else as the
run measured it. `taken_over` is how far the student went from its teacher's contrast to that of the pictures.
"""

import json
from pathlib import Path

from PIL import Image

from eval.evidence import FIGURES, run_name
from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.data import moving
from fastgen.data.appearance import load_appearance
from fastgen.evaluation.metrics.fvd_mini import contrast
from fastgen.training.cast import load_configured

GAP = 8
KEPT = ("contrast", "agreement_motion", "dynamic_degree", "fvd_mini")


def study(run: Path) -> dict:
    """The contrast of the pictures beside what the run measured."""
    for name in ("config.yaml", "results.json"):
        if not (run / name).is_file():
            raise UserError("--run", f"{run / name} does not exist", "give the folder of a finished run")
    cfg = validate(read_files([str(run / "config.yaml")]))
    results = json.loads((run / "results.json").read_text())
    pictures = load_appearance(cfg.data.appearance, load_configured(cfg.teacher).codec)
    if pictures is None or "contrast" not in results["student"]:
        found = f"{run} takes over no look"
        raise UserError("--run", found, "give a run with data.appearance, measured on clips")
    rows = {
        name: {k: results[name][k] for k in KEPT}
        for name in ("teacher", "untrained_student", "student", "floor")
        if name in results
    }
    wanted, before = contrast(pictures), rows["teacher"]["contrast"]
    share = (rows["student"]["contrast"] - before) / (wanted - before)
    return {"pictures": {"contrast": wanted}, **rows, "taken_over": share}


def strips(run: Path, rows: int = 6) -> Image.Image | None:
    """Clips of the teacher over the student's for the same requests, enlarged; None without samples."""
    files = [run / "samples" / f"{name}.png" for name in ("teacher", "student")]
    if not all(file.is_file() for file in files):
        return None
    grids = [Image.open(file).convert("RGB") for file in files]
    grids = [grid.crop((0, 0, grid.width, min(grid.height, rows * (moving.SIZE + 2)))) for grid in grids]
    both = Image.new("RGB", (grids[0].width, 2 * grids[0].height + GAP), "white")
    for i, grid in enumerate(grids):
        both.paste(grid, (0, i * (grid.height + GAP)))
    return both.resize((2 * both.width, 2 * both.height), Image.Resampling.NEAREST)


def record(model: str, folder: Path) -> Path:
    """Write assets/results/benchmarks/look_<run>.json, and filmstrips among the figures."""
    name = run_name(model)
    picture = strips(Path(model))
    if picture is not None and "+" not in name:  # one picture a recipe
        picture.save(FIGURES / f"look_{name}.png", optimize=True)
    document = {"model": name, "command": f"python -m eval look --run runs/{name}", **study(Path(model))}
    file = folder / f"look_{name}.json"
    write_text(file, json.dumps(document, indent=1) + "\n")
    return file
