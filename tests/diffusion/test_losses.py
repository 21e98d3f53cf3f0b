"""Losses against their closed forms."""

import math

import pytest
import torch

from fastgen.diffusion import losses
from fastgen.diffusion.schedules import EDM, VP, Flow


def test_distribution_matching_gradient_is_the_normalised_difference():
    x = torch.randn(4, 3, 5, requires_grad=True)
    real, fake = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    losses.distribution_matching(x, real, fake).backward()
    scale = (x.detach() - real).abs().flatten(1).mean(1)[:, None, None]
    torch.testing.assert_close(x.grad, (fake - real) / scale / x.numel(), rtol=1e-5, atol=1e-8)


def test_distribution_matching_scale_invariance():
    """Scaling D_real - D_fake and x - D_real together leaves the gradient unchanged; scaling only one
    does not.
    """
    real = torch.randn(4, 6)
    gap, way = torch.randn(4, 6), torch.randn(4, 6)

    def grad(c_gap, c_way):
        x = (real + c_way * way).requires_grad_()
        losses.distribution_matching(x, real, real + c_gap * gap).backward()
        return x.grad

    torch.testing.assert_close(grad(1, 1), grad(7, 7), rtol=1e-4, atol=1e-7)
    assert (grad(1, 1) - grad(7, 1)).abs().max() > 0.1


def test_denoising_weights_regress_the_native_prediction():
    for schedule, kind in ((VP.scaled_linear(), "eps"), (VP.scaled_linear(), "v"), (Flow(), "flow")):
        t = schedule.from_unit(torch.tensor([0.2, 0.5, 0.9]))
        x0, eps, guess = torch.randn(3, 3, 8)
        x_t = schedule.noise(x0, eps, t)
        native = schedule.from_x0(kind, x0, x_t, t)
        D = schedule.to_x0(kind, guess, x_t, t)
        torch.testing.assert_close(
            losses.denoising(schedule, D, x0, t, kind), losses.mse(guess, native), rtol=1e-4, atol=1e-6
        )


def test_edm_weight():
    t = torch.tensor([0.3, 2.0])
    D, x0 = torch.ones(2, 4), torch.zeros(2, 4)
    expected = (1 / t.double() ** 2 + 4).mean()
    assert math.isclose(losses.denoising(EDM(), D, x0, t, "edm"), expected, rel_tol=1e-6)


def test_gan_pair_values():
    zero, good, bad = [torch.zeros(5)], [torch.full((5,), 3.0)], [torch.full((5,), -3.0)]
    assert math.isclose(losses.gan_discriminator(zero, zero), 2 * math.log(2), rel_tol=1e-6)
    assert math.isclose(losses.gan_generator(zero), math.log(2), rel_tol=1e-6)
    assert losses.gan_discriminator(zero, zero, "hinge") == 1 and losses.gan_generator(zero, "hinge") == 0
    assert losses.gan_discriminator(bad, good, "hinge") == 0
    assert losses.gan_discriminator(good, bad) > losses.gan_discriminator(bad, good)


def test_huber_limits():
    pred, target = torch.randn(3, 50), torch.randn(3, 50)
    d = pred - target
    torch.testing.assert_close(losses.pseudo_huber(pred, target, 1e-6), d.abs().mean(), rtol=1e-4, atol=1e-5)
    big, pred, target = 1e4, pred.double(), target.double()
    torch.testing.assert_close(
        losses.pseudo_huber(pred, target, big) * 2 * big, (d.double() ** 2).mean(), rtol=1e-3, atol=1e-5
    )
    expected = (d.square().sum(1).sqrt() / 50**0.5).mean()
    torch.testing.assert_close(
        losses.sample_huber(pred, target, 1e-6), expected.double(), rtol=1e-4, atol=1e-5
    )


