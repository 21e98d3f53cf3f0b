"""What an autoencoder alone costs, and distances to reconstructions."""

from types import SimpleNamespace

import pytest
import torch

from fastgen.data.bundled import load_images
from fastgen.evaluation.metrics.fd_mini import Measurer
from fastgen.evaluation.reconstruction import NAMES, Reconstructions, reconstructions


class Halved:
    """A codec whose autoencoder halves the contrast."""

    vae = True

    def encode(self, images):
        return images / 2

    def decode(self, x0):
        return (x0 + 1) / 2


def test_a_generator_of_reconstructions_is_perfect_against_them_only():
    measurer = Measurer("digits")
    held = load_images("digits", "heldout").images.float() / 255
    found = Reconstructions(measurer, Halved())
    halved = (held * 2 - 1) / 4 + 0.5
    assert found.own()["fd_mini"] > 1 > found.distance(halved)[NAMES["fd_mini"]]
    assert found.distance(held)[NAMES["fd_mini"]] == pytest.approx(found.own()["fd_mini"], rel=1e-3), (
        "the same two sets"
    )


def test_an_autoencoder_without_error_costs_nothing():
    class Exact(Halved):
        def encode(self, images):
            return images

    assert Reconstructions(Measurer("digits"), Exact()).own()["fd_mini"] == pytest.approx(0, abs=1e-3)


def test_only_latent_teachers_of_bundled_sets_have_one(tiny):
    pixels = SimpleNamespace(vae=None)
    assert reconstructions(Measurer("digits"), pixels, "cpu", 10) is None
    assert reconstructions(None, Halved(), "cpu", 10) is None
    assert isinstance(reconstructions(Measurer("digits"), Halved(), torch.device("cpu"), 10), Reconstructions)
