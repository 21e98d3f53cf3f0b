"""Assets as files that other programs open: splats (.ply), meshes (.glb, .obj), turntables (.gif) and the
cameras of them; fields also as safetensors, from which they are read back.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError
from fastgen.threed.asset import Asset
from fastgen.threed.assets import make_asset
from fastgen.threed.cameras import Cameras
from fastgen.threed.fields import FieldAsset
from fastgen.threed.gaussians import GaussianAsset

EXTRA = 'pip install "fastgen-distill[threed]"'
DENSITY, THIN = 10.0, 2.0
"""where the surface of a field of densities is taken, per world unit: at half of the largest one, at most and
at least these"""
MOST_HEADER = 2**16


def ply_names(degree: int) -> list[str]:
    """Properties of a vertex in the layout of 3D Gaussian Splatting (the authors' code)."""
    rest = 3 * ((degree + 1) ** 2 - 1)
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3))]
    names += [f"f_rest_{i}" for i in range(rest)]
    return [*names, "opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]


@torch.no_grad()
def write_ply(
    asset: GaussianAsset, path: Path, normals: Tensor | None = None, more: dict[str, Tensor] | None = None
) -> None:
    """Binary little-endian .ply: log scales, logits of the opacity, harmonics by channel, quaternions (w
    first) of length 1; normals [N, 3] are zero where none are given. more: further properties [N] by name,
    which viewers pass over.
    """
    more = more or {}
    sh = asset.value("sh").transpose(1, 2)  # [N, 3, K]
    columns = [
        asset.value("means"),
        torch.zeros(asset.num, 3) if normals is None else normals,
        sh[:, :, 0],
        sh[:, :, 1:].flatten(1),
        asset.value("logits")[:, None],
        asset.value("log_scales"),
        torch.nn.functional.normalize(asset.value("quaternions"), dim=-1),
        *(value[:, None] for value in more.values()),
    ]
    table = torch.cat([c.float().cpu() for c in columns], 1).numpy().astype("<f4")
    names = [*ply_names(asset.degree), *more]
    assert table.shape[1] == len(names), (table.shape, len(names))
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {asset.num}"]
    header += [*(f"property float {name}" for name in names), "end_header", ""]
    path.write_bytes("\n".join(header).encode() + table.tobytes())


@torch.no_grad()
def read_ply(path: Path, key: str = "--model") -> GaussianAsset:
    """The Gaussians of such a file; a UserError that names `key` for another one."""
    raw = path.read_bytes()
    end = raw.find(b"end_header\n", 0, MOST_HEADER)
    lines = raw[: max(end, 0)].decode("ascii", "replace").split("\n")
    names = [line.split()[-1] for line in lines if line.startswith("property float ")]
    counts = [line.split()[-1] for line in lines if line.startswith("element vertex ")]
    degree = math.isqrt(sum(n.startswith("f_rest_") for n in names) // 3 + 1) - 1
    own = ply_names(degree)  # what may follow them is passed over
    whole = len(counts) == 1 and counts[0].isdecimal() and names[: len(own)] == own
    start = end + len(b"end_header\n")
    size = int(counts[0]) * len(names) * 4 if whole else -1
    if end < 0 or "format binary_little_endian 1.0" not in lines or len(raw) - start != size or not size:
        found = f"{path} is no .ply of Gaussians in the layout of 3D Gaussian Splatting"
        raise UserError(key, found, "give one that fastgen exported, or another program for splats")
    table = torch.from_numpy(np.frombuffer(raw, "<f4", offset=start).reshape(-1, len(names)).copy())
    if not table.isfinite().all():
        raise UserError(key, f"{path} holds values that are not finite", "export it again")
    at = {name: i for i, name in enumerate(names)}
    some = lambda *keys: table[:, [at[k] for k in keys]]  # noqa: E731
    asset = GaussianAsset(len(table), degree)
    asset.put("means", some("x", "y", "z"))
    asset.put("log_scales", some("scale_0", "scale_1", "scale_2"))
    asset.put("quaternions", some("rot_0", "rot_1", "rot_2", "rot_3"))
    asset.put("logits", table[:, at["opacity"]])
    rest = [f"f_rest_{i}" for i in range(3 * ((degree + 1) ** 2 - 1))]
    dc = some("f_dc_0", "f_dc_1", "f_dc_2")[:, :, None]
    sh = torch.cat([dc, some(*rest).unflatten(1, (3, -1))], 2) if rest else dc
    asset.put("sh", sh.transpose(1, 2))
    return asset


@torch.no_grad()
def mesh_of(asset: FieldAsset, size: int = 48):
    """A trimesh.Trimesh of the field's surface with a colour at each vertex, from size^3 points: the zero
    set of a distance, else of equal density. A UserError where there is no surface.
    """
    mcubes, trimesh = _packages()
    line = torch.linspace(-1, 1, size)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    points = points.to(next(asset.parameters()))
    field = -asset.distance(points) if asset.surface else asset.at(points)[0]
    inside = field.double().cpu().numpy()
    level = 0.0 if asset.surface else min(DENSITY, max(THIN, 0.5 * float(inside.max())))
    values = np.pad(inside, 1, constant_values=level - 1.0)  # closed at the box
    if not values.min() < level < values.max():
        found = f"no surface at {level:g}: the field is {inside.min():.3g} to {inside.max():.3g}"
        raise UserError("export", found, "train longer, or export the turntable alone")
    vertices, faces = mcubes.marching_cubes(values, level)
    vertices = (vertices - 1) * (2 / (size - 1)) - 1
    colours = asset.at(torch.from_numpy(vertices).to(points).clamp(-1, 1))[1].cpu().numpy()
    return trimesh.Trimesh(vertices, faces, vertex_colors=(colours * 255).astype(np.uint8))


def _packages():
    try:
        import mcubes
        import trimesh
    except ImportError as error:
        raise UserError("export", f"{error.name} is not installed", EXTRA) from None
    return mcubes, trimesh


def cameras_json(cameras: Cameras, size: int) -> str:
    """Cameras as NeRF's data sets give them: camera-to-world matrices with OpenGL axes, angles in radians."""
    rows = zip(cameras.c2w.tolist(), cameras.rows().tolist())
    frames = [
        {"transform_matrix": c2w, "camera_angle_y": math.radians(fovy), "azimuth": az, "elevation": el}
        for c2w, (az, el, _, fovy) in rows
    ]
    return json.dumps({"w": size, "h": size, "frames": frames}, indent=1) + "\n"


def write_gif(images: Tensor, path: Path, scale: int = 1, milliseconds: int = 80) -> None:
    """Frames [T, 3, H, W] in [0, 1] as an endless clip, each pixel `scale` wide."""
    from PIL import Image

    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    frames = [Image.fromarray(p).resize((p.shape[1] * scale, p.shape[0] * scale), 0) for p in pixels]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def write_asset(asset: Asset, folder: Path, name: str) -> list[str]:
    """The files of one asset, by name; a field's mesh only where trimesh and PyMCubes are installed."""
    if isinstance(asset, GaussianAsset):
        write_ply(asset, folder / f"{name}.ply")
        return [f"{name}.ply"]
    assert isinstance(asset, FieldAsset), type(asset)
    write_weights(asset, folder / f"{name}.safetensors")
    try:
        mesh_of(asset).export(folder / f"{name}.glb")
    except UserError as error:
        print(f"warning: no mesh of {name}: {error.found}; {error.instruction}")
        return [f"{name}.safetensors"]
    return [f"{name}.safetensors", f"{name}.glb"]


def read_asset(folder: Path, name: str, settings: dict) -> Asset:
    """One asset of an export; settings are those of `student.asset`."""
    if settings["kind"] == "gaussians":
        return read_ply(folder / f"{name}.ply")
    asset = make_asset(settings, 0)
    read_weights(asset, folder / f"{name}.safetensors")
    return asset


def write_weights(module: nn.Module, file: Path) -> None:
    """All of a module's tensors."""
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, file)


def read_weights(module: nn.Module, file: Path) -> None:
    """Put the tensors of a file into a module; a UserError for a file that does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        found = f"{file} does not fit ({str(error).splitlines()[0]})"
        raise UserError("--model", found, "export it again") from None
