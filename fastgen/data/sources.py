"""The source of a run's data: a bundled set, pictures or clips of a user, or a file of prompts."""

import math
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgen.core.errors import UserError
from fastgen.data import moving
from fastgen.data.appearance import check_appearance
from fastgen.data.buckets import parsed, sorted_in
from fastgen.data.bundled import NAMES, load_images, load_labels
from fastgen.data.folders import Listing, Samples, check_folder, named, scan, some
from fastgen.data.kinds import kind_of_source
from fastgen.data.labels import class_rows, drop_missing, unlabelled_rows
from fastgen.data.latents import read_manifest
from fastgen.data.media import describe, read_files
from fastgen.data.order import Order
from fastgen.data.readers import check_named, gathered
from fastgen.data.scans import pairs_of
from fastgen.data.streaming import PictureReader, Reader
from fastgen.data.tables import LARGE
from fastgen.data.text import read_lines
from fastgen.networks.codecs import TextCodec


@dataclass
class Found:
    """What a source holds, None for what it has not or what was not wanted."""

    images: Tensor | None = None  # uint8 [N, C, H, W] or [N, C, F, H, W]
    labels: Tensor | None = None  # long [N]
    captions: list[str] | None = None
    samples: Samples | None = None  # the files of a folder
    total: int | None = None  # samples before data.limit
    reader: Reader | None = None  # instead of images where they are streamed
    order: Order | None = None  # of the samples of several sources
    own: bool = False  # whether they are a user's

    @property
    def num(self) -> int | None:
        """Samples, or None without any source."""
        files = None if self.samples is None else self.samples.files
        lists: tuple[Sized | None, ...] = (self.images, self.reader, self.labels, self.captions, files)
        return next((len(v) for v in lists if v is not None), None)


MANY = 20_000
"""files of a set from which on it is streamed"""
PROMPTS = "a text file with one prompt a line"


def check_there(cfg) -> None:
    """Refuse a data section whose folders or files are not there, before anything is loaded."""
    for key in ("images", "control", "dispreferred"):
        if path := getattr(cfg, key):
            check_folder(Path(path).expanduser(), f"data.{key}")
    for i, source in enumerate(cfg.sources):
        if source.images:
            check_folder(Path(source.images).expanduser(), f"data.sources.{i}.images")
    for key, source in [("data", cfg), *((f"data.sources.{i}", s) for i, s in enumerate(cfg.sources))]:
        check_named(source, key)
    if cfg.appearance is not None:
        check_appearance(cfg.appearance)
    if cfg.scans:
        pairs_of(Path(cfg.scans).expanduser(), "data.scans")
    if cfg.latents:
        read_manifest(Path(cfg.latents).expanduser())
    if cfg.prompts and not Path(cfg.prompts).expanduser().is_file():
        read_lines(cfg.prompts, "data.prompts", PROMPTS)  # says what is wrong with it


def takes_text(codec) -> bool:
    return isinstance(codec, TextCodec) and codec.family.takes_text


def makes_clips(codec) -> bool:
    return codec.family is not None and bool(codec.family.temporal)


def read_source(cfg, codec, device, pixels: bool) -> Found:
    """What the data section names; with pixels=False no image is read, only what goes with them."""
    if not cfg.prompts:  # a file that is not there is named first
        _check_wanted(cfg, codec)
    if cfg.buckets and not kind_of_source(cfg):
        raise UserError(
            "data.buckets", "found without pictures of your own", "set data.images, or leave it out"
        )
    if cfg.name:
        return _bundled(cfg, codec, pixels)
    if kind_of_source(cfg):
        return _own(cfg, codec, device, pixels)
    if cfg.prompts:
        # beside control images every line has its place
        lines = read_lines(cfg.prompts, "data.prompts", PROMPTS, keep_blank=bool(cfg.control))
        _check_wanted(cfg, codec)
        different = len(set(lines))
        repeated = f", {different} of them different" if different < len(lines) else ""
        print(f"data: {len(lines)} prompt{'s'[: len(lines) > 1]}{repeated}")
        return Found(captions=lines[: cfg.limit or None], total=len(lines))
    return Found()


