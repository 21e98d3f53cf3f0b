"""Helpers that the asset builders share."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ASSETS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ASSETS.parent))  # the builders run from a checkout, installed or not
torch.set_num_threads(1)
START = time.time()


class Rows:
    """Batches of row numbers: every row once per epoch, in a new order each time."""

    def __init__(self, num: int, batch_size: int, generator: torch.Generator):
        self.num, self.batch_size, self.generator = num, batch_size, generator
        self.order = torch.empty(0, dtype=torch.long)

    def next(self) -> Tensor:
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(self.num, generator=self.generator)
        rows, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return rows


def seconds() -> float:
    return round(time.time() - START, 1)


def command() -> str:
    return " ".join(["python", "assets/build/" + Path(sys.argv[0]).name, *sys.argv[1:]])


def write_card(folder: Path, **facts) -> None:
    """Write card.json: what was trained, how, and what it reaches."""
    card = {"command": command(), "seconds": seconds(), **facts}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card), flush=True)


def readable(folder: Path) -> None:
    """Let everyone read the weights: safetensors writes for the owner only."""
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, clip: float = 0) -> None:
    """One step at this learning rate; `clip` bounds the norm of the gradient, 0 does not."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two feature sets [N, D]."""
    a, b = a.double(), b.double()
    root = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.clamp(min=0).sqrt().sum()
    spread = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root
    return ((a.mean(0) - b.mean(0)).square().sum() + spread).item()


def one_cycle(step: int, steps: int, warmup: float = 0.05) -> float:
    """Linear warm-up, then cosine to zero: the factor on the learning rate."""
    x = (step + 1) / steps
    return min(x / warmup, 0.5 * (1 + torch.cos(torch.tensor(torch.pi * x)).item()))


def jitter(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift every image by up to that many pixels, repeating its border."""
    n, _, h, w = images.shape
    padded = torch.nn.functional.pad(images, [pixels] * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, n), generator=generator)
    rows, cols = dy[:, None] + torch.arange(h), dx[:, None] + torch.arange(w)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
