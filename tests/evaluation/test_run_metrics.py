"""Metrics that a run's config asks for, numbers without any weights, and the weights that `keep: best`
keeps.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen.cli.train import main
from fastgen.core.errors import UserError
from fastgen.data.bundled import load_images
from fastgen.evaluation import label_free
from fastgen.evaluation.run_metrics import RunMetrics, Samples, _grouped
from fastgen.networks.load import load_teacher

FLAT = Path(__file__).parents[1] / "support/flat.yaml"


def test_scores_are_those_of_the_registry():
    held = load_images("tinted", "heldout")
    images, asked = held.images[:60].float() / 255, {k: v[:60] for k, v in held.attributes.items()}
    chosen = RunMetrics(["fd_mini", "agreement_mini", "contrast"], {}, "tinted", "tinted")
    found = chosen.scores(images, Samples(held.captions[:60], asked, 0))
    from fastgen.evaluation.metrics.fd_mini import Measurer

    wanted = Measurer("tinted").compare(images, asked)
    assert found["fd_mini"] == pytest.approx(wanted["fd_mini"], rel=1e-4)
    assert found["agreement_mini"] == wanted["agreement"] and found["contrast"] > 0
    assert list(found) == ["fd_mini", "agreement_mini", "contrast"]
    assert chosen.better["fd_mini"] == "lower" and chosen.describe()["encoders"]["mini"]
    assert "agreement_mini" not in chosen.scores(images, Samples(None, {}, 0)), "nothing was asked for"
    assert chosen.scores(images[:1], Samples(None, {}, 0)).keys() == {"contrast"}, (
        "one sample has no distance"
    )


def test_samples_of_one_request_are_brought_together():
    assert _grouped(7, 3) == ([0, 3, 1, 4, 2, 5], 2) and _grouped(2, 3)[1] == 0 and _grouped(4, 0)[1] == 0


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (["fd_mni"], {}, "eval.metrics: no metric 'fd_mni' (did you mean 'fd_mini'?)"),
        (["clip"], {}, "eval.weights: none given for clip; pass eval.weights, as clip=PATH"),
        (["clip"], {"weights": {"clip": "/no.pt"}}, "eval.weights: clip: /no.pt does not exist"),
        (["contrast"], {"weights": {"lip": "x"}}, "eval.weights: found 'lip=x'"),
        (["kid_mini"], {"mini_set": "digits"}, "eval.against: none given"),
        (["psnr"], {}, "eval.metrics: psnr needs originals"),
        (["motion"], {}, "eval.metrics: motion measures clips; leave it out: this teacher makes images"),
        (["fid"], {"kind": "clips"}, "eval.metrics: fid measures images; leave it out"),
        (["modes"], {"kind": "points"}, "eval.metrics: modes needs an exact mixture"),
        (["unlearning_h_mini"], {"mini_set": "digits"}, "eval.metrics: unlearning_h_mini needs --forgotten"),
        (["contrast"], {"against": "/nowhere"}, "eval.against: /nowhere is not a folder"),
    ],
)
def test_what_a_config_cannot_ask_for(names, more, said):
    with pytest.raises(UserError) as caught:
        RunMetrics(names, **{"weights": {}, **more})
    assert said in str(caught.value)


def test_prompts_are_needed_where_a_metric_reads_them(tmp_path):
    from fastgen.evaluation.metrics.metric import Metric
    from fastgen.evaluation.registry import Wanted

    chosen = RunMetrics(["contrast"], {})
    chosen.wanted = [Wanted("clip", Metric("clip", "", "higher", "", None, ("prompts",)), "")]
    chosen.check_texts(True)
    with pytest.raises(UserError, match="eval.metrics: clip needs prompts"):
        chosen.check_texts(False)


def test_clips_of_a_run_are_measured_as_clips():
    clips = torch.rand(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    chosen = RunMetrics(["motion", "flicker"], {}, "somewhere", kind="clips")
    found = chosen.scores(clips, Samples(None, {}, 0))
    assert found["motion"] == pytest.approx(float(clips.diff(dim=2).abs().mean()), abs=2e-3)
    assert found["flicker"] > 0


# -- without weights
def test_teacher_features_are_the_images_own(tiny):
    teacher = load_teacher(str(tiny("sd")))
    size = teacher.codec.decode_size()
    images = torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(0))
    null = teacher.codec.null(1)
    found = label_free.teacher_features(teacher, images, null)
    assert found.ndim == 2 and len(found) == 6 and found.isfinite().all()
    again = label_free.teacher_features(teacher, images[:5], null, batch_size=2)
    assert torch.allclose(found[:5], again, atol=1e-4), "whatever the batches"
    same = label_free.distances(found, found)
    assert same["fd_teacher_features"] == pytest.approx(0, abs=1e-6) and same["diversity_ratio"] == 1
    other = label_free.teacher_features(teacher, 0.2 * images, null)
    assert label_free.distances(other, found)["fd_teacher_features"] > 1e-4


def test_colours_beside_the_teacher():
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    teacher = label_free.looks(images)
    louder = label_free.looks((1.5 * (images - 0.5) + 0.5).clamp(0, 1))
    found = label_free.against_teacher(louder, teacher)
    assert all(1.2 < found[f"{k}_ratio"] < 1.6 for k in ("saturation", "contrast", "sharpness"))
    clip = torch.rand(2, 3, 4, 8, 8)
    assert {"saturation", "motion", "flicker"} <= label_free.looks(clip).keys()


# -- in the run
def train(tmp_path, *flags) -> dict:
    argv = [
        "--config",
        FLAT,
        "--output_dir",
        tmp_path / "run",
        "--train.max_train_steps",
        2,
        "--train.validation_steps",
        1,
    ]
    argv += ["--train.train_batch_size", 2, "--eval.num_samples", 12, "--eval.validation_samples", 12]
    argv += ["--eval.grid", 4, "--train.report_to", "[]", *flags]
    assert main([str(a) for a in argv]) == 0
    return json.loads((tmp_path / "run/results.json").read_text())


def curve(tmp_path, key) -> list:
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    return [r[key] for r in map(json.loads, lines) if key in r]


def test_a_run_reports_what_it_was_asked_for(tmp_path, capsys):
    """With keep: best by a metric for which more is better."""
    base = ["--teacher.path", "assets:teachers/digits", "--data.name", "digits"]
    chosen = ["--eval.metrics", "contrast", "kid_mini", "vendi_mini", "--eval.keep", "best"]
    found = train(tmp_path, *base, *chosen, "--eval.keep_by", "vendi_mini")
    for who in ("teacher", "student"):
        assert {"fd_mini", "contrast", "kid_mini", "vendi_mini"} <= found[who].keys()
    assert found["protocol"]["metrics"]["encoders"]["mini"]["encoder"] == "digits_mini"
    scores = curve(tmp_path, "validation/vendi_mini")
    assert list(found["curve"].values()) == scores and len(scores) == 3
    best = max((1, 2), key=lambda i: scores[i])
    assert found["protocol"]["weights"].endswith(f"step {best}"), "of those that were trained"
    assert "kid_mini" in capsys.readouterr().out, "in the table"
    assert "kid mini" in (tmp_path / "run/report/index.html").read_text()


def test_an_exact_teacher_is_asked_for_its_cost_and_modes(tmp_path, capsys):
    """Metrics of points, and of the generator: the teacher takes more calls than the student."""
    base = ["--teacher.path", "analytic:gmm2d", "--teacher.num_steps", 6, "--objective.gan_weight", 0]
    asked = ["latency", "nfe", "peak_memory", "mode_error", "energy_distance"]
    found = train(tmp_path, *base, "--eval.metrics", *asked)
    for who in ("teacher", "student"):
        assert {*asked} <= found[who].keys()
    assert found["teacher"]["nfe"] == 6 > found["student"]["nfe"]
    assert found["teacher"]["latency"] > found["student"]["latency"] > 0
    assert len(curve(tmp_path, "validation/latency")) == 3


def test_a_teacher_without_a_network_of_its_own_gets_numbers(tiny, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"picture {i}")
    base = ["--teacher.path", tiny("sd"), "--data.images", images]
    found = train(tmp_path, *base, "--teacher.num_steps", 2)
    student = found["student"]
    assert student["fd_teacher_features"] > 0 and student["diversity_ratio"] > 0
    assert {"saturation_ratio", "contrast_ratio", "sharpness_ratio"} <= student.keys()
    assert "fd_teacher_features" not in found["teacher"] and found["teacher"]["saturation"] > 0
    assert len(curve(tmp_path, "validation/saturation_ratio")) == 3
    assert "fd_teacher_features" in capsys.readouterr().out


def test_best_needs_a_metric(tiny, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a dress\na boot\n")
    flags = ["--teacher.path", tiny("sd"), "--data.prompts", tmp_path / "p.txt"]
    flags += [
        "--config",
        FLAT,
        "--objective.gan_weight",
        0,
        "--output_dir",
        tmp_path / "run",
        "--train.max_train_steps",
        1,
    ]
    for more, said in (
        (["--eval.keep", "best"], "eval.keep: no metric says which weights are best; give eval.metrics"),
        (["--eval.keep_by", "fid"], "eval.keep_by: found 'fid'; choose one of this run's metrics: none"),
        (["--eval.metrics", "clip"], "eval.weights: none given for clip"),
    ):
        assert main([str(a) for a in (*flags, *more)]) == 2
        assert said in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*")), "refused before any step"
