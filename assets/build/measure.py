"""Train the measuring net of one image set into assets/measure/<set>, or with --out and another seed and
width a net of the same kind that students are tuned by (assets/rewards/<set>): what tunes never measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import ASSETS, Rows, frechet, jitter, one_cycle, seconds, update, write_card
from torch.nn import functional as F

from fastgen.data.bundled import NAMES, WORDS, load_images
from fastgen.networks.feature_net import FeatureNet, measure

EPOCHS = {"digits": 40, "fashion": 14, "tinted": 7, "solids": 14}


def targets_of(data):
    return data.attributes or {"class": data.labels}


def train(
    name: str, seed: int, folder: Path, widths: Sequence[int] = (32, 64, 96), batch_size: int = 100
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, heldout = load_images(name, "train"), load_images(name, "heldout")
    heads = {k: len(v) for k, v in WORDS[name].items()} if name in WORDS else {"class": 10}
    net = FeatureNet(data.images.shape[1], data.images.shape[-1], heads, widths)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    steps = EPOCHS[name] * (len(data) // batch_size)
    order = Rows(len(data), batch_size, generator)
    for step in range(steps):
        rows = order.next()
        images = jitter(data.images[rows].float() / 255, 1 if name == "digits" else 2, generator)
        if name == "fashion":  # mirrored garments are garments; digits are not
            flip = torch.rand(batch_size, generator=generator) < 0.5
            images[flip] = images[flip].flip(-1)
        logits = net(images)["logits"]
        loss = sum(
            F.cross_entropy(logits[key], target[rows], label_smoothing=0.05)
            for key, target in targets_of(data).items()
        )
        update(optimizer, loss, 2e-3 * one_cycle(step, steps))
        if step % 200 == 0:
            print(name, step, steps, f"{loss.item():.3f}", seconds(), flush=True)
    net.save(folder)
    net = FeatureNet.load(folder)
    seen, unseen = measure(net, data.images), measure(net, heldout.images)
    accuracy = {
        key: round((unseen["logits"][key].argmax(1) == target).float().mean().item(), 4)
        for key, target in targets_of(heldout).items()
    }
    floor = frechet(seen["features"], unseen["features"])
    write_card(
        folder,
        heldout_accuracy=accuracy,
        heldout_images=len(heldout),
        frechet_train_vs_heldout=round(floor, 3),
        seed=seed,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder to write; the shipped one if not given")
    parser.add_argument("--widths", type=int, nargs=3, default=(32, 64, 96), help="channels of its layers")
    args = parser.parse_args()
    train(args.name, args.seed, args.out or ASSETS / "measure" / args.name, args.widths)
