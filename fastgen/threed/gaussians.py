"""An asset of 3D Gaussians (Kerbl et al. 2023, arXiv 2308.04079) with a fixed budget of them.

Differs: their number does not grow. What cloning, splitting and pruning do there, `settle` does by moving the
transparent ones to where the image still pulls most (as relocation does in Kheradmand et al. 2024,
arXiv 2404.09591), so that checkpoints and optimizers keep their shapes.
"""

import math

import torch
from torch import Tensor, nn

from fastgen.threed.asset import Asset, Render
from fastgen.threed.cameras import Cameras
from fastgen.threed.gsplat import gsplat_or_none
from fastgen.threed.rasteriser import Projected, project, rasterise, rotations

SH = 0.28209479177387814
"""the constant spherical harmonic"""
FAINT = 0.02
"""opacity below which a Gaussian does nothing"""


class GaussianAsset(Asset):
    """`num` Gaussians, at first a grey cloud in a ball of radius 0.6, drawn by `seed`."""

    UNITS = {"means": 0.25, "log_scales": 0.5, "quaternions": 0.5, "logits": 2.5, "sh": 2.0}
    colours_in = ("sh",)
    means: Tensor
    """[N, 3], world units"""
    log_scales: Tensor
    """[N, 3], logarithms of the standard deviations"""
    quaternions: Tensor
    """[N, 4], w first, of any length"""
    logits: Tensor
    """[N], of the opacity"""
    sh: Tensor
    """[N, (degree + 1)^2, 3], harmonics of the colour less 0.5"""
    pull: Tensor
    """[N], gradient of the loss in the projected means since the last move, summed"""

    fresh: Tensor
    """[N], the same of this step and this process"""

    def __init__(self, num: int = 500, degree: int = 0, seed: int = 0, move_every: int = 0):
        """degree: of the spherical harmonics of the colour, 0 to 3; move_every: steps between two moves of
        transparent Gaussians, 0 never.
        """
        super().__init__()
        assert 0 <= degree <= 3, degree
        self.degree, self.move_every = degree, move_every
        generator = torch.Generator().manual_seed(seed)
        way = nn.functional.normalize(torch.randn(num, 3, generator=generator), dim=-1)
        values = {
            "means": 0.6 * way * torch.rand(num, 1, generator=generator) ** (1 / 3),
            "log_scales": torch.full((num, 3), math.log(0.5 * num ** (-1 / 3))),
            "quaternions": torch.randn(num, 4, generator=generator),
            "logits": torch.full((num,), -2.0),
            "sh": 0.1 * torch.randn(num, (degree + 1) ** 2, 3, generator=generator),
        }
        values["sh"][:, 1:] = 0
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value / self.UNITS[name]))
        self.register_buffer("pull", torch.zeros(num))
        self.register_buffer("fresh", torch.zeros(num), persistent=False)

    @property
    def num(self) -> int:
        return len(self.means)

    def colours(self, cameras: Cameras) -> Tensor:
        """[B, N, 3] as the cameras see them."""
        means = self.value("means")
        way = nn.functional.normalize(means - cameras.position.to(means)[:, None], dim=-1)
        basis = harmonics(way, self.degree)  # [B, N, K]
        return (torch.einsum("bnk,nkc->bnc", basis, self.value("sh")) + 0.5).clamp(min=0)

    def projected(self, cameras: Cameras, size: int) -> Projected:
        scales = self.value("log_scales").exp()
        return project(self.value("means"), self.value("quaternions"), scales, cameras, size)

    def render(self, cameras: Cameras, size: int, background: Tensor) -> Render:
        if (fast := gsplat_or_none(self.means.device)) is not None and not self.training:
            return fast(self, cameras, size, background)
        seen = self.projected(cameras, size)
        if self.training and seen.means.requires_grad:
            seen.means.register_hook(lambda g: self._note(size / 2 * g))
        features = torch.cat([self.colours(cameras), seen.depths[..., None]], -1)
        image, alpha = rasterise(seen, self.value("logits").sigmoid(), features, size)
        rgb = image[:, :3] + (1 - alpha) * background.to(image)[:, :, None, None]
        return Render(rgb, alpha, image[:, 3:] / alpha.clamp(min=1e-6))

    @torch.no_grad()
    def _note(self, pull: Tensor) -> None:
        """Add up the gradient [B, N, 2] in the projected means, in units of half an image."""
        self.fresh += pull.norm(dim=-1).sum(0).to(self.fresh)

    @torch.no_grad()
    def settle(self, k: int) -> None:
        """After every `move_every` steps: transparent Gaussians become halves of those that were pulled most.
        Halves stand half a deviation to either side along the longest axis and are sqrt(3) / 2 as long,
        which keeps the variance; each takes the opacity 1 - sqrt(1 - o): together they cover as the one did.
        """
        if not self.move_every:
            return
        if torch.distributed.is_initialized():  # every process makes the same moves
            torch.distributed.all_reduce(self.fresh)
            self.fresh /= torch.distributed.get_world_size()
        self.pull += self.fresh
        self.fresh.zero_()
        if (k + 1) % self.move_every:
            return
        opacity = self.value("logits").sigmoid()
        idle = (opacity < FAINT).nonzero()[:, 0]
        busy = (opacity >= FAINT).nonzero()[:, 0]
        num = min(len(idle), len(busy))
        idle, busy = idle[:num], busy[self.pull[busy].argsort(descending=True)[:num]]
        half = (1 - (1 - opacity[busy]).sqrt()).clamp(1e-4, 1 - 1e-4)
        self.logits[busy] = half.logit() / self.UNITS["logits"]
        longest = self.log_scales[busy].argmax(-1, keepdim=True)
        way = rotations(self.value("quaternions")[busy]).gather(2, longest[:, None].expand(-1, 3, -1))[..., 0]
        step = 0.5 * self.value("log_scales")[busy].exp().gather(1, longest) * way / self.UNITS["means"]
        shorter = self.log_scales[busy].gather(1, longest) + 0.5 * math.log(0.75) / self.UNITS["log_scales"]
        self.log_scales[busy] = self.log_scales[busy].scatter(1, longest, shorter)
        for name in self.UNITS:
            parameter = getattr(self, name)
            parameter[idle] = parameter[busy]
        self.means[idle] += step
        self.means[busy] -= step
        self.pull.zero_()

    def extent(self) -> float:
        shown = self.value("logits").sigmoid() > FAINT
        return float(self.value("means")[shown].norm(dim=-1).max()) if shown.any() else 0.0


def harmonics(way: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics [..., (degree + 1)^2] of unit directions [..., 3], in the order and with the
    signs of 3D Gaussian Splatting.
    """
    x, y, z = way.unbind(-1)
    found = [torch.full_like(x, SH)]
    if degree > 0:
        found += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree > 1:
        found += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * z * z - x * x - y * y),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if degree > 2:
        found += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * z * z - x * x - y * y),
            0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -0.4570457994644658 * x * (4 * z * z - x * x - y * y),
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return torch.stack(found, -1)
