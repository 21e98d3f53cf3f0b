"""Sample an export: python sample.py --model runs/quickstart/export --labels 0-9 --num_images 40

Steps, times, scheduler and guidance come from the export; nothing has to be remembered. Image i draws all its
noise from seed + i, so neither the batch size nor the number of images changes a picture.
"""

import argparse
import json
import time
from contextlib import contextmanager
from pathlib import Path

from fastgen.core.errors import UserError, warn

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        "sample.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = flags.add_argument
    add("--model", required=True, help="export folder, LoRA file, run folder, or a teacher's folder")
    add("--base", default="", help="base of a LoRA file, if not the one its header names")
    add("--prompt", action="append", default=[], help="what to draw; may be repeated")
    add("--prompts", default="", metavar="FILE", help="text file, one prompt a line")
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="first frame or control image; one for all, or one each",
    )
    add("--negative_prompt", default="", help="for teachers, and for students with NASA")
    add("--nasa_scale", type=float, default=None, help="negative prompt of a student; default: its export's")
    add("--labels", default="", help="class labels: 3, 0-9 or 1,4,7; all if not given")
    add("--num_images", type=int, default=0, help="in all, going round prompts or labels; default one each")
    add("--steps", type=int, default=0, help="default: what the model was trained for")
    add("--seed", type=int, default=0, help="of the first image")
    add("--batch_size", type=int, default=50)
    add("--out", default="samples", help="folder of PNGs, grid.png and samples.json")
    add("--overwrite", action="store_true", help="replace the samples in a folder that holds some")
    add("--compare_teacher", action="store_true", help="draw the same seeds with the teacher, below")
    add("--teacher_steps", type=int, default=0, help="default: what the run compared with")
    add("--guidance", type=float, default=None, help="teacher's guidance; default: what the student learned")
    add("--dtype", choices=DTYPES, default="fp32", help="of the denoiser")
    add("--device", default="", help="default: cuda if there is one")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Entry point of sample.py; 0, or 2 for a user's mistake."""
    from fastgen.core.console import fail, quiet

    args = _flags().parse_args(argv)
    quiet()
    try:
        run(args)
    except UserError as error:
        return fail(error)
    return 0


class Generator:
    """One contender: a student with its times, or a teacher with its steps and guidance."""

    def __init__(self, loaded, steps: int, guidance: float, null: dict, nasa_scale: float = 0.0):
        """nasa_scale: subtract the attention to `null`, a student's negative prompt (negative_prompts.py)."""
        self.nasa_scale = nasa_scale
        from fastgen.roles.roles import Student

        self.role, self.codec, self.null = loaded.role, loaded.codec, null
        self.guidance, self.is_student = guidance, isinstance(self.role, Student)
        if isinstance(self.role, Student):
            self.role = _as_asked(self.role, steps, guidance)
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
                return self.codec.decode(sample_student(self.role, seeds, self.codec.shape, cond, device))
        noise = ImageNoise(seeds, self.codec.shape, device).first
        uncond = cond | {k: v.expand(len(seeds), *v.shape[1:]) for k, v in self.null.items()}
        w = self.guidance if self.null else 1.0
        return self.codec.decode(sample_teacher(self.role, noise, cond, uncond, self.steps, w))

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


def _as_asked(student, steps: int, guidance: float):
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


def draw(generator: Generator, cond: dict, seeds: list[int], batch_size: int, device="cpu"):
    """(images, the i-th under condition i modulo their number; seconds per image without the warm-up)."""
    import torch
    from tqdm.auto import tqdm

    from fastgen.core.batch import select

    num_rows = len(next(iter(cond.values()))) if cond else 1

    def batch(index):
        rows = {k: v.to(device) for k, v in select(cond, index % num_rows).items()}
        return generator(rows, [seeds[i] for i in index.tolist()], device).cpu()

    images = []
    with torch.no_grad():
        batch(torch.arange(1))
        start = time.perf_counter()
        with tqdm(total=len(seeds), desc=generator.name, unit="image", leave=False) as bar:
            for index in torch.arange(len(seeds)).split(batch_size):
                images.append(batch(index))
                bar.update(len(index))
    return torch.cat(images), (time.perf_counter() - start) / len(seeds)


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