def _check_wanted(cfg, codec) -> None:
    """Refuse what this teacher would take no notice of."""
    if cfg.prompts and not takes_text(codec):
        kind = "class labels" if codec.num_classes else "noise alone"
        kind = "an image" if codec.needs_image else kind
        found = f"found {cfg.prompts} for a teacher that takes {kind}"
        raise UserError("data.prompts", found, "leave it out")
    clips = makes_clips(codec)
    if cfg.fps is not None and not (clips and kind_of_source(cfg) == "images"):
        why = "beside no clips of your own (data.images)" if clips else "for a teacher of pictures"
        raise UserError("data.fps", f"found {cfg.fps:g} {why}", "leave it out")
    if cfg.scans:
        raise UserError(
            "data.scans", f"found {cfg.scans} for a teacher that completes no scans", "leave it out"
        )
    shown = codec.needs_image
    if cfg.control and kind_of_source(cfg) not in ("", "images"):
        found = f"found beside data.{kind_of_source(cfg)}"
        raise UserError("data.control", found, "its images go with those of a folder: data.images")
    if cfg.degradation and (not shown or codec.family.temporal):
        instruction = "leave it out, or give a teacher that is shown a picture (docs/families.md)"
        raise UserError("data.degradation", "found for a teacher that takes no picture", instruction)
    if cfg.degradation and not kind_of_source(cfg) and not cfg.name:
        raise UserError("data.degradation", "found without pictures", "set data.images or data.name")
    if cfg.degradation and cfg.control:
        raise UserError("data.control", "found beside data.degradation", "give one: both are shown")
    if cfg.control and (not shown or codec.family.temporal):
        what = "takes its first frames from data.images" if shown else "takes no control images"
        raise UserError("data.control", f"found {cfg.control} for a teacher that {what}", "leave it out")


def _bundled(cfg, codec, pixels: bool) -> Found:
    clips = makes_clips(codec)
    if cfg.name == moving.NAME:
        return _moving(cfg, codec, clips, pixels)
    if cfg.name not in NAMES:
        allowed = ", ".join((*NAMES, moving.NAME))
        raise UserError("data.name", f"found {cfg.name!r}", f"allowed: {allowed}")
    if clips:
        wrong = f"{cfg.name} holds images, and {codec.family.name} generates clips"
        raise UserError("data.name", wrong, f"use {moving.NAME}, or clips of your own: data.images")
    if pixels:
        whole = load_images(cfg.name, "train")
        found = Found(whole.images, whole.labels, whole.captions)
    else:
        found = Found(None, *load_labels(cfg.name))
    found.total, end = found.num, cfg.limit or None
    found.images = None if found.images is None else found.images[:end]
    found.labels = None if found.labels is None else found.labels[:end]
    found.captions = None if found.captions is None else found.captions[:end]
    counts: dict[str, Sized | None] = {
        "images": found.images,
        "labels": found.labels,
        "captions": found.captions,
    }
    print(f"data: {cfg.name}, {', '.join(f'{len(v)} {k}' for k, v in counts.items() if v is not None)}")
    return found


def _moving(cfg, codec, clips: bool, pixels: bool) -> Found:
    """The bundled clips: composed when a batch has them, or first of all where data.stream is never."""
    if not clips:
        wrong = f"{moving.NAME} holds clips, and {codec.family.name} generates images"
        raise UserError("data.name", wrong, "use tinted")
    wanted, here = (moving.FRAMES, moving.SIZE, moving.SIZE), (codec.num_frames, *codec.pixels)
    if wanted[1:] != here[1:] or here[0] > wanted[0]:
        sizes = [" x ".join(map(str, size)) for size in (wanted, here)]
        wrong = (
            f"{moving.NAME} holds clips of {sizes[0]} (frames x height x width), the teacher makes {sizes[1]}"
        )
        instruction = "set teacher.num_frames, teacher.height and teacher.width to these, or to fewer frames"
        raise UserError("data.name", wrong, instruction)
    num, frames = min(cfg.limit or moving.count(), moving.count()), here[0]
    found = Found(captions=moving.captions(range(num)), total=moving.count())
    if pixels and cfg.stream == "never":
        found.images = moving.load_clips("train", range(num)).images[:, :, :frames]
    elif pixels:
        found.reader = moving.MovingReader(num, frames)
    how = f", the first {frames} of {wanted[0]} frames" if frames < wanted[0] else ""
    how += ", composed when a batch has them" if found.reader else ""
    print(f"data: {moving.NAME}, {num} clips with captions{how}")
    return found


