"""How many pixels and frames a latent stands for, and which numbers of frames a family takes."""

from fastgen.core.errors import UserError
from fastgen.families.base import Family


def spatial_factor(family: Family, pipe) -> int:
    """Pixels per latent side."""
    for name in ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"):
        if getattr(pipe, name, None):
            return getattr(pipe, name) * family.folded
    return family.factor


def temporal_factor(family: Family, pipe) -> int:
    """Frames per latent frame; 0 for images."""
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
        if family.temporal and getattr(pipe, name, None):
            return getattr(pipe, name)
    return family.temporal


def check_frames(
    frames: int, family: Family, per: int, patch: int, key: str, found: str, encoded: bool = False
) -> None:
    """A UserError unless clips of so many frames are whole latent frames and tokens, and where they are
    encoded, whole for the autoencoder.

    per: frames of a latent one; patch: latent ones of a token.
    """
    chunk = max(per, family.frame_chunk) if encoded else per

    def whole(num: int) -> bool:
        return (num - 1) % chunk == 0 and ((num - 1) // per + 1) % patch == 0

    if whole(frames):
        return
    below = next((n for n in range(frames, 0, -1) if whole(n)), 0)
    above = next(n for n in range(frames, frames + 2 * chunk * patch * per) if whole(n))
    rules = [f"1 plus a multiple of {chunk}"] * (chunk > 1)
    why = ", ".join([*rules, *[f"in tokens of {patch} latent frames"] * (patch > 1)])
    near = f"{below} or {above}" if below else str(above)
    raise UserError(key, found, f"give {near}: {why}, as {family.name} needs")
