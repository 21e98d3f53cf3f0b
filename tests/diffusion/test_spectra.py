"""Frequencies and edges: a projection, its share of white noise, a step, spectra of known waves."""

import math

import pytest
import torch

from fastgen.diffusion.spectra import edges, high_pass, radial_power, spectrum_gap


def wave(k: int, size: int = 32) -> torch.Tensor:
    """One image of k whole waves from left to right."""
    return torch.sin(2 * math.pi * k * torch.arange(size) / size).expand(1, 1, size, size)


def test_high_pass_is_an_orthogonal_projection_without_the_mean():
    x = torch.randn(2, 3, 16, 20)
    high = high_pass(x, 0.25)
    low = x - high
    torch.testing.assert_close(high_pass(high, 0.25), high, rtol=1e-4, atol=1e-5)
    assert abs(float((high * low).sum())) < 1e-3
    torch.testing.assert_close(high.square().sum() + low.square().sum(), x.square().sum())
    assert high_pass(torch.full((1, 1, 8, 8), 3.0), 0.0).abs().max() < 1e-5
    assert high_pass(wave(4), 0.25).abs().max() < 1e-5 < 0.9 < high_pass(wave(5), 0.25).abs().max()


def test_white_noise_keeps_the_share_of_the_frequencies_left():
    """32 x 32 at 0.25: all but the 81 wavenumbers up to 4 each way."""
    x = torch.randn(64, 1, 32, 32)
    share = float(high_pass(x, 0.25).square().mean() / x.square().mean())
    assert share == pytest.approx(1 - 81 / 1024, abs=0.01)


def test_edges_of_a_step_and_their_gradient_where_it_is_flat():
    x = torch.zeros(1, 3, 8, 8)
    x[..., 4:] = 1
    found = edges(x)
    assert float(found[0, 0, 4, 3]) == pytest.approx(4, abs=1e-5) and float(found[0, 0, 4, 0]) < 2e-3
    flat = torch.zeros(1, 1, 8, 8, requires_grad=True)
    edges(flat).sum().backward()
    assert flat.grad.isfinite().all()


def test_edges_of_a_clip_are_those_of_its_frames():
    clip = torch.randn(2, 3, 4, 8, 8)
    frames = clip.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(edges(clip), edges(frames))


def test_radial_power_finds_a_wave_and_its_height():
    power = radial_power(wave(3) + 0.5 * wave(9))
    assert power.argmax() == 2 and power[8] > 10 * power[7:9].min()
    torch.testing.assert_close(radial_power(2 * wave(3))[2], 4 * radial_power(wave(3))[2])


def test_spectrum_gap_is_zero_for_one_and_grows_with_blur():
    x = torch.randn(8, 1, 16, 16)
    power = radial_power(x)
    assert spectrum_gap(power, power) == 0
    blurs = [x - share * high_pass(x, 0.25) for share in (0.3, 0.7)]
    less, more = (spectrum_gap(radial_power(b), power) for b in blurs)
    assert 0.1 < less < more
