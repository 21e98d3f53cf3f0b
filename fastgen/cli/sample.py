"""Sample an export: python sample.py --model runs/quickstart/export --labels 0-9 --num_images 40

Steps, times, scheduler and guidance come from the export; nothing has to be remembered. Image i draws all its
noise from seed + i, so neither the batch size nor the number of images changes a picture.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgen.cli.pictures import Gallery, open_folder
from fastgen.cli.sample_limits import add_size, asked_size, check_numbers, check_size, load_sized
from fastgen.core import interrupt
from fastgen.core.console import documented, exit_code, program, quiet
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
        help="first frame or control image: one for all prompts, or repeated, one for each",
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
    add_size(found)
    add("--steps", type=int, default=0, help="sampling steps; default: as trained")
    add("--seed", type=int, default=0, help="seed of the first image")
    add("--batch_size", type=int, default=50, help="images per batch; it changes no image")
    add("--out", default="samples", type=expand, help="folder to write PNGs, grid.png and samples.json to")
    add("--insist", action="store_true", help="do not refuse more than disk, memory or 100 days allow")
    add("--overwrite", action="store_true", help="replace the samples in a folder that holds some")
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


class Generator:
    """One contender: a student with its times, or a teacher with its steps and guidance."""

    def __init__(self, loaded, steps: int, guidance: float, null: dict, nasa_scale: float = 0.0):
        """nasa_scale: subtract the attention to `null`, a student's negative prompt (negative_prompts.py)."""
        from fastgen.roles.roles import Student

        self.nasa_scale = nasa_scale
        self.role, self.codec, self.null = loaded.role, loaded.codec, null
        self.guidance, self.is_student = guidance, isinstance(self.role, Student)
        if isinstance(self.role, Student):
            self.role = _with_flags(self.role, steps, guidance)
            self.steps = len(self.role.times)
        else:
            self.steps = steps or 20

    @property
    def name(self) -> str:
        return f"{'student' if self.is_student else 'teacher'}, {self.steps} step{'s' * (self.steps > 1)}"

    @property
    def nfe(self) -> int:
        """Network evaluations per image; guidance takes two a step."""
        return self.steps * (1 if self.is_student or self.guidance in (0, 1) or not self.null else 2)

    def __call__(self, cond: dict, seeds: list[int], device):
        """Images [B, C, H, W] in [0, 1]."""
        from fastgen.sampling.solvers import ImageNoise, sample_student, sample_teacher

        if self.is_student:
            with self._negative():
                return self._decoded(sample_student(self.role, seeds, self.codec.shape, cond, device))
        noise = ImageNoise(seeds, self.codec.shape, device).first
        uncond = cond | {k: v.expand(len(seeds), *v.shape[1:]) for k, v in self.null.items()}
        w = self.guidance if self.null else 1.0
        return self._decoded(sample_teacher(self.role, noise, cond, uncond, self.steps, w))

    def _decoded(self, x0):
        """Pictures of denoised samples; NotFinite instead of black ones."""
        from fastgen.sampling.solvers import check_finite

        images = self.codec.decode(x0)
        check_finite(f"samples of the {self.name}", x0, images)
        return images

    @contextmanager
    def _negative(self):
        """The student's networks under NASA while it draws; a LoRA's teacher shares them afterwards."""
        from fastgen.networks import negative_prompts

        nets = [r.backbone.net for r in self.role.members] if self.nasa_scale else []
        states, mask = (self.null.get(f"encoder_{k}") for k in ("hidden_states", "attention_mask"))
        for net in nets:
            negative_prompts.attach(net, states, self.nasa_scale, mask)
        try:
            yield
        finally:
            for net in nets:
                negative_prompts.remove(net)


def _with_flags(student, steps: int, guidance: float):
    """The student in `steps` steps (0: its own), at this scale where it takes one; warns outside what it was
    trained for.
    """
    own, spec = len(student.times), student.spec
    if steps not in (0, own):
        if not spec.grid:
            warn(f"--steps: trained for {own}, sampling with {steps}")
        student = student.with_steps(steps)
    if spec.guidance_range and not spec.steps_as_guidance:
        low, high = spec.guidance_range
        if not low <= guidance <= high:
            warn(f"--guidance: trained for {low:g} to {high:g}, sampling with {guidance:g}")
        student = student.with_guidance(guidance)
    return student


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

    guided = not loaded.is_student or args.compare_teacher
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
    if args.compare_teacher and loaded.is_student:
        found.append(loaded.reference())
    generators = []
    for one in found:
        one.to(device, getattr(torch, DTYPES[args.dtype]))
        null = null_of(args, one.codec)
        wanted = steps if one is loaded else args.teacher_steps or (info.teacher_steps if info else 20)
        scale = nasa_scale if one is loaded else 0.0
        generators.append(Generator(one, wanted, guidance, {k: v.to(device) for k, v in null.items()}, scale))
    return generators


def _nasa_scale(args, loaded) -> float:
    """NASA's scale for this student, 0 where nothing is to be subtracted."""
    from fastgen.networks.codecs import TextCodec

    if args.nasa_scale is not None and args.nasa_scale < 0:
        raise UserError("--nasa_scale", f"found {args.nasa_scale}", "give 0 or more")
    able = loaded.is_student and isinstance(loaded.codec, TextCodec)
    if args.nasa_scale is not None and not (args.negative_prompt and able):
        warn("--nasa_scale has no effect without a --negative_prompt for a text-to-image student")
    if not args.negative_prompt or not able:
        return 0.0
    own = loaded.info.nasa_scale if loaded.info else 0.0
    return own if args.nasa_scale is None else args.nasa_scale


def run(args) -> int:
    """Load, draw and write; the exit code."""
    from fastgen.cli.conditions import conditions
    from fastgen.networks.device import open_device

    check_numbers(args)
    out = open_folder(Path(args.out), args.overwrite)
    device = open_device(args.device)
    loaded = load_sized(args.model, args.base, asked_size(args))
    if len(loaded.codec.shape) == 1:
        raise UserError("--model", f"{args.model} makes points, not images", "measure it with python -m eval")
    loaded.teacher.to(device)
    cond, names = conditions(args, loaded.codec)
    generators = contenders(args, loaded, device)
    seeds = range(args.seed, args.seed + (args.num_images or len(names)))
    if not args.insist:
        check_size(out, len(seeds), args.batch_size, loaded.codec.shape, generators)
    record: dict = {"arguments": vars(args), "guidance": generators[-1].guidance, "contenders": []}
    gallery = Gallery(out, seeds, names)
    try:
        for generator in generators:
            record["contenders"].append(_draw_into(gallery, generator, cond, args.batch_size, device))
    except (interrupt.Stopped, NotFinite, OSError) as error:
        with interrupt.deferred(), suppress(OSError):  # what was made is kept, with its record
            gallery.close(record)
        if isinstance(error, interrupt.Stopped):
            return _stopped(error, gallery)
        raise
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
