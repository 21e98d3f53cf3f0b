"""Scans and what they are completed to, as x0 and conditions: simulated scenes, or a user's pairs of files.

x0 [N, 3] is how far the truth lies from where points start. Which point becomes which does not matter to a
local formulation; where data are scaled (vp) every point gets a truth near where it starts.
"""

from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.data.batches import Data
from fastgen.networks.codecs import ScanCodec
from fastgen.threed.clouds import KINDS, read_cloud
from fastgen.threed.scenes import farthest_points, make_scans

NAME = "scenes"
COUNT, HELD_OUT = 1024, 64
"""simulated scans to train on, and others to measure by"""
SEEDS = {"train": 1, "heldout": 2}
MOST = 20_000
"""points of a user's scan that the farthest are chosen from"""


class Scans(Data):
    """x0 [S, N, 3], and each scan as its own condition."""

    def __init__(self, codec: ScanCodec, scans: Tensor, truth: Tensor):
        """scans [S, M, 3], truth [S, N, 3]"""
        self.truth = truth
        self.again: Tensor | None = None
        """other points [S, N, 3] of the same scenes, where they are simulated to be measured by"""
        starts = codec.starts(scans)
        x0 = truth - starts
        if codec.formulation == "vp":
            x0 = torch.stack([matched(*pair) for pair in zip(scans, truth)]) - starts
        null = {k: v.cpu() for k, v in codec.null(1).items()}
        rows = torch.zeros(len(scans)).long()
        super().__init__(x0, {}, rows, null, codec.shape, None, codec.scans(scans), codec.untold(scans))

    def first(self, num: int) -> "Scans":
        if not 0 < num < len(self):
            return self
        assert self.x0 is not None, "made with it"
        some = copy(self)
        some.x0, some.rows, some.truth = self.x0[:num], self.rows[:num], self.truth[:num]
        some.again = None if self.again is None else self.again[:num]
        some.own, some.own_null = ({k: v[:num] for k, v in d.items()} for d in (self.own, self.own_null))
        return some


def simulated(codec: ScanCodec, split: str, num: int = 0) -> Scans:
    """The first num scans of a split; 0: all."""
    most = COUNT if split == "train" else HELD_OUT
    many, held = codec.shape[0], split == "heldout"
    scans, truth = make_scans(min(num or most, most), codec.scan_points, many * (1 + held), SEEDS[split])
    made = Scans(codec, scans, truth[:, :many])
    made.again = truth[:, many:] if held else None
    return made


def matched(scan: Tensor, truth: Tensor) -> Tensor:
    """The points of truth [N, 3] in an order in which the first N / M are near the first of a scan [M, 3],
    and so on: in rounds, each point that has no place asks the nearest of the scan that has one left, which
    takes the nearest that ask.
    """
    far = torch.cdist(truth, scan)
    left = torch.full((len(scan),), len(truth) // len(scan))
    place = torch.full((len(truth),), -1)
    while len(asking := (place < 0).nonzero()[:, 0]):
        wish, at = far[asking].masked_fill(left == 0, torch.inf).min(1)
        order = wish.argsort(stable=True)
        order = order[at[order].argsort(stable=True)]  # by whom they ask, the nearest first
        at = at[order]
        rank = torch.arange(len(at)) - torch.searchsorted(at, at)
        taken = rank < left[at]
        place[asking[order[taken]]] = at[taken]
        left -= torch.bincount(at[taken], minlength=len(left))
    return truth[place.argsort(stable=True)]


def fitted(scan: Tensor, num: int, key: str, name: str) -> Tensor:
    """num points [num, 3] of a user's scan, the farthest from each other; a UserError where it has fewer."""
    if len(scan) < num:
        found = f"{name} holds {len(scan)} points, the model takes {num}"
        raise UserError(key, found, "give a denser scan")
    if len(scan) > MOST:
        scan = scan[torch.randperm(len(scan), generator=torch.Generator().manual_seed(0))[:MOST]]
    return farthest_points(scan[None], torch.ones(1, len(scan), dtype=torch.bool), num)[0]


def sampled(truth: Tensor, num: int) -> Tensor:
    """num points [num, 3] of a user's truth: some of many, few of them again."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(truth), generator=generator)
    return truth[order.repeat(-(-num // len(truth)))[:num]]


def pairs_of(folder: Path, key: str) -> list[tuple[Path, Path]]:
    """(scan, truth) files of a folder with scan/ and truth/, by their names without endings."""
    found = {}
    for part in ("scan", "truth"):
        files = sorted(p for p in (folder / part).glob("*") if p.suffix in KINDS)
        if not files:
            instruction = f"put {', '.join(KINDS)} files into scan/ and truth/, alike in name"
            raise UserError(key, f"{folder / part} holds no point cloud", instruction)
        found[part] = {p.stem: p for p in files}
    missing = sorted(found["scan"].keys() ^ found["truth"].keys())
    if missing:
        raise UserError(key, f"{missing[0]} is in one of scan/ and truth/ alone", "give both of each")
    return [(found["scan"][name], found["truth"][name]) for name in found["scan"]]


def own(codec: ScanCodec, folder: Path, key: str, limit: int = 0) -> Scans:
    """A user's pairs."""
    scans, truth = [], []
    for a, b in pairs_of(folder, key)[: limit or None]:
        scans.append(fitted(read_cloud(a, key), codec.scan_points, key, str(a)))
        truth.append(sampled(read_cloud(b, key), codec.shape[0]))
    return Scans(codec, torch.stack(scans), torch.stack(truth))


def load_scans(cfg, codec: ScanCodec) -> Scans:
    """The pairs of a data section."""
    if cfg.scans:
        found = own(codec, Path(cfg.scans).expanduser(), "data.scans", cfg.limit)
        print(f"data: {len(found)} scans and what they are completed to")
        return found
    check_scans(cfg)
    found = simulated(codec, "train", cfg.limit)
    print(f"data: {NAME}, {len(found)} simulated scans of {codec.scan_points} points")
    return found


def check_scans(cfg) -> None:
    """Refuse a data section that holds no scans."""
    if cfg.scans:
        pairs_of(Path(cfg.scans).expanduser(), "data.scans")
    elif cfg.name != NAME:
        found = f"found {cfg.name!r} for a teacher that completes scans"
        raise UserError("data.name", found, f"set it to {NAME}, or give pairs in data.scans")
