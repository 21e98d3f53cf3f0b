"""Assets as the network of a student: x = G(z, c) = encode(render(theta_i, camera)).

The noise z, which a generator turns into a sample, picks the asset i where there are several and the colour
behind it; the camera is a condition. Everything that trains, checks and measures one-step generators then
trains, checks and measures assets.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.diffusion.schedules import Schedule
from fastgen.networks.denoiser import Denoiser
from fastgen.threed.asset import Asset, Render, opaqueness, sparsity
from fastgen.threed.cameras import Cameras

DARKEST, BRIGHTEST = 0.05, 0.95
"""greys that are drawn behind an asset"""


class AssetStudent(Denoiser):
    """D(x_t, t, cond) that does not read the time: x_t is the noise, and cond["camera"] [B, 4] the view."""

    prediction = "x0"
    is_asset = True

    def __init__(
        self,
        assets: Sequence[Asset],
        encode: Callable[[Tensor], Tensor],
        schedule: Schedule,
        size: int,
        background: str = "grey",
    ):
        """encode: images [B, 3, size, size] in [-1, 1] to x0, differentiable; background: grey, colour, black
        or white.
        """
        super().__init__()
        self.assets = nn.ModuleList(assets)
        self.encode, self.schedule, self.size, self.background = encode, schedule, size, background
        self.seen: Render | None = None
        self.moves, self.normals = True, False

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        z = x_t.flatten(1)[:, :4] / self.schedule.prior_std(float(t[0]))
        self.seen = self.look(z, cond)
        return self.encode(2 * self.seen.rgb - 1)

    raw = forward

    def look(self, z: Tensor, cond: Cond) -> Render:
        """What noise [B, 4] and a condition pick."""
        return self.render(z, Cameras.of(cond["camera"]))

    @property
    def scenes(self) -> list[Asset]:
        """The assets, as what they are."""
        return [asset for asset in self.assets if isinstance(asset, Asset)]

    def particle(self, z: Tensor) -> Tensor:
        """Which asset each row [B] of noise [B, 4] picks, all alike."""
        share = 0.5 * (1 + torch.erf(z[:, 0].double() / 2**0.5))
        return (share * len(self.assets)).long().clamp(max=len(self.assets) - 1)

    def behind(self, z: Tensor) -> Tensor:
        """The colour [B, 3] behind each asset."""
        if self.background in ("black", "white"):
            return torch.full((len(z), 3), float(self.background == "white"), device=z.device)
        u = 0.5 * (1 + torch.erf(z[:, 1:4] / 2**0.5))
        u = u[:, :1].expand(-1, 3) if self.background == "grey" else u
        return DARKEST + (BRIGHTEST - DARKEST) * u

    def render(self, z: Tensor, cameras: Cameras) -> Render:
        """The assets that the noise picks, each row from its camera."""
        which, colour = self.particle(z), self.behind(z)
        if len(self.assets) == 1:
            return self._drawn(self.scenes[0], cameras, colour)
        found, places = [], []
        for i, asset in enumerate(self.scenes):
            rows = (which == i).nonzero()[:, 0]
            if len(rows):
                found.append(self._drawn(asset, cameras[rows], colour[rows]))
                places.append(rows)
        back = torch.cat(places).argsort()
        parts = zip(*((r.rgb, r.alpha, r.depth) for r in found))
        return Render(*(torch.cat(part)[back] for part in parts))

    def _drawn(self, asset: Asset, cameras: Cameras, colour: Tensor) -> Render:
        return (asset.render_normals if self.normals else asset.render)(cameras, self.size, colour)

    def staged(self, train: str, view: str) -> "AssetStudent":
        """The same assets as a stage trains and sees them. train: all, or geometry or colours with the other
        as it is; view: colours or normals.
        """
        other = copy.copy(self)
        other.moves, other.normals = train == "all", view == "normals"
        if train != "all":
            other.fixed = tuple(
                f"assets.{i}.{name}"
                for i, asset in enumerate(self.scenes)
                for name, _ in asset.named_parameters()
                if name.startswith(asset.colours_in) == (train == "geometry")
            )
        return other.requires_grad_(False)

    def settle(self, k: int) -> None:
        for asset in self.scenes if self.moves else []:
            asset.settle(k)

    def penalty(self, sparse: float, opaque: float) -> Tensor:
        """Weighted sparsity and opaqueness of the render that was drawn last."""
        assert self.seen is not None, "nothing was rendered yet"
        return sparse * sparsity(self.seen) + opaque * opaqueness(self.seen)

    def state(self) -> dict[str, Tensor]:
        return {f"assets/{n}": b for n, b in self.named_buffers() if n.endswith("pull")}

    def opacity(self) -> Tensor:
        """Mean opacity of the render that was drawn last: near 0 the box is empty, near 1 it is full."""
        assert self.seen is not None, "nothing was rendered yet"
        return F.relu(self.seen.alpha.detach()).mean()
