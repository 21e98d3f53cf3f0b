"""Sample an export: python sample.py --model runs/quickstart/export --labels 0-9 --num_images 40

Steps, times, scheduler and guidance come from the export; nothing has to be remembered. Image i draws all its
noise from seed + i, so neither the batch size nor the number of images changes a picture.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastgen.cli.completions import add_scans, complete
from fastgen.cli.generator import Generator
from fastgen.cli.pictures import Gallery, open_folder
from fastgen.cli.sample_limits import (
    add_clip,
    add_control,
    add_fidelity,
    add_scale,
    add_size,
    asked_size,
    check_blocks,
    check_clip,
    check_companions,
    check_numbers,
    check_size,
    load_sized,
    put_fidelity,
)
from fastgen.cli.views import TAKEN, add_views, draw_views
from fastgen.core import interrupt
from fastgen.core.console import documented, exit_code, passed_over, program, quiet
from fastgen.core.errors import NotFinite, UserError, warn
from fastgen.core.paths import expand

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def flags() -> argparse.ArgumentParser:
    """Of sample.py."""
    found = documented(program("sample.py"), __doc__)
    add = found.add_argument
    add(
        "--model",
        required=True,
        type=expand,
        help="export folder, LoRA file, run folder, or a teacher's folder",
    )
    add(
        "--base",
        default="",
        type=expand,
        help="base model of a LoRA file, instead of the one its header names",
    )
    add("--prompt", action="append", default=[], help="text prompt; may be repeated")
    add("--prompts", default="", type=expand, metavar="FILE", help="text file, one prompt per line")
    add(
        "--image",
        action="append",
        default=[],
        type=expand,
        metavar="FILE",
        help="first frame, control image or picture to enlarge: one for all prompts, or one for each",
    )
    add("--negative_prompt", default="", help="negative prompt, for teachers and for students with NASA")
    add(
        "--nasa_scale",
        type=float,
        default=None,
        help="weight of a student's negative prompt; default: from its export",
    )
    add("--labels", default="", help="class labels: 3, 0-9 or 1,4,7; default: all")
    add(
        "--num_images",
        type=int,
        default=0,
        help="total, repeating prompts or labels in order; default: one each",
    )
    add_scale(found)
    add_fidelity(found)
    add_size(found)
    add_clip(found)
    add("--steps", type=int, default=0, help="sampling steps; default: as trained")
    add("--seed", type=int, default=0, help="seed of the first image")
    add("--batch_size", type=int, default=50, help="images per batch; it changes no image")
    add("--out", default="samples", type=expand, help="folder to write PNGs, grid.png and samples.json to")
    add("--insist", action="store_true", help="do not refuse more than disk, memory or 100 days allow")
    add("--overwrite", action="store_true", help="replace the samples in a folder that holds some")
    add_control(found)
    add_views(found)
    add_scans(found)
    add("--compare_teacher", action="store_true", help="add the teacher's images of the same seeds below")
    add("--teacher_steps", type=int, default=0, help="steps of the teacher; default: as in the run")
    add("--guidance", type=float, default=None, help="guidance scale; default: the one the student learned")
    add("--dtype", choices=DTYPES, default="fp32", help="precision of the denoiser")
    add("--device", default="", help="device; default: cuda if there is one")
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point of sample.py; 0, 2 for a user's mistake, 3 for samples that are not finite, 75 where a
    signal stopped it and the pictures made so far are kept.
    """
    args = flags().parse_args(argv)
    quiet()
    with interrupt.handled():
        try:
            return exit_code(lambda: run(args))
        except interrupt.Stopped as stop:
            print(f"{stop}: stopped before the first image", file=sys.stderr)
            return interrupt.REQUEUE
        except KeyboardInterrupt:
            print("stopped at once; the images written so far are kept", file=sys.stderr)
            return 130


