"""Moving Tinted Fashion: clips composed of the bundled images when they are asked for, each with a caption
that names garment, colour, background and motion, and with the exact path of every pixel of its garment.

Clip i shows image i mod the number of images. Everything else about it follows from a hash of i: tint,
motion, speed, place and size. A point p of the garment (pixels from its middle) is at frame k at

  x_k(p) = c + k v + s_k R(k w) p        c middle, v speed, s_k = s + k g size, w clockwise turn

with all of v, g and w zero but what the motion names.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.data.bundled import VOCABULARY as STILL_VOCABULARY
from fastgen.data.bundled import bundled_part, caption, ids_of, mixed, tint, tint_of, words_of
from fastgen.data.streaming import Reader, Rows

NAME = "moving"
FRAMES, SIZE = 9, 32
PHRASES = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "grow": "growing",
    "shrink": "shrinking",
    "turn": "turning",
    "still": "standing still",
}
"""how a caption says each motion"""
MOTIONS = tuple(PHRASES)
VOCABULARY = {**STILL_VOCABULARY, "motion": MOTIONS}
VARIANTS = 3
"""clips of each training image"""
SPEED, TURN = (0.9, 1.4), (0.17, 0.26)
"""least and most pixels, or radians, from frame to frame"""
SIZES, SMALL, LARGE = (0.55, 0.68), (0.38, 0.48), (0.88, 1.0)
"""sizes of a garment, of its 28 pixels; the small and the large end of growing and shrinking"""
OFF_MIDDLE = 1.5
"""most pixels between the middle of a path and that of the picture, along each side"""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass
class Paths:
    """Where the garments of some clips are: middle and speed [N, 2] (x right, y down), size and its growth,
    turn [N], in pixels and radians a frame.
    """

    middle: Tensor
    speed: Tensor
    size: Tensor
    growth: Tensor
    turn: Tensor

    def at(self, points: Tensor) -> Tensor:
        """Points [N, P, 2] of the garments at every frame, [N, F, P, 2]."""
        k = torch.arange(FRAMES, dtype=points.dtype)
        cos, sin = (k * self.turn[:, None]).cos(), (k * self.turn[:, None]).sin()
        rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        size = (self.size[:, None] + k * self.growth[:, None])[..., None, None]
        centre = self.middle[:, None] + k[:, None] * self.speed[:, None]
        return centre[:, :, None] + size * (points[:, None] @ rotation.transpose(-1, -2))

    def back(self, pixels: Tensor) -> Tensor:
        """The points of the garments that are seen at pixels [P, 2] of every frame, [N, F, P, 2]."""
        k = torch.arange(FRAMES, dtype=pixels.dtype)
        cos, sin = (k * self.turn[:, None]).cos(), (k * self.turn[:, None]).sin()
        rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        size = (self.size[:, None] + k * self.growth[:, None])[..., None, None]
        centre = self.middle[:, None] + k[:, None] * self.speed[:, None]
        return ((pixels - centre[:, :, None]) @ rotation) / size


@dataclass
class Clips:
    """Some clips of the set; `displacement` is the mean way of the garment's pixels from frame to frame."""

    images: Tensor  # uint8 [N, 3, F, H, W]
    labels: Tensor  # long [N]
    captions: list[str]
    attributes: dict[str, Tensor]  # garment, colour, background, motion: long [N]
    displacement: Tensor  # float [N], pixels

    def __len__(self) -> int:
        return len(self.labels)


