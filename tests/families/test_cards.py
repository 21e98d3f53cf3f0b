"""The code of every card runs as it stands, in the export's own folder, without fastgen: each family, full
and LoRA. The run itself worked in another folder, with a path of its base relative to that.
"""

import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageSequence

from fastgen.training.exporting import export_run
from tests.families.cases import CASES
from tests.families.world import World
from tests.support.plain import run_plain

QUICK = ("unet2d-flow", "sd", "flux", "wan")
"""cases of the default run: no pipeline, VP, a guidance input, video; all others are in the slow group"""
NAMES = [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in sorted(CASES)]


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def pictures(folder) -> list[np.ndarray]:
    """What the code wrote: one picture, or the frames of a clip."""
    file = next(f for f in (folder / "sample.png", folder / "sample.gif") if f.exists())
    with Image.open(file) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_the_card_runs_as_it_stands(name, kind, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    world = World(name, tmp_path / "work" / "base")
    world.teacher.path = "base"  # as a user gives it
    trainer = world.trainer(kind, 1 if world.case.sampler == "ode" else 2, world.case.sampler)
    trainer.cast.teacher.path = "base"
    trainer.cast.teacher_cfg = trainer.cast.teacher_cfg.model_copy(update={"path": "base"})
    folder = export_run(trainer, tmp_path / "work" / "runs" / "export", {})
    monkeypatch.chdir("/")
    card = (folder / "README.md").read_text()
    assert "base_model" not in card, "a folder is no id of the hub"
    (folder / "card.py").write_text(code_of(card))
    for name, colour in (("image.png", "red"), ("last.png", "blue")):
        if f'load_image("{name}")' in card:
            Image.new("RGB", (64, 64), colour).save(folder / name)
    done = run_plain("card.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert all(np.ptp(frame) > 0 for frame in pictures(folder)), "a picture of one colour"


def test_a_card_names_a_hub_base_and_no_other():
    from fastgen.export.snippet import hub_id, shown_path

    assert hub_id("stabilityai/sdxl-turbo") == "stabilityai/sdxl-turbo"
    for path in ("assets:teachers/tinted-sd", "assets/teachers", "/a/b", "./a", "one", "a/b/c", "~/sd"):
        assert hub_id(path) == "", path
    assert shown_path("stabilityai/sdxl-turbo", "runs/x/export") == "stabilityai/sdxl-turbo"


def test_a_bundled_base_is_found_from_the_export(tmp_path):
    from fastgen.core.paths import asset
    from fastgen.export.snippet import shown_path

    place = tmp_path / "run/export"
    place.mkdir(parents=True)
    found = shown_path("assets:teachers/tinted-sd", place)
    assert not os.path.isabs(found)
    assert os.path.samefile(place / found, asset("teachers/tinted-sd"))


def test_the_licence_is_the_base_s(tiny, tmp_path):
    from tests.export.test_plain_diffusers import make_run

    base = tmp_path / "base"
    shutil.copytree(tiny("sd"), base)
    (base / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    named = export_run(make_run(base, "lora", tmp_path), tmp_path / "a", {})
    assert "license: creativeml-openrail-m" in (named / "README.md").read_text()
    unknown = export_run(make_run(tiny("sd"), "lora", tmp_path), tmp_path / "b", {})
    assert "license:" not in (unknown / "README.md").read_text().split("---")[1]
