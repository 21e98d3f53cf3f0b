"""The judge of single frames: which it sees, how they are decoded, and its penalty."""

import pytest
import torch
from torch import nn

from fastgen.core.rng import Rng
from fastgen.networks.vision import Pixels
from fastgen.roles.frames import FrameJudge, drawn_frames, feature_penalty
from tests.support.dots import Codec


def test_frames_are_drawn_evenly_and_once():
    uniform = Rng(0).rand
    at = drawn_frames(4000, 5, 2, uniform)
    assert (at[:, 0] < at[:, 1]).all()
    counts = torch.bincount(at.flatten(), minlength=5) / 8000
    assert (counts - 0.2).abs().max() < 0.02
    parts = drawn_frames(4000, 9, 3, uniform, spread=True)
    assert all(set(parts[:, i].tolist()) == {3 * i, 3 * i + 1, 3 * i + 2} for i in range(3))
    assert drawn_frames(7, 1, 2, uniform).tolist() == [[0]] * 7


def test_frames_are_decoded_alone_or_with_their_clip():
    """Both ways the same pictures, where the autoencoder keeps frames apart."""
    x0 = torch.randn(6, 4, 3, 2, 2)
    apart, joined = (FrameJudge(Pixels(), Codec(frames=n), (2, 2)) for n in (3, 9))
    one, other = (j.frames(x0, 2, Rng(0).rand) for j in (apart, joined))
    assert one.shape == (12, 4, 2, 2) and torch.equal(one, other)
    at = drawn_frames(6, 3, 2, Rng(0).rand)
    torch.testing.assert_close(one[1], x0[0, :, at[0, 1]] / 2 + 0.5)


def test_penalty_is_zero_at_a_gradient_of_one():
    """Of the features, at mixtures of both; the negative: twice the slope."""

    class Linear(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.w = nn.Parameter(torch.full((12,), slope / 12**0.5))

        def maps(self, images):
            return [images.flatten(1)]

        def judge(self, maps):
            return [(maps[0] * self.w).sum(1, keepdim=True)]

    real, fake = torch.rand(2, 5, 3, 2, 2)
    assert float(feature_penalty(Linear(1.0), real, fake, Rng(0).rand).detach()) < 1e-10
    steep = feature_penalty(Linear(2.0), real, fake, Rng(0).rand)
    assert float(steep.detach()) == pytest.approx(1.0)
    assert steep.requires_grad
