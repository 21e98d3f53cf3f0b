"""Discriminator heads on the features of a denoiser (the critic's or the frozen teacher's)."""

import torch
from torch import Tensor, nn

from fastgen.backbones.base import Cond
from fastgen.roles import Role


def _norm(channels: int) -> nn.Module:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4 or g == 1)
    return nn.GroupNorm(groups, channels)


def make_head(channels: int, size: int, width: int = 128) -> nn.Sequential:
    """One scalar logit [B] from a [B, C, size, size] map: stride-2 convolutions to 4 x 4, one full-size,
    one 1 x 1 (DMD2 code).
    """
    layers: list[nn.Module] = []
    while size > 7:
        layers += [nn.Conv2d(channels, width, 4, 2, 1), _norm(width), nn.SiLU()]
        channels, size = width, size // 2
    if size > 1:
        layers += [nn.Conv2d(channels, width, 3, 1, 1), _norm(width), nn.SiLU()]
        channels = width
    layers += [nn.Conv2d(channels, width, size), nn.SiLU(), nn.Conv2d(width, 1, 1), nn.Flatten(0)]
    return nn.Sequential(*layers)


class Discriminator(nn.Module):
    """Heads over feature taps of a role. The role's own weights belong to whichever player holds them.

    With `mean` there are no heads: a logit map is the channel mean of its features.
    """

    def __init__(
        self, role: Role, taps: tuple[int, ...], example: tuple[Tensor, Tensor, Cond], mean: bool = False
    ):
        super().__init__()
        self.taps = taps
        self._role = [role]  # in a list, so that the network is not registered as part of the heads
        self.heads = nn.ModuleList()
        if mean:
            return
        with torch.no_grad():
            maps, _ = role.features(*example, taps=taps)
        self.heads = nn.ModuleList(make_head(m.shape[1], m.shape[2]) for m in maps)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, score: bool = False):
        """Logits, one [B] per head (or maps [B, h, w]); with score=True also D of the same pass."""
        maps, D = self._role[0].features(x_t, t, cond, taps=self.taps, score=score)
        logits = [head(m) for head, m in zip(self.heads, maps)] or [m.mean(1) for m in maps]
        return (logits, D) if score else logits
