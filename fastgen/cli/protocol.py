"""Measure a generator or a set of images as a published protocol does.

fastgen-eval protocol mini-fashion --model runs/mine --out measured
fastgen-eval protocol coco2014-30k --model runs/mine --prompts captions.txt --against val2014 \\
    --weights inception=FILE clip=FILE --out measured
fastgen-eval protocol geneval --model runs/mine --prompts evaluation_metadata.jsonl --out measured
fastgen-eval protocol geneval --results results.jsonl           read the tool's results back
fastgen-eval protocol                                           all protocols

Images are drawn into OUT/images (a killed call goes on; `fastgen-eval generate` with the same seed and
prompts draws them with many processes), or taken from --images. OUT/results.json has the numbers and what
they were made with.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

from fastgen.cli import sample
from fastgen.cli.generate import PROMPTS, Request, generate
from fastgen.cli.measuring import at_least, open_material
from fastgen.core.console import documented
from fastgen.core.errors import UserError, warn
from fastgen.core.files import to_json, write_json
from fastgen.core.paths import expand


def flags() -> argparse.ArgumentParser:
    """Of the command."""
    found = documented("fastgen-eval protocol", __doc__)
    add = found.add_argument
    add("protocol", nargs="?", default="", metavar="NAME", help="or a .yaml file; without it all are listed")
    add("--model", default="", type=expand, help="export, run folder, LoRA file, or teacher")
    add("--images", default="", type=expand, metavar="SOURCE", help="images that are there already")
    add("--out", default="", type=expand, metavar="DIR")
    add("--prompts", default="", type=expand, metavar="PATH", help="what the protocol says")
    add("--against", default="", type=expand, metavar="SOURCE", help="what the protocol says")
    add("--weights", nargs="+", default=[], metavar="NAME=PATH", help="local files of networks")
    add("--num_samples", type=int, default=0, help="fewer than the protocol's: labelled so")
    add("--metrics", nargs="+", default=[], metavar="NAME", help="in place of the protocol's")
    add("--results", default="", type=expand, metavar="FILE", help="results of the protocol's own tool")
    add("--seed", type=int, default=0, help="of the first image")
    add("--steps", type=int, default=0, help="default: what the model was made for")
    add("--guidance", type=float, default=None, help="of a teacher; default: what its run compared with")
    add("--batch_size", type=int, default=50)
    add("--dtype", choices=sample.DTYPES, default="fp32", help="of the denoiser")
    add("--cache", default="", type=expand, metavar="DIR", help="keep features there between calls")
    add("--device", default="", help="default: cuda if there is one")
    return found


def run(args) -> int:
    """The command; its exit code."""
    from fastgen.evaluation import protocols

    at_least(args, num_samples=0, seed=0, steps=0, batch_size=1)
    if not args.protocol:
        print(protocols.table())
        return 0
    protocol = protocols.read(args.protocol)
    if args.results:
        return _read_back(protocol, args)
    if bool(args.model) == bool(args.images):
        raise UserError("--model", "give either --model or --images", "see --help")
    if not args.out:
        raise UserError("--out", "none given", "give the folder to write to")
    if protocol.layout:
        return _lay_out(protocol, args)
    found = _measure(protocol, args)
    write_json(Path(args.out) / "results.json", found)
    print(to_json(found, 2))
    return 0


def _measure(protocol, args) -> dict:
    """The numbers with what they were made with."""
    from fastgen.data.bundled import NAMES
    from fastgen.data.text import read_lines
    from fastgen.evaluation import protocols
    from fastgen.evaluation.material import measure
    from fastgen.evaluation.registry import wanted

    names = list(args.metrics or protocol.metrics)
    asked = [wanted(n) for n in names]
    bundled = protocol.reference if protocol.reference in NAMES else ""
    if any("reference" in w.metric.needs for w in asked) and not (args.against or bundled):
        raise UserError("--against", "none given", f"give {protocol.reference}")
    texts = read_lines(args.prompts, "--prompts", PROMPTS) if args.prompts else []
    own = SimpleNamespace(
        images=args.images or str(_draw(protocol, args, texts)),
        first=0 if args.images else args.num_samples or protocol.num_samples,
        equal_counts=protocol.equal_counts,
        against=args.against or bundled,
        extractor=bundled,
        prompts=args.prompts if args.images else "",
        weights=args.weights,
        clip=protocol.clip,
        device=args.device,
        cache=args.cache,
        group_size=protocol.group_size,
        resolution=protocol.resolution,
    )
    material = open_material(own, asked)
    departures = protocols.departures(protocol, len(material.source), names)
    for text in departures:
        warn(f"{protocol.name}: {text}; not comparable with published numbers of this protocol")
    estimates = measure(material, asked)
    return {
        "protocol": {"name": protocol.name, "sha256": protocol.sha256, "departures": departures},
        "model": args.model or args.images,
        "num_images": len(material.source),
        **{label: e.value for label, e in estimates.items()},
        "intervals": {label: list(e.interval()) for label, e in estimates.items()},
        "seed": args.seed,
        **material.describe(),
    }


def _draw(protocol, args, texts: list[str], group_size: int = 0) -> Path:
    """The folder of the protocol's images, all drawn."""
    known = {k: getattr(args, k) for k in ("seed", "steps", "guidance", "batch_size", "dtype", "device")}
    num = args.num_samples or protocol.num_samples
    request = Request(args.model, num, texts, group_size=group_size or protocol.group_size, **known)
    generate(request, Path(args.out) / "images")
    return Path(args.out) / "images"


def _lay_out(protocol, args) -> int:
    """Draw for a tool that measures in our place."""
    from fastgen.evaluation import layouts

    if not args.prompts:
        raise UserError("--prompts", "none given", f"give {protocol.prompts}")
    items = layouts.read_items(protocol.layout, Path(args.prompts))
    if args.images:
        folder = Path(args.images)
    elif protocol.layout == "vbench":
        found = "clips are drawn by sample.py"
        raise UserError("--model", found, "give its folder as --images, with --num_images 5 per prompt")
    else:
        args.num_samples = args.num_samples or len(items) * protocol.group_size
        folder = _draw(protocol, args, [prompt for prompt, _ in items])
    out = Path(args.out) / protocol.layout
    num = layouts.export(protocol.layout, folder, items, out, protocol.group_size)
    print(f"wrote {num} samples of {len(items)} prompts to {out}, as {protocol.title} takes them")
    return 0


def _read_back(protocol, args) -> int:
    from fastgen.evaluation import layouts

    if not protocol.layout:
        raise UserError("--results", f"{protocol.name} is measured here", "leave it out")
    found = layouts.read_results(protocol.layout, Path(args.results))
    print(to_json({"protocol": protocol.name, "sha256": protocol.sha256, **found}, 2))
    return 0
