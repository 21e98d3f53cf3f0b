"""Compare generators, or sets of images that are there already.

fastgen-eval compare runs/a runs/b --num_samples 1000 --seeds 3 --out compared
fastgen-eval compare runs/a@1 runs/a@4 assets:teachers/fashion@20 --metrics fd_mini kid_mini agreement_mini
fastgen-eval compare folder_a folder_b --against real --metrics fid kid --weights inception=FILE

MODEL@STEPS takes another number of steps. Generators draw the same requests from the same noise, seed by
seed, into the output folder (a killed comparison goes on); differences to the first one are paired image by
image. One model is held at a time, so a machine that takes each takes all. Writes comparison.md,
comparison.json and comparison.html.
"""

import argparse
import gc
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from fastgen.cli import sample
from fastgen.cli.generate import PROMPTS, Drawing, Request, generate
from fastgen.cli.measuring import at_least, open_encoders, open_material
from fastgen.cli.pictures import grid
from fastgen.core.console import documented
from fastgen.core.errors import UserError
from fastgen.core.files import placed, write_json, write_text
from fastgen.core.paths import expand
from fastgen.evaluation.metrics.estimate import Estimate
from fastgen.evaluation.metrics.speed import Generator

SEED_STRIDE = 1_000_000
"""between the first images of two seeds"""
SHOWN = 10


def flags() -> argparse.ArgumentParser:
    """Of the command."""
    found = documented("fastgen-eval compare", __doc__)
    add = found.add_argument
    add("contenders", nargs="+", metavar="MODEL[@STEPS] or SOURCE")
    add("--names", nargs="+", default=[], metavar="NAME", help="of the contenders in tables, in their order")
    add("--metrics", nargs="+", default=[], metavar="NAME", help="see `fastgen-eval metrics`")
    add("--num_samples", type=int, default=1000, help="of each generator and seed")
    add("--seeds", type=int, default=1, help="sets that each generator draws")
    add("--seed", type=int, default=0, help="of the first image of the first set")
    add("--out", default="compared", type=expand, metavar="DIR")
    add("--guidance", type=float, default=None, help="of teachers; default: what their runs compared with")
    add("--repeats", type=int, default=3, help="timed calls of each generator; 0: none")
    add(
        "--against",
        default="",
        type=expand,
        metavar="SOURCE",
        help="reference; default: of the mini teachers",
    )
    add("--extractor", default="", help="digits, fashion or tinted: whose mini network measures")
    add("--weights", nargs="+", default=[], metavar="NAME=PATH", help="local files of networks")
    add("--prompts", default="", type=expand, metavar="FILE", help="prompts or labels, one a line")
    add("--group_size", type=int, default=1, help="images of each prompt, following each other")
    add("--clip", default="vit-g-14", metavar="PRESET", help="vit-b-32, vit-l-14, vit-g-14 or dmd2")
    add("--forgotten", type=int, default=-1, metavar="N", help="class that was to be unlearned")
    add("--cache", default="", type=expand, metavar="DIR", help="keep features there between calls")
    add("--batch_size", type=int, default=50)
    add("--dtype", choices=sample.DTYPES, default="fp32", help="of the denoisers")
    add("--device", default="", help="default: cuda if there is one")
    return found


@dataclass
class Entry:
    """A contender as the command names it: a model to draw with, or a source of images (steps -1)."""

    name: str
    path: str
    steps: int
    line: str


def entries(args) -> list[Entry]:
    """The contenders, with names that differ."""
    if args.names and len(args.names) != len(args.contenders):
        raise UserError(
            "--names", f"{len(args.names)} for {len(args.contenders)} contenders", "give one each"
        )
    found = []
    for i, text in enumerate(args.contenders):
        path, at, steps = text.rpartition("@")
        if not (at and steps.isdecimal()):
            path, steps = text, "0"
        path = expand(path)
        line = Path(path.removesuffix("/export")).name or path
        name = args.names[i] if args.names else line + (f" at {steps}" if at and steps != "0" else "")
        found.append(Entry(name, path, int(steps) if is_model(path) else -1, line))
    names = [e.name for e in found]
    if double := next((n for n in names if names.count(n) > 1), None):
        raise UserError("--names", f"two contenders are called {double!r}", "give each a name with --names")
    return found


