"""Training data: images become x0 once, or where they are streamed when a batch has them; labels and prompts
become condition rows; batches are picked by index.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.core.batch import MILDER
from fastgen.core.errors import UserError
from fastgen.core.paths import is_analytic
from fastgen.core.progress import tracked
from fastgen.data import buckets, cache, tables
from fastgen.data.appearance import check_clips, load_appearance
from fastgen.data.batches import Data
from fastgen.data.degradation import shown as degraded_and_enlarged
from fastgen.data.kinds import kind_of_source, own_source
from fastgen.data.labels import unlabelled_rows
from fastgen.data.latents import check_latents, open_latents
from fastgen.data.media import read_files
from fastgen.data.scans import check_scans, load_scans
from fastgen.data.sources import Found, control_files, dispreferred_files, read_source
from fastgen.data.streaming import EncodedLater, Stream, StreamedData
from fastgen.data.text import cut_prompts
from fastgen.data.views import Views, captions
from fastgen.networks.codecs import ScanCodec, TextCodec
from fastgen.networks.teacher import Teacher

MOST_CAPTIONS = 2000
"""different captions of streamed pictures that are encoded before the first step"""
FIRST_CAPTIONS = 256
"""samples whose captions are encoded then if there are more, for what is measured"""


def _at_once(images: Tensor) -> int:
    """How many of images [N, ...] an autoencoder is given together."""
    return max(1, min(500, 1_536_000 // images[0].numel()))


@torch.no_grad()
def encode_images(codec, images: Tensor, cache_dir: str, device, key: str) -> Tensor:
    """x0 of uint8 images, batched; kept as safetensors under cache_dir if given."""

    def make() -> Iterator[tables.Rows]:
        size = _at_once(images)
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
    if cfg.degradation:
        assert found.images is not None, "read_source refuses a section without pictures"
        return degraded_rows(cfg.degradation, codec, found.images, device)
    if codec.family.temporal:
        shown = None if found.images is None else shown_frames(codec, found.images)
    elif cfg.control:
        files = control_files(Path(cfg.control), found, name)
        shown = read_files(files, (codec.colours, *codec.pixels), "error", key="data.control")[0]
    if shown is None:
        where = "set data.images" if codec.family.temporal else "set data.control, one for each image"
        raise UserError("data", f"{name} takes an image beside the text, and none are given", where)
    return image_rows(codec, shown, device)


def shown_frames(codec, clips: Tensor) -> Tensor:
    """What a network is shown of clips [N, 3, F, H, W]: their first frames [N, 3, H, W], or these and the
    last ones [N, 3, 2, H, W].
    """
    return clips[:, :, [0, -1]] if codec.family.needs_last_image else clips[:, :, 0]


def image_rows(codec, images: Tensor, device="cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The condition rows of uint8 images [N, 3, H, W], and their null."""
    parts = [codec.image_rows(c.to(device).float() / 127.5 - 1) for c in images.split(_at_once(images))]
    cond, null = (tables.joined(len(images), (p[i] for p in parts)) for i in (0, 1))
    return cond, null


