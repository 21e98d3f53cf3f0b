"""Small classifiers of image attributes, whose features the bundled metrics and perceptual losses use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class FeatureNet(nn.Module):
    """Three convolutions, a feature vector and a linear head per attribute, for images in [0, 1].

    heads: number of classes of each attribute; size: height and width of the images.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        heads: dict[str, int],
        widths: Sequence[int] = (32, 64, 96),
        num_features: int = 64,
    ):
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": channels,
            "size": size,
            "heads": dict(heads),
            "widths": list(widths),
            "num_features": num_features,
        }
        self.num_features = num_features
        stages, side, width = [], size, channels
        for out in widths:
            layers = [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.SiLU()]
            if side > 4:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            stages.append(nn.Sequential(*layers))
            width = out
        self.stages = nn.ModuleList(stages)
        self.to_features = nn.Linear(width * side * side, num_features)
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, k) for name, k in heads.items()})

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C, h, w] after each stage, highest resolution first (for perceptual losses)."""
        assert images.shape[1:] == (self.config["channels"], *[self.config["size"]] * 2), images.shape
        x, maps = images * 2 - 1, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> dict:
        """Return {"features": [B, num_features], "logits": {head: [B, K]}}."""
        features = self.to_features(self.maps(images)[-1].flatten(1))
        return {"features": features, "logits": {name: head(features) for name, head in self.heads.items()}}

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in half precision."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
        (folder / "model.safetensors").chmod(0o644)  # safetensors writes mode 0600

    @classmethod
    def load(cls, folder: str | Path) -> FeatureNet:
        """Read a saved network in float32, frozen and in eval mode."""
        folder = Path(folder)
        net = cls(**json.loads((folder / "config.json").read_text()))
        net.load_state_dict(load_file(folder / "model.safetensors"))
        return net.float().eval().requires_grad_(False)


class Images(nn.Module):
    """x0 [B, *shape] to the pictures in [0, 1] that the codec decodes."""

    def __init__(self, codec: Any):
        super().__init__()
        self.shape, self.decode = codec.shape, codec.decode

    def forward(self, x0: Tensor) -> Tensor:
        return self.decode(x0)


class Perceptual(nn.Module):
    """x0 to the feature maps of a frozen network for the images that the codec decodes."""

    def __init__(self, codec: Any, net: FeatureNet):
        super().__init__()
        self.net, self.decode = net, codec.decode

    def trainable(self) -> dict[str, Tensor]:
        return {}

    def forward(self, x0: Tensor) -> list[Tensor]:
        return self.net.maps(self.decode(x0))


@torch.no_grad()
def measure(net: nn.Module, images: Tensor, batch_size: int = 500) -> dict:
    """Features and logits of many images (uint8, or float in [0, 1]) by a FeatureNet on its own device."""
    device, parts = next(net.parameters()).device, []
    for chunk in images.split(batch_size):
        chunk = chunk.to(device)
        parts.append(net(chunk.float() / 255 if chunk.dtype == torch.uint8 else chunk.float()))
    logits = {name: torch.cat([p["logits"][name] for p in parts]) for name in parts[0]["logits"]}
    return {"features": torch.cat([p["features"] for p in parts]), "logits": logits}
