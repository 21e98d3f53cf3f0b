"""Optimizers by name, and the fused update beside the plain one."""

import pytest
import torch

from fastgen.config.sections import PlayerOptim
from fastgen.training.trainer import make_optimizer


def trained(cfg: PlayerOptim, steps: int = 20) -> torch.Tensor:
    """A small regression after some steps."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 1, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(8, 1))
    optimizer = make_optimizer([weight], cfg)
    for _ in range(steps):
        optimizer.zero_grad()
        (x @ weight - y).square().mean().backward()
        optimizer.step()
    return weight.detach()


def test_a_fused_update_differs_by_rounding_alone():
    plain, fused = (trained(PlayerOptim(lr=1e-2, weight_decay=0.1, fused=on)) for on in (False, True))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-7)
    assert (
        trained(PlayerOptim(lr=1e-2, weight_decay=0.2)) - plain
    ).abs().max() > 1e-4  # negative: another setting
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2))], PlayerOptim(fused=True))
    assert optimizer.defaults["fused"] is True


def test_radam_has_no_fused_form():
    with pytest.raises(ValueError, match="fused: found true with radam"):
        PlayerOptim(name="radam", fused=True)
