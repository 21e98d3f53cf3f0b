"""The derivative along a path, on every tiny network: forward mode against central differences."""

import pytest
import torch
from pydantic import ValidationError

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.networks.jvp import TangentConfig, tangent
from fastgen.networks.load import load_teacher
from fastgen.roles.roles import Role
from tests.support.tiny import FOLDERS

each = pytest.mark.parametrize("family", FOLDERS)
DIFFERENCE = TangentConfig(method="difference")


def setting(folder, adapter=False):
    """(D over unit-length times, its arguments, the direction) of a tiny teacher."""
    teacher = load_teacher(str(folder))
    if adapter:
        teacher.backbone.add_adapter("student", 2, 2, teacher.backbone.family.lora_targets)
        for name, p in teacher.backbone.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, 0, 0.1, generator=torch.Generator().manual_seed(3))
    role, S = Role(teacher.backbone, "student" if adapter else None), teacher.schedule
    span = 1.0 if S.t_max == 80.0 else S.t_max
    x, dx = torch.randn(2, 2, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    u = torch.tensor([0.3, 0.6], dtype=torch.float64)  # clear of SANA's ReLU kinks, which no step resolves
    cond = teacher.codec.null(2)
    return lambda x, u: role(x, u * span, cond), (x, u), (dx, torch.ones_like(u))


def relative(a, b):
    return float((a - b).detach().norm() / b.norm())


@each
def test_exact_equals_central_differences(family, tiny):
    f, at, along = setting(tiny(family))
    exact = tangent(f, at, along, TangentConfig())
    assert exact.dtype == torch.float32 and not exact.requires_grad
    assert relative(tangent(f, at, along, DIFFERENCE), exact) < 5e-3
    in_x, in_t = (tangent(f, at, way, TangentConfig()) for way in _parts(along))
    torch.testing.assert_close(in_x + in_t, exact, rtol=1e-4, atol=1e-4)
    assert relative(in_x, exact) > 0.05, "the time's share must be seen, or this test proves nothing"


def _parts(along):
    dx, du = along
    return (dx, torch.zeros_like(du)), (torch.zeros_like(dx), du)


@pytest.mark.parametrize("family", ["sd", "sana"])
def test_through_an_adapter(family, tiny):
    f, at, along = setting(tiny(family), adapter=True)
    exact, difference = (tangent(f, at, along, cfg) for cfg in (TangentConfig(), DIFFERENCE))
    assert relative(difference, exact) < 5e-3
    assert not difference.requires_grad and f(*at).requires_grad, "the adapter is not trained through it"
    plain, at, along = setting(tiny(family))
    assert relative(tangent(plain, at, along, TangentConfig()), exact) > 0.02


@pytest.mark.parametrize("cfg", [TangentConfig(), DIFFERENCE], ids=["exact", "difference"])
def test_autocast_leaves_the_tangent_in_float32(cfg, tiny):
    """Under bf16 a difference would be noise; the tangent pass steps out of autocast."""
    f, at, along = setting(tiny("sana"))
    plain = tangent(f, at, along, cfg)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tangent(f, at, along, cfg), plain)
        ends = [f(at[0] + h * along[0], at[1] + h * along[1]) for h in (cfg.step, -cfg.step)]
        assert relative((ends[0] - ends[1]) / (2 * cfg.step), plain) > 0.1
        loss = f(at[0].requires_grad_(), at[1]).square().sum()  # nothing cached without gradient before
    loss.backward()
    assert at[0].grad.abs().max() > 0


def test_steps_too_small_for_float32_are_refused_because_they_are_noise(tiny):
    f, at, along = setting(tiny("edm"))
    exact = tangent(f, at, along, TangentConfig())
    tiny_step = TangentConfig.model_construct(method="difference", step=1e-7, math_attention=True)
    assert relative(tangent(f, at, along, tiny_step), exact) > 0.1
    with pytest.raises(ValidationError, match="float32 rounding"):
        TangentConfig(method="difference", step=1e-7)
    objective = {"name": "scm", "tangent": {"method": "difference", "step": 1e-7}}
    with pytest.raises(
        UserError, match="objective.tangent.step: found 1e-07, .*; use at least 1e-05"
    ) as error:
        validate({"objective": objective, "data": {"name": "digits"}})
    assert str(error.value).count("objective.tangent") == 1 and "\n" not in str(error.value)


def test_a_kernel_without_forward_mode_is_told_in_one_line(tiny):
    f, at, along = setting(tiny("sd"))
    with pytest.raises(
        UserError, match=r"objective.tangent: .*forward-mode differentiation.*math_attention to true"
    ):
        tangent(f, at, along, TangentConfig(math_attention=False))
    with pytest.raises(RuntimeError, match="mine"):  # other errors stay as they are

        def broken(*_):
            raise RuntimeError("mine")

        tangent(broken, at, along, TangentConfig())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_small_layers_in_half_precision(dtype):
    """1 / std to the third power overflows float16; the derivative of the norm is float32's all the same."""
    norm = torch.nn.LayerNorm(16, elementwise_affine=False)
    x, dx = 0.01 * torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        plain = torch.func.jvp(norm, (x,), (dx,))[1]
        wanted = torch.func.jvp(norm, (x.float(),), (dx.float(),))[1]
    assert dtype == torch.bfloat16 or not plain.isfinite().all()
    found = tangent(norm, (x,), (dx,), TangentConfig())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-2)
