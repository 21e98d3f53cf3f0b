"""Discriminator heads on the features of a denoiser (the critic's or the frozen teacher's)."""

import torch
from torch import Tensor, nn

from fastgen.backbones.base import Cond
from fastgen.roles import Role


def _norm(channels: int) -> nn.Module:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4 or g == 1)
    return nn.GroupNorm(groups, channels)


def make_head(channels: int, height: int, width: int, hidden: int = 128) -> nn.Sequential:
    """One scalar logit [B] from a map [B, C, height, width] (a video's frames stacked along the height):
    stride-2 convolutions to 4 x 4, one full-size, one 1 x 1 (DMD2 code). A small side is kept.
    """
    layers: list[nn.Module] = []
    while max(height, width) > 7:
        kernel, stride = zip(*((4, 2) if side > 7 else (3, 1) for side in (height, width)))
        layers += [nn.Conv2d(channels, hidden, kernel, stride, 1), _norm(hidden), nn.SiLU()]
        channels = hidden
        height, width = (side // 2 if side > 7 else side for side in (height, width))
    if max(height, width) > 1:
        layers += [nn.Conv2d(channels, hidden, 3, 1, 1), _norm(hidden), nn.SiLU()]
        channels = hidden
    layers += [nn.Conv2d(channels, hidden, (height, width)), nn.SiLU(), nn.Conv2d(hidden, 1, 1)]
    return nn.Sequential(*layers, nn.Flatten(0))


class Discriminator(nn.Module):
    """Heads over feature taps of a role. The role's own weights belong to whichever player holds them."""

    def __init__(self, role: Role, taps: tuple[int, ...], example: tuple[Tensor, Tensor, Cond]):
        super().__init__()
        self.taps = taps
        self._role = [role]  # in a list, so that the network is not registered as part of the heads
        with torch.no_grad():
            maps, _ = role.features(*example, taps=taps)
        self.heads = nn.ModuleList(make_head(*m.shape[1:]) for m in maps)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, score: bool = False):
        """Logits, one [B] per head; with score=True also D of the same pass."""
        maps, D = self._role[0].features(x_t, t, cond, taps=self.taps, score=score)
        logits = [head(m) for head, m in zip(self.heads, maps)]
        return (logits, D) if score else logits
