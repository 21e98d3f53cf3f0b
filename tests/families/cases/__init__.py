"""Tiny random pipelines of every family, one builder each, for the battery in ../test_families.py.

A module here states CASES; each builder writes an ordinary diffusers folder offline, in well under a second.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

PROMPTS = ["a red dress", "a blue boot"]


@dataclass
class Case:
    """One family at tiny size, and what the battery must know of it beyond its declaration."""

    family: str
    """the name its folder must be detected as"""
    build: Callable[[Path], None]
    """writes the folder"""
    name: str = ""
    """defaults to the family's; several cases may share one family"""
    options: dict = field(default_factory=dict)
    """keywords of load_teacher: size, frames, guidance"""
    images: Callable[[], torch.Tensor] | None = None
    """what families with needs_image are shown, [2, 3, H, W] in [-1, 1]"""
    call: dict = field(default_factory=dict)
    """keywords of the plain pipeline call that follow from the folder (image=..., num_frames=...)"""
    sampler: str = "ode"
    """what the exported pipeline is compared in: ode, or renoise where its scheduler adds noise"""
    plain: Callable | None = None
    """plain(pipe, case, loaded, noise) -> images in [0, 1], where a pipeline call is not enough"""
    latent: bool = False
    """compare latents: decoding takes too long for a test"""
    excused: dict[str, str] = field(default_factory=dict)
    """check -> why it does not apply (a documented exception, shown in the table of families)"""
    published: list[tuple] = field(default_factory=list)
    """(model, real network config, published parameter count, relative tolerance for its rounding)"""


def _collect() -> dict[str, Case]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "__main__":
            continue
        for case in getattr(importlib.import_module(f"tests.families.cases.{module.name}"), "CASES", ()):
            case.name = case.name or case.family
            assert case.name not in found, case.name
            found[case.name] = case
    return found


CASES = _collect()
