"""A network that makes the asset of any prompt in one pass (amortised text-to-3D), and it as a student.

  z = SiLU(A mean(text));  h = B z as [4 width, 4, 4, 4]
  blocks, each of twice the side and half the channels:  h = up(SiLU((1 + a(z)) norm(conv(h)) + b(z)))
  field = conv(h): the four values of a dense grid, which `FieldAsset` shows

Paper: Ma et al. 2024, arXiv 2407.02040 (ScaleDreamer), which trains such a network for many prompts; this is
the smallest of its three kinds, 3D convolutions (3DConv-net).

Differs: no noise beside the text, so one asset for a prompt; a scale and a shift of normalised channels in
the place of modulated weights; the last convolution gives density and colour themselves, no small network.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Schedule
from fastgen.threed.asset import Render
from fastgen.threed.cameras import Cameras
from fastgen.threed.fields import DenseGrid, FieldAsset, marched, shaded
from fastgen.threed.student import AssetStudent

COARSEST, LEAST = 4, 16
"""points of a side where it begins; fewest channels"""
TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
"""of a condition: the text [B, L, C], and which of it counts [B, L]"""
PLAIN = "plain_"
"""prefix of a condition's entries that are of the prompt without a word for the view"""


class Block(nn.Module):
    """Twice the side."""

    def __init__(self, width: int, out: int, told: int):
        super().__init__()
        self.conv = nn.Conv3d(width, out, 3, padding=1)
        self.norm = nn.GroupNorm(8, out, affine=False)
        self.style = nn.Linear(told, 2 * out)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        scale, shift = self.style(z)[..., None, None, None].chunk(2, 1)
        h = F.silu((1 + scale) * self.norm(self.conv(h)) + shift)
        return F.interpolate(h, scale_factor=2, mode="trilinear")


class GridGenerator(nn.Module):
    """Text [B, L, text_width] to the values [B, 4, size, size, size] of a dense grid."""

    def __init__(self, text_width: int, size: int, width: int, seed: int = 0):
        """size: 4 times a power of two; width: a quarter of the channels where it begins."""
        super().__init__()
        num = (size // COARSEST).bit_length() - 1
        assert size == COARSEST * 2**num and num > 0, size
        self.size, told = size, 4 * width
        widths = [max(LEAST, 4 * width >> i) for i in range(num + 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.told = nn.Sequential(nn.Linear(text_width, told), nn.LayerNorm(told), nn.SiLU())
            self.start = nn.Linear(told, widths[0] * COARSEST**3)
            self.blocks = nn.ModuleList(Block(a, b, told) for a, b in zip(widths, widths[1:]))
            self.out = nn.Conv3d(widths[-1], 4, 3, padding=1)
        with torch.no_grad():
            self.out.weight *= 0.1
            nn.init.zeros_(self.get_parameter("out.bias"))

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask [B, L]: which places of the text count; all without one."""
        if mask is None:
            mean = text.mean(1)
        else:
            counts = mask.to(text)[..., None]
            mean = (text * counts).sum(1) / counts.sum(1).clamp(min=1)
        z = self.told(mean.float())
        h = self.start(z).unflatten(1, (-1, COARSEST, COARSEST, COARSEST))
        for block in self.blocks:
            h = block(h, z)
        return DenseGrid.UNIT * self.out(h)


class GeneratedAssets(AssetStudent):
    """A student whose assets a network makes of cond["plain_encoder_hidden_states"] [B, L, C]."""

    def __init__(
        self,
        generator: nn.Module,
        encode: Callable[[Tensor], Tensor],
        schedule: Schedule,
        size: int,
        background: str = "grey",
        surface: bool = False,
        samples: int = 48,
    ):
        """generator: (text [B, L, C], mask [B, L] or None) to values [B, 4, S, S, S]; surface, samples: as of
        a `FieldAsset`.
        """
        super().__init__([], encode, schedule, size, background)
        self.generator, self.surface, self.samples = generator, surface, samples

    def look(self, z: Tensor, cond: Cond) -> Render:
        values = self.generator(cond[PLAIN + TEXT], cond.get(PLAIN + MASK)).float()

        def at(p: Tensor) -> tuple[Tensor, Tensor]:
            places = p.flatten(1, 3)[:, :, None, None]
            found = F.grid_sample(values, places, align_corners=True, padding_mode="border")
            return shaded(p, found[..., 0, 0].mT.view(*p.shape[:-1], 4), self.surface)

        return marched(at, Cameras.of(cond["camera"]), self.size, self.samples, self.behind(z).to(values))

    @torch.no_grad()
    def made(self, cond: Cond) -> list[FieldAsset]:
        """The assets of prompts' own conditions, which have no prefix."""
        device = next(self.generator.parameters()).device
        text, mask = cond[TEXT].to(device), cond.get(MASK)
        values = self.generator(text, mask if mask is None else mask.to(device))
        return fields_of(values, self.surface, self.samples)


def fields_of(values: Tensor, surface: bool, samples: int) -> list[FieldAsset]:
    """Grids [B, 4, S, S, S] as assets of their own."""
    found = []
    for one in values.cpu():
        asset = FieldAsset("grid", one.shape[-1], surface, samples)
        asset.field.table.data.copy_(one[None] / DenseGrid.UNIT)
        found.append(asset.eval())
    return found


def generated(
    settings: dict,
    width: int,
    seed: int,
    encode: Callable[[Tensor], Tensor],
    schedule: Schedule,
    size: int,
    background: str,
) -> GeneratedAssets:
    """The student of the config's section `student.asset`, untrained, for texts of a width."""
    generator = GridGenerator(width, settings["size"], settings["generator"]["width"], seed)
    field = settings["surface"], settings["samples"]
    return GeneratedAssets(generator, encode, schedule, size, background, *field)


def text_width(shapes: dict) -> int:
    """Of the text among the shapes of conditions; a UserError where there is none."""
    if TEXT not in shapes:
        raise UserError(
            "student.asset.generator", "the teacher has no text as a sequence", "use another teacher"
        )
    return shapes[TEXT][-1]
