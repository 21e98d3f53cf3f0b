"""Draw the images that are to be measured: as many as a protocol asks, by any number of processes.

fastgen-eval generate --model runs/mine --num_samples 5000 --out generated
fastgen-eval generate --model OWNER/NAME --prompts captions.txt --num_samples 30000 --out generated
torchrun --nproc_per_node 8 -m fastgen.cli.evaluate generate ...     each process draws its share of the
batches fastgen-eval generate ... --shard 2/8                                one share by hand, on any machine

Image i draws its noise from seed + i and shows prompt i, going round. Batches begin at multiples of the batch
size whoever draws them, so the files do not depend on the number of processes; a call that was killed goes on
with the batches that are missing.
"""

import argparse
import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.cli import sample
from fastgen.cli.measuring import at_least
from fastgen.core import interrupt
from fastgen.core.console import documented
from fastgen.core.errors import UserError
from fastgen.core.files import placed, to_json
from fastgen.core.paths import expand
from fastgen.core.reading import read_json
from fastgen.data.bundled import WORDS, load_labels
from fastgen.evaluation.prompts import MOST_BYTES
from fastgen.evaluation.prompts import SAMPLES as RECORD
from fastgen.evaluation.sources import REQUEST

PROMPTS = "give a text file, one prompt per line"