def degraded_rows(
    section, codec, images: Tensor, device="cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each picture as it is shown in the section's factor, and under MILDER names in the teacher's."""
    cond, null = image_rows(codec, degraded_and_enlarged(images, section.factor, section.kind), device)
    mild = section.teacher_factor or section.factor // 2
    for_teacher, its_null = image_rows(codec, degraded_and_enlarged(images, mild, section.kind), device)
    cond |= {MILDER + key: rows for key, rows in for_teacher.items()}
    return cond, null | {MILDER + key: rows for key, rows in its_null.items()}


@dataclass
class Conditions:
    """What goes with the samples of a source, in the teacher's terms; see `Data`."""

    table: dict[str, Tensor]
    rows: Tensor
    uncond: dict[str, Tensor]
    texts: list[str] | None = None
    own: dict[str, Tensor] = field(default_factory=dict)
    own_null: dict[str, Tensor] = field(default_factory=dict)
    later: EncodedLater | None = None
    """of streamed samples with more captions than are encoded before the first step"""


def load_data(cfg, teacher: Teacher, device="cpu", pixels: bool = True) -> Data:
    """The data section of a run, in the teacher's own terms; with pixels=False no image is read that the
    teacher is not shown, only what goes with them.
    """
    codec: Any = teacher.codec
    appearance = load_appearance(cfg.appearance, codec, cfg.on_bad_image) if pixels else None
    if cfg.latents:
        data = open_latents(cfg, teacher, pixels)
        data.appearance = appearance
        return with_dropout(cfg, codec, data)
    uncond = {k: v.cpu() for k, v in codec.null(1).items()}
    if is_analytic(teacher.path):
        _check_exact(cfg)
        exact: Any = teacher.backbone
        x0, labels = exact.sample(20_000, torch.Generator().manual_seed(1))
        return Data(x0, _label_table(codec), labels, uncond, codec.shape)
    if cfg.views is not None:
        return _views(cfg.views, codec, uncond)
    if isinstance(codec, ScanCodec):
        return with_dropout(cfg, codec, load_scans(cfg, codec))
    cache.check_folder(cfg.cache_dir)
    if cfg.buckets:
        buckets.check_fits(buckets.parsed(cfg.buckets), codec)
    shown = codec.needs_image and codec.family.temporal
    found = read_source(cfg, codec, device, pixels or bool(shown or cfg.degradation))
    x0 = None
    if found.images is not None:
        _check_size(found.images, codec, device)
        x0 = encode_images(codec, found.images, cfg.cache_dir, device, teacher.path)
    if isinstance(codec, TextCodec):
        cond = _text_conditions(cfg, teacher, found, uncond, device)
    elif codec.needs_image:
        own, own_null = _shown(cfg, codec, found, device)
        rows = torch.zeros(len(next(iter(own.values())))).long()
        cond = Conditions({}, rows, {}, None, own, own_null)
    else:
        cond = _label_conditions(codec, found, uncond, pixels)
    if found.reader is None:
        given = (cond.table, cond.rows, cond.uncond, codec.shape, cond.texts)
        data = Data(x0, *given, cond.own, cond.own_null)
        data.order = found.order
        data.dispreferred = _dispreferred(cfg, codec, found, device, teacher.path)
        data.degradation, data.originals = cfg.degradation, found.images if cfg.degradation else None
    else:
        data = _streamed(cfg, codec, found, cond, device)
    data.appearance = appearance
    return with_dropout(cfg, codec, data)


def _views(views, codec, uncond: dict[str, Tensor]) -> Views:
    """The prompts of a section `views` as they are seen from each side."""
    _check_views(views, codec)
    prompts = views.library
    texts = [*(text for p in prompts for text in captions(p)), *prompts]
    for cut in cut_prompts(codec, texts):
        print(f"warning: {cut}")
    rows, first = {k: v.cpu() for k, v in codec.prompts(texts).items()}, len(texts) - len(prompts)
    halves = slice(first), slice(first, None)
    table, plain = ({k: v[some] for k, v in rows.items()} for some in halves)
    sectors, held_out = (views.front, views.back), len(views.held_out)
    return Views(table, plain, uncond, codec.shape, prompts, views.ranges, sectors, held_out)


def _check_views(views, codec) -> None:
    """Refuse a prompt for a teacher that draws no pictures of text."""
    if not (isinstance(codec, TextCodec) and codec.family.takes_text and len(codec.shape) == 3):
        found = f"found {views.prompt!r} for a teacher that makes no image of a prompt"
        raise UserError("data.views", found, "use a text-to-image teacher")


def _dispreferred(cfg, codec, found: Found, device, key: str) -> Tensor | None:
    """x0 of what each of data.images is preferred to; None without such pairs."""
    if not cfg.dispreferred or found.images is None:
        return None
    files = dispreferred_files(Path(cfg.dispreferred), found)
    images = read_files(files, tuple(found.images.shape[1:]), "error", key="data.dispreferred")[0]
    return encode_images(codec, images, cfg.cache_dir, device, key)


def _streamed(cfg, codec, found: Found, cond: Conditions, device) -> Data:
    assert found.reader is not None, "a source that is streamed"
    if cfg.dispreferred:
        raise UserError("data.dispreferred", "its pictures are not streamed", "set data.stream to never")
    stream = Stream(found.reader, cfg.workers, cfg.on_bad_image, f"data.{kind_of_source(cfg) or 'name'}")
    read = stream.sound(0)[1]["images"][None]
    if not cfg.buckets:
        _check_size(read, codec, device)

    def encode(images: Tensor) -> Tensor:
        return codec.encode(images.to(device).float() / 127.5 - 1)

    given = (cond.table, cond.rows, cond.uncond, codec.shape, cond.texts)
    kind = buckets.BucketedData if cfg.buckets else StreamedData
    return kind(stream, encode, *given, cond.later, found.order)


def with_dropout(cfg, codec, data: Data) -> Data:
    """The data with the share of null conditions that the section sets, if the teacher knows them."""
    data.dropout = cfg.caption_dropout
    if data.dropout and not (data.uncond and codec.has_null):
        wrong = f"found {data.dropout:g} for a teacher without a null condition"
        raise UserError("data.caption_dropout", wrong, "use 0")
    return data


def _label_conditions(codec, found: Found, uncond: dict[str, Tensor], pixels: bool) -> Conditions:
    """Those of a teacher that takes classes, or nothing."""
    num = 10_000 if found.num is None else found.num
    rows, table = torch.zeros(num).long(), {}
    if codec.num_classes:
        table = _label_table(codec)
        if found.labels is not None:
            rows = found.labels
            codec.labels(rows)
        elif not found.own:  # no pictures, so there is nothing that a label could be wrong about
            rows = torch.arange(num) % codec.num_classes
        else:
            rows = unlabelled_rows(num, codec, pixels)
            null = codec.null(1) if codec.has_null else {}
            table = {k: torch.cat([v, *(null[n] for n in [k] if n in null)]) for k, v in table.items()}
    return Conditions(table, rows, uncond)


def look_at(cfg, teacher: Teacher) -> None:
    """Print what the data section of a run names, and refuse what `load_data` would; no pixel is read and
    nothing encoded, so the teacher may be without weights.
    """
    codec: Any = teacher.codec
    if cfg.appearance is not None:
        check_clips(codec)
    if is_analytic(teacher.path):
        _check_exact(cfg)
        return
    if cfg.latents:
        check_latents(cfg, teacher)
        return
    if cfg.views is not None:
        _check_views(cfg.views, codec)
        return
    if isinstance(codec, ScanCodec):
        check_scans(cfg)
        return
    if cfg.buckets:
        buckets.check_fits(buckets.parsed(cfg.buckets), codec)
    found = read_source(cfg, codec, "cpu", pixels=False)
    if cfg.dispreferred:
        dispreferred_files(Path(cfg.dispreferred), found)
    if isinstance(codec, TextCodec):
        if codec.family.needs_image and cfg.control:
            control_files(Path(cfg.control), found, codec.family.name)
        if codec.family.takes_text and not cfg.degradation:
            _check_captions(found.captions)


def _check_exact(cfg) -> None:
    """Refuse data for an exact teacher."""
    if key := own_source(cfg):
        raise UserError(f"data.{key}", "given for an exact teacher, which draws its own data", "leave it out")


def _check_captions(captions: list[str] | None) -> list[str]:
    """The captions, which a text-to-image teacher needs."""
    if captions is None:
        raise UserError(
            "data",
            "this text-to-image teacher needs captions and the set has none",
            "add metadata.jsonl with file_name and text, or a .txt file beside each image",
        )
    return captions


def _text_conditions(cfg, teacher, found: Found, uncond: dict[str, Tensor], device) -> Conditions:
    """Those of a teacher that takes text, an image, or both."""
    codec: Any = teacher.codec
    num = 10_000 if found.num is None else found.num
    captions, later = found.captions, None
    own: dict[str, Tensor] = {}
    own_null: dict[str, Tensor] = {}
    if codec.family.needs_image:
        own, own_null = _shown(cfg, codec, found, device)
        num = len(next(iter(own.values())))
    if not codec.family.takes_text or cfg.degradation:
        captions = [""] * num
    captions = _check_captions(captions)
    if found.reader is not None and (different := len(set(captions))) > MOST_CAPTIONS:
        print(f"data: {different:,} different captions, encoded when a batch has them")
        later, captions = EncodedLater(codec, captions), captions[:FIRST_CAPTIONS]
    table, rows, texts = _text_rows(codec, captions, device, cfg.cache_dir, teacher.path)
    if own:
        table = {k: v for k, v in table.items() if k not in own}
        uncond = {k: v for k, v in uncond.items() if k not in own_null}
    return Conditions(table, rows, uncond, texts, own, own_null, later)


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
