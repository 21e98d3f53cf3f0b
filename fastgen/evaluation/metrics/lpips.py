"""LPIPS (Zhang 2018, arXiv 1801.03924) by torchmetrics' heads and a torchvision backbone from a local file:
the distance of pairs, and diversity as the mean distance between images of one prompt.

Which backbone a file is follows from its names: AlexNet, VGG16 or SqueezeNet. Values of two are not
comparable.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.evaluation.encoders.base import needs, unreadable
from fastgen.evaluation.metrics.estimate import Estimate, mean_of
from fastgen.evaluation.metrics.metric import Metric
from fastgen.evaluation.metrics.pixels import check_side
from fastgen.evaluation.metrics.variety import within_groups

WANTED = "alexnet-owt-7be5be79.pth, vgg16-397923af.pth or squeezenet1_1-b8a52dc0.pth (torchvision)"
COUNTS = {16: "alex", 32: "vgg", 52: "squeeze"}
"""tensors in the file of each backbone"""
SIDES = {"alex": 31, "vgg": 16, "squeeze": 17}
"""smallest pictures that each backbone takes"""


@lru_cache(maxsize=2)
def load(path: Path) -> nn.Module:
    """(a, b) in [-1, 1], [B, 3, H, W] -> [B, 1, 1, 1]."""
    try:
        import torchvision  # noqa: F401  (builds the backbone)
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError:
        raise needs("torchmetrics and torchvision", "lpips") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if len(state) not in COUNTS:
            raise ValueError(f"{len(state)} tensors")
        kind: Any = COUNTS[len(state)]
        net = _LPIPS(pretrained=True, net=kind, pnet_rand=True)
        _fill(net.net, state)
    except Exception as error:
        raise unreadable("lpips", path, error, WANTED) from None
    return net.eval().requires_grad_(False)


def _fill(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """torchvision's `features.N...` into slices that keep the number N, as `sliceK.N...`."""
    own = backbone.state_dict()
    values = {}
    for name in own:
        plain = "features." + ".".join(
            p for p in name.split(".") if not p.startswith("slice") and p != "slices"
        )
        values[name] = state[_squeezed(plain, state)]
    backbone.load_state_dict(values)


def _squeezed(name: str, state: dict[str, Tensor]) -> str:
    """torchmetrics keeps SqueezeNet's slices in a list, whose own number comes first."""
    if name in state:
        return name
    head, _, rest = name.split(".", 2)
    return f"{head}.{rest}"


def _distance(net: nn.Module, device, a: Tensor, b: Tensor, batch_size: int = 16) -> Tensor:
    """[B] of uint8 images."""
    found = []
    for x, y in zip(a.split(batch_size), b.split(batch_size)):
        x, y = (v.expand(-1, 3, -1, -1).to(device).float() / 127.5 - 1 for v in (x, y))
        with torch.no_grad():
            found.append(net(x, y).flatten().cpu())
    return torch.cat(found)


def _net(material: Any) -> Any:
    return load(material.encoders.path("lpips", WANTED)).to(material.encoders.device)


def lpips(material: Any, encoder: str) -> Estimate:
    """Of pairs."""
    net, device, found = _net(material), material.encoders.device, []
    for a, b in material.pairs():
        check_side(a, SIDES[net.pnet_type])
        found.append(_distance(net, device, a, b))
    return mean_of(torch.cat(found))


def diversity(material: Any, encoder: str) -> Estimate:
    """Within the images of a prompt."""
    net, images = _net(material), torch.cat(list(material.images()))
    check_side(images, SIDES[net.pnet_type])
    return within_groups(images, material.group_size, partial(_distance, net, material.encoders.device))


METRICS = (
    Metric("lpips", "perceptual distance of pairs", "lower", "arXiv 1801.03924", lpips, ("pairs",), "", 1),
    Metric("lpips_diversity", "LPIPS within a prompt", "higher", "arXiv 1801.03924", diversity, ("groups",)),
)
