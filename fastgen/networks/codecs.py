"""Images and conditions on both sides of a denoiser.

A codec turns images [B, C, H, W] in [-1, 1] into the x0 the network works on and back, and labels or
prompts into the `cond` dict the network takes. Nothing else in fastgen knows about autoencoders, tokenizers
or label rows.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.families.base import Family
from fastgen.families.factors import spatial_factor, temporal_factor
from fastgen.families.parts import DiffusersModel
from fastgen.networks.linear_attention import float16_autocast, linear_attention


class Codec(nn.Module):
    """What every teacher's codec offers; see `LabelCodec` and `TextCodec`."""

    shape: tuple[int, ...]
    """of one x0, without the batch"""
    family: Family | None
    vae: Any
    """the autoencoder, a module of diffusers; None where x0 is made of pixels"""
    pipe: Any
    """the diffusers pipeline that encodes prompts; None without one"""
    num_classes: int
    class_names: list[str]
    has_null: bool
    """whether the network knows the empty condition of `null`"""
    guidance: float | None
    """value of the network's own input for the guidance scale; None without such an input"""
    enlarges: int = 0
    """how many times smaller the picture is that the network is shown enlarged; 0: it is shown as it is"""

    def __init__(self, family: Family | None, shape: tuple[int, ...], num_classes: int = 0):
        super().__init__()
        self.family, self.shape, self.num_classes = family, shape, num_classes
        self.class_names = [str(i) for i in range(num_classes)]
        self.vae, self.pipe, self.guidance, self.has_null = None, None, None, num_classes > 0

    @property
    def needs_image(self) -> bool:
        """Whether the network is shown a picture of every sample."""
        return self.family is not None and self.family.needs_image

    @property
    def colours(self) -> int:
        """Channels of the pictures that it is shown."""
        return 3

    def encode(self, images: Tensor) -> Tensor:
        """x0 [B, *shape] of images [B, C, H, W] in [-1, 1]."""
        raise NotImplementedError

    def decode(self, x0: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] of x0 [B, *shape]."""
        raise NotImplementedError

    def null(self, num: int) -> Cond:
        """The empty condition, `num` rows."""
        raise NotImplementedError

    def shown(self, x0: Tensor, cond: Cond) -> Tensor:
        """What a user is shown of samples x0 [B, *shape] drawn under cond: the images of `decode`."""
        return self.decode(x0)


class LabelCodec(Codec):
    """Pixels (folded patch x patch into channels) or an autoencoder's latents, with class labels; the row
    after the last class is the null class.
    """

    def __init__(self, shape: tuple[int, ...], patch: int = 1, num_classes: int = 0, class_names=None):
        super().__init__(None, shape, num_classes)
        self.patch, self.class_names = patch, class_names or self.class_names

    def encode(self, images: Tensor) -> Tensor:
        if self.vae is not None and self.family is not None:
            return encode_latents(self.family, self.vae, images)
        return F.pixel_unshuffle(images, self.patch) if self.patch > 1 else images

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [0, 1]."""
        if self.vae is not None and self.family is not None:
            return decode_latents(self.family, self.vae, x0)
        images = F.pixel_shuffle(x0, self.patch) if self.patch > 1 else x0
        return (images / 2 + 0.5).clamp(0, 1)

    def labels(self, labels: Tensor) -> Cond:
        if not self.num_classes:
            return {}
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise UserError(
                "labels",
                f"found {int(labels.min())} to {int(labels.max())}",
                f"give labels from 0 to {self.num_classes - 1}",
            )
        return {"class_labels": labels.long()}

    def null(self, num: int) -> Cond:
        """The null class; class 0, as a placeholder that is never guided with, where the network has none."""
        row = self.num_classes if self.has_null else 0
        return {"class_labels": torch.full((num,), row)} if self.num_classes else {}


class PictureCodec(LabelCodec):
    """Pixels of pictures that are restored, each from the one that is shown of it."""

    family: Family

    def __init__(self, family: Family, shape: tuple[int, ...], patch: int = 1):
        super().__init__(shape, patch)
        self.family = family

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.shape[-2] * self.patch, self.shape[-1] * self.patch

    @property
    def colours(self) -> int:
        """Channels of the images: 3, or 1 of grey ones."""
        return self.shape[0] // self.patch**2

    def image_rows(self, images: Tensor) -> tuple[Cond, Cond]:
        """The condition of images [B, C, H, W] in [-1, 1], and the null one, which is the same."""
        cond = self.family.encode_image(self, images)
        return cond, cond

    def null(self, num: int) -> Cond:
        """A placeholder; each picture is its own null condition."""
        return {"shown": torch.zeros(num, *self.shape)}


