"""The small image sets that ship with fastgen: digits, fashion, tinted and solids."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastgen.core.paths import asset
from fastgen.data import solids
from fastgen.data.solids import COLOURS

NAMES = ("digits", "fashion", "tinted", "solids")
SPLITS = ("train", "heldout")
GARMENTS = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
BACKGROUNDS = {"black": (16, 16, 16), "grey": (128, 128, 128), "white": (240, 240, 240)}
VOCABULARY = {"garment": GARMENTS, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}
FILES = {"digits": "digits", "fashion": "fashion", "tinted": "fashion", "solids": "solids"}
TINTS = 3  # variants of each training image


@dataclass
class Images:
    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # long [N]
    num_classes: int
    class_names: tuple[str, ...]
    captions: list[str] | None = None
    attributes: dict[str, torch.Tensor] | None = None  # of each word of the vocabulary: long [N]

    def __len__(self) -> int:
        return len(self.labels)


def load_labels(name: str, split: str = "train") -> tuple[torch.Tensor, list[str] | None]:
    """Labels and captions of a bundled set in the order of its images, of which none is read."""
    labels = bundled_part(name, split, "labels").astype(np.int64)
    if name == "tinted":
        ids, captions = _tints(labels, TINTS if split == "train" else 1)
        return torch.from_numpy(ids["garment"]), captions
    if name == "solids":
        return torch.from_numpy(labels), _solid_words(split)[1]
    return torch.from_numpy(labels), None


def bundled_part(name: str, split: str, part: str) -> np.ndarray:
    """One array of a bundled file."""
    if name not in NAMES:
        raise ValueError(f"unknown image set {name!r}: choose one of {', '.join(NAMES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    with np.load(asset(f"data/{FILES[name]}.npz"), allow_pickle=False) as file:
        return file[f"{split}_{part}"]


def load_images(name: str, split: str = "train") -> Images:
    """Load a bundled set: digits (1x8x8), fashion (1x32x32), or tinted or solids (3x32x32, with captions)."""
    if name == "solids":
        return _solids(split)
    grey, labels = bundled_part(name, split, "images"), bundled_part(name, split, "labels").astype(np.int64)
    if name == "digits":
        grey = np.round(grey * (255 / 16)).astype(np.uint8)
        names = tuple(str(i) for i in range(10))
    else:
        grey, names = np.pad(grey, ((0, 0), (2, 2), (2, 2))), GARMENTS
    if name == "tinted":
        return _tinted(grey, labels, TINTS if split == "train" else 1)
    return Images(torch.from_numpy(grey)[:, None], torch.from_numpy(labels), 10, names)


def tint(grey: np.ndarray, colour: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Paint grey uint8 [N, H, W] images in the given colours (ids) over the given backgrounds (ids)."""
    # Every output byte is a function of one grey byte, so one 256-entry table per combination is exact:
    # alpha = clip(4 g), out = alpha * colour * (.25 + .75 g) + (1 - alpha) * background.
    level = np.arange(256, dtype=np.float64) / 255
    alpha = np.clip(4 * level, 0, 1)
    out = np.empty((len(grey), 3, *grey.shape[1:]), np.uint8)
    for c, b in itertools.product(range(len(COLOURS)), range(len(BACKGROUNDS))):
        rows = np.flatnonzero((colour == c) & (background == b))
        for channel in range(3):
            front = tuple(COLOURS.values())[c][channel] * (0.25 + 0.75 * level)
            back = tuple(BACKGROUNDS.values())[b][channel]
            out[rows, channel] = np.round(alpha * front + (1 - alpha) * back).astype(np.uint8)[grey[rows]]
    return out


def mixed(numbers: np.ndarray) -> np.ndarray:
    """An integer hash below 2^32 of each number: no random generator."""
    h = numbers.astype(np.uint64) & np.uint64(0xFFFFFFFF)
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        h = ((h ^ (h >> np.uint64(16))) * np.uint64(multiplier)) & np.uint64(0xFFFFFFFF)
    return (h ^ (h >> np.uint64(16))).astype(np.int64)


def tint_of(index: np.ndarray, variant: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour and background ids of (image index, variant)."""
    h = mixed(index * 8 + variant)
    return h % len(COLOURS), h // len(COLOURS) % len(BACKGROUNDS)


def _tints(labels: np.ndarray, variants: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Attribute ids and captions of every variant of images with these labels."""
    tints = [tint_of(np.arange(len(labels)), v) for v in range(variants)]
    colour, background = (np.concatenate([t[i] for t in tints]) for i in range(2))
    ids = {"garment": np.tile(labels, variants), "colour": colour, "background": background}
    return ids, [caption(*row) for row in zip(*(v.tolist() for v in ids.values()))]


def _tinted(grey: np.ndarray, labels: np.ndarray, variants: int) -> Images:
    ids, captions = _tints(labels, variants)
    images = tint(np.tile(grey, (variants, 1, 1)), ids["colour"], ids["background"])
    attributes = {key: torch.from_numpy(value) for key, value in ids.items()}
    return Images(torch.from_numpy(images), attributes["garment"], 10, GARMENTS, captions, attributes)


def _solid_words(split: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Attribute ids and captions of the renders of solids."""
    parts = (bundled_part("solids", split, part) for part in ("labels", "colours", "views"))
    ids = dict(zip(solids.VOCABULARY, (torch.from_numpy(part.astype(np.int64)) for part in parts)))
    return ids, [solids.caption(*row) for row in zip(*(v.tolist() for v in ids.values()))]


def _solids(split: str) -> Images:
    ids, captions = _solid_words(split)
    images, names = torch.from_numpy(bundled_part("solids", split, "images")), solids.VOCABULARY["shape"]
    return Images(images, ids["shape"], len(names), names, captions, ids)


def caption(garment: int, colour: int, background: int) -> str:
    """The sentence that names all three attributes."""
    words = VOCABULARY["colour"][colour], GARMENTS[garment], VOCABULARY["background"][background]
    return "a {} {} on a {} background".format(*words)


WORDS = {"tinted": VOCABULARY, "solids": solids.VOCABULARY}
"""names of every attribute that the captions of a set tell apart"""
CAPTIONS = {"tinted": caption, "solids": solids.caption}
"""of the sets with captions, by the ids of their attributes"""


def all_captions(name: str = "tinted") -> list[str]:
    """Every combination of a set's attributes as a caption, in a fixed order."""
    return [CAPTIONS[name](*ids) for ids in itertools.product(*(range(len(v)) for v in WORDS[name].values()))]


def attributes_of(text: str, name: str = "tinted") -> dict[str, int]:
    """Ids of the attributes that a caption names; those it does not name are left out."""
    return ids_of(text, words_of(text), WORDS[name])


def words_of(text: str) -> list[str]:
    """The words of a caption."""
    return text.lower().replace(",", " ").replace(".", " ").split()


def ids_of(text: str, words: list[str], vocabulary: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Ids of the attributes that the words of a caption name; a ValueError where they name one twice."""
    found = {}
    for key, names in vocabulary.items():
        hits = [names.index(word) for word in words if word in names]
        if len(hits) > 1:
            raise ValueError(f"caption names more than one {key}: {text!r}")
        if hits:
            found[key] = hits[0]
    return found