@lru_cache(maxsize=2)
def _source(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey garments uint8 [M, 28, 28] and their labels [M]."""
    return bundled_part("fashion", split, "images"), bundled_part("fashion", split, "labels").astype(np.int64)


def count(split: str = "train") -> int:
    """Clips of a split."""
    return len(_source(split)[1]) * (VARIANTS if split == "train" else 1)


def _unit(index: np.ndarray, what: int) -> np.ndarray:
    """A number in [0, 1) for each clip, another one for every `what`."""
    return mixed(index * 16 + what + (1 << 20)) / 2**32


def attributes(index: Sequence[int], split: str = "train") -> dict[str, Tensor]:
    """Garment, colour, background and motion of some clips, long [N]."""
    _, labels = _source(split)
    i = np.asarray(index)
    image, variant = i % len(labels), i // len(labels)
    colour, background = tint_of(image, variant)
    motion = (_unit(i, 0) * len(MOTIONS)).astype(np.int64)
    ids = {"garment": labels[image], "colour": colour, "background": background, "motion": motion}
    return {key: torch.from_numpy(value) for key, value in ids.items()}


def captions(index: Sequence[int], split: str = "train") -> list[str]:
    rows = zip(*(v.tolist() for v in attributes(index, split).values()))
    return [moving_caption(*row) for row in rows]


def moving_caption(garment: int, colour: int, background: int, motion: int) -> str:
    """The sentence that names all four attributes."""
    return f"{caption(garment, colour, background)} {PHRASES[MOTIONS[motion]]}"


def all_captions() -> list[str]:
    """Every combination of the four attributes, 1440 captions in a fixed order."""
    return [moving_caption(*ids) for ids in itertools.product(*(range(len(v)) for v in VOCABULARY.values()))]


def paths(index: Sequence[int], split: str = "train") -> Paths:
    """The exact paths of some clips."""
    i, motion = np.asarray(index), attributes(index, split)["motion"]

    def drawn(what: int, low: float, high: float) -> Tensor:
        return torch.from_numpy(low + (high - low) * _unit(i, what))

    def only(*names: str) -> Tensor:
        return torch.isin(motion, torch.tensor([MOTIONS.index(name) for name in names])).double()

    directions = torch.tensor([DIRECTIONS.get(name, (0, 0)) for name in MOTIONS]).double()
    speed = drawn(1, *SPEED)[:, None] * directions[motion]
    jitter = torch.stack([drawn(2, -OFF_MIDDLE, OFF_MIDDLE), drawn(3, -OFF_MIDDLE, OFF_MIDDLE)], 1)
    steps = FRAMES - 1
    small, large, size = drawn(4, *SMALL), drawn(5, *LARGE), drawn(6, *SIZES)
    grows, shrinks = only("grow"), only("shrink")
    size = grows * small + shrinks * large + (1 - grows - shrinks) * size
    growth = (grows - shrinks) * (large - small) / steps
    return Paths(jitter - steps / 2 * speed, speed, size, growth, only("turn") * drawn(7, *TURN))


def _grid(side: int) -> Tensor:
    """Pixels [side^2, 2] as (x, y) from the middle of a square."""
    at = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def displacement(index: Sequence[int], split: str = "train") -> Tensor:
    """Mean way of the garment's pixels from one frame to the next, by how much each covers: pixels, [N]."""
    grey, labels = _source(split)
    cover = (
        torch.from_numpy(grey[np.asarray(index) % len(labels)]).double().flatten(1).div(255 / 4).clamp(max=1)
    )
    places = paths(index, split).at(_grid(grey.shape[-1]).expand(len(cover), -1, -1))
    way = places.diff(dim=1).norm(dim=-1).mean(1)
    return (way * cover).sum(1) / cover.sum(1)


def compose(index: Sequence[int], split: str = "train") -> Tensor:
    """Some clips, uint8 [N, 3, F, H, W]."""
    grey, labels = _source(split)
    i = np.asarray(index)
    shown = torch.from_numpy(grey[i % len(labels)]).float()
    points = paths(index, split).back(_grid(SIZE)).float() * (2 / grey.shape[-1])
    points = points.unflatten(2, (SIZE, SIZE)).flatten(0, 1)
    whole = shown[:, None].repeat_interleave(FRAMES, 0)
    levels = F.grid_sample(whole, points, mode="bilinear", padding_mode="zeros", align_corners=False)
    frames = levels[:, 0].round().clamp(0, 255).byte().numpy()
    ids = attributes(index, split)
    each = (np.repeat(ids[key].numpy(), FRAMES) for key in ("colour", "background"))
    tinted = torch.from_numpy(tint(frames, *each))
    return tinted.unflatten(0, (len(i), FRAMES)).transpose(1, 2).contiguous()


def first_frames(index: Sequence[int], split: str = "train") -> Tensor:
    """The frames that some clips begin with, uint8 [N, 3, H, W]."""
    parts = [index[i : i + 250] for i in range(0, len(index), 250)]
    return torch.cat([compose(part, split)[:, :, 0] for part in parts])


def load_clips(split: str = "train", index: Sequence[int] | None = None) -> Clips:
    """Some clips of a split, or all of them: 83 MB for every thousand of them in float32."""
    index = range(count(split)) if index is None else index
    ids = attributes(index, split)
    parts = [index[i : i + 250] for i in range(0, len(index), 250)]
    images = torch.cat([compose(part, split) for part in parts])
    way = torch.cat([displacement(part, split) for part in parts])
    return Clips(images, ids["garment"], captions(index, split), ids, way)


def attributes_of(text: str) -> dict[str, int]:
    """Ids of the attributes that a caption names; those it does not name are left out."""
    said = {phrase.split()[-1]: name for name, phrase in PHRASES.items()}
    return ids_of(text, [said.get(word, word) for word in words_of(text)], VOCABULARY)


class MovingReader(Reader):
    """The first clips of the training split, composed when a batch has them."""

    def __init__(self, num: int, frames: int = FRAMES):
        """frames: of each clip, from its first on."""
        self.num, self.frames = num, frames

    def __len__(self) -> int:
        return self.num

    def load(self, i: int) -> Rows:
        return {"images": compose([i])[0][:, : self.frames]}

    def name(self, i: int) -> str:
        return f"{NAME} {i}"

    def first(self, num: int) -> MovingReader:
        return MovingReader(min(num, self.num), self.frames)
