"""What an encoder is: a frozen network with its preprocessing, known by the checksum of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgen.core.errors import UserError
from fastgen.core.files import sha256

Outputs = dict[str, Tensor]
"""by name, [B, d] each: always "features", perhaps "logits" """


class Encoder:
    """uint8 images [B, 3, H, W] to named outputs.

    prepare: uint8 images to what the net takes; preprocessing says it in words; weights: checksum of the
    file, by which caches and results know the encoder.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        preprocessing: str,
        weights: str,
        run: Callable[[nn.Module, Tensor], Outputs] | None = None,
    ):
        self.name, self.net, self.prepare = name, net.eval().requires_grad_(False), prepare
        self.preprocessing, self.weights, self._run = preprocessing, weights, run
        self.device = torch.device("cpu")

    @property
    def key(self) -> str:
        """Sixteen hex digits that two encoders share only if they give the same features."""
        text = f"{self.weights} {self.preprocessing}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to(self, device) -> Encoder:
        """Compute there."""
        self.device = torch.device(device)
        self.net.to(self.device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        """Float32 outputs on the CPU; one grey channel is repeated to three."""
        assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.shape)
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        found = self.outputs(self.prepare(images).to(self.device))
        return {k: v.cpu() for k, v in found.items()}

    def outputs(self, x: Tensor) -> Outputs:
        """Float32 outputs of what `prepare` makes, where the network is; differentiable."""
        found = self._run(self.net, x) if self._run else {"features": self.net(x)}
        return {k: v.flatten(1).float() for k, v in found.items()}

    def describe(self) -> dict[str, str]:
        """What a number must be quoted with."""
        return {"encoder": self.name, "weights_sha256": self.weights[:12], "resize": self.preprocessing}


class TextImageEncoder(Encoder):
    """An encoder of images and of texts into one space; `scale` is the network's own logit scale, `size` the
    side of the pictures it takes.
    """

    size: int

    def __init__(self, *args: Any, texts: Callable[[list[str]], Tensor], scale: float = 100.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._texts, self.scale = texts, scale

    @torch.no_grad()
    def texts(self, prompts: list[str], batch_size: int = 64) -> Tensor:
        """Unit vectors [N, d] of prompts."""
        parts = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        return torch.cat([normalize(self._texts(part), dim=-1).float().cpu() for part in parts])


def checksum(path: Path) -> str:
    """sha256 of a file; of a folder, over the names and contents of the weights and configs in it."""
    if path.is_file():
        return sha256(path)
    known = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin", ".json", ".txt"))
    text = "".join(f"{p.relative_to(path)} {sha256(p)}\n" for p in known)
    return hashlib.sha256(text.encode()).hexdigest()


def state_checksum(net: nn.Module) -> str:
    """sha256 over the names and values of a network's state, for nets that come from no one file."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def needs(extra: str, name: str) -> UserError:
    """What is said where a library is not installed."""
    return UserError("--metrics", f"{name} needs {extra}", 'pip install "fastgen-distill[eval]"')


def unreadable(name: str, path: Path, error: Exception, wanted: str) -> UserError:
    """What is said of a weight file that is not what it should be."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError("--weights", f"{name}: {path} cannot be read ({first})", f"give {wanted}")
