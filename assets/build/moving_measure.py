"""Train the space-time measuring net of the moving clips into assets/measure/moving, or with --out and
another seed and width a net of the same kind that students are tuned by (assets/rewards/moving).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import ASSETS, Rows, frechet, one_cycle, seconds, update, write_card
from torch.nn import functional as F

from fastgen.data import moving
from fastgen.networks.clip_net import ClipNet
from fastgen.networks.feature_net import measure

LR, STEPS, BATCH_SIZE, SCORED = 2e-3, 700, 24, 1000
WIDTHS = (24, 48, 64, 96)


def train(steps: int, seed: int, folder: Path, widths: Sequence[int] = WIDTHS) -> None:
    torch.manual_seed(seed)
    heads = {k: len(v) for k, v in moving.VOCABULARY.items()}
    net = ClipNet(3, moving.FRAMES, moving.SIZE, heads, widths)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.02)
    order = Rows(moving.count(), BATCH_SIZE, torch.Generator().manual_seed(seed))
    for step in range(steps):
        rows = order.next().tolist()
        logits = net(moving.compose(rows).float() / 255)["logits"]
        wanted = moving.attributes(rows)
        loss = sum(F.cross_entropy(logits[k], v, label_smoothing=0.05) for k, v in wanted.items())
        update(optimizer, loss, LR * one_cycle(step, steps))
        if step % 20 == 0:
            print(step, steps, f"{loss.item():.3f}", seconds(), flush=True)
    net.save(folder)
    net = ClipNet.load(folder)
    held, known = (moving.load_clips(split, range(SCORED)) for split in ("heldout", "train"))
    seen, unseen = measure(net, known.images, 100), measure(net, held.images, 100)
    accuracy = {
        k: round((unseen["logits"][k].argmax(1) == v).float().mean().item(), 4)
        for k, v in held.attributes.items()
    }
    write_card(
        folder,
        heldout_accuracy=accuracy,
        heldout_clips=len(held),
        frechet_train_vs_heldout=round(frechet(seen["features"], unseen["features"]), 3),
        steps=steps,
        seed=seed,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "measure" / moving.NAME)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--widths", type=int, nargs=4, default=WIDTHS, help="channels of its layers")
    args = parser.parse_args()
    train(args.steps, args.seed, args.out, args.widths)
