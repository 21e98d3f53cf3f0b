"""Over every family: selective recomputation, and frozen weights that are away between their passes."""

import copy

import pytest
import torch

from fastgen.networks import offload as module
from fastgen.networks import recomputing
from fastgen.networks.offload import Visitor, layers_to_offload
from fastgen.networks.offload import offload as offload_weights
from tests.families.cases import CASES
from tests.families.test_families import excuse

each = pytest.mark.parametrize("name", sorted(CASES))


def gradient(world, change=lambda backbone: None, trained: bool = False, precision=torch.float32):
    """(gradient of x through a copy of the network, that copy)."""
    backbone = copy.deepcopy(world.backbone).requires_grad_(trained)
    change(backbone)
    t = world.times(2)
    x_t = world.schedule.noise(world.x0, world.noise, t).requires_grad_(True)
    with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        if precision is not torch.float32:  # as in a step that samples first: autocast then knows all casts
            with torch.no_grad():
                backbone(x_t, t, world.cond)
        out = backbone(x_t, t, world.cond)
    (out * world.noise).sum().backward()
    return x_t.grad, backbone


@each
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selective_recomputation_gives_the_plain_gradient(world, monkeypatch, precision):
    """The results that are kept are those of costly operations, and no others are; what autocast remembers of
    an earlier pass is no matter.
    """
    excuse(world, "checkpointing")
    monkeypatch.setattr(recomputing, "WORTH", 8)  # tiny networks
    asked, is_costly = [], recomputing.is_costly
    spy = lambda operation, args: (asked.append(is_costly(operation, args)), asked[-1])[1]  # noqa: E731
    monkeypatch.setattr(recomputing, "is_costly", spy)
    turned_on = lambda backbone: backbone.enable_gradient_checkpointing(True)  # noqa: E731
    found, selective = gradient(world, turned_on, True, precision)
    wanted, plain = gradient(world, trained=True, precision=precision)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    for (name, one), two in zip(plain.named_parameters(), selective.parameters()):
        if one.grad is not None:  # a weight used twice adds up in bf16 here and in fp32 there
            most = {torch.float32: 1e-4, torch.bfloat16: 0.03}[precision] * one.grad.abs().max()
            assert (two.grad - one.grad).abs().max() <= most + 1e-6, name
    assert True in asked and False in asked


class Poisoned(Visitor):
    """At home weights are NaN: on a CPU as on a card, whoever uses them there is found out."""

    visits = 0

    def settle(self, parameter):
        parameter.true = parameter.data
        parameter.data = torch.full_like(parameter.data, torch.nan)

    def copy(self, parameter):
        Poisoned.visits += 1
        return torch.nn.Parameter(parameter.true, requires_grad=False)


@each
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_weights_that_are_away_are_never_used(world, recompute, monkeypatch):
    """Without a graph, in one, and in its backward pass, where it is recomputed or not."""
    monkeypatch.setattr(module, "SMALLEST", 1)
    monkeypatch.setattr(module, "Visitor", Poisoned)
    if recompute:
        excuse(world, "checkpointing")

    def change(backbone):
        if recompute:
            backbone.enable_gradient_checkpointing()
        offload_weights(backbone, set(), "cpu")

    Poisoned.visits = 0
    found, backbone = gradient(world, change)
    torch.testing.assert_close(found, gradient(world)[0], rtol=1e-4, atol=1e-6)
    away = [p for _, weights in layers_to_offload(backbone, set()) for p in weights]
    assert len(away) > 3 and all(p.isnan().all() for p in away)
    assert Poisoned.visits > len(away) if recompute else Poisoned.visits <= 2 * len(away)
    t = world.times(2)
    with torch.no_grad():
        x_t = world.schedule.noise(world.x0, world.noise, t)
        again = backbone(x_t, t, world.cond)
        torch.testing.assert_close(again, world.backbone(x_t, t, world.cond), rtol=1e-5, atol=1e-5)
