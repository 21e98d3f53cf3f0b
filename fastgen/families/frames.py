"""Feature maps of the video families."""

from torch import Tensor


def per_frame(out: Tensor, x: Tensor) -> Tensor:
    """Maps [B f, C, h, w] of x [B, C, f, h, w] as [B, C, f h, w], frames stacked along the height."""
    return out.unflatten(0, (len(x), x.shape[2])).transpose(1, 2).flatten(2, 3)
