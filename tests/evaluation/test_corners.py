"""Corners of measuring: caches of edited encoders, folders that hold more than was asked for, flags that a
command does not take, sets that a metric is not defined for.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.cli.evaluate import main
from fastgen.config.sections import EvalConfig
from fastgen.core.errors import UserError
from fastgen.evaluation import layouts
from fastgen.evaluation.archives import is_archive
from fastgen.evaluation.encoders import plugin
from fastgen.evaluation.inputs import open_source
from fastgen.evaluation.metrics import mmd
from fastgen.evaluation.metrics.distributions import METRICS
from fastgen.evaluation.metrics.estimate import mean_of, pooled, share_of, wilson
from fastgen.evaluation.run_metrics import RunMetrics
from fastgen.training.validation import choose_metric

NET = """
import torch
class Sum(torch.nn.Module):
    def forward(self, x):
        return {{"{name}": {scale} * x.float().mean((2, 3))}}
def made():
    return Sum()
"""


def pictures(folder: Path, num: int, side: int = 16, value: int = 1) -> Path:
    folder.mkdir(parents=True)
    for i in range(num):
        pixels = np.random.default_rng(value * i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def refused(capsys, *argv) -> str:
    """The one line that a refused call prints."""
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def encoder(folder: Path, name: str = "features", scale: int = 1):
    (folder / "own_encoder.py").write_text(NET.format(name=name, scale=scale))
    sys.modules.pop("own_encoder", None)
    importlib.invalidate_caches()
    return plugin.load("own", "own_encoder:made")


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("own_encoder", None)


def test_an_edited_encoder_is_another_one(own):
    """It has no weights, so only its file tells."""
    before, same, edited = encoder(own), encoder(own), encoder(own, scale=2)
    assert before.key == same.key != edited.key


def test_an_encoder_must_give_what_a_metric_looks_at(own, capsys):
    encoder(own, name="logits")
    folder = pictures(own / "a", 24)
    argv = ("--images", folder, "--against", folder, "--weights", "own=own_encoder:made")
    said = refused(capsys, *argv, "--metrics", "fd:own")
    assert said.startswith("error: --metrics: own gives no features; ")
    said = refused(capsys, *argv[:4], "--extractor", "tinted", "--metrics", "is:mini")
    assert "--images: " in said or "mini gives no logits" in said
    (own / "own_encoder.py").write_text("import torch\nmade = lambda: torch.nn.Flatten(0)\n")
    sys.modules.pop("own_encoder", None)
    importlib.invalidate_caches()
    assert "return a tensor [B, d]" in refused(capsys, *argv, "--metrics", "kid:own")


def test_of_a_larger_set_only_what_was_asked_for_is_measured(tmp_path, capsys):
    """Another comparison into the same folder, of fewer images, is of the first of them."""
    argv = ["compare", "assets:teachers/digits@1", "--repeats", "0", "--metrics", "contrast"]
    found = []
    for num, out in ((12, "a"), (6, "a"), (6, "b")):
        assert main([*argv, "--num_samples", str(num), "--out", str(tmp_path / out)]) == 0
        found.append(json.loads((tmp_path / out / "comparison.json").read_text())["contenders"][0])
    assert found[0]["metrics"] != found[1]["metrics"] and found[1] == found[2]
    assert [one["num_images"] for one in found] == [12, 6, 6]
    argv = [
        "protocol",
        "mini-digits",
        "--model",
        "assets:teachers/digits",
        "--steps",
        "1",
        "--metrics",
        "contrast",
    ]
    for num in (8, 4):
        capsys.readouterr()
        assert main([*argv, "--num_samples", str(num), "--out", str(tmp_path / "c")]) == 0
        assert json.loads(capsys.readouterr().out)["num_images"] == num


def test_prompts_are_taken_for_sets_that_say_their_own(tmp_path, monkeypatch):
    """samples.json beside a user's own images does not overrule the flag."""
    from fastgen.cli import compare

    folder = pictures(tmp_path / "a", 2)
    said = [{"file": f"{i:03d}.png", "condition": "old"} for i in range(2)]
    (folder / "samples.json").write_text(json.dumps({"images": said}))
    (tmp_path / "p.txt").write_text("new\nnewer\n")
    seen = []
    real = compare.open_material
    monkeypatch.setattr(compare, "open_material", lambda *a: seen.append(real(*a)) or seen[-1])
    argv = ["compare", folder, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o"]
    assert main([str(a) for a in argv]) == 0 and seen[0].prompts == ["new", "newer"]


def test_a_folder_of_pictures_may_hold_an_archive(tmp_path):
    folder = pictures(tmp_path / "a", 3)
    (folder / "backup.tar").write_bytes(b"")
    assert not is_archive(str(folder)) and len(open_source(str(folder))) == 3
    (tmp_path / "b").mkdir()
    (tmp_path / "b/shard.tar").write_bytes(b"")
    assert is_archive(str(tmp_path / "b"))


# -- intervals
def test_shares_are_named_and_not_guessed():
    """A score that is nought for every image is no share of them."""
    assert mean_of(torch.zeros(9)).interval() == (0, 0)
    assert share_of(torch.zeros(9)).interval() == wilson(0, 9) != (0, 0)
    both = pooled([share_of(torch.ones(9)), share_of(torch.ones(9))])
    assert both.share and both.interval() == wilson(18, 18)
    reached = pooled([share_of(torch.tensor([1.0, 0, 0]), "references")] * 2)
    assert not reached.share, "averaged over seeds, a reference is reached by a part of them"


def test_every_image_counts_in_kids_interval(monkeypatch):
    """Above MOST the means are over fewer others, the contributions are still one for each image."""
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(600, 8, generator=draw), torch.randn(400, 8, generator=draw) + 1
    whole = mmd.influence(mmd.polynomial, a, b)
    monkeypatch.setattr(mmd, "MOST", 200)
    found = mmd.kid_estimate(a, b)
    assert len(found.contributions()) == 600
    some = mmd.influence(mmd.polynomial, a, b, 200)
    assert torch.corrcoef(torch.stack([whole, some]))[0, 1] > 0.95
    assert float(some.std() / whole.std()) == pytest.approx(1, abs=0.15)


def test_a_protocol_may_take_all_images_of_both_sets():
    """ADM's recall of 50,000 images against 10,000 uses all; customarily counts are equal."""
    recall = next(m for m in METRICS if m.name == "recall").compute
    draw = torch.Generator().manual_seed(2)
    many, few = torch.randn(300, 3, generator=draw), torch.randn(60, 3, generator=draw)
    found = {}
    for equal in (True, False):
        material = SimpleNamespace(
            outputs=lambda e: {"features": many}, reference=lambda e: {"features": few}, equal_counts=equal
        )
        found[equal] = recall(material, "own")
    assert found[True].value != found[False].value
    assert found[False].value == mean_of(found[False].contributions()).value


# -- what keeps the best weights
def test_the_best_is_chosen_by_a_metric_that_validation_can_compute():
    cfg = EvalConfig(keep="best", validation_samples=50, grid=4)
    better, least = {"lpips_diversity": "higher", "fd_mini": "lower"}, {"lpips_diversity": 200.0}
    assert choose_metric(cfg, better, least) == "fd_mini"
    named = cfg.model_copy(update={"keep_by": "lpips_diversity"})
    with pytest.raises(UserError, match="eval.validation_samples: found 50; lpips_diversity.*needs 200.0"):
        choose_metric(named, better, least)
    with pytest.raises(UserError, match="several samples of each prompt"):
        choose_metric(named, better, {"lpips_diversity": float("inf")})
    assert choose_metric(named.model_copy(update={"keep": "last"}), better, least) == "lpips_diversity"
    metrics = RunMetrics(["contrast", "kid:mini"], {}, "digits", "digits")
    assert metrics.least(100) == {"contrast": 1, "kid_mini": 2}


# -- other tools' layouts
def drawn(folder: Path, prompts: list[str]) -> Path:
    pictures(folder, len(prompts))
    said = [{"file": f"{i:03d}.png", "condition": p} for i, p in enumerate(prompts)]
    (folder / "samples.json").write_text(json.dumps({"images": said}))
    return folder


def test_a_prompt_that_stands_twice_has_its_own_samples_each_time(tmp_path):
    folder = drawn(tmp_path / "a", ["x"] * 4 + ["y"] * 4 + ["x"] * 4)
    items = [("x", {"n": 0}), ("y", {"n": 1}), ("x", {"n": 2})]
    assert layouts.export("geneval", folder, items, tmp_path / "o", 4) == 12
    last = tmp_path / "o/00002/samples"
    assert sorted(p.name for p in last.iterdir()) == [f"000{k}.png" for k in range(4)]
    assert (last / "0000.png").read_bytes() == (folder / "008.png").read_bytes()
    assert layouts.export("vbench", folder, items, tmp_path / "v", 4) == 12
    assert (tmp_path / "v/x-7.png").is_file() and not (tmp_path / "v/x-8.png").exists()


def test_samples_that_do_not_fit_are_refused(tmp_path):
    folder = drawn(tmp_path / "a", ["x"] * 3)
    with pytest.raises(UserError, match="3 samples of 'x'; draw four"):
        layouts.export("dpg", folder, [("x", {"item": "0"})], tmp_path / "o", 4)
    for images in ([{"file": "000.png"}], [{"file": "gone.png", "condition": "x"}], "none", []):
        (folder / "samples.json").write_text(json.dumps({"images": images}))
        with pytest.raises(UserError, match="--images: "):
            layouts.export("geneval", folder, [("x", {})], tmp_path / "p")


# -- bad input
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--images A --metrics contrast --num_samples 5", "--num_samples: --images does not take it"),
        ("--images A --metrics contrast --out B", "--out: --images does not take it"),
        ("--run A --metrics contrast", "--metrics: --run does not take it"),
        ("--run A --cache B", "--cache: --run does not take it"),
        (
            "statistics --images A --encoder dinov2 --out B.npz --cache C",
            "`fastgen-eval statistics` does not take",
        ),
        ("metrics --images A", "it takes no flags"),
        ("--images A --metrics contrast --group_size -2", "--group_size: found -2; give 0 or more"),
        ("--images A --against A --metrics ssim", "--images: images of 8 x 8 pixels; give 11 or more"),
        ("compare A A2 --batch_size 0", "--batch_size: found 0; give 1 or more"),
        ("protocol mini-digits --images A --out B --batch_size 0", "--batch_size: found 0"),
        ("protocol mini-digits --images A --out B --num_samples -5", "--num_samples: found -5"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(argv, said, tmp_path, capsys):
    pictures(tmp_path / "A", 2, side=8)
    places = {"A": tmp_path / "A", "A2": tmp_path / "A", "B": tmp_path / "B", "B.npz": tmp_path / "B.npz"}
    assert said in refused(capsys, *(places.get(word, word) for word in argv.split()))


@pytest.mark.parametrize(
    ("labels", "said"),
    [([1, 2], "2 labels in arr_1 for 3 images"), ([1, 2.5, 0], "no whole"), ([1, np.nan, 0], "no whole")],
)
def test_labels_of_arrays_pair_with_their_images(labels, said, tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((3, 8, 8, 3), np.uint8), np.array(labels))
    with pytest.raises(UserError, match=said):
        open_source(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", np.zeros((3, 8, 8, 3), np.uint8), np.array([[1.0], [2.0], [0.0]]))
    assert open_source(str(tmp_path / "a.npz")).labels == [1, 2, 0]


def test_a_cache_is_a_folder(own, capsys):
    encoder(own)
    folder = pictures(own / "a", 3)
    (own / "file").write_text("")
    argv = (
        "--images",
        folder,
        "--against",
        folder,
        "--weights",
        "own=own_encoder:made",
        "--metrics",
        "kid:own",
    )
    assert "--cache: " in refused(capsys, *argv, "--cache", own / "file")


def test_more_images_of_a_prompt_than_there_are(tmp_path):
    from fastgen.evaluation.encoders.catalogue import Encoders
    from fastgen.evaluation.material import Material, check
    from fastgen.evaluation.registry import wanted

    material = Material(open_source(str(pictures(tmp_path / "a", 3))), Encoders(), group_size=5)
    with pytest.raises(UserError, match="--group_size: 5 for 3 images"):
        check(material, [wanted("lpips_diversity")])
