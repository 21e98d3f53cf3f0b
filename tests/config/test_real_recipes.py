"""Recipes of released models: each validates, says what was published, and rehearses at full size."""

import re

import pytest
from PIL import Image

from fastgen.cli.train import main
from fastgen.config.catalogue import head_comment
from fastgen.config.run import load
from fastgen.core.paths import config
from fastgen.data.clips import save_clip
from tests.networks.test_vision import dino
from tests.support.heavier import first_of

FILES = sorted(config("recipes/real").glob("*.yaml"))


def images_of(file, folder):
    """The flags of a user's pictures, which recipes of 3D assets do without."""
    return [] if "views:" in file.read_text() else ["--data.images", str(folder)]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder of pictures and one of clips, with captions; what judges frames."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("pictures", "clips")}
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 0, 0)).save(folders["pictures"] / f"{i}.png")
        frames = [Image.new("RGB", (64, 64), (90 * i, 2 * k, 0)) for k in range(82)]
        save_clip(frames, folders["clips"] / f"{i}.gif", 20)
        for folder in folders.values():
            (folder / f"{i}.txt").write_text(f"picture {i}")
    return folders | {"dino": dino(tmp_path_factory.mktemp("dino"))}


@pytest.mark.parametrize(
    "file", first_of(sorted(FILES, key=lambda f: f.stem != "sd15_dmd2")), ids=lambda f: f.stem
)
def test_a_real_recipe_rehearses_at_full_size(file, material, capsys):
    of_clips = any(name in file.stem for name in ("wan", "hunyuan", "animatediff"))
    flags = images_of(file, material["clips" if of_clips else "pictures"])
    judged = ["--objective.features", str(material["dino"])] if file.stem.endswith("_mcm") else []
    code = main(["--config", str(file), *flags, "--dry_run", *judged])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "nothing was started or written" in said.out
    assert ("2 captions" if flags else "views of") in said.out


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_real_recipe_says_where_its_settings_are_from(file):
    cfg, head = load([str(file)], images_of(file, "my")), head_comment(file)
    assert re.search(r"\d{4}\.\d{5}|FastGen", head), "a paper or a program"
    assert re.search(r"published|Published|no number|no FID", head), (
        "what to expect, or that nothing is published"
    )
    assert cfg.teacher.layout and not cfg.data.name and cfg.all_stages()[0].max_train_steps >= 1000
