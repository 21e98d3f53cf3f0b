"""The resizings of published protocols: uint8 images [B, 3, H, W] in, floats out.

All filters are Pillow's, which widen when they scale down (antialiased); only Inception's own TensorFlow
bilinear, inside its network, does not.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _each(images: Tensor, change: Callable) -> Tensor:
    """uint8 images through a function of Pillow images."""
    from PIL import Image

    images = images.expand(-1, 3, -1, -1)
    pictures = [Image.fromarray(np.ascontiguousarray(i)) for i in images.permute(0, 2, 3, 1).cpu().numpy()]
    arrays = [torch.from_numpy(np.array(change(picture))) for picture in pictures]
    return torch.stack(arrays).permute(0, 3, 1, 2)


def cropped(images: Tensor, size: int, pre_resize: int = 0) -> Tensor:
    """uint8 [B, 3, size, size]: scaled to cover the square, bicubic, and cropped about the middle, as CLIP's
    own transform does. With pre_resize that square is made first, with a Lanczos filter.
    """
    from PIL import Image, ImageOps

    def change(picture):
        if pre_resize:
            picture = ImageOps.fit(picture, (pre_resize, pre_resize), Image.Resampling.LANCZOS)
        return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)

    return _each(images, change)


def tensors(images: Tensor, size: int) -> Tensor:
    """Float images [B, 3, H, W] in [0, 1] as `cropped` and `normalised` by CLIP's mean make them of uint8
    ones, but differentiable: an antialiased bicubic filter on tensors.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    if side != size:
        square = interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return normalised(255 * square, CLIP_MEAN, CLIP_STD)


def squared(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, size, size], bicubic, without a crop."""
    from PIL import Image

    return _each(images, lambda picture: picture.resize((size, size), Image.Resampling.BICUBIC))


def clean(images: Tensor, size: int = 299) -> Tensor:
    """Floats [B, 3, size, size] in 0..255 as clean-fid makes them: bicubic on float channels, so that nothing
    is rounded to 8 bits or clipped (Parmar 2022, arXiv 2104.11222).
    """
    from PIL import Image

    planes = images.expand(-1, 3, -1, -1).float().cpu().flatten(0, 1).numpy()
    made = [Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC) for p in planes]
    return torch.stack([torch.from_numpy(np.array(p)) for p in made]).unflatten(0, (len(images), 3))


def centre(images: Tensor, size: int = 299) -> Tensor:
    """The middle size x size pixels, without resizing; AssertionError of smaller images."""
    height, width = images.shape[-2:]
    assert min(height, width) >= size, (height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """0..255 to (x / 255 - mean) / std."""
    x = images.float() / 255
    centre, spread = (torch.tensor(v, device=x.device).reshape(3, 1, 1) for v in (mean, std))
    return (x - centre) / spread
