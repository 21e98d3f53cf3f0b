"""fastgen-eval compare: what it writes, that differences are paired, that a killed one goes on."""

import json
import weakref

import numpy as np
import pytest
from PIL import Image

from fastgen.cli import compare as module
from fastgen.cli.evaluate import main
from fastgen.data.bundled import load_images
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run


def digits(folder, num, noise, seed=0):
    """Held-out digits with some noise, in a folder."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i, image in enumerate(load_images("digits", "heldout").images[:num, 0].numpy()):
        mixed = np.clip(image + noise * rng.normal(size=image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(mixed).save(folder / f"{i:03d}.png")
    return folder


def call(*argv) -> int:
    return main(["compare", *map(str, argv)])


def test_sets_of_images(tmp_path, capsys):
    clean, noisy = digits(tmp_path / "clean", 120, 0), digits(tmp_path / "noisy", 120, 60)
    argv = [
        "--against",
        "digits",
        "--metrics",
        "fd_mini",
        "contrast",
        "precision_mini",
        "--out",
        tmp_path / "o",
    ]
    assert call(clean, noisy, *argv) == 0
    document = json.loads((tmp_path / "o/comparison.json").read_text())
    first, second = document["contenders"]
    assert document["baseline"] == first["name"] == "clean" and "differences" not in first
    gap = second["differences"]["fd_mini"]
    assert gap["verdict"] == "worse" and gap["paired"] and 0 < gap["low"] < gap["value"] < gap["high"]
    assert second["differences"]["contrast"]["verdict"] in ("differs", "undecided")
    assert gap["value"] == pytest.approx(
        second["metrics"]["fd_mini"]["value"] - first["metrics"]["fd_mini"]["value"]
    )
    text = (tmp_path / "o/comparison.md").read_text()
    assert "| noisy |" in text and "worse" in text and "fd_mini (lower is better)" in text
    html = (tmp_path / "o/comparison.html").read_text()
    assert "data:image/png;base64" in html and "http" not in html.replace("http://www.w3.org", "")
    assert "not comparable with an Inception FID" in html and "<svg" not in html, "no cost is known"


def test_generators_share_requests_noise_and_seeds(tiny, tmp_path, capsys, monkeypatch):
    """One model at two step counts, two seeds: files, costs, plots; a second call draws nothing."""
    run = make_run(tiny("flow"), out=tmp_path / "flow", num_steps=2)
    export_run(run, tmp_path / "flow" / "export", {})
    model = tmp_path / "flow" / "export"
    argv = [
        f"{model}@1",
        f"{model}@2",
        "--num_samples",
        8,
        "--seeds",
        2,
        "--batch_size",
        4,
        "--out",
        tmp_path / "o",
    ]
    assert call(*argv, "--repeats", 1) == 0
    document = json.loads((tmp_path / "o/comparison.json").read_text())
    assert [row["nfe"] for row in document["contenders"]] == [1, 2]
    assert [row["name"] for row in document["contenders"]] == ["flow at 1", "flow at 2"]
    entry = document["contenders"][0]["metrics"]["contrast"]
    assert len(entry["by_seed"]) == 2 and entry["value"] == pytest.approx(sum(entry["by_seed"]) / 2)
    assert all(row["seconds"] > 0 for row in document["contenders"])
    html = (tmp_path / "o/comparison.html").read_text()
    assert html.count("<svg") == 6, "three metrics against network calls and seconds"
    folders = [
        tmp_path / "o/images" / n / s for n in ("flow_at_1", "flow_at_2") for s in ("seed_0", "seed_1")
    ]
    records = [json.loads((f / "samples.json").read_text())["images"] for f in folders]
    assert records[0] == records[2] and records[0] != records[1]

    def never(self, first):
        raise AssertionError("all images are there")

    monkeypatch.setattr(module.Drawing, "batch", never)
    assert call(*argv, "--repeats", 0) == 0
    again = json.loads((tmp_path / "o/comparison.json").read_text())
    assert again["contenders"][0]["metrics"] == document["contenders"][0]["metrics"]


def test_one_model_is_held_at_a_time_and_metrics_of_generators(tiny, tmp_path, capsys, monkeypatch):
    """Three contenders, never two alive; their own metrics have no interval and no verdict."""
    run = make_run(tiny("flow"), out=tmp_path / "flow", num_steps=2)
    model = export_run(run, tmp_path / "flow" / "export", {})
    alive, most = weakref.WeakSet(), []

    class Counted(module.Drawing):
        def __init__(self, request):
            super().__init__(request)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(module, "Drawing", Counted)
    argv = [f"{model}@{n}" for n in (1, 2, 3)]
    names = ("nfe", "latency", "latency_p95", "peak_memory", "contrast")
    more = ("--num_samples", 4, "--batch_size", 4, "--seeds", 2, "--repeats", 2, "--out", tmp_path / "o")
    assert call(*argv, "--metrics", *names, *more) == 0
    assert max(most) == 1 and len(most) >= 3
    rows = json.loads((tmp_path / "o/comparison.json").read_text())["contenders"]
    assert [row["metrics"]["nfe"]["value"] for row in rows] == [1, 2, 3]
    assert all(0 < r["metrics"]["latency"]["value"] <= r["metrics"]["latency_p95"]["value"] for r in rows)
    assert rows[1]["differences"]["nfe"]["verdict"] == "no interval"
    assert rows[1]["differences"]["contrast"]["verdict"] != "no interval"
    sets = digits(tmp_path / "set", 6, 0)
    assert call(argv[0], sets, "--metrics", "nfe", *more) == 2
    assert "nfe needs a model, set is a set" in capsys.readouterr().err
    assert call(sets, "--metrics", "motion", *more) == 2
    assert "motion measures clips" in capsys.readouterr().err


def test_what_cannot_be_compared(tmp_path, capsys):
    one = digits(tmp_path / "a", 6, 0)
    (tmp_path / "b").mkdir()
    same = digits(tmp_path / "b" / "a", 6, 9)
    for argv, said in (
        ((one, same), "two contenders are called 'a'"),
        ((one, same, "--names", "x"), "--names: 1 for 2 contenders"),
        ((one, tmp_path / "none"), "is not a folder"),
        ((one, "--seeds", 0), "--seeds: found 0"),
        ((one, "--metrics", "fd_mini"), "--against: none given"),
        ((one, "analytic:gmm2d"), "makes points, not images"),
        ((one, "--metrics", "fid"), "--weights: none given for inception"),
        (("assets:teachers/digits@1", "analytic:gmm2d"), "makes points, not images"),
    ):
        assert call(*argv, "--out", tmp_path / "o") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and said in error, error
    assert not (tmp_path / "o/images").exists(), "nothing was drawn before the refusal"


def test_unpaired_sets_are_told(tmp_path, capsys):
    more, fewer = digits(tmp_path / "more", 40, 0), digits(tmp_path / "fewer", 30, 0)
    assert call(more, fewer, "--metrics", "contrast", "--out", tmp_path / "o") == 0
    assert "some differences are not paired" in (tmp_path / "o/comparison.md").read_text()