def _own(cfg, codec, device, pixels: bool) -> Found:
    """A user's pictures: those of the section itself, then those of data.sources."""
    size = tuple(codec.decode(torch.zeros(1, *codec.shape, device=device)).shape[1:]) if pixels else ()
    clips = len(size) == 4 if pixels else makes_clips(codec)
    sources = [(cfg, "data"), *((one, f"data.sources.{i}") for i, one in enumerate(cfg.sources))]
    named_once = len(sources) == 1
    if not named_once and cfg.control:
        raise UserError("data.control", "found beside data.sources", "use one source with control images")
    kinds = [kind_of_source(one) for one, _ in sources]
    keys = [f"{key}.{kind}" for (_, key), kind in zip(sources, kinds)]
    sets = [gathered(one, cfg, key, clips) for (one, _), key in zip(sources, keys)]
    totals = [len(one.files) for one in sets]
    if cfg.buckets and not named_once:
        raise UserError("data.buckets", "found beside data.sources", "use one source with buckets")
    stream = pixels and sum(totals) > 0 and streams(cfg, codec, size, sum(totals))
    founds = []
    for one, key in zip(sets, keys):
        founds.append(_one_set(cfg, codec, one, "" if named_once else f"{key}: ", (size, stream), pixels))
    weights = [one.weight for one, _ in sources]
    found = founds[0] if named_once else _together(founds, weights, keys, codec)
    found.own, found.total = True, sum(totals)
    if stream and found.reader is None:
        found.reader = PictureReader([one.samples for one in founds if one.samples], size)
    return found


def _one_set(cfg, codec, samples: Samples, label: str, how: tuple[tuple, bool], pixels: bool) -> Found:
    """Pictures, labels and captions of one source; how: the size of its pictures, and whether they are
    streamed.
    """
    size, stream = how
    read, strict = pixels and not stream, cfg.on_bad_image == "error"
    needed = takes_text(codec) and any(text is not None for text in samples.captions)
    if needed and not (read and strict):
        samples = drop_missing(samples.captions, samples, cfg.on_bad_image, "caption")
    elif codec.num_classes and samples.origin:
        samples = drop_missing(samples.labels, samples, cfg.on_bad_image, "label")
        samples.labels = class_rows(samples, codec).tolist()
    images = None
    if read or not samples.files:
        images, samples = read_files(samples, size, cfg.on_bad_image, cfg.limit)
    elif cfg.limit:
        samples = samples.chosen(list(range(min(cfg.limit, len(samples.files)))))
    if needed:  # where both are errors, a file that is no picture is named before its missing caption
        samples = drop_missing(samples.captions, samples, cfg.on_bad_image, "caption")
    reader = None
    if cfg.buckets:  # headers alone, also for a dry run
        reader = sorted_in(samples, size[0] if size else 3, parsed(cfg.buckets), cfg.on_bad_image)
        samples = reader.samples
    captions = [text for text in samples.captions if text is not None]
    what = "files, read when a batch has them" if stream else "files, of which no pixel is read"
    counts = {"images" if read else what: len(samples.files)}
    counts |= {"captions": len(captions)} if takes_text(codec) else {}
    labelled = codec.num_classes and samples.origin
    counts |= {"labels": len(samples.files)} if labelled else {}
    print(describe(samples.listing, counts, label))
    labels = torch.tensor(samples.labels).long() if labelled else None
    return Found(images, labels, captions or None, samples, reader=reader if stream else None)


