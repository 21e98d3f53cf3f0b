"""Training data: images become x0 once, labels and prompts become condition rows once, batches are picked
by index.

The order of samples is a function of (seed, step), so a resumed run continues with the very next batch and no
iterator state exists.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.batch import Batch, select
from fastgen.core.errors import UserError
from fastgen.core.files import write_tensors
from fastgen.core.rng import Rng
from fastgen.data.bundled import load_images, load_labels
from fastgen.data.media import file_names, read_captions, read_folder
from fastgen.networks.teacher import Teacher

BUNDLED = ("digits", "fashion", "tinted")


class Data:
    """x0 table [N, ...] or None, condition table, and for each sample its condition row.

    own and own_null hold what is each sample's alone, row by row: the image a network is shown.
    """

    def __init__(
        self,
        x0: Tensor | None,
        cond_table: dict[str, Tensor],
        rows: Tensor,
        uncond: dict[str, Tensor],
        shape,
        texts: list[str] | None = None,
        own: dict[str, Tensor] | None = None,
        own_null: dict[str, Tensor] | None = None,
    ):
        """texts: the caption of each row of the condition table."""
        self.x0, self.cond_table, self.rows, self.uncond, self.shape = x0, cond_table, rows, uncond, shape
        self.own, self.own_null, self.texts = own or {}, own_null or {}, texts

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, num: int) -> "Data":
        """The first num samples; all of them for 0."""
        if not 0 < num < len(self):
            return self
        x0 = None if self.x0 is None else self.x0[:num]
        own = ({k: v[:num] for k, v in d.items()} for d in (self.own, self.own_null))
        return Data(x0, self.cond_table, self.rows[:num], self.uncond, self.shape, *own)

    def cond(self, index: Tensor) -> dict[str, Tensor]:
        return select(self.cond_table, self.rows[index]) | select(self.own, index)

    def null(self, index: Tensor) -> dict[str, Tensor]:
        shared = {k: v.expand(len(index), *v.shape[1:]) for k, v in self.uncond.items()}
        return shared | select(self.own_null, index)

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
                uncond = {n: v.to(device) for n, v in self.null(index).items()}
                texts = [self.texts[i] for i in self.rows[index].tolist()] if self.texts else None
                window.append(Batch(x0, cond, uncond, noise.to(device), index, texts))
            yield window
            k += 1

    def _shuffled(self, position: int, seed: int) -> int:
        """Sample at a position of the endless stream: a fresh permutation every epoch."""
        epoch, offset = divmod(position, len(self))
        if getattr(self, "_order_key", None) != (epoch, seed):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            self._order, self._order_key = torch.randperm(len(self), generator=generator), (epoch, seed)
        return int(self._order[offset])


@torch.no_grad()
def encode_images(codec, images: Tensor, cache_dir: str, device, key: str) -> Tensor:
    """x0 of uint8 images, batched; kept as safetensors under cache_dir if given."""
    if not cache_dir:
        batch = max(1, min(500, 1_536_000 // images[0].numel()))
        return torch.cat([codec.encode(c.to(device).float() / 127.5 - 1).cpu() for c in images.split(batch)])
    from safetensors.torch import load_file

    digest = hashlib.sha256(f"{key}{tuple(images.shape)}".encode())
    for tensor in (images, *codec.parameters()):  # another picture or autoencoder is another cache
        digest.update(tensor.detach().cpu().contiguous().numpy())
    file = Path(cache_dir) / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if not file.exists():
        write_tensors(file, {"x0": encode_images(codec, images, "", device, key)})
    return load_file(file)["x0"]


def _text_rows(
    codec, captions: list[str], device, cache_dir: str = "", key: str = ""
) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """Each distinct caption encoded once (kept under cache_dir if given), the row of every sample, and the
    captions by row.
    """
    unique = sorted(set(captions))
    for text in unique:
        lost = codec.cut(text)
        if lost:
            print(f"warning: prompt longer than {codec.max_length} tokens, cut: {lost!r} of {text!r}")
    where = {text: i for i, text in enumerate(unique)}
    rows = torch.tensor([where[t] for t in captions])
    file = _prompt_file(codec, unique, cache_dir, key) if cache_dir else None
    if file is not None and file.exists():
        from safetensors.torch import load_file

        return load_file(file), rows, unique
    parts = [codec.prompts(unique[i : i + 256]) for i in range(0, len(unique), 256)]
    table = {k: torch.cat([p[k] for p in parts]).cpu() for k in parts[0]}
    if file is not None:
        write_tensors(file, table)
    return table, rows, unique


def _prompt_file(codec, prompts: list[str], cache_dir: str, key: str) -> Path:
    """Where these prompts' encodings are kept: other prompts, sizes or encoders are another file."""
    about = (key, codec.family.name, codec.max_length, codec.pixels, codec.guidance, prompts)
    digest = hashlib.sha256(repr(about).encode())
    for tensor in codec.encoders.parameters():  # a thousand numbers of each tell encoders apart
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // 1000)]
        digest.update(some.float().cpu().numpy().tobytes())
    return Path(cache_dir) / f"prompts-{digest.hexdigest()[:16]}.safetensors"