def is_model(path: str) -> bool:
    """Whether a path names something that draws; everything else is a source of images."""
    from fastgen.core.paths import is_analytic, resolve

    if path.startswith("assets:") or is_analytic(path):
        return True
    place = resolve(path)
    known = ("config.yaml", "fastgen.json", "model_index.json", "unet", "transformer", "prior")
    if place.is_dir():
        return any((place / name).exists() for name in known)
    if place.suffix == ".safetensors" and place.is_file():
        from safetensors import safe_open

        with safe_open(place, "pt") as file:
            return "images" not in file.keys()  # noqa: SIM118 (no mapping)
    return not place.exists() and path.count("/") == 1 and not place.suffix


def run(args) -> int:
    """The command; its exit code."""
    from fastgen.evaluation.comparison import compared, markdown
    from fastgen.evaluation.comparison_page import page
    from fastgen.evaluation.registry import wanted

    at_least(args, num_samples=2, seeds=1, seed=0, repeats=0, group_size=1, batch_size=1)
    found, out = entries(args), Path(args.out)
    if out.is_file():
        raise UserError("--out", f"{out} is a file", "give a folder")
    asked = [wanted(name) for name in dict.fromkeys(args.metrics)]
    check_weights(args, asked)
    models = [e for e in found if e.steps >= 0]
    mini = args.extractor or next((m for m in [_mini_of(args, e) for e in models] if m), "")
    asked = asked or [wanted(name) for name in default_metrics(mini)]
    drawn = {e.name: _drawn(args, e, asked, out) for e in models}
    contenders, better, protocol = _measured(args, found, asked, mini, drawn, out)
    document = compared(contenders, better) | {"protocol": protocol}
    write_json(out / "comparison.json", document)
    write_text(out / "comparison.md", markdown(document))
    picture = _grid(args, found, out)
    write_text(out / "comparison.html", page(document, picture.read_bytes() if picture else b""))
    print(markdown(document))
    print(f"wrote comparison.md, .json and .html to {out}")
    return 0


def _request(args, entry: Entry, seed: int) -> Request:
    from fastgen.data.text import read_lines

    texts = read_lines(args.prompts, "--prompts", PROMPTS) if args.prompts else []
    known = {k: getattr(args, k) for k in ("guidance", "batch_size", "group_size", "dtype", "device")}
    return Request(entry.path, args.num_samples, texts, seed, entry.steps, **known)


def check_weights(args, asked) -> None:
    """Refuse a network that cannot be opened before anything is drawn."""
    encoders = open_encoders(args)
    for label, metric, encoder in asked:
        if metric.kind not in ("images", "any"):
            raise UserError("--metrics", f"{label} measures {metric.kind}", "ask for metrics of images")
        if encoder and encoder != "mini":
            encoders.open(encoder)


@contextmanager
def _held(args, entry: Entry) -> Iterator[Drawing]:
    """A model ready to draw; its memory is free again afterwards."""
    drawing = Drawing(_request(args, entry, args.seed))
    try:
        yield drawing
    finally:
        del drawing
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _mini_of(args, entry: Entry) -> str:
    """The bundled set whose net judges a model; a model that cannot be drawn from is refused here, before
    any other has drawn. What it warns of is said when it draws.
    """
    with redirect_stderr(io.StringIO()), _held(args, entry) as drawing:
        return drawing.measure


@dataclass
class Drawn:
    """What remains of a model that has drawn: network calls of an image, seconds of one (0: not timed), and
    the metrics of the generator itself.
    """

    nfe: int
    seconds: float
    estimates: dict[str, Estimate]


