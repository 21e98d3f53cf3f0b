"""The f table, the density ratio and its bins."""

from typing import get_args

import pytest
import torch

from fastgen.diffusion import divergences
from fastgen.diffusion.divergences import TABLE


def test_names_are_the_table():
    assert get_args(divergences.Name) == tuple(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_table_agrees_with_f(name):
    """h = r^2 f'', h - r h' and r^2 h'' by automatic differentiation; f is convex and 0 at 1."""
    r = torch.linspace(0.1, 8, 40, dtype=torch.float64, requires_grad=True)

    def grad(y):
        found = (
            torch.autograd.grad(y.sum(), r, create_graph=True, allow_unused=True)[0]
            if y.requires_grad
            else None
        )
        return torch.zeros_like(r) if found is None else found

    row = TABLE[name]
    h = r**2 * grad(grad(row.f(r)))
    torch.testing.assert_close(row.h(r) + 0 * r, h)
    torch.testing.assert_close(row.k(r) + 0 * r, h - r * grad(h))
    torch.testing.assert_close(row.r2h(r) + 0 * r, r**2 * grad(grad(h)))
    assert (h > 0).all() and row.f(torch.ones(1)).abs().max() < 1e-6


def test_direction_of_the_weights():
    """Forward KL looks at what the student misses (r large), Neyman at what it invents; swapped if r is."""
    r = torch.tensor([0.5, 1.0, 2.0])
    for name, wanted in (("rkl", (1, 1, 1)), ("kl", (0.5, 1, 2)), ("neyman", (2, 1, 0.5))):
        h = TABLE[name].h(r)
        torch.testing.assert_close(h / h[1], torch.tensor(wanted).float())


def test_a_clamped_ratio_has_no_derivative():
    r = torch.tensor([0.01, 1.0, 50.0])
    h, k, r2h = divergences.weights("kl", r, 0.1, 20.0)
    torch.testing.assert_close(h, torch.tensor([0.1, 1.0, 20.0]))
    torch.testing.assert_close(k, torch.tensor([0.1, 0.0, 20.0]))  # h - r h' with h' = 0 outside
    assert divergences.weights("chi2", r, 0.1, 20.0)[2].tolist() == [0.0, 4.0, 0.0] and r2h.abs().max() == 0


def test_log_ratio_takes_heads_and_maps():
    heads = [torch.tensor([0.0, 30.0]), torch.tensor([2.0, 30.0])]
    assert divergences.log_ratio(heads).tolist() == [1.0, 10.0]
    maps = torch.arange(8.0).reshape(2, 2, 2)
    assert divergences.log_ratio([maps]).tolist() == [1.5, 5.5]


def test_bins_divide_each_noise_level_by_its_own_mean():
    r = torch.tensor([1.0, 3.0, 10.0, 30.0])
    where = torch.tensor([0, 0, 2, 2])
    mean, sums = divergences.running_means(r, where, torch.zeros(2, 3), 8)
    torch.testing.assert_close(r / mean, torch.tensor([0.5, 1.5, 0.5, 1.5]))
    torch.testing.assert_close(sums, torch.tensor([[4.0, 0.0, 40.0], [2.0, 0.0, 2.0]]))
    mean, sums = divergences.running_means(2 * r[:2], where[:2], sums, 8)  # 2 of 8 samples: 3/4 is kept
    torch.testing.assert_close(sums, torch.tensor([[11.0, 0.0, 30.0], [3.5, 0.0, 1.5]]))
    torch.testing.assert_close(mean, torch.full((2,), 11 / 3.5))
    mean, sums = divergences.running_means(r, where, sums, 4)  # a batch as large as the memory: its own
    torch.testing.assert_close(sums, torch.tensor([[4.0, 0.0, 40.0], [2.0, 0.0, 2.0]]))
