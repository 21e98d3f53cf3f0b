"""Measures against closed forms and, where one exists, a published implementation."""

import math

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.data.bundled import load_images
from fastgen.evaluation.metrics import frechet, mixtures, speed
from fastgen.evaluation.metrics.fd_mini import Measurer, agreement, measurer_for
from fastgen.networks.analytic import load_analytic


def draw(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- frechet -----------------------
def test_frechet_closed_form():
    eye = torch.eye(3, dtype=torch.float64)
    mean = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    assert frechet.frechet_from(0 * mean, eye, mean, 4 * eye) == pytest.approx(9 + 3, abs=1e-9)
    assert frechet.frechet_from(mean, 4 * eye, 0 * mean, eye) == pytest.approx(12, abs=1e-9)
    assert frechet.frechet_from(mean, 4 * eye, mean, 4 * eye) == pytest.approx(0, abs=1e-9)


def test_frechet_of_samples_is_rotation_invariant_and_rank_deficient_safe():
    a, b = draw(50, 6), 2 * draw(50, 6, 1) + 1
    turn = torch.linalg.qr(draw(6, 6, 2)).Q
    assert frechet.frechet(a @ turn, b @ turn) == pytest.approx(frechet.frechet(a, b), rel=1e-9)
    assert frechet.frechet(a[:4], a[:4]) == pytest.approx(0, abs=1e-6)


def test_frechet_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.fid")

    class Extractor(torch.nn.Module):
        num_features = 5

        def forward(self, x):
            return x.double().flatten(1)[:, :5] / 255

    metric = image.FrechetInceptionDistance(feature=Extractor(), input_img_size=(3, 4, 4)).set_dtype(
        torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(lo, 256, (60, 3, 4, 4), generator=generator).to(torch.uint8) for lo in (0, 90))
    metric.update(a, real=True)
    metric.update(b, real=False)
    flat = [x.double().flatten(1)[:, :5] / 255 for x in (a, b)]
    assert float(metric.compute()) == pytest.approx(frechet.frechet(*flat), rel=1e-5)


def test_mmd_equals_its_definition_and_is_unbiased():
    a, b = draw(7, 3), draw(9, 3, 1) + 1

    def kernel(x, y):
        return (x @ y.T / 3 + 1) ** 3

    own = sum(kernel(x, x).fill_diagonal_(0).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    assert frechet.polynomial_mmd(a, b) == pytest.approx(float(own - 2 * kernel(a, b).mean()), rel=1e-9)
    same = [frechet.polynomial_mmd(draw(40, 3, s), draw(40, 3, 1000 + s)) for s in range(200)]
    assert abs(sum(same) / 200) < 3 * torch.tensor(same).std().item() / math.sqrt(200) < 0.1
    assert frechet.kid(a, b, 20, 5)[0] == pytest.approx(1000 * frechet.polynomial_mmd(a, b), rel=0.8)


def test_precision_and_recall_see_different_failures():
    real = torch.cat([draw(200, 2), draw(200, 2, 1) + 30])
    half = draw(400, 2, 2)  # one of the two clusters, all plausible
    precision, recall = frechet.precision_recall(real, half)
    assert precision > 0.85 and 0.35 < recall < 0.55
    wide = torch.cat([real[::2] + 0.01 * draw(200, 2, 3), draw(200, 2, 4) * 0.1 - 60])  # half is nonsense
    precision, recall = frechet.precision_recall(real, wide)
    assert 0.4 < precision < 0.6 and recall > 0.7
    assert all(math.isnan(v) for v in frechet.precision_recall(real[:3], real[:3]))


def test_evenly_keeps_the_spread():
    assert frechet.evenly(torch.arange(10), 5).tolist() == [0, 2, 4, 6, 8]
    assert len(frechet.evenly(torch.arange(10), 99)) == 10


# -- the bundled measuring nets -----------------------
def test_measurer_ranks_real_noisy_and_blank():
    measurer, real = Measurer("digits"), load_images("digits", "train")
    images, labels = real.images[:300].float() / 255, {"class": real.labels[:300]}
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    scores = [measurer.compare((1 - c) * images + c * noise, labels) for c in (0, 0.3, 1)]
    fd, mmd, right = ([s[k] for s in scores] for k in ("fd_mini", "mmd", "agreement"))
    assert fd == sorted(fd) and mmd == sorted(mmd) and right == sorted(right, reverse=True)
    assert right[0] > 0.95 and scores[2]["recall"] < 0.1 < scores[0]["recall"]
    shuffled = measurer.compare(images, {"class": (labels["class"] + 1) % 10})
    assert shuffled["agreement"] < 0.05 and shuffled["fd_mini"] == fd[0]


def test_floor_falls_with_the_count():
    measurer = Measurer("digits")
    few, many = measurer.floor(100), measurer.floor(1000)
    assert 0 < many["fd_mini"] < few["fd_mini"] and many["agreement"] > 0.97


def test_tinted_agreement_needs_every_attribute():
    logits = {"colour": torch.eye(3), "garment": torch.eye(3)}
    asked = {"colour": torch.tensor([0, 1, 0]), "garment": torch.tensor([0, 0, -1])}
    found = agreement(logits, asked)
    assert found == pytest.approx({"agreement": 1 / 3, "agreement_colour": 2 / 3, "agreement_garment": 2 / 3})
    assert agreement(logits, {}) == {}


def test_measurer_for():
    assert measurer_for({"measure": "fashion"}).name == "fashion" and measurer_for("tinted").name == "tinted"
    assert measurer_for({}) is None and measurer_for(None) is None and measurer_for("imagenet") is None
    with pytest.raises(UserError, match="takes"):
        Measurer("digits").compare(torch.zeros(4, 3, 8, 8), {})
    with pytest.raises(UserError, match="at least two"):
        Measurer("digits").compare(torch.zeros(1, 1, 8, 8), {})
    assert "not comparable with an Inception FID" in Measurer("digits").describe()["note"]


# -- exact laws -----------------------
def test_energy_distance_of_shifted_points():
    zeros, ones = torch.zeros(5, 1), torch.ones(7, 1)
    assert mixtures.energy_distance(zeros, ones) == pytest.approx(2)
    assert mixtures.gaussian_mmd(zeros, ones, 1.0) == pytest.approx(2 - 2 * math.exp(-0.5))


def test_toy_measures_tell_exact_from_collapsed_and_wide():
    mixture = load_analytic("gmm2d").backbone
    measurer = mixtures.ToyMeasurer(mixture)
    good = measurer.floor(1000)
    assert good["energy_distance"] < 0.01 and good["modes"] == 1 and good["mode_error"] < 0.06
    assert abs(good["kl"]) < 0.15 and good["agreement"] > 0.99
    points, _ = mixture.sample(1000, torch.Generator().manual_seed(5))
    collapsed = measurer.compare(points[mixtures.component_log_likelihood(points, mixture).argmax(1) < 3], {})
    assert collapsed["modes"] == 0.5 and collapsed["mode_error"] > 0.45 and collapsed["kl"] > 0.4
    wide = measurer.compare(points + 0.4 * draw(1000, 2, 7), {})
    assert wide["kl"] > good["kl"] + 0.5 and wide["energy_distance"] > 3 * abs(good["energy_distance"])


# -- speed -----------------------
def test_speed_is_interleaved_and_per_image():
    order = []
    found = speed.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 4, repeats=2)
    assert order == ["a", "b"] * 3 and set(found) == {"a", "b"} and all(v >= 0 for v in found.values())
    assert speed.nfe(20, 3.0) == 40 and speed.nfe(20, 1.0) == 20 and speed.nfe(20, 0) == 20


# -- prompt alignment
def test_clip_tells_right_from_wrong_captions():
    held = load_images("tinted", "heldout")
    images, asked = held.images[:60].float() / 255, {k: v[:60] for k, v in held.attributes.items()}
    measurer = Measurer("tinted")
    right = measurer.compare(images, asked)
    wrong = measurer.compare(images, {k: v.roll(1) for k, v in asked.items()})
    assert right["clip"] > 60 > 20 > wrong["clip"]
    assert right["agreement"] > 0.8 > 0.2 > wrong["agreement"] and right["agreement_colour"] == 1
    assert "clip" not in measurer.compare(images, {"colour": asked["colour"]})
