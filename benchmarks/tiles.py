"""What leaving tiles of attention out saves on a CPU: of one attention layer, and of the whole Wan mini."""

import statistics

from benchmarks.page import ROOT
from benchmarks.timing import alternate

SIZES = ((9, 16), (21, 64), (21, 256))
"""latent frames and tokens of each; the first is a clip of the Wan mini"""
GLOBALS = (1, 2, 4)
PAGE = ROOT / "docs/methods.md"


def tiles(rounds: int = 7) -> dict:
    """CPU seconds of attention under each kernel over those of the dense one, side by side; medians."""
    import torch

    from fastgen.networks.tile_attention import attend, evenly, tile_count

    torch.set_num_threads(1)
    found: dict = {"rows": []}
    for frames, per in SIZES:
        given = torch.randn(3, 1, frames * per, 4, 32).unbind(0)
        runs = {("dense", frames): lambda g=given, f=frames: attend(*g, f, tuple(range(f)))}
        for num in GLOBALS:
            for kernel in ("boolean", "parts"):
                one = lambda g=given, f=frames, m=num, k=kernel: attend(*g, f, evenly(f, m), kernel=k)  # noqa: E731
                runs[kernel, num] = one
        with torch.no_grad():
            times = {name: statistics.median(v) for name, v in alternate(runs, rounds).items()}
        dense = times["dense", frames]
        for num in GLOBALS:
            share = tile_count(frames, num) / frames**2
            ratios = {kernel: times[kernel, num] / dense for kernel in ("boolean", "parts")}
            about = {"frames": frames, "tokens": frames * per, "globals": num, "tiles": share}
            found["rows"].append({**about, "dense_ms": 1000 * dense, **ratios})
    return found | network(max(3, rounds // 2))


def network(rounds: int) -> dict:
    """The same of a pass of the Wan mini over 21 latent frames of 32 x 32, two global frames a layer."""
    import torch

    from fastgen.networks.load import load_teacher
    from fastgen.networks.tile_attention import share_of_tiles

    net = load_teacher("assets:teachers/moving-wan").network
    control = net.in_tiles(None)
    layers = len(control.names)
    x = torch.randn(1, net.net.config.in_channels, 21, 32, 32)
    t, cond = (
        torch.ones(1, dtype=torch.float64),
        {"encoder_hidden_states": torch.zeros(1, 16, net.net.config.text_dim)},
    )

    def forward(*plan: int) -> None:
        control.plan().copy_(torch.tensor(plan))
        with torch.no_grad():
            net(x, t, cond)

    sparse = (21, *[2] * layers)
    times = alternate(
        {"dense": lambda: forward(*[0] * (1 + layers)), "sparse": lambda: forward(*sparse)}, rounds
    )
    medians = {name: statistics.median(v) for name, v in times.items()}
    return {
        "network_tokens": 21 * 16 * 16,
        "network_tiles": share_of_tiles(21, sparse[1:]),
        "network_dense_ms": 1000 * medians["dense"],
        "network_ratio": medians["sparse"] / medians["dense"],
    }


def table(record: dict) -> str:
    """The record as a page shows it."""
    names = ("frames x tokens", "global frames", "tiles", "dense, ms", "boolean mask", "parts")
    head = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    rows = [
        f"| {r['frames']} x {r['tokens'] // r['frames']} | {r['globals']} | {r['tiles']:.0%} "
        f"| {r['dense_ms']:.3g} | {r['boolean']:.2f} | {r['parts']:.2f} |"
        for r in record["rows"]
    ]
    whole = (
        f"| the whole Wan mini, {record['network_tokens']} tokens | 2 | {record['network_tiles']:.0%} "
        f"| {record['network_dense_ms']:.0f} | | {record['network_ratio']:.2f} |"
    )
    return "\n".join([head, *rows, whole])
