"""Assets made from settings."""

from typing import Any

from fastgen.threed.asset import Asset
from fastgen.threed.fields import FieldAsset
from fastgen.threed.gaussians import GaussianAsset


def make_asset(settings: dict[str, Any], seed: int) -> Asset:
    """One untrained asset; the keys are those of the config's section `student.asset`."""
    if settings["kind"] == "gaussians":
        return GaussianAsset(settings["points"], settings["degree"], seed, settings["move_every"])
    size, surface, samples = (settings[name] for name in ("size", "surface", "samples"))
    return FieldAsset(settings["kind"], size, surface, samples, seed, settings.get("separate", False))


def make_assets(settings: dict[str, Any], seed: int) -> list[Asset]:
    """`num` of them, each drawn by a seed of its own."""
    return [make_asset(settings, seed * 1000 + i) for i in range(settings["num"])]