def batches(generator: Generator, cond: dict, seeds: Sequence[int], batch_size: int, device="cpu"):
    """Yields (number of the first, images, seconds) a batch, the i-th image under condition i modulo their
    number; the first image comes alone and once more in its batch, to warm up and to be seen early.
    """
    import torch

    from fastgen.core.batch import select
    from fastgen.core.progress import tracked

    num_rows = len(next(iter(cond.values()))) if cond else 1

    @torch.no_grad()
    def batch(first: int, last: int):
        rows = {k: v.to(device) for k, v in select(cond, torch.arange(first, last) % num_rows).items()}
        start = time.perf_counter()
        images = generator(rows, list(seeds[first:last]), device).cpu()
        return first, images, time.perf_counter() - start

    yield *batch(0, 1)[:2], 0.0
    what = f"drawing {len(seeds):,} images, {generator.name}"
    for first in tracked(range(0, len(seeds), batch_size), what, len(seeds), batch_size):
        yield batch(first, min(first + batch_size, len(seeds)))


def draw(generator: Generator, cond: dict, seeds: Sequence[int], batch_size: int, device="cpu"):
    """(all images at once, seconds per image without the warm-up)."""
    import torch

    found = list(batches(generator, cond, seeds, batch_size, device))[1:]
    return torch.cat([images for _, images, _ in found]), sum(s for *_, s in found) / len(seeds)


def contenders(args, loaded, device) -> list[Generator]:
    """The model, then its teacher where the two are compared; warns of flags that cannot act."""
    import torch

    from fastgen.cli.conditions import null_of

    guided = not loaded.is_student or args.compare_teacher or args.base_steps
    info = loaded.info
    takes_scale = loaded.is_student and bool(info and info.guidance_range and not info.steps_as_guidance)
    nasa_scale = _nasa_scale(args, loaded)
    for flag, acts in (("negative_prompt", guided or nasa_scale), ("guidance", guided or takes_scale)):
        if vars(args)[flag] not in ("", None) and not acts:
            way = "; --nasa_scale 0.5 subtracts it (NASA)" if flag == "negative_prompt" else ""
            warn(f"--{flag} has no effect: guidance is baked into the student{way}")
    own = info.guidance if info else 1.0
    guidance = args.guidance if args.guidance is not None else own
    steps = args.steps or (info.steps if info and not loaded.is_student else 0)
    found = [loaded]
    if (args.compare_teacher or args.base_steps) and loaded.is_student:
        found.append(loaded.reference())
    put_loras(args, found)
    generators = []
    for one in found:
        one.to(device, getattr(torch, DTYPES[args.dtype]))
        null = null_of(args, one.codec)
        wanted = steps if one is loaded else args.teacher_steps or (info.teacher_steps if info else 20)
        scale = nasa_scale if one is loaded else 0.0
        generators.append(Generator(one, wanted, guidance, {k: v.to(device) for k, v in null.items()}, scale))
    if args.base_steps:
        from fastgen.cli.hybrid import with_base

        generators[0] = with_base(generators[0], generators[-1], args.base_steps, args.handover or 1)
        return generators[: 1 + args.compare_teacher]
    return generators


def put_loras(args, found: list) -> None:
    """Add every --lora to the networks of the contenders, each network once."""
    from fastgen.export.adapters import add_to

    scales = args.lora_scale or [1.0]
    if len(scales) not in (1, max(1, len(args.lora))):
        wrong = f"found {len(scales)} for {len(args.lora)} files"
        raise UserError("--lora_scale", wrong, "give one for all --lora, or one for each")
    if args.lora_scale and not args.lora:
        raise UserError("--lora_scale", "found without --lora", "name the file it is for")
    networks = {id(role.backbone): (role.backbone, one.teacher) for one in found for role in one.role.members}
    for network, teacher in networks.values():
        for file, scale in zip(args.lora, scales * len(args.lora)):
            add_to(network, teacher, Path(file), scale, "--lora")


def _nasa_scale(args, loaded) -> float:
    """NASA's scale for this student, 0 where nothing is to be subtracted."""
    from fastgen.networks.codecs import TextCodec

    if args.nasa_scale is not None and args.nasa_scale < 0:
        raise UserError("--nasa_scale", f"found {args.nasa_scale}", "give 0 or more")
    able = loaded.is_student and isinstance(loaded.codec, TextCodec) and not args.base_steps
    if args.nasa_scale is not None and not (args.negative_prompt and able):
        warn(
            "--nasa_scale acts on a --negative_prompt of a text-to-image student alone, without --base_steps"
        )
    if not args.negative_prompt or not able:
        return 0.0
    own = loaded.info.nasa_scale if loaded.info else 0.0
    return own if args.nasa_scale is None else args.nasa_scale


