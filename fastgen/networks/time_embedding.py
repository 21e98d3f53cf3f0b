"""A network's function of time without its fast ripples, for methods that differentiate by it.

Sinusoids of a time that counts to 1000 reach one radian a unit. In a teacher's samples that hardly shows,
but its exact derivative by t is mostly ripple: on the bundled flow and VP teachers the ripple is about as
large as the derivative behind it, or larger. Here the time embedder is solved anew, in closed form, from slow
functions of time only, and kept: training it would bring the fast sinusoids back within a few hundred steps.
Nothing else changes, so that the export is the plain class.
"""

import math

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.networks.backbone import Backbone
from fastgen.networks.denoiser import Denoiser


@torch.no_grad()
def embedded(net: nn.Module, family, times: Tensor) -> Tensor:
    """The time embedding [N, C] at the network's own times [N], float64."""
    waves, mlp = (net.get_submodule(name) for name in family.time_layers)
    return mlp(waves(times)).double()


@torch.no_grad()
def solve_embedder(net: nn.Module, family, times: Tensor, wanted: Tensor, slope: float = 40.0) -> None:
    """Set the time embedder to `wanted` at `times`, as closely as ramps of bounded slope do.

    The first layer becomes random ramps in the one sinusoid that rises slowly over all times, the second is
    solved for by least squares.
    """
    waves, mlp = (net.get_submodule(name) for name in family.time_layers)
    device = next(mlp.parameters()).device
    if device.type == "meta":
        return
    found = waves(times)
    z = (times - times.min()) / (times.max() - times.min())
    rising = found - found[z.argmin()]
    spread = (found.max(0).values - found.min(0).values).clamp(min=1e-9)
    straight = (rising / spread).abs() - z[:, None]  # how far each wave is from a line in time
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
    solution = torch.linalg.solve(hidden.T @ hidden + 1e-6 * len(times) * eye, hidden.T @ wanted)
    mlp.linear_2.weight.copy_(solution[:-1].T)
    mlp.linear_2.bias.copy_(solution[-1])


def make_smooth(backbone: Denoiser) -> None:
    """Solve a denoiser's time embedder anew over its schedule's own times."""
    family, net = backbone.family, backbone.net if isinstance(backbone, Backbone) else backbone
    names = dict(net.named_modules())
    if family is None or not all(name in names for name in family.time_layers):
        what = "an exact teacher" if family is None else type(net).__name__
        found = f"{what} has no sinusoidal time embedder that fastgen knows"
        raise UserError("student.smooth_time", found, "set it to false")
    u = torch.linspace(0, 1, 4001, dtype=torch.float64, device=next(net.parameters()).device)
    S = backbone.schedule
    levels = S.t_min + u * (S.t_max - S.t_min) if math.isclose(S.t_min, 0) else S.from_unit(u)
    times = backbone.net_time(levels)
    solve_embedder(net, family, times, embedded(net, family, times))
    backbone.fix(family.time_layers[1])