def test_weights_multiply_each_sample():
    """Of distances, of the matching gradient, of the generator's loss and of the denoising loss."""
    x, y = torch.randn(2, 4, 6, dtype=torch.float64)
    w, d = torch.linspace(0.5, 3, 4, dtype=torch.float64), x - y
    for found, each in (
        (losses.mse(x, y, w), d.square().mean(1)),
        (losses.l1(x, y, w), d.abs().mean(1)),
        (losses.pseudo_huber(x, y, 0.3, w), ((d.square() + 0.09).sqrt() - 0.3).mean(1)),
        (
            losses.sample_huber(x, y, 0.3, w),
            ((d.square().sum(1) + 0.09 * 6).sqrt() - 0.3 * 6**0.5) / 6**0.5,
        ),
        (losses.gan_generator([x[:, 0]], "hinge", w), -x[:, 0]),
        (losses.gan_generator([x[:, 0], y[:, 0]], "softplus", w), torch.log1p((-x[:, 0]).exp()) / 2
         + torch.log1p((-y[:, 0]).exp()) / 2),
    ):  # fmt: skip
        torch.testing.assert_close(found, (w * each).mean())
    x.requires_grad_()
    (grad,) = torch.autograd.grad(losses.distribution_matching(x, y, torch.zeros_like(y), w), x)
    scale = (x - y).abs().mean(1).detach()
    torch.testing.assert_close(grad, -(w / scale)[:, None] * y / x.numel())
    S, t = Flow(), torch.linspace(0.3, 0.8, 4, dtype=torch.float64)
    wanted = (w[:, None] * (x - y) ** 2).mean()
    torch.testing.assert_close(losses.denoising(S, x, y, t, "x0", w), wanted)


def test_weights_of_the_signal_to_noise_ratio():
    S, t = Flow(), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    snr = torch.tensor([16.0, 1.0, 1 / 16], dtype=torch.float64)
    torch.testing.assert_close(losses.error_weight(S, t, "eps"), snr)
    torch.testing.assert_close(losses.error_weight(S, t, "snr1"), snr.clamp(min=1))
    torch.testing.assert_close(losses.error_weight(S, t, "snr_plus_1"), snr + 1)


def test_clamped_feels_what_is_below_the_margin():
    assert float(losses.clamped(torch.tensor([0.1, 0.7]), 0.5)) == pytest.approx(0.2)


def test_feature_distance_is_of_unit_vectors_and_summed_over_maps():
    """Orthogonal features are at squared distance 2 wherever they stand, whatever their length."""
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    one[:, 0], other[:, 1] = 5.0, 0.2
    assert float(losses.feature_distance([one], [other])) == pytest.approx(2.0)
    assert float(losses.feature_distance([one, one], [other, 2 * one])) == pytest.approx(2.0)
    weight = torch.tensor([1.0, 3.0])
    assert float(losses.feature_distance([one], [other], weight)) == pytest.approx(4.0)


def test_tempered_ratio():
    """exp((mean n^2 - mean n'^2) / 2) with n' the noise that makes x_t of x."""
    S, t = Flow(), torch.tensor([0.25, 0.5], dtype=torch.float64)
    x, n = torch.tensor([[1.0, 2.0], [0.5, -1.0]]).double(), torch.tensor([[1.0, 0.0], [2.0, 1.0]]).double()
    x_t = S.noise(x, n, t) + torch.tensor([[0.25, 0.5], [0.0, 0.0]])  # n' = (2, 2) in the first row
    found = losses.tempered_ratio(S, x, x_t, t, n)
    torch.testing.assert_close(found, torch.tensor([math.exp((0.5 - 4) / 2), 1.0]).double())


def test_r1_is_the_squared_norm_of_the_mean_logits_gradient():
    """Heads a . x and maps whose tokens are b . x and c . x: the mean of a and (b + c) / 2."""
    x, (a, b, c) = torch.randn(5, 3, requires_grad=True), torch.randn(3, 3)
    logits = [x @ a, torch.stack([x @ b, x @ c], 1)]
    torch.testing.assert_close(losses.r1(logits, x), ((a + (b + c) / 2) / 2).square().sum())
    near = [torch.zeros(5), torch.ones(5)]
    assert float(losses.approximate_r1([torch.zeros(5), torch.zeros(5)], near)) == 0.5
