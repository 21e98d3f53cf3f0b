"""Training data: images become x0 once, labels and prompts become condition rows once, batches are picked
by index.

The order of samples is a function of (seed, step), so a resumed run continues with the very next batch and no
iterator state exists.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.backbones import Teacher
from fastgen.checkpoint import write_tensors
from fastgen.codecs import select
from fastgen.datasets import load_images, load_labels
from fastgen.errors import UserError
from fastgen.objectives.base import Batch
from fastgen.rng import Rng

BUNDLED = ("digits", "fashion", "tinted")


class Data:
    """x0 table [N, ...] or None, condition table, and for each sample its condition row."""

    def __init__(
        self,
        x0: Tensor | None,
        cond_table: dict[str, Tensor],
        rows: Tensor,
        uncond: dict[str, Tensor],
        shape,
        texts: list[str] | None = None,
    ):
        """texts: the caption of each row of the condition table."""
        self.x0, self.cond_table, self.rows, self.uncond, self.shape = x0, cond_table, rows, uncond, shape
        self.texts = texts

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, num: int) -> "Data":
        """The first num samples; all of them for 0."""
        if not 0 < num < len(self):
            return self
        x0 = None if self.x0 is None else self.x0[:num]
        return Data(x0, self.cond_table, self.rows[:num], self.uncond, self.shape)

    def cond(self, index: Tensor) -> dict[str, Tensor]:
        return select(self.cond_table, self.rows[index])

    def null(self, num: int) -> dict[str, Tensor]:
        return {k: v.expand(num, *v.shape[1:]) for k, v in self.uncond.items()}

    def batches(
        self, batch_size: int, start: int, accumulation: int, rng: Rng, device
    ) -> Iterator[list[Batch]]:
        """Windows of `accumulation` micro-batches from step `start` on, endlessly."""
        per_micro = batch_size * rng.world
        k = start
        while True:
            window = []
            for micro in range(accumulation):
                first = (k * accumulation + micro) * per_micro + rng.rank * batch_size
                index = torch.tensor([self._shuffled(first + i, rng.seed) for i in range(batch_size)])
                rng.reset(k, micro, stream=1)
                noise = rng.randn(batch_size, *self.shape)
                x0 = None if self.x0 is None else self.x0[index].float().to(device)
                cond = {n: v.to(device) for n, v in self.cond(index).items()}
                uncond = {n: v.to(device) for n, v in self.null(batch_size).items()}
                texts = [self.texts[i] for i in self.rows[index].tolist()] if self.texts else None
                window.append(Batch(x0, cond, uncond, noise.to(device), index, texts))
            yield window
            k += 1

    def _shuffled(self, position: int, seed: int) -> int:
        """Sample at a position of the endless stream: a fresh permutation every epoch."""
        epoch, offset = divmod(position, len(self))
        if getattr(self, "_order_key", None) != (epoch, seed):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self._order, self._order_key = torch.randperm(len(self), generator=generator), (epoch, seed)
        return int(self._order[offset])


def image_names(folder: Path) -> list[Path]:
    """Image files of a folder, sorted."""
    if not folder.is_dir():
        raise UserError("data.images", f"{folder} is not a folder", "a folder of png, jpg or webp files")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))


def read_captions(folder: Path, names: list[Path]) -> list[str] | None:
    """The text that goes with each image, from metadata.jsonl or a .txt beside it; None if any has none."""
    captions: dict[str, str] = {}
    if (folder / "metadata.jsonl").exists():
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        captions = {r["file_name"]: r["text"] for r in map(json.loads, filter(str.strip, lines))}
    texts = []
    for path in names:
        side = path.with_suffix(".txt")
        beside = side.read_text().strip() if side.exists() else None
        texts.append(captions.get(str(path.relative_to(folder)), beside))
    return texts if texts and all(t is not None for t in texts) else None


def read_folder(folder: Path, size: tuple[int, int, int], on_bad: str) -> tuple[Tensor, list[str] | None]:
    """Images [N, C, H, W] uint8 and captions of a folder; unreadable files are named and skipped, or
    fatal.
    """
    from PIL import Image

    images, kept, bad = [], [], []
    channels, height, width = size
    for path in image_names(folder):
        try:
            with Image.open(path) as image:
                fitted = image.convert("L" if channels == 1 else "RGB")
                scale = max(height / fitted.height, width / fitted.width)
                fitted = fitted.resize(
                    (round(fitted.width * scale), round(fitted.height * scale)), Image.Resampling.LANCZOS
                )
                left, top = (fitted.width - width) // 2, (fitted.height - height) // 2
                fitted = fitted.crop((left, top, left + width, top + height))
        except OSError as error:
            bad.append(f"{path.name} ({error})")
            continue
        array = torch.from_numpy(np.array(fitted))
        images.append(array[None] if channels == 1 else array.permute(2, 0, 1))
        kept.append(path)
    if bad and on_bad == "error":
        raise UserError(
            "data.images", f"{len(bad)} unreadable: {bad[0]}", "mend it or set data.on_bad_image skip"
        )
    if bad:
        print(f"warning: data.images: skipped {len(bad)} unreadable: {', '.join(bad[:5])}")
    if not images:
        raise UserError("data.images", f"{folder} holds no readable image", "png, jpg or webp files")
    return torch.stack(images), read_captions(folder, kept)


@torch.no_grad()
def encode_images(codec, images: Tensor, cache_dir: str, device, key: str) -> Tensor:
    """x0 of uint8 images, batched; kept as safetensors under cache_dir if given."""
    if not cache_dir:
        return torch.cat([codec.encode(c.to(device).float() / 127.5 - 1).cpu() for c in images.split(500)])
    from safetensors.torch import load_file

    digest = hashlib.sha256(f"{key}{tuple(images.shape)}".encode())
    for tensor in (images, *codec.parameters()):  # another picture or autoencoder is another cache
        digest.update(tensor.detach().cpu().contiguous().numpy())
    file = Path(cache_dir) / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if not file.exists():
        write_tensors(file, {"x0": encode_images(codec, images, "", device, key)})
    return load_file(file)["x0"]


def _text_rows(codec, captions: list[str], device) -> tuple[dict, Tensor, list[str]]:
    """Each distinct caption encoded once, the row of every sample, and the captions by row."""
    unique = sorted(set(captions))
    for text in unique:
        lost = codec.cut(text)
        if lost:
            print(f"warning: prompt longer than {codec.max_length} tokens, cut: {lost!r} of {text!r}")
    parts = [codec.prompts(unique[i : i + 256]) for i in range(0, len(unique), 256)]
    table = {k: torch.cat([p[k] for p in parts]).cpu() for k in parts[0]}
    where = {text: i for i, text in enumerate(unique)}
    return table, torch.tensor([where[t] for t in captions]), unique


def load_data(cfg, teacher: Teacher, device="cpu", pixels: bool = True) -> Data:
    """The data section of a run, in the teacher's own terms; with pixels=False no image is read, only what
    goes with them.
    """
    codec = teacher.codec
    uncond = {k: v.cpu() for k, v in codec.null(1).items()}
    if teacher.path.startswith("analytic:"):
        x0, labels = teacher.backbone.sample(20_000, torch.Generator().manual_seed(1))
        return Data(x0, _label_table(codec), labels, uncond, codec.shape)
    images = labels = captions = None
    if cfg.name in BUNDLED and not pixels:
        labels, captions = load_labels(cfg.name)
    elif cfg.name in BUNDLED:
        found = load_images(cfg.name, "train")
        images, labels, captions = found.images, found.labels, found.captions
    elif cfg.images and not pixels:
        captions = read_captions(Path(cfg.images), image_names(Path(cfg.images)))
    elif cfg.images:
        sample = codec.decode(torch.zeros(1, *codec.shape, device=device))
        images, captions = read_folder(Path(cfg.images), tuple(sample.shape[1:]), cfg.on_bad_image)
    elif cfg.prompts:
        captions = _read_prompts(Path(cfg.prompts))
    elif cfg.name:
        raise UserError("data.name", f"found {cfg.name!r}", f"allowed: {', '.join(BUNDLED)}")
    if cfg.limit:
        images, labels, captions = (
            v[: cfg.limit] if v is not None else None for v in (images, labels, captions)
        )
    x0 = None
    if images is not None:
        _check_size(images, codec, device)
        x0 = encode_images(codec, images, cfg.cache_dir, device, teacher.path)
    num = next((len(v) for v in (images, labels, captions) if v is not None), 10_000)
    texts = None
    if hasattr(codec, "prompts"):
        if captions is None:
            raise UserError(
                "data",
                "this text-to-image teacher needs captions and the set has none",
                "metadata.jsonl with file_name and text, or .txt side-cars",
            )
        table, rows, texts = _text_rows(codec, list(captions), device)
    elif codec.num_classes:
        rows = torch.arange(num) % codec.num_classes if labels is None else labels
        codec.labels(rows)
        table = _label_table(codec)
    else:
        table, rows = {}, torch.zeros(num).long()
    return Data(x0, table, rows, uncond, codec.shape, texts)


def _label_table(codec) -> dict[str, Tensor]:
    return codec.labels(torch.arange(codec.num_classes)) if codec.num_classes else {}


def _read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError("data.prompts", f"{path} does not exist", "a text file with one prompt a line")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError("data.prompts", f"{path} is empty", "one prompt a line")
    return lines


def _check_size(images: Tensor, codec, device) -> None:
    found = tuple(codec.encode(images[:1].to(device).float() / 127.5 - 1).shape[1:])
    if found != tuple(codec.shape):
        raise UserError(
            "data",
            f"images of shape {tuple(images.shape[1:])} give x0 {found}",
            f"the teacher takes {codec.shape}",
        )
