"""What every asset offers: it is rendered from cameras, and its parameters are what is learned."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen.threed.cameras import Cameras


@dataclass(frozen=True)
class Render:
    """One render of a batch of cameras: rgb [B, 3, H, W] over the background, alpha [B, 1, H, W] in 0 to 1,
    and the expected depth [B, 1, H, W] in world units (0 where nothing is).
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor


class Asset(nn.Module):
    """A scene around the origin, inside the box [-1, 1]^3. Parameters are stored in units of `UNITS`, so that
    one learning rate of Adam fits them all: a step moves each by the rate times its unit.
    """

    UNITS: dict[str, float] = {}
    colours_in: tuple[str, ...] = ()
    """beginnings of the names of parameters that hold colours alone; the others hold none. Empty where no
    parameters are separate"""

    def value(self, name: str) -> Tensor:
        """A parameter as the renderer reads it."""
        return getattr(self, name) * self.UNITS[name]

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Set a parameter to what the renderer is to read."""
        getattr(self, name).copy_(value / self.UNITS[name])

    def render(self, cameras: Cameras, size: int, background: Tensor) -> Render:
        """Seen from cameras [B], size x size pixels, over one colour [B, 3] each."""
        raise NotImplementedError

    def render_normals(self, cameras: Cameras, size: int, background: Tensor) -> Render:
        """The same with (n + 1) / 2 of the outward unit normals n in the world in the place of colours."""
        raise NotImplementedError(f"{type(self).__name__} has no surface")

    def settle(self, k: int) -> None:
        """After step k: representations with a budget of parts move those that do nothing."""

    def extent(self) -> float:
        """Radius around the origin that holds it all, so that a camera inside is noticed; world units."""
        return 1.0


def sparsity(render: Render) -> Tensor:
    """Mean of sqrt(alpha^2 + 0.01): less of the image is covered (DreamFusion, as in threestudio)."""
    return (render.alpha.square() + 0.01).sqrt().mean()


def opaqueness(render: Render) -> Tensor:
    """Entropy of the opacity, BCE(a, a) with a kept off its ends: pixels are covered or empty, no fog."""
    a = render.alpha.clamp(1e-3, 1 - 1e-3)
    return -(a * a.log() + (1 - a) * (1 - a).log()).mean()
