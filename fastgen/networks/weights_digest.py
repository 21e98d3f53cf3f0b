"""A hash of a teacher: what a resumed run and a recorded measurement compare."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastgen.families.parts import of_adapter
from fastgen.networks.quantization import stored_tensors

WHOLE, BLOCKS, BLOCK = 2**30, 64, 2**16
"""weights up to WHOLE bytes are hashed in full; of larger ones BLOCKS evenly spaced blocks of each tensor"""


def weights_digest(teacher) -> str:
    """Hash of a teacher's weights (denoiser, autoencoder and encoders; adapters apart) and of the settings
    of its network and scheduler.
    """
    return _digest(_configs(teacher), (teacher.backbone, teacher.codec))


def denoiser_digest(denoiser) -> str:
    """Hash of one network's weights (adapters apart), and of its settings and what it predicts."""
    return _digest([_plain(getattr(denoiser, "net", None)), denoiser.prediction], (denoiser,))


def _digest(about: list, parts: Iterable) -> str:
    tensors: list[tuple[str, Tensor]] = []
    for part in parts:
        if isinstance(part, nn.Module):
            tensors += [*part.named_parameters(), *part.named_buffers()]
    kept = [(n, t.detach()) for n, t in tensors if not of_adapter(n) and not t.is_meta]
    whole = sum(t.numel() * t.element_size() for _, t in kept) <= WHOLE
    digest = hashlib.sha256(repr(about).encode())
    for name, tensor in kept:
        digest.update(f"{name.replace('.base_layer.', '.')}{tuple(tensor.shape)}{tensor.dtype}".encode())
        for part in stored_tensors(tensor) if whole else _blocks(tensor):
            digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _configs(teacher) -> list:
    """The settings that a teacher's folder gives its network, its scheduler and us."""
    plain = [_plain(p) for p in (getattr(teacher.backbone, "net", None), teacher.scheduler)]
    return [*plain, sorted((k, repr(v)) for k, v in (teacher.info or {}).items())]


def _plain(part) -> list[tuple[str, str]]:
    """The settings of a part of diffusers, in order."""
    config = dict(getattr(part, "config", None) or {})
    return sorted((k, repr(v)) for k, v in config.items() if not k.startswith("_"))


def _blocks(tensor: Tensor) -> Iterable[Tensor]:
    """Evenly spaced blocks of a tensor, the first and the last included."""
    for part in stored_tensors(tensor):
        flat, size = part.reshape(-1), max(1, BLOCK // part.element_size())
        if flat.numel() <= BLOCKS * size:
            yield flat
            continue
        last = flat.numel() - size
        yield from (flat[i * last // (BLOCKS - 1) :][:size] for i in range(BLOCKS))
