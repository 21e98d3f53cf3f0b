"""Metrics by name of clips, point clouds, points and unlearning: values, influences, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.cli.evaluate import main
from fastgen.evaluation.metrics import geometry, mixtures, video
from fastgen.networks.load import load_teacher


def measured(capsys, *argv) -> dict:
    assert main([str(a) for a in argv]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv) -> str:
    assert main([str(a) for a in argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


class Mean(torch.nn.Module):
    """Features of a frame: its mean colour."""

    def forward(self, images):
        return images.float().mean((2, 3)) / 255


def random_clips(num=3, frames=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, frames, 8, 8), generator=generator).byte()


def test_clips_of_a_folder_and_a_file_are_measured_alike(tmp_path, capsys):
    clips = random_clips()
    np.savez(tmp_path / "clips.npz", clips=clips.numpy())
    folder = tmp_path / "clips"
    folder.mkdir()
    for i, clip in enumerate(clips):
        frames = [Image.fromarray(f.numpy()) for f in clip.permute(1, 2, 3, 0)]
        frames[0].save(folder / f"{i}.webp", save_all=True, append_images=frames[1:], lossless=True)
    names = ("frame_correlation", "motion", "flicker", "frame_consistency:mean")
    weights = ("--weights", "mean=tests.evaluation.test_items:Mean")
    found = measured(capsys, "--images", tmp_path / "clips.npz", "--metrics", *names, *weights)
    x = clips.double() / 255
    assert found["motion"] == pytest.approx(float(video.motion(x).mean()))
    assert found["flicker"] == pytest.approx(float(video.flicker(x).mean()))
    means = clips.float().mean((3, 4)).transpose(1, 2)
    cosine = torch.nn.functional.cosine_similarity(means[:, :-1], means[:, 1:], dim=-1).mean()
    assert found["frame_consistency:mean"] == pytest.approx(float(cosine), abs=1e-5)
    low, high = found["intervals"]["motion"]
    assert low < found["motion"] < high
    again = measured(capsys, "--images", folder, "--metrics", *names, *weights)
    assert {n: again[n] for n in names} == pytest.approx({n: found[n] for n in names})


def test_clipsim_takes_the_prompt_of_each_clip(tmp_path, capsys, monkeypatch):
    """By a text encoder that gives unit vectors of colours."""
    from fastgen.evaluation.encoders import catalogue
    from fastgen.evaluation.encoders.base import TextImageEncoder

    axes = {"red": 0, "green": 1, "blue": 2}
    made = TextImageEncoder(
        *("clip", Mean(), lambda images: images, "none", ""),
        texts=lambda prompts: torch.eye(3)[[axes[p] for p in prompts]],
    )
    monkeypatch.setitem(catalogue.KNOWN, "clip", lambda e: made)
    clips = torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8)
    clips[0, 0], clips[1, 2] = 200, 90
    np.savez(tmp_path / "clips.npz", clips=clips.numpy())
    (tmp_path / "prompts.txt").write_text("red\ngreen")
    argv = ("--images", tmp_path / "clips.npz", "--prompts", tmp_path / "prompts.txt")
    assert measured(capsys, *argv, "--metrics", "clipsim")["clipsim"] == pytest.approx(50)


def test_clouds(tmp_path, capsys):
    """Moved by a tenth on a grid of unit steps every nearest point is the own one: 2 x .01."""
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    a = torch.stack([grid, grid + 0.5])
    np.savez(tmp_path / "a.npz", points=a.numpy())
    np.savez(tmp_path / "b.npz", points=(a + torch.tensor([0.1, 0, 0])).numpy())
    argv = ("--images", tmp_path / "a.npz", "--against", tmp_path / "b.npz", "--metrics", "chamfer", "jsd")
    found = measured(capsys, *argv)
    assert found["chamfer"] == pytest.approx(0.02, rel=1e-5) and 0 < found["jsd"] <= 1
    same = measured(capsys, *argv[:3], tmp_path / "a.npz", *argv[4:])
    assert same["chamfer"] == 0 and same["jsd"] == pytest.approx(0, abs=1e-12)


def test_the_divergence_moves_as_its_influence_says():
    generator = torch.Generator().manual_seed(3)
    a = [torch.rand(200, 3, generator=generator) for _ in range(12)]
    b = [torch.rand(200, 3, generator=generator) ** 2 for _ in range(12)]
    found = geometry.jensen_shannon_estimate(a, b, 4)
    moved = found.contributions() - found.value
    low, high = geometry.box(a, b)
    q = geometry.occupancy(b, low, high, 4)
    each = torch.stack([geometry.occupancy([c], low, high, 4) for c in a])

    def score(weights):
        p = (weights[:, None] * each).sum(0) / weights.sum()
        mean = (p + q) / 2
        parts = [torch.where(x > 0, x * (x / mean).log2(), 0).sum() for x in (p, q)]
        return float(sum(parts) / 2)

    for i in (0, 7):
        weights = torch.ones(12, dtype=torch.float64)
        weights[i] += 1e-6
        slope = (score(weights) - score(torch.ones(12, dtype=torch.float64))) / 1e-6 * 12
        assert float(moved[i]) == pytest.approx(slope, rel=1e-3)


def test_points_against_an_exact_mixture(tmp_path, capsys):
    """The numbers that a run on the same teacher reports, and exact draws beat shifted ones."""
    mixture = load_teacher("analytic:gmm2d").backbone
    points, _ = mixture.sample(400, torch.Generator().manual_seed(5))
    np.savez(tmp_path / "exact.npz", points=points.numpy())
    np.savez(tmp_path / "off.npz", points=points.numpy() + 0.4)
    names = ("energy_distance", "modes", "mode_error", "kl")
    argv = ("--against", "analytic:gmm2d", "--metrics", *names)
    exact = measured(capsys, "--images", tmp_path / "exact.npz", *argv)
    own = mixtures.ToyMeasurer(mixture).compare(points, {})
    assert {n: exact[n] for n in names} == pytest.approx({n: own[n] for n in names}, rel=1e-6)
    low, high = exact["intervals"]["mode_error"]
    assert low < exact["mode_error"] < high and exact["intervals"]["modes"] == [None, None]
    off = measured(capsys, "--images", tmp_path / "off.npz", *argv)
    assert off["energy_distance"] > 10 * abs(exact["energy_distance"]) and off["modes"] < exact["modes"]


def test_the_energy_distance_moves_as_its_influence_says():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(300, 2, generator=generator), torch.randn(200, 2, generator=generator) + 0.5
    found = mixtures.energy_estimate(a, b)
    without = [mixtures.energy_distance(torch.cat([a[:i], a[i + 1 :]]), b) for i in range(300)]
    jackknife = found.value + 299 * (found.value - torch.tensor(without))
    gap = (jackknife - jackknife.mean()) - (found.contributions() - found.value)
    assert float(gap.abs().max()) < 0.05 * float(jackknife.std())


def test_unlearning_by_name(tmp_path, capsys):
    """Digits asked for by their own labels: a forgotten class that is still drawn was not unlearned."""
    argv = ("--images", "digits", "--against", "digits", "--metrics")
    names = ("unlearning_accuracy_mini", "retained_accuracy_mini", "unlearning_h_mini")
    found = measured(capsys, *argv, *names, "--forgotten", 3)
    assert found["unlearning_accuracy_mini"] < 0.1 and found["retained_accuracy_mini"] > 0.9
    assert found["unlearning_h_mini"] < 0.2
    assert "--forgotten: none given" in refused(capsys, *argv, names[0])
    assert "no image is asked for class 77" in refused(capsys, *argv, names[0], "--forgotten", 77)


def test_what_does_not_fit_is_one_line(tmp_path, capsys):
    np.savez(tmp_path / "clips.npz", clips=random_clips(2, 2).numpy())
    np.savez(tmp_path / "floats.npz", clips=random_clips().float().numpy())
    np.savez(tmp_path / "points.npz", points=np.zeros((5, 3)))
    np.savez(tmp_path / "bad.npz", points=np.array([[0.0, 1], [np.nan, 1], [2, 2]]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.gif").write_bytes(b"GIF89a, not really")
    gmm = ("--against", "analytic:gmm2d", "--metrics", "energy_distance")
    for argv, said in (
        (("clips.npz", "--metrics", "flicker"), "clip 0 has 2 frames; give clips of 3 or more"),
        (("clips.npz", "--metrics", "motion", "jsd"), "motion measures clips, jsd measures clouds"),
        (("floats.npz", "--metrics", "motion"), "clips torch.float32"),
        (("points.npz", "--metrics", "motion"), "has no readable `clips`"),
        (("points.npz", "--metrics", "jsd"), "points torch.float64 [5, 3]"),
        (("points.npz", *gmm), "points of 2 dimensions for samples of 3"),
        (("points.npz", "--metrics", "modes"), "--against: none given; give analytic:NAME"),
        (("bad.npz", *gmm), "sample 1 is not finite"),
        (("empty", "--metrics", "motion"), "holds no clips"),
        (("broken", "--metrics", "motion"), "a.gif cannot be read"),
        (("none", "--metrics", "motion"), "is no file of clips"),
        (("clips.npz", "--metrics", "frame_consistency"), "none given for dinov2"),
        (("clips.npz", "--metrics", "clipsim"), "--prompts: none given"),
        (("clips.npz", "--metrics", "latency"), "arr_0"),
    ):
        line = refused(capsys, "--images", tmp_path / argv[0], *argv[1:])
        assert line.startswith("error: ") and said in line, line
    line = refused(capsys, "--images", "digits", "--metrics", "latency")
    assert "--images: none given; give a model" in line