def run(args) -> dict:
    """Load, draw, write; the record that samples.json holds."""
    import torch

    from fastgen.cli.conditions import conditions
    from fastgen.export.load import load_export

    for name in ("num_images", "steps", "teacher_steps", "seed"):
        if vars(args)[name] < 0:
            raise UserError(f"--{name}", f"found {vars(args)[name]}", "give 0 or more")
    if args.batch_size < 1:
        raise UserError("--batch_size", f"found {args.batch_size}", "give 1 or more")
    out = open_folder(Path(args.out), args.overwrite)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_export(args.model, args.base or None)
    if len(loaded.codec.shape) == 1:
        raise UserError("--model", f"{args.model} makes points, not images", "measure it with python -m eval")
    loaded.teacher.to(device)
    cond, names = conditions(args, loaded.codec)
    generators = contenders(args, loaded, device)
    seeds = [args.seed + i for i in range(args.num_images or len(names))]
    images, record = [], {"arguments": vars(args), "guidance": generators[-1].guidance, "contenders": []}
    for generator in generators:
        found, seconds = draw(generator, cond, seeds, args.batch_size, device)
        images.append(found)
        record["contenders"].append(
            {"name": generator.name, "nfe": generator.nfe, "seconds_per_image": seconds}
        )
        print(
            f"{generator.name:<20} {len(seeds)} images, "
            f"{seconds:.4g} s and {generator.nfe} network calls each"
        )
    if len(generators) == 2:
        ratio = record["contenders"][1]["seconds_per_image"] / record["contenders"][0]["seconds_per_image"]
        print(f"{'':<20} the student is {ratio:.1f} times as fast")
    record["images"] = [
        {"file": f"{i:05d}_{seed}.png", "seed": seed, "condition": names[i % len(names)]}
        for i, seed in enumerate(seeds)
    ]
    write(out, images, [p.name for p in generators], record)
    print(f"wrote {len(seeds)} images and grid.png to {out}")
    return record


def open_folder(out: Path, overwrite: bool) -> Path:
    """The output folder; one with files is refused, or with `overwrite` cleared of samples."""
    if out.exists() and not out.is_dir():
        raise UserError("--out", f"{out} is a file", "give a folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError("--out", f"{out} is not empty", "give another folder, or --overwrite")
        if not (out / "samples.json").is_file():
            found = f"{out} was not written by sample.py"
            raise UserError("--out", found, "give another folder: --overwrite replaces samples only")
        for image in json.loads((out / "samples.json").read_text()).get("images", []):
            (out / Path(image["file"]).name).unlink(missing_ok=True)
    return out


def write(out: Path, images: list, titles: list[str], record: dict) -> None:
    """A PNG (of a clip a gif) per sample of the first contender, the grid of all, samples.json."""
    from fastgen.core.files import write_text
    from fastgen.data.media import filmstrip, save_clip, to_pil

    out.mkdir(parents=True, exist_ok=True)
    for image, entry in zip(images[0], record["images"]):
        if image.ndim == 4:
            entry["file"] = str(Path(entry["file"]).with_suffix(".gif"))
            save_clip([to_pil(frame) for frame in image.unbind(1)], out / entry["file"])
        else:
            to_pil(image).save(out / entry["file"])
    if images[0].ndim == 5:
        images = [filmstrip(clips) for clips in images]
    grid(images, titles).save(out / "grid.png")
    write_text(out / "samples.json", json.dumps(record, indent=2))


def grid(images: list, titles: list[str], columns: int = 10, most: int = 100):
    """Up to `most` images, each contender's row above the next one's, titled where there are several."""
    from PIL import Image, ImageDraw

    from fastgen.data.media import to_pil

    num = min(len(images[0]), most)
    filmstrips = images[0].shape[-1] >= 6 * images[0].shape[-2]  # which stand alone
    columns = 1 if filmstrips else min(num, columns)
    scale = max(1, 64 // images[0].shape[-1])
    height, width = images[0].shape[-2] * scale + 2, images[0].shape[-1] * scale + 2
    left = 110 if len(images) > 1 else 0
    rows = -(-num // columns)
    canvas = Image.new("RGB", (left + columns * width, rows * len(images) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (found, title) in enumerate(zip(images, titles)):
        for i in range(num):
            row, column = divmod(i, columns)
            tile = to_pil(found[i]).convert("RGB").resize((width - 2, height - 2), Image.Resampling.NEAREST)
            top = (row * len(images) + k) * height
            canvas.paste(tile, (left + column * width, top))
            if left and not column:
                pen.text((4, top + height // 2 - 6), title, fill="black")
    return canvas
