"""Measure runs, image folders and teachers.

fastgen-eval --run runs/quickstart [--num_samples 5000]     measure an export again, rewrite results.json
fastgen-eval --images out --against fashion --prompts labels.txt --metrics fd_mini mmd agreement
fastgen-eval --images a --against b --metrics fid kid --weights inception=FILE
fastgen-eval --images a --prompts p.txt --metrics clip hps --weights clip=FILE hps=FILE
fastgen-eval card --teacher assets:teachers/fashion [--guidance 1.5] [--num_samples 1000]

In a checkout `python -m eval` is the same and keeps the leaderboard too.
"""

import argparse
import sys
from pathlib import Path

from fastgen.core.console import CommandFlags, exit_code, quiet
from fastgen.core.errors import UserError
from fastgen.core.files import to_json
from fastgen.core.paths import expand

MINI = ("fd_mini", "mmd", "precision", "recall", "agreement", "clip_mini")
COMMANDS = ("measure", "card")
METRICS = (*MINI, "fid", "kid", "clip", "hps")


def _flags() -> argparse.ArgumentParser:
    flags = CommandFlags(
        "fastgen-eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument
    add("command", nargs="?", default="measure", choices=COMMANDS)
    add("--run", default="", type=expand, metavar="DIR", help="run folder to evaluate again")
    add("--num_samples", type=int, default=0, help="number of samples; default: the run's eval.num_samples")
    add(
        "--images",
        default="",
        type=expand,
        metavar="DIR",
        help="folder of generated images; grid*.png are ignored",
    )
    add(
        "--against",
        default="",
        type=expand,
        help="folder of real images, or digits, fashion, tinted (held-out images)",
    )
    add("--metrics", nargs="+", default=["fd_mini"], choices=METRICS, metavar="NAME", help=", ".join(METRICS))
    add("--extractor", default="", help="network for two folders: digits, fashion or tinted")
    add("--weights", nargs="+", default=[], metavar="NAME=FILE", help="local files for inception, clip, hps")
    add(
        "--prompts",
        default="",
        type=expand,
        metavar="FILE",
        help="text file with the prompts or labels of the images, one per line",
    )
    add(
        "--clip",
        default="vit-g-14",
        metavar="PRESET",
        help="CLIP variant: vit-b-32, vit-l-14, vit-g-14 or dmd2",
    )
    add("--device", default="", help="device; default: cuda if there is one")
    add(
        "--teacher",
        default="",
        type=expand,
        metavar="PATH",
        help="card: teacher to evaluate at 1, 4, 20 and 50 steps",
    )
    add("--guidance", type=float, default=1.0, help="card: classifier-free guidance scale w")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Entry point of fastgen-eval; 0, or 2 for a user's mistake, 3 for samples that are not finite."""
    args = _flags().parse_args(argv)
    quiet()
    return exit_code(lambda: _run(args))


def _run(args) -> int:
    if args.command == "card":
        _card(args)
    elif bool(args.run) == bool(args.images):
        raise UserError("--run", "give either --run DIR or --images DIR", "see --help")
    elif args.run:
        from fastgen.cli.remeasure import remeasure

        remeasure(Path(args.run), args.num_samples, args.device)
    else:
        print(to_json(measure_folder(args), 2))
    return 0


def _card(args) -> None:
    from fastgen.cli.remeasure import measure_teacher

    if not args.teacher:
        raise UserError("--teacher", "none given", "give a teacher folder, e.g. assets:teachers/fashion")
    measure_teacher(args.teacher, args.guidance, args.num_samples or 1000, args.device)


def _weights(pairs: list[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    bad = [k for k in found if k not in ("inception", "clip", "hps") or not found[k]]
    if bad:
        raise UserError("--weights", f"found {bad[0]!r}", "give inception=FILE, clip=FILE or hps=FILE")
    return {name: expand(file) for name, file in found.items()}


def measure_folder(args) -> dict:
    """Every requested metric, with what it was measured with."""
    from fastgen.evaluation.images import image_files
    from fastgen.networks.device import open_device

    device = open_device(args.device)
    metrics, weights = set(args.metrics), _weights(args.weights)
    if metrics & {"clip", "hps"} and not args.prompts:
        raise UserError(
            "--prompts",
            "none given",
            f"give the file of the images' prompts, for {' and '.join(sorted(metrics & {'clip', 'hps'}))}",
        )
    if metrics - {"clip", "hps"} and not args.against:
        raise UserError(
            "--against", "none given", "give a folder of real images, or digits, fashion or tinted"
        )
    found: dict[str, object] = {"num_images": len(image_files(args.images))}
    if metrics & set(MINI):
        found |= _mini(args, metrics, device)
    if metrics & {"fid", "kid"}:
        found |= _inception(args, metrics, weights, device)
    if metrics & {"clip", "hps"}:
        found |= _text(args, metrics, weights, device)
    return found


def _mini(args, metrics: set, device) -> dict:
    """Metrics of the bundled nets."""
    from fastgen.data.bundled import NAMES
    from fastgen.evaluation.images import image_files, read_all, read_prompts
    from fastgen.evaluation.metrics.fd_mini import NOTE, Measurer, attributes_from, compare_features

    name = args.extractor or args.against
    if name not in NAMES:
        raise UserError(
            "--extractor", "none given", f"name the network for two folders, one of {', '.join(NAMES)}"
        )
    measurer = Measurer(name, device)
    mode = "L" if measurer.net.config["channels"] == 1 else "RGB"
    images = read_all(args.images, mode).float() / 255
    if args.against in NAMES:
        requested = read_prompts(args.prompts, image_files(args.images)) if args.prompts else []
        scores = measurer.compare(images, attributes_from(name, requested))
    else:
        real = measurer.features(read_all(args.against, mode, "--against").float() / 255)
        scores = compare_features(measurer.features(images), real)
    if metrics & {"precision", "recall"} and len(images) < Measurer.least:
        found = f"{args.images} holds {len(images)} images"
        raise UserError("--images", found, f"give {Measurer.least} or more, as precision and recall need")
    scores = {"clip_mini" if k == "clip" else k: v for k, v in scores.items()}
    if missing := [m for m in metrics & set(MINI) if m not in scores]:
        raise UserError(
            "--metrics", f"{missing[0]} cannot be computed", "give --against a bundled set and --prompts"
        )
    kept = {
        k: v
        for k, v in scores.items()
        if k.split("_")[0] == "agreement" and "agreement" in metrics or k in metrics
    }
    return {**kept, "extractor": measurer.describe()["extractor"], "note": NOTE}


def _inception(args, metrics: set, weights: dict, device) -> dict:
    """FID and KID; a bundled set is named to compare with its held-out images."""
    from fastgen.data.bundled import NAMES, load_images
    from fastgen.evaluation.images import batches, digest, image_files, local_file
    from fastgen.evaluation.metrics import fid

    for key, folder in (("--images", args.images), ("--against", args.against)):
        if folder not in NAMES and len(image_files(folder, key)) < 2:
            raise UserError(key, f"{folder} holds one image", "give two or more, as fid and kid need")
    file = local_file(weights, "inception", fid.WANTED)
    net = fid.load_inception(file)
    fake = fid.features(net, batches(image_files(args.images)), device)
    if args.against in NAMES:
        real = fid.features(net, load_images(args.against, "heldout").images.split(64), device)
    else:
        real = fid.features(net, batches(image_files(args.against, "--against"), key="--against"), device)
    scores = fid.compare(fake, real, tuple(metrics & {"fid", "kid"}))
    return {**scores, "num_real": len(real), "inception_sha256": digest(file)}


def _text(args, metrics: set, weights: dict, device) -> dict:
    """CLIP score and HPS."""
    from fastgen.evaluation.images import digest, image_files, local_file, read_all, read_prompts
    from fastgen.evaluation.metrics import clip, hps

    if args.clip not in clip.PRESETS:
        raise UserError("--clip", f"found {args.clip!r}", f"allowed: {', '.join(clip.PRESETS)}")
    prompts = read_prompts(args.prompts, image_files(args.images))
    images = read_all(args.images)
    found: dict[str, float | str] = {}
    if "clip" in metrics:
        preset = clip.PRESETS[args.clip]
        file = local_file(weights, "clip", clip.WANTED.format(arch=preset.arch))
        model, tokenizer = clip.load_model(preset.arch, file)
        found["clip"] = clip.clip_score(
            model.to(device), tokenizer, images, prompts, preset.scale, preset.prefix, preset.pre_resize
        )
        found |= {"clip_preset": args.clip, "clip_sha256": digest(file)}
    if "hps" in metrics:
        file = local_file(weights, "hps", hps.WANTED)
        model, tokenizer = hps.load_hps(file)
        found |= {"hps": hps.hps_score(model.to(device), tokenizer, images, prompts), "hps_file": file.name}
        found["hps_sha256"] = digest(file)
    return found


if __name__ == "__main__":
    sys.exit(main())
