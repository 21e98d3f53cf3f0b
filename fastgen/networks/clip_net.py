"""A small space-time classifier of clips, whose features the bundled metrics of video use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fastgen.networks.feature_net import FeatureNet


class ClipNet(FeatureNet):
    """Four space-time convolutions, a feature vector and a linear head per attribute, for clips in [0, 1].

    heads: number of classes of each attribute; frames, size: of the clips, which are square.
    """

    def __init__(
        self,
        channels: int,
        frames: int,
        size: int,
        heads: dict[str, int],
        widths: Sequence[int] = (24, 48, 64, 96),
        num_features: int = 64,
    ):
        nn.Module.__init__(self)
        self.config = {
            "channels": channels,
            "frames": frames,
            "size": size,
            "heads": dict(heads),
            "widths": list(widths),
            "num_features": num_features,
        }
        self.num_features = num_features
        stages, width = [], channels
        for i, out in enumerate(widths):
            halved = (1 if i % 2 == 0 else 2, 1, 1) if i else (1, 2, 2)
            layers = [nn.Conv3d(width, out, 3, halved, 1, bias=False), nn.BatchNorm3d(out), nn.SiLU()]
            if i:
                layers.append(nn.MaxPool3d((1, 2, 2)))
            frames, size, width = -(-frames // halved[0]), size // 2, out
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.to_features = nn.Linear(width * frames * size**2, num_features)
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, k) for name, k in heads.items()})

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C, f, h, w] of clips [B, C, F, H, W] after each stage."""
        config = self.config
        assert images.shape[1:] == (config["channels"], config["frames"], *[config["size"]] * 2), images.shape
        x, maps = images * 2 - 1, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def measuring_net(folder: Path) -> FeatureNet:
    """The saved net of an image set, or of clips where its config has frames."""
    config = json.loads((folder / "config.json").read_text())
    return ClipNet.load(folder) if "frames" in config else FeatureNet.load(folder)
