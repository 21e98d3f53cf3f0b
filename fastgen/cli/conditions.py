"""Labels, prompts and images that sample.py is to draw, as condition rows."""

from pathlib import Path

import torch

from fastgen.core.errors import UserError, warn
from fastgen.data.folders import named
from fastgen.data.media import read_image
from fastgen.data.text import cut_prompts, read_lines
from fastgen.networks.codecs import Codec, LabelCodec, TextCodec

MOST_LABELS = 1_000_000


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
    """Images [num, 3, H, W] in [-1, 1] for a model that takes one beside the text; None for others."""
    if not isinstance(codec, TextCodec) or not codec.family.needs_image:
        if args.image:
            raise UserError("--image", "this model takes no image", "leave it out")
        return None
    if len(args.image) not in (1, num):
        raise UserError(
            "--image",
            f"found {len(args.image)} for {num} prompts",
            "give one image for all prompts, or one for each",
        )
    found = [_read_image(path, codec.pixels) for path in args.image]
    return torch.stack(found).expand(num, -1, -1, -1)


def _read_image(path: str, pixels: tuple[int, int]) -> torch.Tensor:
    """One file as [3, H, W] in [-1, 1]."""
    try:
        return read_image(Path(path).expanduser(), (3, *pixels)).float() / 127.5 - 1
    except OSError as error:
        found = f"{named(path)} cannot be read ({error})"
        raise UserError("--image", found, "give a png, jpg, webp or other picture file") from None


def conditions(args, codec: Codec) -> tuple[dict, list]:
    """(one condition row each, what each stands for)."""
    texts = read_prompts(args)
    if isinstance(codec, TextCodec):
        if not codec.family.takes_text:
            if texts:
                raise UserError("--prompt", "this model takes an image alone", "leave it out")
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
    if not isinstance(codec, TextCodec):
        return codec.null(1)
    images = read_images(args, codec, max(1, len(args.image)))
    images = None if images is None else images[:1]
    null = codec.prompts([args.negative_prompt], images) if args.negative_prompt else codec.null(1, images)
    if images is None:
        return null
    shown, nulled = codec.image_rows(images)
    return {k: v for k, v in null.items() if k not in shown or not torch.equal(shown[k], nulled[k])}
