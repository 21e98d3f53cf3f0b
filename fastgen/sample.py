"""Sample an export: python sample.py --model runs/quickstart/export --labels 0-9 --num_images 40 --out out

The number of steps, their times, the scheduler and guidance come from the export; nothing has to be remembered.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from fastgen.errors import UserError


def _flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser("sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", required=True, help="export folder, LoRA file, or a teacher folder")
    flags.add_argument("--base", default="", help="base of a LoRA file, if not the one its header names")
    flags.add_argument("--prompt", action="append", default=[], help="may be repeated")
    flags.add_argument("--prompts", default="", help="text file, one prompt a line")
    flags.add_argument("--negative_prompt", default="", help="has no effect on a student with guidance baked in")
    flags.add_argument("--labels", default="", help="class labels: 3, 0-9 or 1,4,7")
    flags.add_argument("--num_images", type=int, default=0, help="total, cycling through prompts or labels")
    flags.add_argument("--steps", type=int, default=0, help="default: as trained")
    flags.add_argument("--seed", type=int, default=0, help="image i uses seed + i, whatever the batch size")
    flags.add_argument("--batch_size", type=int, default=50)
    flags.add_argument("--out", default="out")
    flags.add_argument("--overwrite", action="store_true", help="write into a folder that has files")
    flags.add_argument("--compare_teacher", action="store_true", help="also sample the teacher from the same noise")
    flags.add_argument("--teacher_steps", type=int, default=20)
    flags.add_argument("--guidance", type=float, default=None, help="of the teacher; default: what the student was trained on")
    flags.add_argument("--device", default="", help="default: cuda if there is one")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Entry point of sample.py; 0, or 2 for a user's mistake."""
    args = _flags().parse_args(argv)
    try:
        run(args)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse_labels(text: str) -> list[int]:
    """3 | 0-9 | 1,4,7 as a list."""
    try:
        found = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
        return found
    except ValueError:
        raise UserError("--labels", f"found {text!r}", "3, 0-9 or 1,4,7") from None


def conditions(args, codec) -> tuple[dict, list]:
    """(condition rows, what each stands for)."""
    import torch

    if hasattr(codec, "prompts"):
        texts = list(args.prompt)
        if args.prompts:
            if not Path(args.prompts).is_file():
                raise UserError("--prompts", f"{args.prompts} does not exist", "a text file, one prompt a line")
            texts += [line.strip() for line in Path(args.prompts).read_text().splitlines() if line.strip()]
        if not texts:
            raise UserError("--prompt", "none given", "this model is asked by text: --prompt or --prompts")
        for text in texts:
            if lost := codec.cut(text):
                print(f"warning: prompt longer than {codec.max_length} tokens, cut: {lost!r}", file=sys.stderr)
        return codec.prompts(texts), texts
    if args.prompt or args.prompts:
        raise UserError("--prompt", "this model takes class labels, not text", "--labels 0-9")
    labels = parse_labels(args.labels) if args.labels else list(range(max(codec.num_classes, 1)))
    return codec.labels(torch.tensor(labels)), labels


def run(args) -> list:
    """Load, sample, write PNGs, grid and samples.json; returns the images [N, C, H, W]."""
    import torch

    from fastgen.backbones.base import Cond  # noqa: F401
    from fastgen.export import load_base, load_export
    from fastgen.roles import Role, Student

    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not args.overwrite:
        raise UserError("--out", f"{out} is not empty", "another folder, or --overwrite")
    loaded = load_export(args.model, args.base)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded.teacher.to(device)
    codec, student = loaded.teacher.codec, loaded.student
    cond, names = conditions(args, codec)
    count = args.num_images or len(names)
    if args.negative_prompt:
        print("warning: --negative_prompt has no effect: guidance is baked into the student", file=sys.stderr)
    contenders = {}
    if student is not None:
        if args.steps and args.steps != len(student.times):
            print(f"warning: trained for {len(student.times)} steps, sampling with {args.steps}", file=sys.stderr)
            student = Student(student.backbone, student.adapter, student.schedule.steps(args.steps), student.sampler)
        contenders["student"] = student
    guidance = args.guidance if args.guidance is not None else loaded.info.get("guidance_baked_in", 1.0)
    if args.compare_teacher or student is None:
        if student is None:
            base, role = loaded.teacher, Role(loaded.teacher.backbone)
        else:
            base, role = load_base(loaded, args.base)
            base.to(device)
        contenders["teacher"] = (role, args.steps if student is None and args.steps else args.teacher_steps, guidance)
    made = {n: _sample(c, codec, cond, count, args.seed, args.batch_size, device) for n, c in contenders.items()}
    _write(out, made, names, args)
    return made


def _sample(contender, codec, cond: dict, count: int, seed: int, batch: int, device):
    """(images in [0, 1], seconds per image, network evaluations) of a Student or (role, steps, guidance)."""
    import torch

    from fastgen.codecs import select
    from fastgen.roles import Student
    from fastgen.samplers import ImageNoise, sample_student, sample_teacher

    def chunk(index):
        seeds = [seed + int(i) for i in index]
        c = {k: v.to(device) for k, v in select(cond, index % len(next(iter(cond.values()), index))).items()}
        if isinstance(contender, Student):
            return codec.decode(sample_student(contender, seeds, codec.shape, c, device))
        role, steps, w = contender
        uncond = {k: v.to(device) for k, v in codec.null(len(index)).items()}
        return codec.decode(sample_teacher(role, ImageNoise(seeds, codec.shape, device).first, c, uncond, steps, w))

    if isinstance(contender, Student):
        evaluations = len(contender.times)
    else:
        evaluations = contender[1] * (1 if contender[2] in (0, 1) else 2)
    with torch.no_grad():
        chunk(torch.arange(1))  # warm-up, not timed
        start = time.perf_counter()
        images = torch.cat([chunk(i).cpu() for i in torch.arange(count).split(batch)])
    return images, (time.perf_counter() - start) / count, evaluations


def _write(out: Path, made: dict, names: list, args) -> None:
    """PNGs by index and seed, one grid (a block of rows per contender), and a record of everything asked."""
    import torch
    from PIL import Image

    from fastgen.finish import save_grid

    out.mkdir(parents=True, exist_ok=True)
    first = next(iter(made))
    for i, image in enumerate(made[first][0]):
        array = (image * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
        Image.fromarray(array).save(out / f"{i:05d}_{args.seed + i}.png")
    save_grid(torch.cat([m[0] for m in made.values()]), out / "grid.png")
    record = {"arguments": vars(args), "asked": names}
    for name, (images, seconds, evaluations) in made.items():
        record[name] = {"images": len(images), "nfe": evaluations, "seconds_per_image": seconds}
        print(f"{name:<8} {len(images)} images, {evaluations} network evaluations, {seconds:.4f} s each")
    if len(made) == 2:
        print(f"student is {made['teacher'][1] / made['student'][1]:.1f} times faster; grid: student rows above, teacher below")
    (out / "samples.json").write_text(json.dumps(record, indent=2))
    print(f"wrote {out}/grid.png")
