"""A completer of scans leaves: its folder, read without fastgen, completes a scan to the same points."""

import json
import re

import numpy as np
import pytest
import torch
import yaml

from fastgen.cli import sample
from fastgen.cli.train import main
from fastgen.core.errors import UserError
from fastgen.data.scans import fitted
from fastgen.export.load import load_export
from fastgen.sampling.solvers import ImageNoise
from fastgen.threed.clouds import read_cloud
from tests.support.clouds import NET, SCHEDULER
from tests.support.plain import run_plain


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The export of a tiny student of either formulation, and of its teacher, by name; two steps trained."""
    made = {}

    def make(name, objective, steps=1, **net):
        if name in made:
            return made[name]
        place = tmp_path_factory.mktemp(name)
        values = {
            "teacher": {
                "blueprint": {"net": {**NET, **net}, "scheduler": SCHEDULER, "info": {"measure": "scenes"}},
                "num_steps": 4,
            },
            "student": {"num_steps": steps, "sampler": "ode"},
            "data": {"name": "scenes", "limit": 4},
            "objective": objective,
            "optim": {"student": {"lr": 1e-2}},
            "train": {"max_train_steps": 2, "train_batch_size": 2, "validation_steps": 0, "ema_decay": [0.5]},
            "eval": {"num_samples": 0},
        }
        (place / "run.yaml").write_text(yaml.safe_dump(values))
        assert main(["--config", str(place / "run.yaml"), "--output_dir", str(place / "run")]) == 0
        made[name] = place / "run/export"
        return made[name]

    return make


def snippet(folder):
    """The code of the card."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]


def completed(folder, loaded, scan, steps=0):
    """Ours, from the seed of the card."""
    flags = ["--model", str(folder), "--steps", str(steps)]
    generator = sample.contenders(sample.flags().parse_args(flags), loaded, "cpu")[0]
    cond = loaded.codec.scans(scan[None])
    generator.null = loaded.codec.untold(scan[None])
    with torch.no_grad():
        return loaded.codec.shown(generator.drawn(cond, [0], "cpu"), cond)[0]


CASES = [
    ("local", {"name": "score_lidar"}, 1, {}),
    ("vp", {"name": "distillation_dpo"}, 1, {"formulation": "vp"}),
    ("steps", {"name": "score_lidar"}, 4, {}),
    ("teacher", {"name": "sft", "noise_moments": 5.0}, 1, {}),
    ("vp_teacher", {"name": "sft"}, 1, {"formulation": "vp"}),
]


@pytest.mark.parametrize(("name", "objective", "steps", "net"), CASES, ids=[c[0] for c in CASES])
def test_p4_the_cards_code_completes_to_the_same_points(folder_of, name, objective, steps, net):
    folder = folder_of(name, objective, steps, **net)
    scan = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    np.save(folder / "scan.npy", scan.numpy())
    (folder / "plain.py").write_text(snippet(folder))
    done = run_plain("plain.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    theirs = torch.from_numpy(np.load(folder / "completed.npy"))
    ours = completed(folder, load_export(folder), scan)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    start = scan.repeat_interleave(5, 0)
    noise = ImageNoise([0], (60, 3)).first[0]
    assert (theirs - start).abs().max() > 0.1 and (theirs - start - noise).abs().max() > 0.01
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_sample_writes_a_cloud_that_other_programs_open(folder_of, tmp_path, capsys):
    trimesh = pytest.importorskip("trimesh")
    folder = folder_of(*CASES[0][:3])
    cloud = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "mine.npy", cloud.numpy())
    flags = ["--model", str(folder), "--scan", str(tmp_path / "mine.npy"), "--out", str(tmp_path / "out")]
    assert sample.main(flags) == 0, capsys.readouterr().err
    opened = trimesh.load(tmp_path / "out/00000_0.ply")
    assert isinstance(opened, trimesh.PointCloud) and opened.vertices.shape == (60, 3)
    own = fitted(read_cloud(tmp_path / "mine.npy", "k"), 12, "k", "f")
    ours = completed(folder, load_export(folder), own)
    np.testing.assert_allclose(opened.vertices, ours.numpy(), atol=1e-5)
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert record["images"][0]["condition"].endswith("mine.npy")
    assert (tmp_path / "out/grid.png").is_file() and (tmp_path / "out/00000_0.png").is_file()
    assert sample.main([*flags[:2], "--num_images", "2", "--out", str(tmp_path / "held")]) == 0
    assert len(list((tmp_path / "held").glob("*.ply"))) == 2


def test_mistakes_with_scans_are_one_line(folder_of, tmp_path, capsys):
    folder = str(folder_of(*CASES[0][:3]))
    np.save(tmp_path / "few.npy", np.zeros((3, 3)))
    np.save(tmp_path / "nan.npy", np.full((30, 3), np.nan))
    for given, words in (
        (["--scan", str(tmp_path / "few.npy")], "holds 3 points, the model takes 12"),
        (["--scan", str(tmp_path / "nan.npy")], "30 of 30 points that are not finite"),
        (["--scan", str(tmp_path / "none.ply")], "does not exist"),
        (["--labels", "3"], "this model takes scans alone"),
    ):
        assert sample.main(["--model", folder, *given, "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err.strip()
        assert words in err and len(err.splitlines()) == 1, err
    digits = ["--model", "assets:teachers/digits", "--scan", "a.npy", "--out", str(tmp_path / "out")]
    assert sample.main(digits) == 2 and "completes no scans" in capsys.readouterr().err


def test_a_teacher_of_scans_takes_no_pictures(folder_of):
    codec = load_export(folder_of(*CASES[0][:3])).codec
    with pytest.raises(UserError, match="completes scans"):
        codec.encode(torch.zeros(1, 3, 8, 8))
