"""Rebuild assets/data: Fashion-MNIST from its Debian package, digits from scikit-learn's wheel."""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "data"
PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it


def read_idx(path: Path) -> np.ndarray:
    """Read one idx file of unsigned bytes: magic 0 0 8 ndim, big-endian shape, data."""
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = np.frombuffer(raw, ">i4", ndim, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def balanced(images: np.ndarray, labels: np.ndarray, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep the first images of each class, in file order."""
    rows = np.sort(np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(10)]))
    return images[rows], labels[rows].astype(np.uint8)


def save(path: Path, train: tuple, heldout: tuple) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = dict(zip(("train_images", "train_labels", "heldout_images", "heldout_labels"), train + heldout))
    np.savez_compressed(path, **arrays)
    print(path, {k: v.shape for k, v in arrays.items()}, f"{path.stat().st_size / 1e6:.2f} MB")


def fashion(folder: Path, out: Path) -> None:
    sets = {}
    for prefix, count in (("train", 1000), ("t10k", 500)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        sets[prefix] = balanced(images, read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"), count)
    save(out / "fashion.npz", sets["train"], sets["t10k"])


def digits(out: Path) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, labels = data.images.astype(np.uint8), data.target.astype(np.uint8)
    rows = np.arange(len(labels))
    parts = train_test_split(rows, test_size=360, stratify=labels, random_state=0)
    train, heldout = (np.sort(part) for part in parts)
    save(out / "digits.npz", (images[train], labels[train]), (images[heldout], labels[heldout]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fashion", type=Path, default=PACKAGE, help="folder of the four idx files")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write")
    args = parser.parse_args()
    digits(args.out)
    fashion(args.fashion, args.out)