def _shown(cfg, codec, images: Tensor | None, device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an image-asked network is shown with each sample, and its null: the first frame of a clip, or the
    file of the same place in data.control.
    """
    if codec.family.temporal:
        shown = None if images is None else images[:, :, 0]
    else:
        shown = read_folder(Path(cfg.control), (3, *codec.pixels), "error")[0] if cfg.control else None
    if shown is None or (images is not None and len(shown) != len(images)):
        found = "none are named" if shown is None else f"{len(shown)} for {len(images)} images"
        allowed = "set data.images" if codec.family.temporal else "set data.control, one for each image"
        raise UserError("data", f"{codec.family.name} is asked by an image beside the text, {found}", allowed)
    parts = [codec.image_rows(c.to(device).float() / 127.5 - 1) for c in shown.split(4)]
    return tuple({k: torch.cat([p[i][k] for p in parts]).cpu() for k in parts[0][i]} for i in (0, 1))


def load_data(cfg, teacher: Teacher, device="cpu", pixels: bool = True) -> Data:
    """The data section of a run, in the teacher's own terms; with pixels=False no image is read, only what
    goes with them.
    """
    codec = teacher.codec
    uncond = {k: v.cpu() for k, v in codec.null(1).items()}
    if teacher.path.startswith("analytic:"):
        x0, labels = teacher.backbone.sample(20_000, torch.Generator().manual_seed(1))
        return Data(x0, _label_table(codec), labels, uncond, codec.shape)
    images, labels, captions = _read(cfg, codec, device, pixels)
    x0 = None
    if images is not None:
        _check_size(images, codec, device)
        x0 = encode_images(codec, images, cfg.cache_dir, device, teacher.path)
    num = next((len(v) for v in (images, labels, captions) if v is not None), 10_000)
    own, texts = (), None
    if hasattr(codec, "prompts"):
        if codec.family.needs_image:
            own = _shown(cfg, codec, images, device)
            num = len(next(iter(own[0].values())))
        if not codec.family.takes_text:
            captions = [""] * num
        if captions is None:
            raise UserError(
                "data",
                "this text-to-image teacher needs captions and the set has none",
                "metadata.jsonl with file_name and text, or .txt side-cars",
            )
        table, rows, texts = _text_rows(codec, list(captions), device, cfg.cache_dir, teacher.path)
        if own:
            table = {k: v for k, v in table.items() if k not in own[0]}
            uncond = {k: v for k, v in uncond.items() if k not in own[1]}
    elif codec.num_classes:
        rows = torch.arange(num) % codec.num_classes if labels is None else labels
        codec.labels(rows)
        table = _label_table(codec)
    else:
        table, rows = {}, torch.zeros(num).long()
    return Data(x0, table, rows, uncond, codec.shape, texts, *own)


def _read(cfg, codec, device, pixels: bool) -> tuple:
    """(images, labels, captions) of a set, None for what it has not or what is not asked for."""
    images = labels = captions = None
    if cfg.name in BUNDLED and not pixels:
        labels, captions = load_labels(cfg.name)
    elif cfg.name in BUNDLED:
        found = load_images(cfg.name, "train")
        images, labels, captions = found.images, found.labels, found.captions
    elif cfg.images and not pixels:
        captions = read_captions(Path(cfg.images), file_names(Path(cfg.images)))
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
    return images, labels, captions


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
