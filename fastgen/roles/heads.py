"""Small heads beside a denoiser: discriminators on its features, and the weight learned over time."""

from typing import cast

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.roles.roles import Role


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


class SpectralConv(nn.Conv2d):
    """A convolution divided by the largest singular value of its weight, found exactly: heads are small."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight / torch.linalg.matrix_norm(self.weight.flatten(1), 2)
        return self._conv_forward(x, weight, self.bias)


class PatchHead(nn.Module):
    """One logit per token, [B, h w] from [B, C, h, w]: the StyleGAN-T head of LADD (arXiv 2403.12015)."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.inp = nn.Sequential(SpectralConv(channels, width, 1), _norm(width), nn.LeakyReLU(0.2))
        self.mid = nn.Sequential(
            SpectralConv(width, width, 3, padding=1, padding_mode="circular"),
            _norm(width),
            nn.LeakyReLU(0.2),
        )
        self.out = SpectralConv(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.out((h + self.mid(h)) / 2**0.5).flatten(1)


class Discriminator(nn.Module):
    """Heads over feature taps of a role. The role's own weights belong to whichever player holds them.

    head: "pooled", one logit per map; "patch", one per token; "mean", no heads: the channel mean of a map.
    """

    def __init__(
        self, role: Role, taps: tuple[int, ...], example: tuple[Tensor, Tensor, Cond], head: str = "pooled"
    ):
        super().__init__()
        self.taps = taps
        self._role = [role]  # in a list, so that the network is not registered as part of the heads
        self.heads = nn.ModuleList()
        if head == "mean":
            return
        with torch.no_grad():
            maps, _ = role.features(*example, taps=taps)
        self.heads = nn.ModuleList(
            PatchHead(m.shape[1]) if head == "patch" else make_head(*m.shape[1:]) for m in maps
        )

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, score: bool = False):
        """Logits per head, [B], [B, tokens] or [B, h, w]; with score=True also D of the same pass."""
        maps, D = self._role[0].features(x_t, t, cond, taps=self.taps, score=score)
        logits = [head(m).float() for head, m in zip(self.heads, maps)] or [m.mean(1) for m in maps]
        return (logits, D) if score else logits


class LevelHeads(nn.ModuleList):
    """A discriminator for the end of each of a student's steps, or one for all of them."""

    def at(self, i: int) -> Discriminator:
        """The one for the end of step i."""
        return cast(Discriminator, self[min(i, len(self) - 1)])


class LogVariance(nn.Module):
    """w(t), the learned log-variance of the adaptive weighting exp(-w) loss + w; zero at first."""

    freqs: Tensor

    def __init__(self, width: int = 64):
        super().__init__()
        self.register_buffer("freqs", 2.0 ** torch.linspace(-2, 4, width // 2))
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        """[B] -> [B]."""
        waves = t.float()[:, None] * self.freqs
        return self.out(torch.cat([waves.sin(), waves.cos()], 1)).float().squeeze(1)