def _together(founds: list[Found], weights: list[float], keys: list[str], codec) -> Found:
    """Several sources as one, in their order. One without captions beside others is an error, one without
    labels is of the null class.
    """
    images = [one.images for one in founds if one.images is not None]
    captions = [one.captions for one in founds if one.captions is not None]
    sizes = [len(one.samples.files) for one in founds if one.samples]
    if takes_text(codec) and 0 < len(captions) < len(founds):
        bare = next(key for one, key in zip(founds, keys) if one.captions is None)
        raise UserError(bare, "no captions, and other sources have them", "add them, or leave the source out")
    labels = None
    if any(one.labels is not None for one in founds):
        rows = [
            unlabelled_rows(size, codec, True, key) if one.labels is None else one.labels
            for one, size, key in zip(founds, sizes, keys)
        ]
        labels = torch.cat(rows)
    return Found(
        torch.cat(images) if images else None,
        labels,
        [text for part in captions for text in part] if len(captions) == len(founds) else None,
        order=Order(sizes, weights),
    )


def streams(cfg, codec, size: tuple[int, ...], num: int) -> bool:
    """Whether num pictures of a size are read when batches need them."""
    shown = codec.needs_image
    if cfg.stream == "always" and shown:
        found = f"found always for {codec.family.name}, which is shown an image of every sample"
        raise UserError("data.stream", found, "use auto or never")
    if cfg.buckets and cfg.stream == "never":
        raise UserError("data.stream", "found never beside data.buckets, which are streamed", "use auto")
    if cfg.buckets:
        return True
    if cfg.stream != "auto" or shown:
        return cfg.stream == "always"
    return num > MANY or num * math.prod(size) > LARGE


def control_files(folder: Path, found: Found, what: str) -> Samples:
    """The control image of each sample: the one of the same name, or where no name is the same the one at the
    same place in natural order, with equal counts. what: the teacher, as a message names it.
    """
    listing = scan(folder, key="data.control")
    files = listing.files
    if found.num is None:
        return _without_text(listing, files)
    own = found.samples
    if own is not None:
        there = {path.relative_to(listing.folder).with_suffix(""): path for path in files}
        own_files = own.paths()
        names = [path.relative_to(own.listing.folder).with_suffix("") for path in own_files]
        missing = [named(name) for name in names if name not in there]
        if not missing and len(there) == len(files):
            return _without_text(listing, [there[name] for name in names])
        if len(missing) < len(names):
            why = f"none named {some(missing)}" if missing else "two of one name"
            raise _unequal(what, len(files), found, why)
    total = found.total if own is None else len(own.listing.files)
    if len(files) != total:
        raise _unequal(what, len(files), found, f"names differ, so one for each of {total} is needed")
    if own is None:
        return _without_text(listing, files[: found.num])
    place = {path: i for i, path in enumerate(own.listing.files)}
    print("data: control images go with the images by their order: no names are the same")
    return _without_text(listing, [files[place[path]] for path in own_files])


def dispreferred_files(folder: Path, found: Found) -> Samples:
    """The image that each of data.images is preferred to, the one of the same name."""
    key, own = "data.dispreferred", found.samples
    if own is None:
        raise UserError(
            key, "found without data.images", "give both: each image is preferred to its namesake"
        )
    listing = scan(folder, key=key)
    there = {path.relative_to(listing.folder).with_suffix(""): path for path in listing.files}
    names = [path.relative_to(own.listing.folder).with_suffix("") for path in own.paths()]
    missing = [named(name) for name in names if name not in there]
    if missing:
        lost = f"{len(missing)} of {len(names)} pairs have no file in {folder}: {some(missing)}"
        raise UserError(key, lost, "give an image of the same name as each in data.images, or remove that")
    if len(there) < len(listing.files):
        raise UserError(key, "found two files of one name and different kinds", "keep one of them")
    return _without_text(listing, [there[name] for name in names])


def _unequal(what: str, num: int, found: Found, why: str) -> UserError:
    counts = f"{num} for {found.num} {'prompts' if found.samples is None else 'images'} ({why})"
    return UserError(
        "data",
        f"{what} takes an image beside the text, {counts}",
        "set data.control, one for each image",
    )


def _without_text(listing: Listing, files: list[Path]) -> Samples:
    return Samples(listing, files, [None] * len(files), [None] * len(files))
