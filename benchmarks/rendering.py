"""Seconds of a render and of its backward pass, for splats and fields of several sizes, one camera each."""

import statistics
import time

from benchmarks.timing import alternate

SETTINGS = {
    "500 Gaussians, 32": ("gaussians", 500, 32, 0),
    "1,000 Gaussians, 64": ("gaussians", 1000, 64, 0),
    "5,000 Gaussians, 64": ("gaussians", 5000, 64, 0),
    "5,000 Gaussians, 128": ("gaussians", 5000, 128, 0),
    "20,000 large Gaussians, 128": ("large", 20_000, 128, 0),
    "dense grid of 32, 32 x 32 samples": ("grid", 32, 32, 32),
    "dense grid of 32, 64 x 64 samples": ("grid", 32, 64, 64),
    "triplane of 64, 32 x 32 samples": ("triplane", 64, 32, 32),
    "triplane of 64, 64 x 64 samples": ("triplane", 64, 64, 64),
    "hash grid of 64, 32 x 32 samples": ("hash", 64, 32, 32),
}
"""what is rendered: kind, Gaussians or points a side, pixels a side, samples along a ray"""
REFERENCE = "dense grid of 32, 32 x 32 samples"


def rendering(rounds: int = 5) -> dict:
    """CPU seconds on one thread by setting, forward and backward, and both together over REFERENCE's."""
    import torch

    torch.set_num_threads(1)
    rows: dict[str, dict] = {name: {"forward": [], "backward": []} for name in SETTINGS}
    runs = {name: _render(rows[name], *setting) for name, setting in SETTINGS.items()}
    alternate(runs, rounds)
    found = {
        name: {side: round(statistics.median(seconds[1:]), 4) for side, seconds in row.items()}
        for name, row in rows.items()
    }
    whole = {name: row["forward"] + row["backward"] for name, row in found.items()}
    for name, row in found.items():
        row["over_reference"] = round(whole[name] / whole[REFERENCE], 2)
    return {"seconds": found, "reference": REFERENCE, "rounds": rounds, "clock": "process time, one thread"}


def _render(row: dict, kind: str, num: int, size: int, samples: int):
    """A function that renders once with gradient and notes both times."""
    import torch

    from fastgen.threed.cameras import Cameras
    from fastgen.threed.fields import FieldAsset
    from fastgen.threed.gaussians import GaussianAsset

    if kind in ("gaussians", "large"):
        asset = GaussianAsset(num).train()
        if kind == "large":  # as large as those of a thousand
            with torch.no_grad():
                asset.log_scales.copy_(GaussianAsset(1000).log_scales[:1].expand(num, 3))
    else:
        asset = FieldAsset(kind, num, samples=samples).train()
    cameras, background = Cameras.of(torch.tensor([[30.0, 15.0, 2.2, 45.0]])), torch.full((1, 3), 0.5)

    def run() -> None:
        start = time.process_time()
        image = asset.render(cameras, size, background).rgb
        middle = time.process_time()
        image.square().mean().backward()
        row["forward"].append(middle - start)
        row["backward"].append(time.process_time() - middle)

    return run


def rendering_table(record: dict) -> str:
    """The record for a page."""
    rows = "".join(
        f"| {name} | {row['forward']:.3f} | {row['backward']:.3f} | {row['over_reference']:g} |\n"
        for name, row in record["seconds"].items()
    )
    head = "| what, pixels a side | forward, s | backward, s | over the dense grid's |\n|---|---|---|---|\n"
    return head + rows
