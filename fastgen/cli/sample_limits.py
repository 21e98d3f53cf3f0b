"""Sizes and numbers of sample.py's flags: those that no call can use are refused before anything is drawn."""

import math
import shutil
from pathlib import Path

from fastgen.core.errors import UserError, warn
from fastgen.core.paths import expand

MOST_STEPS, MOST_SEED, MOST_SIZE = 100_000, 2**63 - 1, 65_536
MOST_WINDOWS, MOST_FPS = 10_000, 240
DAYS, PASS_SECONDS, NETWORK = 100, 2e-3, 16
"""NETWORK: what a network holds of a sample, in multiples of its pixels, where it is smallest"""


def check_numbers(args) -> None:
    """Bounds of every number on the command line."""
    bounds = {
        "height": (0, MOST_SIZE),
        "width": (0, MOST_SIZE),
        "num_frames": (0, MOST_SIZE),
        "cache_blocks": (0, MOST_SIZE),
        "windows": (1, MOST_WINDOWS),
        "fps": (1, MOST_FPS),
        "num_images": (0, MOST_SEED),
        "steps": (0, MOST_STEPS),
        "teacher_steps": (0, MOST_STEPS),
        "base_steps": (0, MOST_STEPS),
        "handover": (1, MOST_STEPS),
        "seed": (0, MOST_SEED),
        "batch_size": (1, MOST_SEED),
        "guidance": (-1e6, 1e6),
        "nasa_scale": (0, 1e6),
        "fidelity": (0, 1),
    }
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise UserError(f"--{name}", f"found {value}", f"give {low:g} or more, up to {high:g}")
    for scale in args.lora_scale:
        if not abs(scale) <= 1000:  # also not a number
            raise UserError("--lora_scale", f"found {scale}", "give a number from -1000 to 1000")
    if args.seed + args.num_images > MOST_SEED:
        raise UserError(
            "--seed", f"found {args.seed}", f"lower it: the seed of the last image may be at most {MOST_SEED}"
        )


def check_companions(args) -> None:
    """Refuse a flag that says something of another one that was not given."""
    compared = args.compare_teacher or args.base_steps
    for flag, alone, other in (
        ("handover", args.handover is not None and not args.base_steps, "--base_steps, which it follows"),
        ("teacher_steps", args.teacher_steps and not compared, "--compare_teacher, which draws them"),
    ):
        if alone:
            found = f"found {getattr(args, flag)} alone"
            raise UserError(f"--{flag}", found, f"give {other}, or leave it out")


def check_size(out: Path, num: int, batch_size: int, shape, generators) -> None:
    """Refuse a call that needs far more memory, disk or time than there is; --insist draws all the same."""
    import psutil

    numbers = math.prod(shape)
    batch = 4.0 * numbers * NETWORK * min(num, batch_size)
    if batch > 2 * psutil.virtual_memory().total:
        found = f"found {batch_size}, about {batch / 2**30:,.0f} GiB of memory"
        raise UserError("--batch_size", found, "lower it, or pass --insist")
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    disk = num * max(4096.0, 0.3 * numbers)  # a block of a disk, or a picture that packs well
    space = shutil.disk_usage(place)
    if space.total and disk > space.free:
        found = f"{num:,} images take about {disk / 2**30:,.0f} GiB, more than is free at {place}"
        raise UserError("--num_images", found, "lower it, or pass --insist")
    seconds = sum(num / min(num, batch_size) * g.nfe * PASS_SECONDS + num * 1e-3 for g in generators)
    if seconds > DAYS * 86_400:
        found = f"{num:,} images take about {seconds / 86_400:,.0f} days or more"
        raise UserError("--num_images", found, "lower it, or pass --insist")


def add_size(flags) -> None:
    """Add --height, --width and --num_frames to a parser."""
    meant = {"height": "height in pixels", "width": "width in pixels", "num_frames": "frames of a video"}
    for key, text in meant.items():
        told = f"{text}, where the model is free in it; default: its own"
        flags.add_argument(f"--{key}", type=int, default=0, help=told)
    kept = "blocks that a causal student attends to, its own included; default: as trained"
    flags.add_argument("--cache_blocks", type=int, default=0, metavar="N", help=kept)


def add_clip(flags) -> None:
    """Add --windows, --clip_format and --fps to a parser."""
    add = flags.add_argument
    end = "last frame, for a model that takes a first and a last one (Wan FLF2V): one for each --image"
    add("--last_image", action="append", default=[], type=expand, metavar="FILE", help=end)
    row = "image to video: clips in a row, each begun by the last frame of the one before; default: 1"
    add("--windows", type=int, default=1, metavar="N", help=row)
    formats = "of the clips that are written; default: gif; mp4 needs imageio-ffmpeg"
    add("--clip_format", choices=("gif", "mp4"), default=None, help=formats)
    add("--fps", type=float, default=None, help="frames a second of the clips that are written; default: 8")


