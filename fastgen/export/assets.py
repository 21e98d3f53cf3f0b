"""The export of a run whose student is 3D assets: their files, a turntable of each, and asset.json."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.core.files import replace_folder, write_json, write_text
from fastgen.core.reading import read_json
from fastgen.threed.asset import Asset
from fastgen.threed.cameras import Cameras, Ranges, middle
from fastgen.threed.files import cameras_json, read_asset, write_asset, write_gif
from fastgen.threed.student import AssetStudent

FILE, FRAMES = "asset.json", 24
"""what says that a folder holds assets; frames of a turntable"""
GREY = 0.5
"""behind an asset on its turntable"""


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

    @property
    def names(self) -> list[str]:
        num = self.settings["num"]
        return ["asset"] if num == 1 else [f"asset{i}" for i in range(num)]

    @property
    def ranges(self) -> Ranges:
        return Ranges(*(tuple(self.views[key]) for key in ("elevation", "distance", "fovy")))


@torch.no_grad()
def turntable_of(asset: Asset, cameras: Cameras, size: int) -> Tensor:
    """Frames [T, 3, size, size] over grey."""
    background = torch.full((1, 3), GREY)
    return torch.cat([asset.render(cameras[i : i + 1], size, background).rgb for i in range(len(cameras))])


def export_assets(student: AssetStudent, info: AssetInfo, folder: Path) -> Path:
    """Write the assets of a student beside `folder` and then in its place."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    cameras = middle(info.ranges, FRAMES)
    size = max(info.size, 64)
    write_text(temporary / "cameras.json", cameras_json(cameras, size))
    files: list[str] = []
    for asset, name in zip(student.scenes, info.names):
        files += write_asset(asset, temporary, name)
        write_gif(turntable_of(asset, cameras, size), temporary / f"{name}.gif", scale=max(1, 192 // size))
    write_json(temporary / FILE, vars(info))
    write_text(temporary / "README.md", card(info, files, {}))
    return replace_folder(temporary, folder)


def read_info(folder: Path) -> AssetInfo | None:
    """asset.json of a folder; None without one, a UserError for one that cannot be used."""
    if not (folder / FILE).is_file():
        return None
    found = read_json(folder / FILE, "--model")
    try:
        info = AssetInfo(**found)
        assert info.settings["num"] >= 1 and info.size >= 1 and isinstance(info.ranges, Ranges)
    except (TypeError, KeyError, AssertionError) as error:
        raise UserError(
            "--model", f"{folder / FILE} lacks or has too much ({error})", "export it again"
        ) from None
    return info


def load_assets(folder: Path, info: AssetInfo) -> list[Asset]:
    """The assets of an export, ready to be rendered."""
    return [read_asset(folder, name, info.settings).eval() for name in info.names]


def card(info: AssetInfo, files: list[str], scores: Mapping[str, float]) -> str:
    """README.md of an export: what it is, how it was made and opened, and what was measured."""
    lines = [f"# {info.prompt}", "", *(f"![{name}]({name}.gif)" for name in info.names), ""]
    lines += [f"A 3D asset made by `{info.objective}` in {info.training_steps:,} steps.", ""]
    about = {".ply": "3D Gaussians, for splat viewers", ".glb": "mesh with vertex colours, for Blender"}
    about |= {".safetensors": "the field itself"}
    lines += [f"- `{name}`: {about[Path(name).suffix]}" for name in files]
    lines += ["- `cameras.json`: the views of the turntable", "", "```bash"]
    lines += ["python sample.py --model THIS_FOLDER --turntable 48 --out views", "```", ""]
    if scores:
        lines += ["| measured | |", "|---|---|", *(f"| {k} | {v:.4g} |" for k, v in scores.items()), ""]
    return "\n".join(lines)
