"""Inception of FID from a local file, with the resizings that published numbers were made with.

The network is torch-fidelity's port of the original TensorFlow graph; "inception" resizes as that graph does
(TF1 bilinear, no antialias), which is what EDM, ADM and torch-fidelity measure, "inception_clean" as
clean-fid does, "inception_patch" takes the middle 299 x 299 pixels as they are. Numbers of two of them, or of
torchvision's Inception, are not comparable.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.evaluation.encoders import resize
from fastgen.evaluation.encoders.base import Encoder, Outputs, checksum, needs, unreadable

WANTED = "weights-inception-2015-12-05-6726825d.pth (torch-fidelity's Inception)"
SIZE = 299
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *(f"Mixed_5{k}" for k in "bcd"),
    *(f"Mixed_6{k}" for k in "abcde"),
    *(f"Mixed_7{k}" for k in "abc"),
    "AvgPool",
)
PREPROCESSING = {
    "inception": "TF1 bilinear to 299, no antialias",
    "inception_clean": "PIL bicubic per float channel to 299, antialiased (clean-fid)",
    "inception_patch": "centre 299 x 299 pixels, no resize",
}


def run(net: Any, x: Tensor) -> Outputs:
    """The graph from images in 0..255 at 299 pixels: pool3 features and the logits without their bias."""
    x = (x.float() - 128) / 128
    for name in LAYERS:
        x = getattr(net, name)(x)
    x = x.flatten(1)
    return {"features": x, "logits": x @ net.fc.weight.T}


def _prepare(name: str):
    if name == "inception_clean":
        return resize.clean
    if name == "inception_patch":
        return _patch
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return lambda images: interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(SIZE, SIZE), align_corners=False
    )


def _patch(images: Tensor) -> Tensor:
    if min(images.shape[-2:]) < SIZE:
        found = f"images of {images.shape[-1]} x {images.shape[-2]} pixels"
        raise UserError(
            "--metrics",
            f"patch_fid: {found}",
            f"give larger ones: it takes the middle {SIZE} x {SIZE} pixels",
        )
    return resize.centre(images, SIZE)


def load(path: Path, name: str = "inception") -> Encoder:
    """The encoder `name`, a key of PREPROCESSING."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise needs("torch-fidelity", name) from None
    try:
        torch.load(path, map_location="meta", weights_only=True)  # refuse a file that holds more than tensors
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:
        raise unreadable("inception", path, error, WANTED) from None
    return Encoder(name, net, _prepare(name), PREPROCESSING[name], checksum(path), run)
