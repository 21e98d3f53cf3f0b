"""Encoders by name: which file each needs, and how it is made ready."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastgen.core.errors import UserError, suggest
from fastgen.core.paths import expand
from fastgen.evaluation.encoders import (
    dinov2,
    efficientnet,
    image_reward,
    inception,
    mini,
    plugin,
    text_image,
)
from fastgen.evaluation.encoders.base import Encoder, TextImageEncoder


class ClipPreset(NamedTuple):
    """One published way to measure a CLIP score."""

    arch: str
    prefix: str = ""
    scale: float = 100.0
    pre_resize: int = 0


CLIP_PRESETS = {
    "vit-b-32": ClipPreset("ViT-B-32-quickgelu"),
    "vit-l-14": ClipPreset("ViT-L-14-quickgelu"),
    "vit-g-14": ClipPreset("ViT-g-14"),
    "dmd2": ClipPreset("ViT-g-14", "A photo depicts ", 1.0, 256),
}
"""values of two presets are not comparable; the last one is DMD2's (arXiv 2405.14867)"""
HPS_ARCH = "ViT-H-14"
HPS_WANTED = "HPS_v2.1_compressed.pt or HPS_v2_compressed.pt"
CMMD_WANTED = (
    "a transformers folder of CLIP ViT-L/14-336, or an open_clip checkpoint of ViT-L-14-336-quickgelu"
)
PICK_WANTED = "a transformers folder of PickScore_v1 with the tokenizer of CLIP-H beside it"
HEAD_WANTED = "sac+logos+ava1-l14-linearMSE.pth"


@dataclass
class Encoders:
    """Opens encoders on first use. weights: file, folder or package.module:function by name; mini_set: the
    bundled image set whose net is "mini"; clip: a key of CLIP_PRESETS.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    mini_set: str = ""
    clip: str = "vit-g-14"
    device: object = "cpu"
    opened: dict[str, Encoder] = field(default_factory=dict)

    @property
    def preset(self) -> ClipPreset:
        """Of the CLIP score."""
        if self.clip not in CLIP_PRESETS:
            raise UserError("--clip", f"found {self.clip!r}", f"choose one of {', '.join(CLIP_PRESETS)}")
        return CLIP_PRESETS[self.clip]

    def path(self, name: str, wanted: str, folder: bool = False) -> Path:
        """The weight given under a name; nothing is ever downloaded."""
        if name not in self.weights:
            raise UserError("--weights", f"none given for {name}", f"pass --weights {name}=PATH of {wanted}")
        path = Path(expand(self.weights[name]))
        if not (path.exists() if folder else path.is_file()):
            wrong = "is a folder" if path.is_dir() else "does not exist"
            raise UserError("--weights", f"{name}: {path} {wrong}", f"give the local file {wanted}")
        return path

    def open(self, name: str) -> Encoder:
        """The encoder of that name, ready on the device."""
        if name not in self.opened:
            self.opened[name] = self._load(name).to(self.device)
        return self.opened[name]

    def text_image(self, name: str) -> TextImageEncoder:
        """One that also takes texts."""
        found = self.open(name)
        if not isinstance(found, TextImageEncoder):
            raise UserError("--weights", f"{name} takes images only", "give an encoder of images and texts")
        return found

    def _load(self, name: str) -> Encoder:
        given = self.weights.get(name, "")
        if plugin.is_plugin(given):
            return plugin.load(name, given)
        if name not in KNOWN:
            known = ", ".join([*KNOWN, *(k for k in self.weights if k not in KNOWN)])
            raise UserError(
                "--metrics", f"no encoder {name!r}{suggest(name, KNOWN)}", f"choose one of {known}"
            )
        return KNOWN[name](self)


def _inception(name: str) -> Callable[[Encoders], Encoder]:
    return lambda e: inception.load(e.path("inception", inception.WANTED), name)


def _efficientnet(name: str) -> Callable[[Encoders], Encoder]:
    return lambda e: efficientnet.load(e.path("efficientnet", efficientnet.WANTED), name)


def _clip(e: Encoders) -> Encoder:
    preset = e.preset
    path = e.path("clip", text_image.WANTED.format(arch=preset.arch), folder=True)
    return text_image.load("clip", path, preset.arch, preset.pre_resize)


def _cmmd(e: Encoders) -> Encoder:
    path = e.path("clip_336", CMMD_WANTED, folder=True)
    return text_image.load("clip_336", path, "ViT-L-14-336-quickgelu", crop=False)


def _clip_l14(e: Encoders) -> Encoder:
    arch = "ViT-L-14-quickgelu"
    path = e.path("clip_l14", text_image.WANTED.format(arch=arch), folder=True)
    return text_image.load("clip_l14", path, arch)


KNOWN: dict[str, Callable[[Encoders], Encoder]] = {
    "mini": lambda e: mini.load(e.mini_set),
    **{name: _inception(name) for name in inception.PREPROCESSING},
    **{name: _efficientnet(name) for name in efficientnet.SIZES},
    "dinov2": lambda e: dinov2.load(e.path("dinov2", dinov2.WANTED, folder=True)),
    "clip": _clip,
    "clip_336": _cmmd,
    "clip_l14": _clip_l14,
    "hps": lambda e: text_image.load("hps", e.path("hps", HPS_WANTED), HPS_ARCH),
    "pickscore": lambda e: text_image.load("pickscore", e.path("pickscore", PICK_WANTED, True), "ViT-H-14"),
    "image_reward": lambda e: image_reward.load(e.path("image_reward", image_reward.WANTED, True)),
}
WEIGHTS = (
    *("inception", "efficientnet", "dinov2", "clip", "clip_336", "clip_l14"),
    *("hps", "pickscore", "image_reward", "aesthetic", "lpips"),
)
"""names that --weights takes besides those of the user's own encoders"""


def read_weights(pairs: list[str]) -> dict[str, str]:
    """NAME=PATH of the command line."""
    found = dict(pair.partition("=")[::2] for pair in pairs)
    check_weights(found)
    return found


def check_weights(weights: Mapping[str, str]) -> None:
    """Refuse a name that no encoder has, unless it stands for package.module:function."""
    for name, path in weights.items():
        pair = f"{name}={path}" if path else name
        if not path or not (name in WEIGHTS or plugin.is_plugin(path)):
            ways = f"give {'=PATH, '.join(WEIGHTS)}=PATH, or NAME=package.module:function"
            raise UserError("--weights", f"found {pair!r}", ways)