def run(args) -> int:
    """Load, draw and write; the exit code."""
    from fastgen.cli.conditions import conditions
    from fastgen.cli.windows import windowed
    from fastgen.export.assets import read_info
    from fastgen.export.load import locate
    from fastgen.networks.device import open_device

    check_numbers(args)
    check_companions(args)
    out = open_folder(Path(args.out), args.overwrite)
    folder = locate(args.model)
    if folder is not None and (asset := read_info(folder)) is not None:
        for flag in passed_over(args, flags().parse_args(["--model", args.model]), TAKEN):
            warn(f"{flag} has no effect: {args.model} is a 3D asset, which is rendered")
        return draw_views(args, folder, asset, out)
    for flag in (f for f in ("camera", "turntable") if vars(args)[f]):
        raise UserError(f"--{flag}", f"found for {args.model}, which is no 3D asset", "leave it out")
    device = open_device(args.device)
    loaded = load_sized(args.model, args.base, asked_size(args))
    if len(loaded.codec.shape) == 1:
        raise UserError("--model", f"{args.model} makes points, not images", "measure it with python -m eval")
    check_blocks(args, loaded)
    put_fidelity(args, loaded)
    if len(loaded.codec.shape) == 2:
        return complete(args, loaded.codec, contenders(args, loaded, device), out, device)
    if args.scan:
        raise UserError("--scan", f"found for {args.model}, which completes no scans", "leave it out")
    check_clip(args, loaded.codec)
    loaded.teacher.to(device)
    cond, names = conditions(args, loaded.codec)
    generators = [windowed(one, args.windows) for one in contenders(args, loaded, device)]
    seeds = range(args.seed, args.seed + (args.num_images or len(names)))
    if not args.insist:
        check_size(out, len(seeds), args.batch_size, loaded.codec.shape, generators)
    record: dict = {"arguments": vars(args), "guidance": generators[-1].guidance, "contenders": []}
    gallery = Gallery(out, seeds, names, args.clip_format or "gif", args.fps or 8.0)
    try:
        for generator in generators:
            record["contenders"].append(_draw_into(gallery, generator, cond, args.batch_size, device))
    except (interrupt.Stopped, NotFinite, OSError) as error:
        with interrupt.deferred(), suppress(OSError):  # what was made is kept, with its record
            gallery.close(record)
        if isinstance(error, interrupt.Stopped):
            return _stopped(error, gallery)
        raise
    if args.visualize_dt:
        from fastgen.cli.hybrid import draw_steps

        record["visualize_dt"] = draw_steps(generators, cond, seeds, out, device).name
    with interrupt.deferred():
        gallery.close(record)
    if len(generators) == 2:
        ratio = record["contenders"][1]["seconds_per_image"] / record["contenders"][0]["seconds_per_image"]
        print(f"{'':<20} the student is {ratio:.1f} times as fast")
    print(f"wrote {len(seeds)} images and grid.png to {out}")
    return 0


def _draw_into(gallery: Gallery, generator: Generator, cond: dict, batch_size: int, device) -> dict:
    """Draw every sample of one contender, written as it comes; what samples.json says of it."""
    seconds, num = 0.0, len(gallery.seeds)
    gallery.contender(generator.name)
    for first, images, spent in batches(generator, cond, gallery.seeds, batch_size, device):
        with interrupt.deferred():
            gallery.add(first, images)
        interrupt.check()
        seconds += spent / num
    print(f"{generator.name:<20} {num} images, {seconds:.4g} s and {generator.nfe} network calls each")
    return {"name": generator.name, "nfe": generator.nfe, "seconds_per_image": seconds}


def _stopped(stop: interrupt.Stopped, gallery: Gallery) -> int:
    """Say what is kept after a signal, and how to draw the rest."""
    made, num = gallery.count, len(gallery.seeds)
    text = f"{stop}: stopped; {made} of {num} images are kept in {gallery.out}"
    if made < num:
        rest = f"--seed {gallery.seeds[0] + made} --num_images {num - made}"
        text += f"; {rest} with another --out draws the rest"
    print(text, file=sys.stderr)
    return interrupt.REQUEUE
