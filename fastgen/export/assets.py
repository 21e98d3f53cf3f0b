"""The export of a run whose student is 3D assets: their files, a turntable of each, and asset.json."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.core.files import replace_folder, write_json, write_text
from fastgen.core.reading import read_json
from fastgen.export.viewer import viewer_page
from fastgen.threed.asset import Asset
from fastgen.threed.cameras import Cameras, Ranges, middle
from fastgen.threed.fields import FieldAsset
from fastgen.threed.files import (
    cameras_json,
    read_asset,
    read_weights,
    write_asset,
    write_gif,
    write_weights,
)
from fastgen.threed.generator_networks import make_generator
from fastgen.threed.generators import MASK, TEXT, GeneratedAssets, fields_of
from fastgen.threed.splats import splat_bytes
from fastgen.threed.student import AssetStudent

FILE, FRAMES = "asset.json", 24
"""what says that a folder holds assets; frames of a turntable"""
VIEWER = "viewer.html"
GREY = 0.5
"""behind an asset on its turntable"""
GENERATOR, SHOWN = "generator.safetensors", 4
"""the weights of a network that makes assets; prompts of a kind that its export shows"""


@dataclass(frozen=True)
class AssetInfo:
    """asset.json: what an export of assets is read back with."""

    prompt: str
    objective: str
    training_steps: int
    size: int
    """pixels of a side that it was trained at"""
    settings: dict[str, Any]
    """of `student.asset`"""
    views: dict[str, Any]
    """of `data.views`"""
    base: str = ""
    """the teacher whose text encoders a generator reads prompts by"""
    prompts: tuple[str, ...] = ()
    """that a generator was trained for"""
    held_out: tuple[str, ...] = ()
    """that it was measured by, too"""

    @property
    def generates(self) -> bool:
        """Whether it is a network that makes the asset of any prompt."""
        return bool(self.settings.get("generator"))

    @property
    def names(self) -> list[str]:
        if self.generates:
            return [name_of(prompt) for prompt in self.shown]
        num = self.settings["num"]
        return ["asset"] if num == 1 else [f"asset{i}" for i in range(num)]

    @property
    def title(self) -> str:
        """Of what describes the export."""
        return "Assets of any prompt" if self.generates else self.prompt

    @property
    def said(self) -> list[str]:
        """What people read in the place of `names`."""
        return self.shown if self.generates else self.names

    @property
    def shown(self) -> list[str]:
        """Prompts that an export shows."""
        return shown_prompts(self.prompts, self.held_out)

    @property
    def ranges(self) -> Ranges:
        return Ranges(*(tuple(self.views[key]) for key in ("elevation", "distance", "fovy")))


@torch.no_grad()
def turntable_of(asset: Asset, cameras: Cameras, size: int) -> Tensor:
    """Frames [T, 3, size, size] over grey."""
    background = torch.full((1, 3), GREY)
    return torch.cat([asset.render(cameras[i : i + 1], size, background).rgb for i in range(len(cameras))])


def shown_prompts(trained: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Some that a generator was trained for, evenly spread, and some held out."""
    step = max(1, len(trained) // SHOWN)
    return [*trained[::step][:SHOWN], *held_out[:SHOWN]]


def name_of(prompt: str) -> str:
    """What the files of a prompt's asset are called."""
    return "asset_" + (re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60] or "prompt")


def export_assets(student: AssetStudent, info: AssetInfo, folder: Path, texts: Cond | None = None) -> Path:
    """Write the assets of a student beside `folder` and then in its place; texts: of a generator the
    conditions of the prompts that are shown.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    cameras = middle(info.ranges, FRAMES)
    size = max(info.size, 64)
    write_text(temporary / "cameras.json", cameras_json(cameras, size))
    if isinstance(student, GeneratedAssets):
        files = [GENERATOR]
        write_weights(student.generator, temporary / GENERATOR)
        assets: list[Asset] = [*student.made(texts or {})]
    else:
        assets = student.scenes
        files = [file for one, name in zip(assets, info.names) for file in write_asset(one, temporary, name)]
    splats = {name: splat_bytes(asset) for asset, name in zip(assets, info.names)}
    write_text(temporary / VIEWER, viewer_page(info.title, dict(zip(info.said, splats.values()))))
    files += [f"{name}.splat" for name in splats]
    for asset, name in zip(assets, info.names):
        (temporary / f"{name}.splat").write_bytes(splats[name])
        write_gif(turntable_of(asset, cameras, size), temporary / f"{name}.gif", scale=max(1, 192 // size))
    write_json(temporary / FILE, vars(info))
    write_text(temporary / "README.md", card(info, files, {}))
    return replace_folder(temporary, folder)


def read_info(folder: Path) -> AssetInfo | None:
    """asset.json of a folder; None without one, a UserError for one that cannot be used."""
    if not (folder / FILE).is_file():
        return None
    found: dict[str, Any] = read_json(folder / FILE, "--model")
    found |= {k: tuple(found[k]) for k in ("prompts", "held_out") if isinstance(found.get(k), list)}
    try:
        info = AssetInfo(**found)
        assert info.settings["num"] >= 1 and info.size >= 1 and isinstance(info.ranges, Ranges)
    except (TypeError, KeyError, AssertionError) as error:
        raise UserError(
            "--model", f"{folder / FILE} lacks or has too much ({error})", "export it again"
        ) from None
    return info


def made_assets(folder: Path, info: AssetInfo, texts: Cond) -> list[FieldAsset]:
    """What the generator of an export makes of the conditions of prompts [B, ...]."""
    settings = info.settings
    generator = make_generator(settings, texts[TEXT].shape[-1])
    read_weights(generator, folder / GENERATOR)
    with torch.no_grad():
        made = generator(texts[TEXT], texts.get(MASK))
    return fields_of(generator, made, settings["surface"], settings["samples"])


def load_assets(folder: Path, info: AssetInfo) -> list[Asset]:
    """The assets of an export, ready to be rendered."""
    return [read_asset(folder, name, info.settings).eval() for name in info.names]


def card(info: AssetInfo, files: list[str], scores: Mapping[str, float]) -> str:
    """README.md of an export: what it is, how it was made and opened, and what was measured."""
    lines = [
        f"# {info.title}",
        "",
        *(f"![{name}]({name}.gif)" for name in info.names),
        "",
    ]
    what = f"A network that makes the 3D asset of a prompt, trained for {len(info.prompts)} prompts"
    lines += [f"{what if info.generates else 'A 3D asset made'} by `{info.objective}` in "]
    lines[-1] += f"{info.training_steps:,} steps."
    lines += [f"Prompts are read by the text encoders of `{info.base}`."] * info.generates + [""]
    about = {".ply": "3D Gaussians, for splat viewers", ".glb": "mesh with vertex colours, for Blender"}
    about |= {".splat": "for viewers of splats in a browser"}
    about |= {".safetensors": "the field itself"}
    about |= {GENERATOR: "the network's weights"}
    lines += [f"- `{name}`: {about.get(name) or about[Path(name).suffix]}" for name in files]
    lines += [
        f"- `{VIEWER}`: all of it in a browser",
        "- `cameras.json`: the views of the turntable",
        "",
        "```bash",
    ]
    asked = f"--prompt '{info.shown[-1]}' " if info.generates else ""
    lines += [f"python sample.py --model THIS_FOLDER {asked}--turntable 48 --out views", "```", ""]
    if scores:
        lines += ["| measured | |", "|---|---|", *(f"| {k} | {v:.4g} |" for k, v in scores.items()), ""]
    return "\n".join(lines)
