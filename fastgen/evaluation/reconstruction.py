"""What an autoencoder alone costs: the distance of reconstructed real images to real ones, and of samples to
reconstructed real images.

A latent generator cannot be nearer to real images than its autoencoder lets it. Against reconstructions its
own error shows, which the autoencoder's otherwise hides.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastgen.evaluation.metrics.fd_mini import Measurer, held_out
from fastgen.evaluation.metrics.frechet import frechet_from, statistics
from fastgen.evaluation.metrics.fvd_mini import ClipMeasurer, held_out_clips

NAMES = {Measurer.primary: "fd_mini_recon", ClipMeasurer.primary: "fvd_mini_recon"}
"""of the distance to reconstructions"""


class Reconstructions:
    """The held-out images (or clips) of a bundled set through the autoencoder of a teacher's codec."""

    def __init__(self, measurer: Measurer | ClipMeasurer, codec, device="cpu", batch_size: int = 100):
        self.measurer, self.codec, self.device, self.batch_size = measurer, codec, device, batch_size

    @torch.no_grad()
    def images(self) -> Tensor:
        """[N, C, H, W] in [0, 1], or clips [N, C, F, H, W]."""
        one = self.measurer
        if isinstance(one, Measurer):
            held = held_out(one.name, one.without) if one.own is None else one.own
        else:
            held = held_out_clips()
        found = []
        for batch in held.split(self.batch_size):
            x = batch.to(self.device).float() / 127.5 - 1
            found.append(self.codec.decode(self.codec.encode(x)).float().cpu())
        return torch.cat(found)

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        return statistics(self.measurer.features(self.images()))

    def own(self) -> dict[str, float]:
        """Distance of the reconstructions to the same images: what no generator through it undercuts."""
        return {self.measurer.primary: frechet_from(*self._statistics, *self.measurer.real())}

    def distance(self, images: Tensor) -> dict[str, float]:
        """Of samples like these."""
        return {
            NAMES[self.measurer.primary]: frechet_from(
                *statistics(self.measurer.features(images)), *self._statistics
            )
        }


def reconstructions(measurer, codec, device, batch_size: int) -> Reconstructions | None:
    """For a teacher of a bundled set that has an autoencoder, else None."""
    if isinstance(measurer, Measurer | ClipMeasurer) and codec.vae is not None:
        return Reconstructions(measurer, codec, device, batch_size)
    return None
