"""Numbers of pixels, clips and clouds in closed form."""

import math

import pytest
import torch

from fastgen.evaluation.metrics import geometry, pixels, video


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_appearance_of_known_images():
    red = torch.zeros(2, 3, 8, 8)
    red[:, 0] = 1
    grey = torch.full((2, 3, 8, 8), 0.4)
    assert pixels.saturation(red).tolist() == [1, 1] and pixels.saturation(grey).abs().max() == 0
    halves = torch.zeros(1, 1, 8, 8)
    halves[..., 4:] = 1
    assert float(pixels.contrast(halves)) == pytest.approx(0.5, rel=0.01)
    assert float(pixels.sharpness(halves)) == pytest.approx(2 / 6), "one step, seen from both sides"
    x = noise(3, 3, 32, 32)
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert (pixels.sharpness(blurred) < pixels.sharpness(x)).all()
    found = pixels.appearance(x)
    assert pixels.drift(found, pixels.appearance(0.5 * x)) == pytest.approx(
        {"saturation_ratio": 2, "contrast_ratio": 2, "sharpness_ratio": 2}, rel=1e-4
    )
    assert set(pixels.appearance(halves)) == {"contrast", "sharpness"}


def test_psnr_in_closed_form():
    a = torch.zeros(2, 3, 4, 4)
    assert pixels.psnr(a, a + 0.1).tolist() == pytest.approx([20, 20], rel=1e-5)
    assert pixels.psnr(a, a).tolist() == [100, 100]


def test_psnr_and_ssim_agree_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = noise(3, 3, 24, 20).double(), noise(3, 3, 24, 20, seed=1).double()
    b = 0.7 * a + 0.3 * b
    theirs = functional.structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert pixels.ssim(a, b).tolist() == pytest.approx(theirs.tolist(), abs=0.02), "theirs pads the borders"
    assert pixels.ssim(a, a).tolist() == pytest.approx([1, 1, 1])
    theirs = functional.peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert pixels.psnr(a, b).tolist() == pytest.approx(theirs.tolist(), rel=1e-5)


def test_clips():
    still = noise(2, 3, 1, 8, 8).expand(-1, -1, 5, -1, -1)
    assert video.frame_correlation(still).tolist() == pytest.approx([1, 1])
    assert video.motion(still).max() == 0 and video.flicker(still).max() == 0
    ramp = torch.arange(5.0).reshape(1, 1, 5, 1, 1).expand(1, 3, 5, 4, 4) / 10
    assert float(video.motion(ramp)) == pytest.approx(0.1) and float(video.flicker(ramp)) < 1e-6
    blinking = (torch.arange(6) % 2).reshape(1, 1, 6, 1, 1).expand(1, 1, 6, 4, 4).float()
    assert float(video.flicker(blinking)) == 2 and float(video.motion(blinking)) == 1
    wild = noise(2, 3, 5, 16, 16, seed=2)
    assert video.frame_correlation(wild).abs().max() < 0.2
    assert video.frame_correlation(1 - torch.stack([wild[:, :, 0], 1 - wild[:, :, 0]], 2)).max() < -0.99
    found = video.frame_consistency(still, lambda x: x.flatten(1))
    assert found.tolist() == pytest.approx([1, 1])
    text = torch.eye(2)
    assert video.frame_text_score(still, text, lambda x: text.repeat_interleave(5, 0)).tolist() == [1, 1]
    assert set(video.clip_scores(wild)) == {"frame_correlation", "motion", "flicker"}


def test_clouds():
    a = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    assert geometry.chamfer(a, a) == 0
    assert geometry.chamfer(a, torch.zeros(1, 3)) == pytest.approx(0.5), "one point a unit away, of two"
    assert geometry.chamfer(a, a + torch.tensor([0.0, 2, 0])) == pytest.approx(8)
    cloud = noise(500, 3)
    assert geometry.jensen_shannon([cloud], [cloud]) == pytest.approx(0, abs=1e-12)
    assert geometry.jensen_shannon([cloud], [cloud + 5]) == pytest.approx(1), "nowhere together"
    left = torch.tensor([[0.0, 0, 0]] * 3 + [[1, 1, 1]])
    right = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    p, q, m = (0.75, 0.25), (0.5, 0.5), (0.625, 0.375)
    wanted = sum(0.5 * x * math.log2(x / z) for y in (p, q) for x, z in zip(y, m))
    assert geometry.jensen_shannon([left], [right]) == pytest.approx(wanted)