@dataclass
class Request:
    """What a set of images is of. texts: prompts, or class labels as text; group_size: images of each prompt,
    following each other; steps 0 and guidance None: as the model was made for.
    """

    model: str
    num: int
    texts: list[str] = field(default_factory=list)
    seed: int = 0
    steps: int = 0
    guidance: float | None = None
    batch_size: int = 50
    group_size: int = 1
    dtype: str = "fp32"
    device: str = ""

    def text_of(self, i: int) -> int:
        """Number of the text of image i."""
        return (i // self.group_size) % max(1, len(self.texts))

    def identity(self, weights: str) -> dict:
        """What must be the same for a set to be gone on with; its size may grow."""
        text = "\n".join(self.texts)
        return {
            "weights_sha256": weights[:16],
            "texts_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "batch_size": self.batch_size,
            "group_size": self.group_size,
            "dtype": self.dtype,
        }


def name_of(i: int) -> str:
    """File of image i."""
    return f"{i:06d}.png"


class Drawing:
    """A model made ready to draw the images of a request. measure: the bundled set whose net judges it, if
    any.
    """

    def __init__(self, request: Request):
        from fastgen.export.load import load_export
        from fastgen.networks.codecs import TextCodec
        from fastgen.networks.device import open_device

        self.request, self.device = request, open_device(request.device)
        loaded = load_export(request.model)
        if len(loaded.codec.shape) < 3:
            raise UserError("--model", f"{request.model} makes points, not images", "give a model of images")
        self.codec: Any = loaded.codec
        if self.codec.needs_image:
            found = f"{request.model} is shown a picture, and none is given here"
            raise UserError("--model", found, "draw with sample.py --image, and measure that folder")
        self.measure = str((loaded.teacher.info or {}).get("measure") or "")
        self.takes_text = isinstance(self.codec, TextCodec)
        if not request.texts:
            request.texts = default_texts(loaded)
        self._check_texts()
        flags = ["--model", request.model, "--steps", str(request.steps), "--dtype", request.dtype]
        if request.guidance is not None:
            flags += ["--guidance", str(request.guidance)]
        self.generator = sample.contenders(sample.flags().parse_args(flags), loaded, self.device)[0]

    def _check_texts(self) -> None:
        texts, num = self.request.texts, self.codec.num_classes
        if self.takes_text or not texts:
            return
        for text in texts:
            if not (text.isdecimal() and int(text) < num):
                raise UserError(
                    "--prompts", f"found {text[:40]!r}", f"give class labels 0 to {num - 1}, one per line"
                )

    def _cond(self, index: list[int]) -> dict[str, Tensor]:
        texts = [self.request.texts[self.request.text_of(i)] for i in index] if self.request.texts else []
        if self.takes_text:
            return self.codec.prompts(texts)
        return self.codec.labels(torch.tensor([int(t) for t in texts])) if texts else {}

    @torch.no_grad()
    def batch(self, first: int) -> Tensor:
        """Images [B, C, H, W] in [0, 1] of the whole batch that begins with image `first`."""
        index = list(range(first, first + self.request.batch_size))
        cond = {k: v.to(self.device) for k, v in self._cond(index).items()}
        return self.generator(cond, [self.request.seed + i for i in index], self.device).cpu()

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.generator.nfe


def default_texts(loaded) -> list[str]:
    """Every class, or the held-out captions that the bundled text-to-image teachers are measured on."""
    from fastgen.networks.codecs import TextCodec

    if not isinstance(loaded.codec, TextCodec):
        return [str(i) for i in range(loaded.codec.num_classes)]
    measure = (loaded.teacher.info or {}).get("measure")
    if measure in WORDS:
        captions = load_labels(measure, "heldout")[1]
        assert captions is not None
        return captions
    if (loaded.teacher.info or {}).get("measure") == "moving":
        from fastgen.data import moving

        return moving.captions(range(moving.count("heldout")), "heldout")
    raise UserError(
        "--prompts", "none given", "give a text file, one prompt per line, since this model takes text"
    )


def shares(num: int, batch_size: int, rank: int, world: int) -> Iterator[int]:
    """First image of each batch that process `rank` of `world` draws."""
    yield from range(rank * batch_size, num, world * batch_size)


def generate(
    request: Request, out: Path, rank: int = 0, world: int = 1, drawing: Drawing | None = None
) -> int:
    """Draw what is missing of this process's share into a folder; how many images were drawn. A drawing of
    the same model may be given, which takes on this request.

    A UserError where the folder holds images of another request.
    """
    drawing = drawing or Drawing(request)
    drawing.request = request
    _claim(request, out)
    drawn = 0
    for first in shares(request.num, request.batch_size, rank, world):
        last = min(first + request.batch_size, request.num)
        if all((out / name_of(i)).is_file() for i in range(first, last)):
            continue
        images = drawing.batch(first)
        if images.ndim != 4:
            raise UserError("--model", f"{request.model} makes clips", "give a model of images")
        with interrupt.deferred():
            for i in range(first, last):
                _save(images[i - first], out / name_of(i))
                drawn += 1
        interrupt.check()
    if all((out / name_of(i)).is_file() for i in range(request.num)):
        _write_record(request, drawing, out)
    return drawn


def _save(image: Tensor, path: Path) -> None:
    from fastgen.data.media import to_pil

    with placed(path) as temporary:
        to_pil(image).save(temporary)


def _claim(request: Request, out: Path) -> None:
    """Write what the folder is of, or check that it is of this."""
    from fastgen.evaluation.encoders.base import checksum
    from fastgen.export.load import locate

    place = locate(request.model)
    weights = checksum(place) if place else hashlib.sha256(request.model.encode()).hexdigest()
    wanted = request.identity(weights)
    file = out / REQUEST
    if not file.is_file() and out.is_dir() and any(p.suffix != ".part" for p in out.iterdir()):
        raise UserError("--out", f"{out} is not empty", "give another folder")
    _write_first(file, to_json({"model": request.model, **wanted}, 2))
    before = read_json(file, "--out", "give another folder, or delete this one")
    differs = [k for k, v in wanted.items() if before.get(k) != v]
    if differs:
        found = f"{out} holds images of another {', '.join(d.removesuffix('_sha256') for d in differs)}"
        raise UserError("--out", found, "give another folder, or delete this one")


def _write_first(file: Path, text: str) -> None:
    """Write a file whole unless it is there: of several processes the first one's stays."""
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    own = file.with_name(f"{file.stem}.{os.getpid()}.part")
    own.write_text(text, encoding="utf-8")
    with suppress(FileExistsError):
        os.link(own, file)
    own.unlink()


def _write_record(request: Request, drawing: Drawing, out: Path) -> None:
    """samples.json, as sample.py writes it."""
    texts = request.texts or [""]
    images = [
        {"file": name_of(i), "seed": request.seed + i, "condition": texts[request.text_of(i)]}
        for i in range(request.num)
    ]
    record = {"model": request.model, "name": drawing.generator.name, "nfe": drawing.nfe, "images": images}
    if (out / RECORD).is_file() and len(
        read_json(out / RECORD, "--out", limit=MOST_BYTES)["images"]
    ) >= request.num:
        return
    (out / RECORD).unlink(missing_ok=True)
    _write_first(out / RECORD, to_json(record))


def flags() -> argparse.ArgumentParser:
    """Of the command."""
    found = documented("fastgen-eval generate", __doc__)
    add = found.add_argument
    add(
        "--model",
        required=True,
        type=expand,
        help="export, run folder, LoRA file, or teacher; hub id if cached",
    )
    add("--num_samples", type=int, required=True)
    add("--out", required=True, type=expand, metavar="DIR")
    add("--prompts", default="", type=expand, metavar="FILE", help="prompts or labels, one a line")
    add("--group_size", type=int, default=1, help="images of each prompt, following each other")
    add("--seed", type=int, default=0, help="of the first image")
    add("--steps", type=int, default=0, help="default: what the model was made for")
    add("--guidance", type=float, default=None, help="of a teacher; default: what its run compared with")
    add("--batch_size", type=int, default=50)
    add("--dtype", choices=sample.DTYPES, default="fp32", help="of the denoiser")
    add("--shard", default="", metavar="I/N", help="this share of the batches; default: torchrun's")
    add("--device", default="", help="default: cuda if there is one")
    return found


def read_shard(text: str) -> tuple[int, int]:
    """(rank from 0, number of processes) of I/N, or of torchrun's environment."""
    if not text:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise UserError("--shard", f"found {text!r}", "give I/N, from 1/N to N/N")
    return int(first) - 1, int(of)


def run(args) -> int:
    """The command; its exit code."""
    from fastgen.data.text import read_lines

    at_least(args, num_samples=1, batch_size=1, group_size=1, seed=0, steps=0)
    texts = read_lines(args.prompts, "--prompts", PROMPTS) if args.prompts else []
    known = {k: getattr(args, k) for k in ("seed", "steps", "guidance", "batch_size", "group_size", "dtype")}
    request = Request(args.model, args.num_samples, texts, device=args.device, **known)
    drawn = generate(request, Path(args.out), *read_shard(args.shard))
    print(
        f"drew {drawn} of {args.num_samples} images; the others were there or are of other shards: {args.out}"
    )
    return 0
