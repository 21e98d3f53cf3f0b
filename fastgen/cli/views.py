"""Views of an exported 3D asset, for sample.py: given cameras, or a turntable."""

from pathlib import Path
from typing import Any

from fastgen.core.errors import UserError
from fastgen.core.files import write_json, write_text

MOST = 2048
"""pixels of a side, and frames"""
TAKEN = ("model", "prompt", "prompts", "height", "width", "camera", "turntable", "out", "overwrite", "insist")
"""flags of sample.py that say something of an asset"""


def add_views(found) -> None:
    """Flags of a 3D asset."""
    how = "of a 3D asset: AZIMUTH ELEVATION DISTANCE FOVY in degrees and world units; may be repeated"
    metavar = ("AZ", "EL", "DIST", "FOVY")
    found.add_argument(
        "--camera", type=float, nargs=4, action="append", default=[], metavar=metavar, help=how
    )
    found.add_argument(
        "--turntable", type=int, default=0, metavar="FRAMES", help="of a 3D asset: one full turn as a gif"
    )


def draw_views(args, folder: Path, info, out: Path) -> int:
    """Write a picture of each camera, or a turntable, of every asset in an export; the exit code. `info`: its
    asset.json.
    """
    import torch

    from fastgen.export.assets import FRAMES, VIEWER, turntable_of
    from fastgen.export.viewer import viewer_page
    from fastgen.threed.cameras import Cameras, middle
    from fastgen.threed.files import cameras_json, write_asset, write_gif
    from fastgen.threed.splats import splat_bytes

    if args.height and args.width and args.height != args.width:
        raise UserError("--width", f"found {args.width} beside --height {args.height}", "views are square")
    if args.camera and args.turntable:
        raise UserError("--turntable", f"found {args.turntable} beside --camera", "give one of the two")
    size = args.height or args.width or max(64, info.size)
    for key, value, most in (("--height", size, MOST), ("--turntable", args.turntable, MOST)):
        if not 0 <= value <= most:
            raise UserError(key, f"found {value}", f"give up to {most}")
    prompts, names, assets = asked_assets(args, folder, info)
    cameras = (
        Cameras.of(torch.tensor(args.camera))
        if args.camera
        else middle(info.ranges, args.turntable or FRAMES)
    )
    for asset in assets:
        check_outside(asset, cameras)
    out.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, str]] = []
    splats = {said: splat_bytes(one) for said, one in zip(prompts if info.generates else names, assets)}
    write_text(out / VIEWER, viewer_page(prompts[0] if len(set(prompts)) == 1 else "Assets", splats))
    for prompt, name, asset in zip(prompts, names, assets):
        if info.generates:
            write_asset(asset, out, name)
            (out / f"{name}.splat").write_bytes(splats[prompt])
        frames = turntable_of(asset, cameras, size)
        if not args.camera:
            write_gif(frames, out / f"{name}.gif")
        for i, frame in enumerate(frames if args.camera else frames[:: max(1, len(frames) // 8)]):
            images.append({"file": f"{len(images):05d}_0.png", "condition": f"{prompt} ({name}, view {i})"})
            _save(frame, out / images[-1]["file"])
    write_text(out / "cameras.json", cameras_json(cameras, size))
    write_json(out / "samples.json", {"arguments": vars(args), "images": images})
    print(f"wrote {len(images)} views{'' if args.camera else ' and a turntable of each asset'} to {out}")
    return 0


def asked_assets(args, folder: Path, info) -> tuple[list[str], list[str], list]:
    """(prompts, names, assets) of an export: those it holds, or what its network makes of each prompt."""
    from fastgen.cli.conditions import read_prompts
    from fastgen.export.assets import load_assets, made_assets, name_of

    prompts = read_prompts(args)
    if not info.generates:
        if prompts:
            found = f"found {prompts[0]!r} for an asset of {info.prompt!r}"
            raise UserError("--prompt", found, "leave it out")
        return [info.prompt] * len(info.names), info.names, load_assets(folder, info)
    from fastgen.data.text import cut_prompts
    from fastgen.networks.load import load_teacher

    prompts = list(dict.fromkeys(prompts or info.shown))
    names = [name_of(prompt) for prompt in prompts]
    names = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
    codec: Any = load_teacher(info.base).codec
    for cut in cut_prompts(codec, prompts):
        print(f"warning: {cut}")
    return prompts, names, made_assets(folder, info, codec.prompts(prompts))


def check_outside(asset, cameras) -> None:
    """Refuse cameras that stand inside the asset."""
    least, reach = float(cameras.distance.min()), asset.extent()
    if least <= reach:
        found = f"found a distance of {least:g}, inside the asset, which reaches {reach:.3g} from its centre"
        raise UserError("--camera", found, f"give a distance above {reach:.3g}")


def _save(frame, path: Path) -> None:
    from PIL import Image

    pixels = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)
