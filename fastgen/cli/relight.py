"""fastgen relight: take a splat apart into material and light, and show it under another light.

fastgen relight --splat runs/solids-sd_vsd/export --out relit            a splat of a run, or any .ply of one
fastgen relight --still_life --out relit        a scene with known materials: photographs, splat, scores

Progressive radiance distillation (arXiv 2408.07595): no faster generator comes of it. The folder then holds
materials.ply (the splat with its albedo, normals, roughness and progress), relit.ply (a splat under the new
light, for any viewer), light.hdr (the light it was in), relit.gif (a turntable), maps.png and relight.json.
"""

import argparse
import shutil
from pathlib import Path

from fastgen.core.console import CommandFlags, exit_code, quiet
from fastgen.core.errors import UserError
from fastgen.core.files import replace_folder, write_json

LIMITS = {
    "size": (16, 512),
    "views": (4, 500),
    "steps": (1, 100_000),
    "frames": (2, 240),
    "points": (20, 20_000),
}


def flags() -> argparse.ArgumentParser:
    """What the command takes."""
    found = CommandFlags(
        "fastgen relight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--splat", default="", metavar="FILE", help="a .ply of 3D Gaussians, or an export with one")
    add("--still_life", action="store_true", help="the bundled scene whose materials are known")
    add("--out", default="", metavar="DIR", help="folder to write")
    add("--light", default="evening", help="light of the relit files: evening, noon or studio")
    add("--size", type=int, default=48, help="pixels of a side of every view")
    add("--views", type=int, default=40, help="views that are looked at")
    add("--steps", type=int, default=800, help="steps of the materials")
    add("--points", type=int, default=800, help="with --still_life: Gaussians of its splat")
    add("--frames", type=int, default=24, help="of the turntable")
    add("--reward", type=float, default=0.02, help="mu: errors below sqrt(mu / 2) are trusted in full")
    add("--plain", action="store_true", help="ordinary inverse rendering, to compare with")
    add("--seed", type=int, default=0, help="of views and pixels")
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point of `fastgen relight`; 0, or 2 for a user's mistake."""
    args = flags().parse_args(argv)
    quiet()
    return exit_code(lambda: run(args))


def check(args) -> None:
    """Refuse flags that cannot be, before anything is made."""
    from fastgen.threed.relight import LIGHTS

    if bool(args.splat) == args.still_life:
        found = "found both" if args.splat else "none given"
        raise UserError("--splat", found, "give a .ply of 3D Gaussians, or --still_life")
    if not args.out:
        raise UserError("--out", "none given", "name a folder to write")
    if args.light not in LIGHTS:
        raise UserError("--light", f"found {args.light!r}", f"give one of {', '.join(LIGHTS)}")
    for key, (low, high) in LIMITS.items():
        value = getattr(args, key)
        if not low <= value <= high:
            raise UserError(f"--{key}", f"found {value}", f"give {low} to {high}")
    if not 0 < args.reward <= 1:
        raise UserError("--reward", f"found {args.reward:g}", "give more than 0, up to 1: without it a falls")


def splat_of(path: Path):
    """The Gaussians of a .ply, or of the first asset of an export."""
    from fastgen.threed.files import read_ply

    if path.is_dir():
        files = [*sorted(path.glob("asset*.ply")), *sorted(path.glob("export/asset*.ply"))]
        if not files:
            found = f"{path} holds no splat (asset.ply)"
            raise UserError("--splat", found, "give a .ply, or the export of a run with Gaussians")
        path = files[0]
    if not path.is_file():
        raise UserError("--splat", f"there is no {path}", "give a .ply of 3D Gaussians, or an export")
    return read_ply(path, "--splat").eval().requires_grad_(False)


def run(args) -> int:
    """Photographs, materials, files."""
    check(args)

    import torch

    from fastgen.threed import radiance_distillation as rd
    from fastgen.threed.cameras import Ranges, random_cameras
    from fastgen.threed.relight import of_gaussians
    from fastgen.threed.relight_scores import RANGES, photographs, scores

    if args.still_life:
        ranges = RANGES
        photos = photographs(args.views, args.size, args.seed)
        asset = rd.fit_splat(photos, args.points, seed=args.seed, tell=print)
    else:
        ranges, asset = Ranges(), splat_of(Path(args.splat))
        check_reach(asset, ranges)
        cameras = random_cameras(args.views, ranges, torch.Generator().manual_seed(args.seed))
        photos = rd.renders_of(asset, cameras, args.size)
    pixels = rd.look(asset, photos)
    cfg = rd.Settings(steps=args.steps, reward=args.reward, plain=args.plain, seed=args.seed)
    found, progress = rd.distil(asset, pixels, cfg, print)
    each = of_gaussians(pixels, progress)
    measured = scores(asset, found, each, args.size) if args.still_life else {}
    folder = write(args, asset, found, each, ranges, measured)
    for name, value in measured.items():
        print(f"{name:<18}{value:.4g}")
    print(
        f"progress {float(progress.mean()):.2f}; wrote materials, and the splat by {args.light}, to {folder}"
    )
    return 0


def check_reach(asset, ranges) -> None:
    """Refuse a splat that cameras would stand in."""
    reach, least = asset.extent(), ranges.distance[0]
    if not 0 < reach < least:
        found = f"its Gaussians reach {reach:.3g} from the origin; cameras stand {least:g} away"
        raise UserError("--splat", found, "centre it on the origin and scale it to a radius of 1")


def write(args, asset, found, progress, ranges, measured: dict) -> Path:
    """Every file, beside the folder and then in its place."""
    from PIL import Image

    from fastgen.threed.cameras import middle
    from fastgen.threed.files import write_gif, write_ply
    from fastgen.threed.relight import LIGHTS, baked, maps, relit, write_materials
    from fastgen.threed.shading import hdr

    out = Path(args.out)
    temporary, light = out.with_name(out.name + ".tmp"), LIGHTS[args.light]
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    size, cameras = max(args.size, 64), middle(ranges, args.frames)
    write_materials(asset, found, progress, temporary / "materials.ply")
    write_ply(baked(asset, found, light), temporary / "relit.ply")
    (temporary / "light.hdr").write_bytes(hdr(found.light))
    frames = relit(asset, found, cameras, size, light)
    write_gif(frames, temporary / "relit.gif", scale=max(1, 192 // size))
    shown = maps(asset, found, progress, cameras[:1], size)
    strip = strip_of([*shown.values(), frames[0]])
    Image.fromarray(strip).save(temporary / "maps.png")
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    document = {"settings": settings, "maps": [*shown, args.light], "measured": measured}
    write_json(temporary / "relight.json", document)
    return replace_folder(temporary, out)


def strip_of(images):
    """Pictures [3, H, W] side by side, as bytes [H, W, 3] twice as large."""
    import torch

    pixels = (torch.cat(list(images), 2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return pixels.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()