def _drawn(args, entry: Entry, asked, out: Path) -> Drawn:
    """Draw all sets of a model into their folders, and time it."""
    with _held(args, entry) as drawing:
        for seed in range(args.seeds):
            request = replace(drawing.request, seed=args.seed + seed * SEED_STRIDE)
            generate(request, _folder(out, entry, seed), drawing=drawing)
        generator = Generator(partial(drawing.batch, 0), args.batch_size, drawing.nfe, args.repeats or 3)
        seconds = _seconds(generator) if args.repeats else 0.0
        material = SimpleNamespace(generator=generator)
        own = {w.label: w.metric.compute(material, "") for w in asked if w.metric.kind == "any"}
        return Drawn(drawing.nfe, seconds, own)


def _seconds(generator: Generator) -> float:
    """Median seconds of an image, after a call that warms up."""
    return generator.timed().p50 / generator.num


def _folder(out: Path, entry: Entry, seed: int) -> Path:
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in entry.name)
    return out / "images" / plain / f"seed_{seed}"


def _measured(args, found: list[Entry], asked, mini: str, drawn: dict[str, Drawn], out: Path):
    """(contenders, which way is better by metric, what the numbers were made with)."""
    from fastgen.evaluation.comparison import Contender
    from fastgen.evaluation.material import measure

    shared = None
    contenders, protocol = [], {}
    of_images = [w for w in asked if w.metric.kind != "any"]
    for entry in found:
        model = drawn.get(entry.name)
        if model is None and len(of_images) < len(asked):
            label = next(w.label for w in asked if w.metric.kind == "any")
            instruction = "leave it out, or compare models alone"
            raise UserError("--metrics", f"{label} needs a model, {entry.name} is a set", instruction)
        by_seed = []
        for seed in range(args.seeds if model else 1):
            drawn_to = _folder(out, entry, seed) if model else None
            material, shared = _material(args, entry, drawn_to, mini, asked, shared)
            by_seed.append((model.estimates if model else {}) | measure(material, of_images))
        nfe, seconds = (model.nfe, model.seconds) if model else (0, 0.0)
        about = {"num_images": len(material.source)}
        contenders.append(Contender(entry.name, by_seed, nfe, seconds, entry.line, about))
        protocol = material.describe()
    protocol.pop("images_sha256", None)
    if drawn:
        drawn_by = {"num_samples": args.num_samples, "seeds": args.seeds, "seed": args.seed}
        protocol = drawn_by | protocol
    return contenders, {w.label: w.metric.better for w in asked}, protocol


def _material(args, entry: Entry, drawn_to: Path | None, mini: str, asked, shared):
    """The material of one set, that of a model in the folder it has drawn to; encoders and reference features
    are shared with the sets before it.
    """
    own = SimpleNamespace(
        images=str(drawn_to or entry.path),
        first=args.num_samples if drawn_to else 0,
        against=args.against or mini,
        extractor=args.extractor or mini,
        prompts="" if drawn_to else args.prompts,
        weights=args.weights,
        clip=args.clip,
        device=args.device,
        cache=args.cache,
        group_size=args.group_size,
        forgotten=args.forgotten,
    )
    material = open_material(own, asked)
    if shared is None:
        shared = material
    else:
        material.share(shared)
    return material, shared


def default_metrics(mini: str) -> list[str]:
    """For the bundled teachers their own, for others what needs no weights."""
    if mini:
        return ["fd_mini", "kid_mini", "recall_mini", "agreement_mini"]
    return ["saturation", "contrast", "sharpness"]


def _grid(args, found: list[Entry], out: Path) -> Path | None:
    """samples.png: a row a contender, the same requests and noise above each other."""
    from itertools import islice

    from fastgen.evaluation.inputs import open_source

    rows = []
    for entry in found:
        source = open_source(str(_folder(out, entry, 0)) if entry.steps >= 0 else entry.path)
        rows.append(next(iter(source.batches(SHOWN))).float() / 255)
    num = min(map(len, rows))
    if len({row.shape[1:] for row in rows}) > 1:
        return None
    path = out / "samples.png"
    with placed(path) as temporary:
        grid([row[:num] for row in list(islice(rows, len(rows)))], [e.name for e in found]).save(temporary)
    return path
