"""What the demo draws with: one export, its teacher beside it, and the choices that the two leave open."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen.cli.conditions import conditions, null_of
from fastgen.cli.generator import Generator
from fastgen.cli.sample import DTYPES, flags
from fastgen.core.batch import select
from fastgen.core.errors import UserError
from fastgen.export import lora
from fastgen.export.load import Loaded, load_export
from fastgen.networks.codecs import LabelCodec, TextCodec
from fastgen.networks.device import open_device


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one click asks for."""

    prompt: str = ""
    label: str = ""
    image: str = ""
    """file of a first frame or control image"""
    steps: int = 0
    """0: the model's own"""
    seed: int = 0
    num_images: int = 1
    guidance: float | None = None
    weight: float = 1.0
    """of a LoRA: 0 is the teacher, 1 as trained"""
    compare: bool = False


@dataclass(frozen=True)
class Drawn:
    """Pictures [B, C, H, W] or clips [B, C, F, H, W] of one contender, in [0, 1]."""

    name: str
    images: torch.Tensor
    seconds: float
    """per picture"""
    nfe: int


class DemoModel:
    """A loaded export; what it takes decides what the page offers."""

    def __init__(self, model: str, base: str = "", device: str = "", dtype: str = "fp32"):
        self.device, self.dtype = open_device(device), getattr(torch, DTYPES[dtype])
        self.model = model
        self.loaded = load_export(model, base or None)
        if len(self.loaded.codec.shape) < 3:
            raise UserError("--model", f"{model} makes points, not pictures", "give an image model")
        self.loaded.teacher.to(self.device)
        self.loaded.to(self.device, self.dtype)
        self._teacher: Loaded | None = None
        codec = self.loaded.codec
        self.takes_text = isinstance(codec, TextCodec) and codec.family.takes_text
        self.takes_image = codec.needs_image
        if isinstance(codec, TextCodec) and codec.family.needs_last_image:
            found = f"{model} is shown a first and a last frame"
            raise UserError("--model", found, "draw with sample.py --image and --last_image")
        self.labels = codec.class_names if isinstance(codec, LabelCodec) else []

    @property
    def steps(self) -> int:
        """The model's own number of steps."""
        info = self.loaded.info
        if self.loaded.is_student:
            return len(self.loaded.student.times)
        return info.steps if info else 20

    @property
    def step_choices(self) -> list[int]:
        """Numbers of steps that it was trained for; of a teacher a few that make sense."""
        info = self.loaded.info
        if not self.loaded.is_student:
            return sorted({self.steps, 4, 10, 20, 50})
        return sorted({self.steps, *(int(n) for n in (info.other_step_counts if info else {}))})

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Lowest and highest guidance scale to offer; None where it is baked in."""
        info = self.loaded.info
        if not self.loaded.is_student:
            return (1.0, 10.0)
        if info is None or info.steps_as_guidance:
            return None
        return info.guidance_range

    @property
    def guidance(self) -> float:
        return self.loaded.info.guidance if self.loaded.info else 1.0

    @property
    def is_lora(self) -> bool:
        return self.loaded.role.adapter is not None

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher to draw beside it."""
        return self.loaded.is_student and (self.is_lora or bool(self.loaded.info and self.loaded.info.base))

    def draw(self, request: Request) -> list[Drawn]:
        """The pictures of the export, then those of its teacher where they are asked for."""
        if self.takes_text and not request.prompt.strip():
            raise UserError("prompt", "it is empty", "say what to draw")
        if self.takes_image and not request.image:
            raise UserError("image", "none given", "choose a picture")
        args = self._arguments(request)
        found = [self._one(self.loaded, args, request, request.steps, request.weight)]
        if request.compare and self.has_teacher:
            if self._teacher is None:
                self._teacher = self.loaded.reference().to(self.device, self.dtype)
            steps = self.loaded.info.teacher_steps if self.loaded.info else 20
            found.append(self._one(self._teacher, args, request, steps, 1.0))
        return found

    def warm_up(self, folder: Path) -> None:
        """One picture that nobody sees, so that the first click is as quick as those after it; `folder` takes
        the grey picture that image models are given.
        """
        from PIL import Image

        file = folder / "grey.png"
        codec: Any = self.loaded.codec
        height, width = codec.pixels if self.takes_image else (64, 64)
        factor = codec.enlarges or 1  # of a picture to enlarge there is one size
        Image.new("RGB", (width // factor, height // factor), "grey").save(file)
        image, label = str(file) if self.takes_image else "", self.labels[0] if self.labels else ""
        self.draw(Request(prompt="a picture", label=label, image=image, steps=self.steps))

    def _arguments(self, request: Request):
        """The request as the flags of sample.py, which checks them."""
        words = ["--model", self.model]
        words += [f"--prompt={request.prompt}"] if self.takes_text else []
        words += [f"--image={request.image}"] if request.image else []
        if self.labels and request.label:
            words += [f"--labels={self.labels.index(request.label)}"]
        return flags().parse_args(words)

    @torch.no_grad()
    def _one(self, loaded: Loaded, args, request: Request, steps: int, weight: float) -> Drawn:
        cond, _ = conditions(args, loaded.codec)
        null = {k: v.to(self.device) for k, v in null_of(args, loaded.codec).items()}
        scale = self.guidance if request.guidance is None else request.guidance
        generator = Generator(loaded, steps, scale, null)
        rows = {k: v[:1].expand(request.num_images, *v.shape[1:]).to(self.device) for k, v in cond.items()}
        seeds = list(range(request.seed, request.seed + request.num_images))
        start = time.perf_counter()
        with lora.strength(loaded.role, weight):
            images = generator(select(rows, torch.arange(request.num_images)), seeds, self.device).cpu()
        seconds = (time.perf_counter() - start) / request.num_images
        return Drawn(generator.name, images, seconds, generator.nfe)


def save(drawn: Drawn, folder: Path, start: int) -> list[str]:
    """Write the pictures, clips as moving ones; their files."""
    from fastgen.data.clips import save_clip
    from fastgen.data.media import to_pil

    files = []
    for i, image in enumerate(drawn.images, start):
        file = folder / f"{i:05d}.{'gif' if image.ndim == 4 else 'png'}"
        if image.ndim == 4:
            save_clip([to_pil(frame) for frame in image.unbind(1)], file)
        else:
            picture = to_pil(image)
            times = max(1, 256 // picture.width)  # small ones larger, each pixel as a square
            picture.resize((picture.width * times, picture.height * times), 0).save(file)
        files.append(str(file))
    return files
