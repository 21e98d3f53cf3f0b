"""Losses against their closed forms."""

import math

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
