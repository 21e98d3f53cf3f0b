"""What sample.py is asked to draw: labels, prompts and images, as condition rows."""

from pathlib import Path

import torch

from fastgen.core.errors import UserError, warn
from fastgen.data.media import read_image

MOST_LABELS = 1_000_000


def parse_labels(text: str) -> list[int]:
    """3 | 0-9 | 1,4,7 as a list."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if span.stop > MOST_LABELS:
                raise UserError("--labels", f"found {part[:40]}", f"3, 0-9 or 1,4,7, below {MOST_LABELS:,}")
            found += span
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        found = []
    if not found or len(found) > MOST_LABELS:
        raise UserError("--labels", f"found {text[:40]!r}", "3, 0-9 or 1,4,7")
    return found


def read_prompts(args) -> list[str]:
    """Prompts of both flags, in order."""
    texts = list(args.prompt)
    if args.prompts:
        if not Path(args.prompts).is_file():
            raise UserError("--prompts", f"{args.prompts} does not exist", "a text file, one prompt a line")
        texts += [line.strip() for line in Path(args.prompts).read_text().splitlines() if line.strip()]
    return texts


def read_images(args, codec, num: int):
    """Images [num, 3, H, W] in [-1, 1] for a model that is shown one beside the text; None for others."""
    wanted = hasattr(codec, "prompts") and codec.family.needs_image
    if not wanted:
        if args.image:
            raise UserError("--image", "this model is asked without an image", "leave it out")
        return None
    if len(args.image) not in (1, num):
        raise UserError("--image", f"found {len(args.image)} for {num} prompts", "one for all, or one each")
    try:
        found = [read_image(Path(p), (3, *codec.pixels)).float() / 127.5 - 1 for p in args.image]
    except OSError as error:
        raise UserError("--image", f"cannot be read ({error})", "png, jpg or webp files") from None
    return torch.stack(found).expand(num, -1, -1, -1)


def conditions(args, codec) -> tuple[dict, list]:
    """(one condition row each, what each stands for)."""
    texts = read_prompts(args)
    if hasattr(codec, "prompts"):
        if not codec.family.takes_text:
            if texts:
                raise UserError("--prompt", "this model is asked by an image alone", "leave it out")
            texts = [""] * max(1, len(args.image))
        if args.labels:
            raise UserError("--labels", "this model is asked by text", '--prompt "..." or --prompts FILE')
        if not texts:
            raise UserError("--prompt", "none given", 'this model is asked by text: --prompt "..."')
        for text in texts:
            if lost := codec.cut(text):
                warn(f"prompt longer than {codec.max_length} tokens, cut: {lost!r} of {text!r}")
        return codec.prompts(texts, read_images(args, codec, len(texts))), texts
    read_images(args, codec, 0)
    if texts:
        raise UserError("--prompt", "this model takes class labels, not text", "--labels 0-9")
    if not codec.num_classes:
        if args.labels:
            raise UserError("--labels", "this model is unconditional", "leave it out")
        return {}, [""]
    labels = parse_labels(args.labels) if args.labels else list(range(codec.num_classes))
    try:
        rows = codec.labels(torch.tensor(labels))
    except UserError as error:
        raise UserError("--labels", error.found, error.allowed) from None
    return rows, [codec.class_names[i] for i in labels]


def null_of(args, codec) -> dict:
    """One row of what guidance leads away from; of an image, only what its null changes."""
    if not hasattr(codec, "prompts"):
        return codec.null(1)
    images = read_images(args, codec, max(1, len(args.image)))
    images = None if images is None else images[:1]
    null = codec.prompts([args.negative_prompt], images) if args.negative_prompt else codec.null(1, images)
    if images is None:
        return null
    shown, nulled = codec.image_rows(images)
    return {k: v for k, v in null.items() if k not in shown or not torch.equal(shown[k], nulled[k])}
