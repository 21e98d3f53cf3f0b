"""A time embedding without high frequencies, for methods that differentiate a network by time.

The sinusoids of a time from 0 to 1000 have frequencies up to one radian per unit. Samples of a teacher
hardly depend on these, but its exact derivative by t does: on the bundled flow and VP teachers their part is
as large as the rest of the derivative, or larger. Here the time embedder is fitted again, in closed form, by
slow functions of time only, and then frozen: training would bring the high frequencies back within a few
hundred steps. Nothing else changes, so that the export has the same class.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.families.base import Family
from fastgen.networks.backbone import Backbone
from fastgen.networks.denoiser import Denoiser


def time_modules(net: nn.Module, family: Family) -> tuple[Any, Any]:
    """(sinusoidal embedding, two-layer embedder) of a network."""
    waves, mlp = (net.get_submodule(name) for name in family.time_layers)
    return waves, mlp


@torch.no_grad()
def embedded(net: nn.Module, family: Family, times: Tensor) -> Tensor:
    """The time embedding [N, C] at times [N] of the network, float64."""
    waves, mlp = time_modules(net, family)
    return copy.deepcopy(mlp).float()(waves(times)).double()


@torch.no_grad()
def solve_embedder(
    net: nn.Module, family: Family, times: Tensor, target: Tensor, slope: float = 40.0
) -> None:
    """Fit the time embedder to the embedding `target` [N, C] at `times` [N] with functions of bounded slope.

    The first layer is set to random ramps of the one sinusoid that increases slowly over all times, the
    second is the least-squares solution.
    """
    waves, own = time_modules(net, family)
    device = next(own.parameters()).device
    if device.type == "meta":
        return
    mlp = copy.deepcopy(own).float()  # solved in float32 for half-precision networks too
    found = waves(times)
    z = (times - times.min()) / (times.max() - times.min())
    rising = found - found[z.argmin()]
    spread = (found.max(0).values - found.min(0).values).clamp(min=1e-9)
    straight = (rising / spread).abs() - z[:, None]  # distance of each sinusoid from a straight line in time
    column = int((straight.abs().max(0).values + (spread < 0.3)).argmin())
    low, high = found[:, column].min(), found[:, column].max()
    width = mlp.linear_1.out_features
    draws = torch.rand(3, width, generator=torch.Generator().manual_seed(0)).to(device)
    ramp = slope * (0.25 + draws[0]) * torch.where(draws[1] < 0.5, -1.0, 1.0) / (high - low)
    knots = low + (1.1 * draws[2] - 0.05) * (high - low)
    mlp.linear_1.weight.zero_()
    mlp.linear_1.weight[:, column] = ramp
    mlp.linear_1.bias.copy_(-ramp * knots)
    hidden = mlp.act(mlp.linear_1(found)).double()
    hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
    eye = torch.eye(width + 1, device=device, dtype=torch.float64)
    solution = torch.linalg.solve(hidden.T @ hidden + 1e-6 * len(times) * eye, hidden.T @ target)
    mlp.linear_2.weight.copy_(solution[:-1].T)
    mlp.linear_2.bias.copy_(solution[-1])
    own.load_state_dict(mlp.state_dict())


def smooth_time_embedding(backbone: Denoiser) -> None:
    """Replace a denoiser's time embedder by its smooth fit over all times of its schedule, and freeze it."""
    if not isinstance(backbone, Backbone):
        raise _no_embedder("an analytic teacher")
    family, net = backbone.family, backbone.net
    names = dict(net.named_modules())
    if not all(name in names for name in family.time_layers):
        raise _no_embedder(type(net).__name__)
    u = torch.linspace(0, 1, 4001, dtype=torch.float64, device=next(net.parameters()).device)
    S = backbone.schedule
    levels = S.t_min + u * (S.t_max - S.t_min) if math.isclose(S.t_min, 0) else S.from_unit(u)
    times = backbone.net_time(levels)
    solve_embedder(net, family, times, embedded(net, family, times))
    backbone.fix(family.time_layers[1])


def _no_embedder(what: str) -> UserError:
    found = f"{what} has no sinusoidal time embedder that fastgen knows"
    return UserError("student.smooth_time", found, "set it to false")
