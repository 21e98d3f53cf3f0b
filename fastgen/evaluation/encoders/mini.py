"""The small classifiers bundled in assets/measure as encoders. They order generators of one bundled image set
and are not comparable with any published network: every name made with them ends in _mini.
"""

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.core.paths import asset
from fastgen.data.bundled import NAMES
from fastgen.evaluation.encoders.base import Encoder, Outputs, checksum
from fastgen.networks.feature_net import FeatureNet


def load(name: str) -> Encoder:
    """The net of digits, fashion or tinted; "logits" are those of its first head, "logits_HEAD" all of
    them.
    """
    if name not in NAMES:
        found = f"no mini network for {name!r}" if name else "no image set named"
        raise UserError("--extractor", found, f"give one of {', '.join(NAMES)}")
    folder = asset(f"measure/{name}")
    net = FeatureNet.load(folder)
    want = (net.config["channels"], net.config["size"], net.config["size"])

    def prepare(images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != want[1:]:
            found = f"images of {images.shape[3]} x {images.shape[2]} pixels"
            raise UserError("--images", found, f"give {want[2]} x {want[1]} to the {name} mini network")
        return (grey(images) if want[0] == 1 else images).float() / 255

    def run(module: nn.Module, x: Tensor) -> Outputs:
        found = module(x)
        return {"features": found["features"]} | {f"logits_{k}": v for k, v in found["logits"].items()}

    return Encoder(f"{name}_mini", net, prepare, f"none, {want[2]} pixels", checksum(folder), run)


def classes(name: str) -> dict[str, int]:
    """Attributes that the net of a set tells apart, with their counts."""
    return dict(FeatureNet.load(asset(f"measure/{name}")).config["heads"])


def grey(images: Tensor) -> Tensor:
    """Luminance of RGB images [B, 3, H, W] in one channel, as Pillow converts them."""
    weights = torch.tensor([299.0, 587.0, 114.0]).reshape(3, 1, 1) / 1000
    return (images.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)
