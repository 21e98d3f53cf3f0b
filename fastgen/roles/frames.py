"""A discriminator of single pictures: heads on a frozen image network, and the frames of clips that it sees.

Papers: Zhai et al. 2024 (MCM), arXiv 2406.06890; its heads are StyleGAN-T's, arXiv 2301.09515.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgen.networks.augment import Rand
from fastgen.networks.vision import Vision
from fastgen.roles.heads import PatchHead


class FrameJudge(nn.Module):
    """One logit for each token of each map of a picture; the image network is not trained."""

    def __init__(self, vision: nn.Module, codec: Any, size: tuple[int, int]):
        super().__init__()
        self._fixed = [vision, codec]  # in a list, so that they are not registered as part of the heads
        with torch.no_grad():
            maps = self.maps(torch.zeros(1, self.picture_channels, *size, device=_device(vision)))
        self.heads = nn.ModuleList(PatchHead(m.shape[1]) for m in maps)

    @property
    def picture_channels(self) -> int:
        return picture_channels(self._fixed[1])

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps [N, C, h, w] of pictures [N, C, H, W] in [0, 1]."""
        return [m.float() for m in cast(Vision, self._fixed[0]).maps(images)]

    def judge(self, maps: list[Tensor]) -> list[Tensor]:
        """Logits of each head, [N, tokens]."""
        return [head(m).float() for head, m in zip(self.heads, maps)]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.judge(self.maps(images))

    def frames(self, x0: Tensor, num: int, rand: Rand, spread: bool = False) -> Tensor:
        """`num` frames of each clip x0 as pictures [B num, C, H, W], differentiable: drawn without
        replacement, or with `spread` one of each of `num` equal parts of it. A picture is its only frame.

        An autoencoder of frames decodes these alone, one that joins frames in time the whole clip.
        """
        codec = self._fixed[1]
        if len(codec.shape) < 4:
            return codec.decode(x0)
        alone = x0.shape[2] == codec.num_frames
        clips = x0 if alone else codec.decode(x0)
        at = drawn_frames(len(x0), clips.shape[2], num, rand, spread).to(clips.device)
        chosen = clips[torch.arange(len(x0), device=clips.device)[:, None], :, at]  # [B, num, C, h, w]
        chosen = chosen.flatten(0, 1)
        return codec.decode(chosen[:, :, None])[:, :, 0] if alone else chosen


def picture_channels(codec: Any) -> int:
    """Channels of the pictures that a codec decodes."""
    if getattr(codec, "pixels", None) is not None:
        return 3
    return codec.shape[0] // codec.patch**2 if codec.vae is None else 3


def drawn_frames(clips: int, length: int, num: int, rand: Rand, spread: bool = False) -> Tensor:
    """Numbers of frames, [clips, min(num, length)] in rising order."""
    num = min(num, length)
    if spread:
        parts = torch.stack([rand(clips) for _ in range(num)], 1)
        return ((torch.arange(num, device=parts.device) + parts) * length / num).long().clamp(max=length - 1)
    keys = torch.stack([rand(clips) for _ in range(length)], 1)
    return keys.argsort(1)[:, :num].sort(1).values


def feature_penalty(judge: FrameJudge, real: Tensor, fake: Tensor, rand: Rand) -> Tensor:
    """mean (|d logit / d features| - 1)^2 at random mixtures of pictures [N, C, H, W] (arXiv 1704.00028, with
    the gradient of the features in place of that of the pictures, as in MCM).
    """
    num = min(len(real), len(fake))
    share = rand(num).to(real).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        maps = judge.maps(fake[:num] + share * (real[:num] - fake[:num]))
    maps = [m.requires_grad_() for m in maps]
    score = torch.stack([logits.mean(1) for logits in judge.judge(maps)]).mean(0).sum()
    grads = torch.autograd.grad(score, maps, create_graph=True)
    norm = torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1)
    return (norm - 1).square().mean()


def _device(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
