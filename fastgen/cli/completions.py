"""Completed scans, for sample.py: each as a .ply, and as it is seen from above beside its scan."""

from pathlib import Path

from fastgen.core.errors import UserError
from fastgen.core.files import write_json
from fastgen.core.paths import expand


def add_scans(found) -> None:
    """Flags of a model that completes scans."""
    how = (
        "of a model that completes scans: point cloud (.ply, .bin, .npy); may be repeated; default: simulated"
    )
    found.add_argument("--scan", action="append", default=[], type=expand, metavar="FILE", help=how)


def read_scans(args, codec):
    """(scans [B, M, 3], what each is) of the files, or simulated ones that nothing was trained on."""
    import torch

    from fastgen.data.scans import fitted, simulated
    from fastgen.threed.clouds import read_cloud

    if not args.scan:
        held = simulated(codec, "heldout", args.num_images or 4)
        return held.own["start"], [f"simulated scan {i}" for i in range(len(held))]
    clouds = [fitted(read_cloud(Path(f), "--scan"), codec.scan_points, "--scan", f) for f in args.scan]
    return torch.stack(clouds), list(args.scan)


def complete(args, codec, generators: list, out: Path, device) -> int:
    """Write what each of the generators makes of scans; the exit code."""
    import torch

    from fastgen.cli.pictures import grid
    from fastgen.data.media import to_pil
    from fastgen.sampling.solvers import check_finite
    from fastgen.threed.clouds import seen_from_above, write_cloud

    if args.prompt or args.prompts or args.labels or args.image:
        raise UserError("--scan", "found a prompt, labels or a picture", "this model takes scans alone")
    scans, names = read_scans(args, codec)
    out.mkdir(parents=True, exist_ok=True)
    half = float(scans[..., :2].abs().max()) * 1.05
    shown, titles, images = [seen_from_above(scans, half)], ["scan"], []
    for k, generator in enumerate(generators):
        clouds = []
        for i, scan in enumerate(scans.split(1)):
            cond = {key: v.to(device) for key, v in codec.scans(scan).items()}
            generator.null = {key: v.to(device) for key, v in codec.untold(scan).items()}
            with torch.no_grad():
                x0 = generator.drawn(cond, [args.seed + i], device)
                clouds.append(codec.shown(x0, cond).cpu())
            check_finite(f"completions of the {generator.name}", x0, clouds[-1])
            if not k:
                images.append({"file": f"{i:05d}_{args.seed + i}.png", "condition": names[i]})
                write_cloud(clouds[-1][0], out / f"{i:05d}_{args.seed + i}.ply")
                to_pil(seen_from_above(clouds[-1], half)[0]).save(out / images[-1]["file"])
        shown.append(seen_from_above(torch.cat(clouds), half))
        titles.append(generator.name)
        print(f"{generator.name:<20} {len(scans)} completions of {codec.shape[0]} points")
    grid(shown, titles, columns=5).save(out / "grid.png")
    write_json(out / "samples.json", {"arguments": vars(args), "images": images})
    print(f"wrote {len(scans)} completions (.ply), their pictures and grid.png to {out}")
    return 0
