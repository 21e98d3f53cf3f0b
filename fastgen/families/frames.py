"""Common base of the video families."""

import torch
from torch import Tensor

from fastgen.families.base import Family
from fastgen.families.parts import DiffusersModel


class VideoFamily(Family):
    """Latents [B, C, f, h, w], normalised per channel if the autoencoder's config has the statistics."""

    def normalise(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        if vae.config.get("latents_mean") is None:
            return super().normalise(vae, z)
        mean, std = statistics(vae, z)
        return (z - mean) * vae.config.get("scaling_factor", 1.0) / std

    def denormalise(self, vae: DiffusersModel, x0: Tensor) -> Tensor:
        if vae.config.get("latents_mean") is None:
            return super().denormalise(vae, x0)
        mean, std = statistics(vae, x0)
        return x0 * std / vae.config.get("scaling_factor", 1.0) + mean


def statistics(vae: DiffusersModel, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents per channel, from the autoencoder's config."""
    mean, std = (torch.tensor(vae.config[f"latents_{k}"]).to(z).view(1, -1, 1, 1, 1) for k in ("mean", "std"))
    return mean, std


def per_frame(out: Tensor, x: Tensor) -> Tensor:
    """Maps [B f, C, h, w] of x [B, C, f, h, w] as [B, C, f h, w], frames stacked along the height."""
    return out.unflatten(0, (len(x), x.shape[2])).transpose(1, 2).flatten(2, 3)