def repeated(scans: Tensor, num: int) -> Tensor:
    """Where num points [B, num, 3] begin: each of a scan's [B, M, 3], num / M times. (The network does the
    same by itself: exports carry its file.)
    """
    return scans.repeat_interleave(num // scans.shape[1], 1)


class ScanCodec(Codec):
    """Scans [B, M, 3] that are completed: x0 [N, 3] is how far each of N points lies from where it starts, a
    point of the scan, in the scan's own unit.
    """

    family: Family

    def __init__(self, family: Family, net: DiffusersModel):
        super().__init__(family, (net.config.num_points, 3))
        self.scan_points, self.has_null = net.config.scan_points, True
        self.formulation: str = net.config.formulation

    def encode(self, images: Tensor) -> Tensor:
        found = f"{self.family.name} completes scans; pictures cannot be turned into its training data"
        raise UserError("data", found, "set data.name to scenes, or data.scans")

    def decode(self, x0: Tensor) -> Tensor:
        """x0 as it is: without the scan it says nothing more."""
        return x0

    def starts(self, scans: Tensor) -> Tensor:
        """Where the points [B, N, 3] begin: each of a scan's, several times."""
        return repeated(scans, self.shape[0])

    def shown(self, x0: Tensor, cond: Cond) -> Tensor:
        """Clouds [B, N, 3]."""
        return self.starts(cond["start"]) + x0

    def scans(self, scans: Tensor) -> Cond:
        """The condition of scans [B, M, 3]: where points start, and what the network is told."""
        return {"start": scans, "scan": scans}

    def untold(self, scans: Tensor) -> Cond:
        """The empty condition of scans: points start there, and the network is told nothing."""
        return {"start": scans, "scan": torch.zeros_like(scans)}

    def null(self, num: int) -> Cond:
        """A placeholder; each scan has a null condition of its own, see `untold`."""
        return self.untold(torch.zeros(num, self.scan_points, 3))


class TextCodec(Codec):
    """An autoencoder and text encoders, seen through the pipeline class that holds them (denoiser and
    scheduler left out), so that prompts are encoded by the very code that will sample the student.
    """

    family: Family

    def __init__(
        self, family: Family, net: DiffusersModel, pipe, shape: tuple[int, ...], max_length: int = 0
    ):
        super().__init__(family, shape)
        self.pipe, self.max_length, self.has_null = pipe, max_length, True
        self.guidance = family.default_guidance if family.guidance_embedded(net) else None
        parts = {} if pipe is None else {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
        self.vae = parts.pop(family.decoder, None)
        self.encoders: nn.ModuleDict | None = nn.ModuleDict(parts)
        self.cond_shapes = family.cond_shapes(net, self)
        self.frame_patch = family.frame_patch(net)
        self._null: Cond | None = None  # encoded once
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""
        factor = spatial_factor(self.family, self.pipe)
        return self.shape[-2] * factor, self.shape[-1] * factor

    @property
    def num_frames(self) -> int:
        """Frames of a video, 1 for an image."""
        factor = temporal_factor(self.family, self.pipe)
        return (self.shape[1] - 1) * factor + 1 if factor else 1

    def encode(self, images: Tensor) -> Tensor:
        return encode_latents(self.family, self.vae, images)

    def decode(self, x0: Tensor) -> Tensor:
        """Images (or frames [B, C, F, H, W]) in [0, 1]; differentiable."""
        return decode_latents(self.family, self.vae, x0)

    def decode_size(self) -> int:
        """Height (and width) in pixels of a decoded sample."""
        return self.decode(torch.zeros(1, *self.shape, device=self.device)).shape[-1]

    @torch.no_grad()
    def prompts(self, prompts: list[str], images: Tensor | None = None) -> Cond:
        """The condition rows of prompts; images [B, 3, H, W] in [-1, 1] where the family needs one
        (first and last frames [B, 3, 2, H, W] where it needs both).
        """
        if self.device.type == "meta" or self.pipe is None:
            return self._shapes(len(prompts))
        self._check_encoders()
        return self._whole(self.family.encode(self, list(prompts)), len(prompts), images)

    @torch.no_grad()
    def null(self, num: int, images: Tensor | None = None) -> Cond:
        """What the pipeline guides away from by default."""
        if self.device.type == "meta" or self.pipe is None:
            return self._shapes(num)
        if self._null is None:
            self._check_encoders()
            row = self.family.nulled(self._whole(self.family.null(self), 1, None))
            self._null = {k: v.cpu() for k, v in row.items()}
        rows = {k: v.to(self.device).expand(num, *v.shape[1:]) for k, v in self._null.items()}
        return rows if images is None else rows | self.image_rows(images)[1]

    @torch.no_grad()
    def image_rows(self, images: Tensor) -> tuple[Cond, Cond]:
        """The part of cond that is the image's [B, 3, H, W], and that of the null condition."""
        cond = self.family.encode_image(self, images.to(self.device))
        return cond, {k: v for k, v in self.family.nulled(cond).items() if k in cond}

    def _whole(self, cond: Cond, num: int, images: Tensor | None) -> Cond:
        """With the parts that no text encoder makes: image and embedded guidance."""
        if self.family.needs_image:
            if images is None:  # a placeholder of the right shape: zeros are mid-grey
                images = torch.zeros(num, 3, *((2,) if self.family.needs_last_image else ()), *self.pixels)
            cond = cond | self.family.encode_image(self, images.to(self.device))
        if self.guidance is not None:
            cond = cond | {"guidance": torch.full((num,), float(self.guidance), device=self.device)}
        return cond

    def _shapes(self, num: int) -> Cond:
        """Zeros in the shapes of a condition: without weights (--dry_run) shapes are all there is."""
        rows = {}
        for key, value in self.cond_shapes.items():
            shape, dtype = value if isinstance(value[0], tuple) else (value, torch.float32)
            made = torch.zeros if dtype.is_floating_point else torch.ones  # masks let everything through
            rows[key] = made(num, *shape, dtype=dtype, device=self.device)
        if self.guidance is not None:
            rows["guidance"] = torch.full((num,), float(self.guidance), device=self.device)
        return rows

    def _check_encoders(self) -> None:
        if self.encoders is None:
            found = "the text encoders were freed once every prompt of the run was encoded"
            raise UserError("prompts", found, "encode prompts before Codec.free")

    def free(self) -> int:
        """Let go of the text encoders once every prompt is encoded; how many bytes that returns."""
        self.null(1)
        if self.encoders is None:
            return 0
        freed = sum(p.numel() * p.element_size() for p in self.encoders.parameters())
        self.drop_encoders()
        return freed

    def drop_encoders(self) -> None:
        """Be without text encoders; what the null condition is must be known, or be told with `know_null`."""
        for name in self.encoders or ():
            setattr(self.pipe, name, None)
        self.encoders = None

    def know_null(self, row: Cond) -> None:
        """Take the null condition [1, ...] from where it was encoded before."""
        self._null = {k: v.cpu() for k, v in row.items()}

    def too_long(self, prompts: list[str]) -> list[str]:
        """Those prompts that do not fit the tokenizer's length."""
        if not self.family.takes_text:
            return []
        tokenizer, found = getattr(self.pipe, self.family.tokenizer), []
        room = self.max_length - tokenizer.num_special_tokens_to_add()
        for first in range(0, len(prompts), 1000):  # together, which is ten times as fast as one by one
            some = prompts[first : first + 1000]
            found += [p for p, ids in zip(some, _token_ids(tokenizer, some)) if len(ids) > room]
        return found

    def cut(self, prompt: str) -> str:
        """The tail of the prompt that does not fit the tokenizer's length, or an empty string."""
        if not self.family.takes_text:
            return ""
        tokenizer = getattr(self.pipe, self.family.tokenizer)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        room = self.max_length - tokenizer.num_special_tokens_to_add()
        return tokenizer.decode(ids[room:]) if len(ids) > room else ""


def _token_ids(tokenizer, prompts: list[str]) -> list[list[int]]:
    return tokenizer(prompts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def encode_latents(family: Family, vae, images: Tensor) -> Tensor:
    """x0 of images in [-1, 1]; differentiable."""
    with _no_overflow(vae, images.device.type):
        return family.normalise(vae, family.to_latents(vae, images.to(vae.dtype)).float()).contiguous()


def decode_latents(family: Family, vae, x0: Tensor) -> Tensor:
    """Images in [0, 1] of x0."""
    with _no_overflow(vae, x0.device.type):
        latents = family.denormalise(vae, x0).to(vae.dtype)
        return (family.decode(vae, latents).float() / 2 + 0.5).clamp(0, 1)


def _no_overflow(vae, device: str) -> AbstractContextManager[Any]:
    """Without autocast where that is to float16 and the autoencoder would overflow it: its config says
    force_upcast, or it has linear attention.
    """
    if not float16_autocast(device):
        return nullcontext()
    upcast = getattr(getattr(vae, "config", None), "force_upcast", False) or linear_attention(vae)
    return torch.autocast(device, enabled=False) if upcast else nullcontext()


def switch_vae(vae, teacher) -> None:
    """Tiled or sliced decoding where the config sets it; refused of an autoencoder that has none."""
    for key, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if not getattr(teacher, key):
            continue
        if vae is None or not hasattr(vae, method):
            found = "this teacher has no autoencoder" if vae is None else f"{type(vae).__name__} cannot do it"
            raise UserError(f"teacher.{key}", found, "set it to false")
        getattr(vae, method)()
