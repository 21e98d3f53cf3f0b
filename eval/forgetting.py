"""Before and after: the pictures of a run of `sfd` beside those of the student that it started from.

python -m eval forgetting --run runs/tinted-sd_sfd

One row each of the student it began as and of the one it became, on the same conditions and noise: first what
was to be forgotten, then what was to be kept.
"""

from pathlib import Path

import torch

from eval.evidence import FIGURES
from fastgen.cli.generator import Generator
from fastgen.cli.pictures import grid
from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.core.batch import stack
from fastgen.core.errors import UserError
from fastgen.core.files import placed
from fastgen.data.bundled import all_captions
from fastgen.export.load import load_export
from fastgen.networks.codecs import Codec, TextCodec
from fastgen.objectives import requirements_of
from fastgen.roles.concepts import Concepts

COLUMNS = 6
"""pictures of what was to be forgotten, and as many of what was to be kept"""


def conditions(codec: Codec, forget: tuple[str, ...]) -> dict:
    """COLUMNS conditions to forget, then as many to keep, spread over the captions or classes there are."""
    concepts = Concepts(codec, forget)
    if isinstance(codec, TextCodec):
        texts = all_captions()
        asks = torch.tensor([concepts.overridden(t) != t for t in texts])
        make = lambda rows: codec.prompts([texts[i] for i in rows.tolist()])  # noqa: E731
    else:
        asks = torch.isin(torch.arange(codec.num_classes), torch.tensor(concepts.classes))
        make = codec.labels
    spread = []
    for mask in (asks, ~asks):
        rows = mask.nonzero()[:, 0]
        spread.append(rows[torch.arange(COLUMNS) * len(rows) // COLUMNS])
    return stack([make(rows) for rows in spread])


@torch.no_grad()
def record(run: str, folder: Path) -> Path:
    """Write docs/figures/forgetting_<run>.png."""
    path, before = Path(run), ""
    if (path / "config.yaml").is_file():
        cfg = validate(read_files([str(path / "config.yaml")]))
        before, forget = cfg.student.init, requirements_of(cfg.all_stages()[-1].objective).forgets
    if not before or not forget:
        raise UserError(
            "--run", f"{run} forgets nothing, or starts from no student", "a run of sfd with init"
        )
    found, names = [], ("before", "after")
    for place in (before, run):
        loaded = load_export(place, key="--run")
        cond = conditions(loaded.codec, forget)
        draw = Generator(loaded, 0, loaded.info.guidance if loaded.info else 1.0, loaded.codec.null(1))
        found.append(draw(cond, list(range(2 * COLUMNS)), "cpu"))
    picture = grid(found, list(names), columns=2 * COLUMNS)
    file = FIGURES / f"forgetting_{path.name}.png"
    with placed(file) as temporary:
        picture.save(temporary, "PNG")
    return file
