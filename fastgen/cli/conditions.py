"""Labels, prompts and images that sample.py is to draw, as condition rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastgen.core.errors import UserError, warn
from fastgen.data.degradation import enlarge
from fastgen.data.folders import named
from fastgen.data.media import read_image, shape_of
from fastgen.data.pictures import read_picture, to_tensor
from fastgen.data.text import cut_prompts, read_lines
from fastgen.networks.codecs import Codec, LabelCodec, PictureCodec, TextCodec

MOST_LABELS = 1_000_000
SAME_ASPECT = 0.02
"""by how much the aspect of --image may differ from the model's without a word"""


def parse_labels(text: str) -> list[int]:
    """3 | 0-9 | 1,4,7 as a list."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if span.stop > MOST_LABELS:
                raise UserError(
                    "--labels", f"found {part[:40]}", f"give them as 3, 0-9 or 1,4,7, below {MOST_LABELS:,}"
                )
            found += span
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        found = []
    if not found or len(found) > MOST_LABELS:
        raise UserError("--labels", f"found {text[:40]!r}", "give them as 3, 0-9 or 1,4,7")
    return found


def read_prompts(args) -> list[str]:
    """Prompts of both flags, in order."""
    texts = list(args.prompt)
    if args.prompts:
        texts += read_lines(args.prompts, "--prompts", "give a text file, one prompt a line")
    return texts


def read_images(args, codec: Codec, num: int):
    """Images [num, 3, H, W] in [-1, 1] for a model that takes one beside the text, first and last frames
    [num, 3, 2, H, W] for one that takes both; None for others.
    """
    if not isinstance(codec, TextCodec | PictureCodec) or not codec.needs_image:
        for flag in (f for f in ("image", "last_image", "scale") if getattr(args, f, None)):
            raise UserError(f"--{flag}", "this model takes no image", "leave it out")
        return None
    if len(args.image) not in (1, num):
        raise UserError(
            "--image",
            f"found {len(args.image)} for {num} prompts",
            "give one image for all prompts, or one for each",
        )
    if len(args.last_image) != (len(args.image) if codec.family.needs_last_image else 0):
        wrong = f"found {len(args.last_image)} for {len(args.image)} of --image"
        way = (
            "one for each --image"
            if codec.family.needs_last_image
            else "leave it out: no last frame is taken"
        )
        raise UserError("--last_image", wrong, way)
    scale = getattr(args, "scale", 0)
    if scale and scale != codec.enlarges:
        able = f"enlarges by {codec.enlarges}" if codec.enlarges else "takes a picture as it is"
        raise UserError("--scale", f"found {scale}", f"leave it out: this model {able}")
    read = _read_small if codec.enlarges else _read_image
    found = [read(path, codec) for path in args.image]
    if args.last_image:
        last = [_read_image(path, codec, "--last_image") for path in args.last_image]
        found = [torch.stack(pair, 1) for pair in zip(found, last)]
    shown = torch.stack(found)
    return shown.expand(num, *shown.shape[1:])


def _read_image(path: str, codec: TextCodec | PictureCodec, flag: str = "--image") -> torch.Tensor:
    """One file as [C, H, W] in [-1, 1]."""
    file, (height, width) = Path(path).expanduser(), codec.pixels
    with _readable(path, flag):
        own = shape_of(file)
        if abs(own[1] * height / (own[0] * width) - 1) > SAME_ASPECT:
            about = f"{named(path)} is {own[1]} x {own[0]}, cropped about its middle to {width} x {height}"
            warn(f"{flag}: {about}")
        return read_image(file, (codec.colours, height, width)).float() / 127.5 - 1


def _read_small(path: str, codec: TextCodec | PictureCodec) -> torch.Tensor:
    """One low-resolution file, enlarged to [C, H, W] in [-1, 1]."""
    with _readable(path):
        picture = to_tensor(read_picture(Path(path).expanduser(), "L" if codec.colours == 1 else "RGB"))
    (height, width), factor = codec.pixels, codec.enlarges
    if tuple(picture.shape[1:]) != (height // factor, width // factor):
        found = f"{named(path)} has {picture.shape[1]} x {picture.shape[2]} pixels; this model enlarges "
        found += f"{height // factor} x {width // factor} to {height} x {width}"
        size = f"--height {factor * picture.shape[1]} --width {factor * picture.shape[2]}"
        raise UserError("--image", found, f"give a picture of that size, or {size}")
    return enlarge(picture[None], codec.pixels)[0].float() / 127.5 - 1


@contextmanager
def _readable(path: str, flag: str = "--image") -> Iterator[None]:
    """What cannot be read as a picture is the user's mistake."""
    try:
        yield
    except OSError as error:
        found = f"{named(path)} cannot be read ({error})"
        raise UserError(flag, found, "give a png, jpg, webp or other picture file") from None


def conditions(args, codec: Codec) -> tuple[dict, list]:
    """(one condition row each, what each stands for)."""
    texts = read_prompts(args)
    if isinstance(codec, PictureCodec):
        for flag in (f for f in ("prompt", "prompts", "labels") if getattr(args, f)):
            raise UserError(f"--{flag}", "this model takes an image alone", "leave it out")
        num = max(1, len(args.image))
        return codec.image_rows(read_images(args, codec, num))[0], [""] * num
    if isinstance(codec, TextCodec):
        if not codec.family.takes_text:
            if texts:
                raise UserError("--prompt", "this model takes an image alone", "leave it out")
            texts = [""] * max(1, len(args.image))
        elif codec.enlarges and not texts:  # super-resolution is trained without captions
            texts = [""] * max(1, len(args.image))
        if args.labels:
            raise UserError(
                "--labels", "this model takes text, not class labels", 'give --prompt "..." or --prompts FILE'
            )
        if not texts:
            raise UserError("--prompt", "none given", 'this model takes text: give --prompt "..."')
        for cut in cut_prompts(codec, [*texts, args.negative_prompt]):
            warn(cut)
        return codec.prompts(texts, read_images(args, codec, len(texts))), texts
    read_images(args, codec, 0)
    if texts:
        raise UserError("--prompt", "this model takes class labels, not text", "give --labels 0-9")
    if not isinstance(codec, LabelCodec) or not codec.num_classes:
        if args.labels:
            raise UserError("--labels", "this model is unconditional", "leave it out")
        return {}, [""]
    labels = parse_labels(args.labels) if args.labels else list(range(codec.num_classes))
    try:
        rows = codec.labels(torch.tensor(labels))
    except UserError as error:
        raise UserError("--labels", error.found, error.instruction) from None
    return rows, [codec.class_names[i] for i in labels]


def null_of(args, codec: Codec) -> dict:
    """One row of what guidance leads away from; of an image, only what its null changes."""
    if isinstance(codec, PictureCodec):
        return {}  # each picture is its own
    if not isinstance(codec, TextCodec):
        return codec.null(1)
    images = read_images(args, codec, max(1, len(args.image)))
    images = None if images is None else images[:1]
    null = codec.prompts([args.negative_prompt], images) if args.negative_prompt else codec.null(1, images)
    if images is None:
        return null
    shown, nulled = codec.image_rows(images)
    return {k: v for k, v in null.items() if k not in shown or not torch.equal(shown[k], nulled[k])}