def check_clip(args, codec) -> None:
    """Refuse an mp4 that cannot be written, and warn of flags of clips for a model of pictures."""
    from fastgen.data.clips import check_mp4
    from fastgen.data.sources import makes_clips

    if makes_clips(codec):
        if args.clip_format == "mp4":
            check_mp4("--clip_format")
        return
    for flag in (f for f in ("clip_format", "fps") if vars(args)[f] is not None):
        warn(f"--{flag} has no effect: this model makes pictures")


def add_scale(flags) -> None:
    """Add --scale to a parser."""
    flags.add_argument(
        "--scale",
        type=int,
        default=0,
        metavar="N",
        help="times by which a super-resolution model enlarges --image; default: as trained",
    )


def add_fidelity(flags) -> None:
    """Add --fidelity to a parser."""
    knob = "with that knob (OFTSR): high is near the original, low looks real; default: as exported"
    flags.add_argument("--fidelity", type=float, default=None, metavar="F", help=knob)


def put_fidelity(args, loaded) -> None:
    """Sample a student at the fidelity that is asked for, which it has to be trained for."""
    if args.fidelity is None:
        return
    span = loaded.role.spec.fidelity_range if loaded.is_student else None
    found = f"found {args.fidelity:g}"
    if span is None:
        raise UserError("--fidelity", f"{found} for {args.model}, which has no such knob", "leave it out")
    if not span[0] <= args.fidelity <= span[1]:
        raise UserError("--fidelity", found, f"give {span[0]:g} to {span[1]:g}, which it was trained for")
    loaded.role = loaded.role.with_fidelity(args.fidelity)


def add_control(flags) -> None:
    """Add the flags of hybrid sampling, of the picture of its steps, and of LoRA files beside the model."""
    add = flags.add_argument
    more = "steps of its base model's own grid, which takes the first ones; default: none (hybrid sampling)"
    add("--base_steps", type=int, default=0, metavar="N", help=more)
    first = "the student's first step after those, from 0; default: 1"
    add("--handover", type=int, default=None, metavar="I", help=first)
    kept = "also write dt.png: the denoised estimate at every step of the first samples"
    add("--visualize_dt", action="store_true", help=kept)
    control = "LoRA file of the base model or another student of it, added to every network; may be repeated"
    add("--lora", action="append", default=[], type=expand, metavar="FILE", help=control)
    scale = "strength of each --lora, also negative; one for all, or one each; default: 1"
    add("--lora_scale", action="append", default=[], type=float, metavar="S", help=scale)


def asked_size(args) -> dict[str, int]:
    """Height, width and number of frames that were asked for."""
    return {key: getattr(args, key) for key in ("height", "width", "num_frames") if getattr(args, key)}


def load_sized(model: str, base: str, size: dict[str, int]):
    """An export or teacher at this size; what a size breaks is said of the flag that gave it."""
    from fastgen.export.load import load_export

    try:
        return load_export(model, base or None, size=size)
    except UserError as error:
        name = error.key.removeprefix("teacher.")
        if name not in ("height", "width", "num_frames"):
            raise
        flag = name if name in size else next(iter(size))  # a square model may complain of the other side
        way = error.instruction.replace("remove it", "leave it out")
        raise UserError(f"--{flag}", str(error.found), way) from None


def check_blocks(args, loaded) -> None:
    """Of a student that goes block by block: whole blocks, a cache no longer than in training, and all of its
    own steps.
    """
    from fastgen.families.factors import temporal_factor
    from fastgen.roles.causal import check_frames, check_window

    info = loaded.info
    if not loaded.is_student or not loaded.role.spec.block:
        if args.cache_blocks:
            found = f"found {args.cache_blocks} for {args.model}, which makes a sample all at once"
            raise UserError("--cache_blocks", found, "leave it out")
        return
    spec, codec = loaded.role.spec, loaded.codec
    check_frames(spec.block, codec.shape[1], "--num_frames", temporal_factor(codec.family, codec.pipe))
    check_window(args.cache_blocks, info.causal["window"] if info else spec.window, "--cache_blocks")
    for flag in ("base_steps", "visualize_dt"):
        if vars(args)[flag]:
            raise UserError(f"--{flag}", "found for a student that goes block by block", "leave it out")
    if args.cache_blocks:
        loaded.role = loaded.role.with_window(args.cache_blocks)
