"""Optimizers by name, and the fused update beside the plain one."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.config.sections import PlayerOptim
from fastgen.training.checkpoint import optimizer_tensors, restore_optimizer
from fastgen.training.optimizers import make_optimizer, set_rate, state_bytes


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


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_states_in_eight_bits_are_small_and_survive_a_file(tmp_path):
    """A stopped and restored optimizer goes on bit for bit; the update is near that of float32 states."""
    cfg, generator = PlayerOptim(name="adamw8bit_torchao", lr=1e-2), torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 64, 64, generator=generator)

    def step(optimizer, weight, k):
        weight.grad = gradients[k].clone()
        set_rate(optimizer, 1e-2 / (1 + k))
        optimizer.step()

    weights = {kind: torch.nn.Parameter(torch.zeros(64, 64)) for kind in ("adamw8bit_torchao", "adamw")}
    found = {k: make_optimizer([w], cfg.model_copy(update={"name": k})) for k, w in weights.items()}
    for k in range(3):
        for kind, weight in weights.items():
            step(found[kind], weight, k)
    whole = found["adamw8bit_torchao"], weights["adamw8bit_torchao"]
    tensors, rest = optimizer_tensors(whole[0], ["a"], "optim/student")
    held = sum(v.numel() * v.element_size() for n, v in tensors.items() if n.endswith((".codes", ".scale")))
    assert held == 2 * 64 * 64 * state_bytes(cfg)
    save_file(tensors, tmp_path / "state.safetensors")
    again = torch.nn.Parameter(whole[1].detach().clone())
    resumed = make_optimizer([again], cfg)
    restore_optimizer(resumed, {"a": again}, "optim/student", load_file(tmp_path / "state.safetensors"), rest)
    for k in range(3, 6):
        step(*whole, k)
        step(resumed, again, k)
    assert torch.equal(again, whole[1]) and again.abs().max() > 0
    for k in range(3, 6):
        step(found["adamw"], weights["adamw"], k)
    away = (again - weights["adamw"]).norm() / again.norm()
    assert 1e-5 < away < 0.05
