"""Measures against closed forms and, where one exists, a published implementation."""

import math
import time

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.data.bundled import load_images
from fastgen.evaluation.metrics import mixtures, speed
from fastgen.evaluation.metrics.agreement import agreement, janus, unlearning
from fastgen.evaluation.metrics.fd_mini import Measurer, measurer_for
from fastgen.networks.analytic import load_analytic


def draw(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_unlearning_counts_each_side_alone():
    """UA over the four images of class 0, RA over the other six, and the harmonic mean."""
    wanted = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    predicted = torch.tensor([0, 1, 1, 1, 1, 1, 2, 2, 2, 0])
    found = unlearning((predicted == wanted).double(), wanted == 0)
    h = 2 * 0.75 * (5 / 6) / (0.75 + 5 / 6)
    assert {k: e.value for k, e in found.items()} == pytest.approx(
        {"unlearning_accuracy": 0.75, "retained_accuracy": 5 / 6, "unlearning_h": h}
    )
    assert [len(e.contributions()) for e in found.values()] == [4, 6, 10]
    low, high = found["unlearning_h"].interval()
    assert low < h < high


def test_the_harmonic_mean_moves_as_its_influence_says():
    """Against a small change of one sample's weight."""
    generator = torch.Generator().manual_seed(0)
    hit = (torch.rand(40, generator=generator) < 0.6).double()
    gone = torch.arange(40) < 12
    weights = torch.ones(40, dtype=torch.float64)

    def score(weights):
        ua = ((1 - hit) * weights)[gone].sum() / weights[gone].sum()
        ra = (hit * weights)[~gone].sum() / weights[~gone].sum()
        return float(2 * ua * ra / (ua + ra))

    moved = unlearning(hit, gone)["unlearning_h"].contributions() - score(weights)
    for i in (0, 5, 20, 39):
        more = weights.clone()
        more[i] += 1e-5
        assert float(moved[i]) == pytest.approx(
            (score(more) - score(weights)) / 1e-5 * 40, rel=1e-3, abs=1e-6
        )


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


def test_latency_leaves_out_the_warm_up():
    calls = []

    def call():
        calls.append(1)
        time.sleep(0.2 if len(calls) <= 2 else 0.002)

    found = speed.latency(call, repeats=5, warm_up=2)
    assert len(calls) == 7 and found.least <= found.p50 <= found.p95 < 0.2 and found.as_dict()["repeats"] == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory there")
def test_peak_memory_sees_an_allocation():
    def allocate():
        held = torch.ones(2**26)
        time.sleep(0.05)
        return held

    assert speed.peak_memory(allocate) > 200 and speed.peak_memory(lambda: time.sleep(0.02)) < 50


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


def test_two_faced_assets_are_counted_where_no_front_is_asked_for():
    """Front, side, back, overhead: of one side and two backs one looks like the front."""
    views = torch.tensor([0, 1, 2, 2, 3])
    looks = torch.eye(4)[torch.tensor([0, 1, 0, 2, 0])]
    assert janus({"view": looks}, {"view": views}) == {"janus": pytest.approx(1 / 3)}
    assert agreement({"view": looks}, {"view": views})["janus"] == pytest.approx(1 / 3)
    assert janus({"view": looks[:1]}, {"view": views[:1]}) == {} and janus({}, {"view": views}) == {}
