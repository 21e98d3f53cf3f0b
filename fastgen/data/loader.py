"""Training data: images become x0 once, labels and prompts become condition rows once, batches are picked
by index.

The order of samples is a function of (seed, step), so a resumed run continues with the very next batch and no
iterator state exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.core.batch import Batch, select
from fastgen.core.errors import UserError
from fastgen.core.paths import is_analytic
from fastgen.core.progress import tracked
from fastgen.core.rng import Rng
from fastgen.data import cache, tables
from fastgen.data.labels import unlabelled_rows
from fastgen.data.media import read_files
from fastgen.data.sources import Found, control_files, dispreferred_files, read_source
from fastgen.data.text import cut_prompts
from fastgen.networks.codecs import TextCodec
from fastgen.networks.teacher import Teacher


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
        dispreferred: Tensor | None = None,
    ):
        """texts: the caption of each row of the condition table; dispreferred: what x0 is preferred to."""
        self.x0, self.cond_table, self.rows, self.uncond, self.shape = x0, cond_table, rows, uncond, shape
        self.own, self.own_null, self.texts = own or {}, own_null or {}, texts
        self.dispreferred = dispreferred

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, num: int) -> "Data":
        """The first num samples; all of them for 0."""
        if not 0 < num < len(self):
            return self
        x0 = None if self.x0 is None else self.x0[:num]
        own, null = ({k: v[:num] for k, v in d.items()} for d in (self.own, self.own_null))
        worse = None if self.dispreferred is None else self.dispreferred[:num]
        rows = self.rows[:num]
        return Data(x0, self.cond_table, rows, self.uncond, self.shape, self.texts, own, null, worse)

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
                worse = None if self.dispreferred is None else self.dispreferred[index].float().to(device)
                window.append(Batch(x0, cond, uncond, noise.to(device), index, texts, worse))
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

    def make() -> Iterator[tables.Rows]:
        size = max(1, min(500, 1_536_000 // images[0].numel()))
        parts = tracked(images.split(size), f"encoding {len(images):,} images", len(images), size)
        return ({"x0": codec.encode(c.to(device).float() / 127.5 - 1).cpu()} for c in parts)

    name = ""
    if cache_dir:
        net = codec if codec.vae is None else codec.vae
        about = (key, tuple(images.shape), tuple(codec.shape), repr(getattr(net, "config", None)))
        name = f"latents-{cache.fingerprint(about, (images, *net.state_dict().values()))}"
    return cache.kept(cache_dir, name, len(images), make)["x0"]


def _text_rows(
    codec, captions: list[str], device, cache_dir: str = "", key: str = ""
) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """Each distinct caption encoded once (kept under cache_dir if given), the row of every sample, and the
    captions by row.
    """
    unique = sorted(set(captions))
    for cut in cut_prompts(codec, unique):
        print(f"warning: {cut}")
    rows = _rows_of(captions, unique)
    name = _prompt_name(codec, unique, key) if cache_dir else ""

    def make() -> Iterator[tables.Rows]:
        with _no_inversion(codec.pipe):
            firsts = range(0, len(unique), 256)
            for i in tracked(firsts, f"encoding {len(unique):,} prompts", len(unique), 256):
                yield codec.prompts(unique[i : i + 256])

    table = cache.kept(cache_dir, name, len(unique), make)
    return table, rows, unique


def _rows_of(captions: list[str], unique: list[str]) -> Tensor:
    where = {text: i for i, text in enumerate(unique)}
    return torch.tensor([where[text] for text in captions])


@contextmanager
def _no_inversion(pipe) -> Iterator[None]:
    """Spare diffusers the search of every prompt for tokens of textual inversion where there are none: it
    would cut each into tokens once more, a third of the time.
    """
    parts = () if pipe is None else pipe.components.values()
    added = [token for part in parts for token in getattr(part, "added_tokens_encoder", None) or ()]
    idle = hasattr(pipe, "maybe_convert_prompt") and not any(token.endswith("_1") for token in added)
    if idle:
        pipe.maybe_convert_prompt = lambda prompt, tokenizer: prompt
    try:
        yield
    finally:
        if idle:
            del pipe.maybe_convert_prompt


def _prompt_name(codec, prompts: list[str], key: str) -> str:
    """Name of the cache of these prompts' encodings: other prompts, sizes or encoders have another one."""
    about = (key, codec.family.name, codec.max_length, codec.pixels, codec.guidance, prompts)
    every = codec.encoders.state_dict().values()  # a thousand numbers of each tell encoders apart
    some = (v.detach().flatten()[:: max(1, v.numel() // 1000)].float() for v in every)
    return f"prompts-{cache.fingerprint(about, some)}"


def _shown(cfg, codec, found: Found, device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The image that a network takes as a condition of each sample, and its null: the first frame of a clip,
    or the sample's file in data.control.
    """
    shown, name = None, codec.family.name
    if codec.family.temporal:
        shown = None if found.images is None else found.images[:, :, 0]
    elif cfg.control:
        files = control_files(Path(cfg.control), found, name)
        shown = read_files(files, (3, *codec.pixels), "error", key="data.control")[0]
    if shown is None:
        where = "set data.images" if codec.family.temporal else "set data.control, one for each image"
        raise UserError("data", f"{name} takes an image beside the text, and none are given", where)
    parts = [codec.image_rows(c.to(device).float() / 127.5 - 1) for c in shown.split(4)]
    cond, null = (tables.joined(len(shown), (p[i] for p in parts)) for i in (0, 1))
    return cond, null


def load_data(cfg, teacher: Teacher, device="cpu", pixels: bool = True) -> Data:
    """The data section of a run, in the teacher's own terms; with pixels=False no image is read, only what
    goes with them.
    """
    data, found = _load(cfg, teacher, device, pixels)
    if cfg.dispreferred and found is not None and found.images is not None:
        files = dispreferred_files(Path(cfg.dispreferred), found)
        size = tuple(found.images.shape[1:])
        images = read_files(files, size, "error", key="data.dispreferred")[0]
        data.dispreferred = encode_images(teacher.codec, images, cfg.cache_dir, device, teacher.path)
    return data


def _load(cfg, teacher: Teacher, device, pixels: bool) -> tuple[Data, Found | None]:
    """(the data, what the source holds) without the pairs."""
    codec: Any = teacher.codec
    uncond = {k: v.cpu() for k, v in codec.null(1).items()}
    if is_analytic(teacher.path):
        _check_exact(cfg)
        exact: Any = teacher.backbone
        x0, labels = exact.sample(20_000, torch.Generator().manual_seed(1))
        return Data(x0, _label_table(codec), labels, uncond, codec.shape), None
    cache.check_folder(cfg.cache_dir)
    found = read_source(cfg, codec, device, pixels)
    x0 = None
    if found.images is not None:
        _check_size(found.images, codec, device)
        x0 = encode_images(codec, found.images, cfg.cache_dir, device, teacher.path)
    num = 10_000 if found.num is None else found.num
    if isinstance(codec, TextCodec):
        return _text_data(cfg, teacher, found, x0, uncond, num, device), found
    rows, table = torch.zeros(num).long(), {}
    if codec.num_classes:
        table = _label_table(codec)
        if found.labels is not None:
            rows = found.labels
            codec.labels(rows)
        elif found.samples is None:  # no pictures, so there is nothing that a label could be wrong about
            rows = torch.arange(num) % codec.num_classes
        else:
            rows = unlabelled_rows(num, codec, pixels)
            null = codec.null(1) if codec.has_null else {}
            table = {k: torch.cat([v, *(null[n] for n in [k] if n in null)]) for k, v in table.items()}
    return Data(x0, table, rows, uncond, codec.shape), found


def look_at(cfg, teacher: Teacher) -> None:
    """Print what the data section of a run names, and refuse what `load_data` would; no pixel is read and
    nothing encoded, so the teacher may be without weights.
    """
    codec: Any = teacher.codec
    if is_analytic(teacher.path):
        _check_exact(cfg)
        return
    found = read_source(cfg, codec, "cpu", pixels=False)
    if cfg.dispreferred:
        dispreferred_files(Path(cfg.dispreferred), found)
    if isinstance(codec, TextCodec):
        if codec.family.needs_image and cfg.control:
            control_files(Path(cfg.control), found, codec.family.name)
        if codec.family.takes_text:
            _check_captions(found.captions)


def _check_exact(cfg) -> None:
    """Refuse data for an exact teacher."""
    if cfg.images or cfg.prompts:
        key = "data.images" if cfg.images else "data.prompts"
        raise UserError(key, "given for an exact teacher, which draws its own data", "leave it out")


def _check_captions(captions: list[str] | None) -> list[str]:
    """The captions, which a text-to-image teacher needs."""
    if captions is None:
        raise UserError(
            "data",
            "this text-to-image teacher needs captions and the set has none",
            "add metadata.jsonl with file_name and text, or a .txt file beside each image",
        )
    return captions


def _text_data(cfg, teacher, found: Found, x0, uncond: dict, num: int, device) -> Data:
    """Data of a teacher that takes text, an image, or both."""
    codec: Any = teacher.codec
    captions = found.captions
    own: dict[str, Tensor] = {}
    own_null: dict[str, Tensor] = {}
    if codec.family.needs_image:
        own, own_null = _shown(cfg, codec, found, device)
        num = len(next(iter(own.values())))
    if not codec.family.takes_text:
        captions = [""] * num
    captions = _check_captions(captions)
    table, rows, texts = _text_rows(codec, captions, device, cfg.cache_dir, teacher.path)
    if own:
        table = {k: v for k, v in table.items() if k not in own}
        uncond = {k: v for k, v in uncond.items() if k not in own_null}
    return Data(x0, table, rows, uncond, codec.shape, texts, own, own_null)


def _label_table(codec) -> dict[str, Tensor]:
    return codec.labels(torch.arange(codec.num_classes)) if codec.num_classes else {}


def _check_size(images: Tensor, codec, device) -> None:
    found = tuple(codec.encode(images[:1].to(device).float() / 127.5 - 1).shape[1:])
    if found != tuple(codec.shape):
        raise UserError(
            "data",
            f"images of shape {tuple(images.shape[1:])} give x0 {found}",
            f"the teacher takes {codec.shape}",
        )
