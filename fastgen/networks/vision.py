"""Feature maps of a frozen image network, which heads judge single pictures by: a bundled `FeatureNet`, a
vision transformer of transformers (DINO, DINOv2), or the pixels themselves.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.core.console import no_weight_bars
from fastgen.core.errors import UserError, first_line
from fastgen.core.paths import resolve
from fastgen.core.reading import read_json, reads_model
from fastgen.networks.feature_net import FeatureNet

PIXELS = "pixels"
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Vision(Protocol):
    """A frozen network of pictures."""

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps [N, C, h, w] of pictures [N, 3, H, W] in [0, 1], differentiable."""


class Pixels(nn.Module):
    """The pictures, whole and at half of their size."""

    def maps(self, images: Tensor) -> list[Tensor]:
        small = F.avg_pool2d(images, 2) if min(images.shape[-2:]) > 3 else images
        return [images * 2 - 1, small * 2 - 1]


class Resized(nn.Module):
    """A `FeatureNet`, shown pictures at the size that it takes."""

    def __init__(self, net: FeatureNet):
        super().__init__()
        self.net = net

    def maps(self, images: Tensor) -> list[Tensor]:
        return self.net.maps(_of_size(images, self.net.config["size"]))


class VisionTransformer(nn.Module):
    """A vision transformer: the tokens of its blocks at four depths as maps."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: Any, statistics: tuple[list[float], list[float]] = IMAGENET):
        super().__init__()
        self.net, self.size = net.requires_grad_(False).eval(), int(net.config.image_size)
        self.patch = int(net.config.patch_size)
        self.size -= self.size % self.patch
        for name, values in zip(("mean", "std"), statistics):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1))
        num = int(net.config.num_hidden_layers)
        self.depths = sorted({max(1, round(num * share / 4)) for share in (1, 2, 3, 4)})

    def maps(self, images: Tensor) -> list[Tensor]:
        pixels = (_of_size(images, self.size) - self.mean) / self.std
        states = self.net(pixel_values=pixels, output_hidden_states=True).hidden_states
        side = self.size // self.patch
        return [states[i][:, -side * side :].transpose(1, 2).unflatten(2, (side, side)) for i in self.depths]


def _of_size(images: Tensor, size: int) -> Tensor:
    if tuple(images.shape[-2:]) == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


@reads_model("objective.features")
def open_vision(path: str, channels: int, key: str = "objective.features") -> nn.Module:
    """The network of a folder, or "pixels"; channels: of the pictures that it is to be shown."""
    if path == PIXELS:
        return Pixels()
    needed = 'give a folder with a DINO or DINOv2 of transformers, a bundled net, or "pixels"'
    try:
        folder = resolve(path)
        config = read_json(folder / "config.json", key)
    except (OSError, ValueError) as error:
        raise UserError(key, f"{path} cannot be read ({first_line(error)})", needed) from None
    if "heads" in config:
        net = FeatureNet.load(folder)
        if net.config["channels"] != channels:
            found = (
                f"{path} takes pictures of {net.config['channels']} channels, the teacher's have {channels}"
            )
            raise UserError(key, found, "give another")
        return Resized(net)
    if "patch_size" not in config or "num_hidden_layers" not in config or channels != 3:
        raise UserError(key, f"{path} is no network of pictures that is known here", needed)
    return _transformer(folder, key, needed)


def _transformer(folder: Path, key: str, needed: str) -> VisionTransformer:
    from transformers import AutoModel

    no_weight_bars()
    local = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        net = AutoModel.from_pretrained(folder, torch_dtype=torch.float32, **local)
    except (OSError, ValueError) as error:
        raise UserError(key, f"{folder} cannot be read ({first_line(error)})", needed) from None
    file = folder / "preprocessor_config.json"
    about = read_json(file, key) if file.is_file() else {}
    mean, std = about.get("image_mean", IMAGENET[0]), about.get("image_std", IMAGENET[1])
    return VisionTransformer(net, (mean, std))
