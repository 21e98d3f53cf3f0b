"""A network that makes the asset of any prompt in one pass as a student, for each kind of field: what
`generator_networks` makes of a text is rendered from a batch's cameras.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Schedule
from fastgen.threed.asset import Render
from fastgen.threed.cameras import Cameras
from fastgen.threed.fields import FieldAsset, marched, shaded
from fastgen.threed.generator_networks import Generator, make_generator
from fastgen.threed.student import AssetStudent

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
"""of a condition: the text [B, L, C], and which of it counts [B, L]"""
PLAIN = "plain_"
"""prefix of a condition's entries that are of the prompt without a word for the view"""


class GeneratedAssets(AssetStudent):
    """A student whose assets a network makes of cond["plain_encoder_hidden_states"] [B, L, C]."""

    def __init__(
        self,
        generator: Generator,
        encode: Callable[[Tensor], Tensor],
        schedule: Schedule,
        size: int,
        background: str = "grey",
        surface: bool = False,
        samples: int = 48,
    ):
        """surface, samples: as of a `FieldAsset`."""
        super().__init__([], encode, schedule, size, background)
        self.generator, self.surface, self.samples = generator, surface, samples

    def look(self, z: Tensor, cond: Cond) -> Render:
        made = self.generator(cond[PLAIN + TEXT], cond.get(PLAIN + MASK)).float()

        def at(p: Tensor) -> tuple[Tensor, Tensor]:
            found = self.generator.read(made, p.flatten(1, 3)).float()
            return shaded(p, found.view(*p.shape[:-1], 4), self.surface)

        return marched(at, Cameras.of(cond["camera"]), self.size, self.samples, self.behind(z).to(made))

    @torch.no_grad()
    def made(self, cond: Cond) -> list[FieldAsset]:
        """The assets of prompts' own conditions, which have no prefix."""
        device = next(self.generator.parameters()).device
        text, mask = cond[TEXT].to(device), cond.get(MASK)
        made = self.generator(text, mask if mask is None else mask.to(device))
        return fields_of(self.generator, made, self.surface, self.samples)


def fields_of(generator: Generator, made: Tensor, surface: bool, samples: int) -> list[FieldAsset]:
    """What a generator made of prompts [B, ...] as assets of their own."""
    found = []
    for one in made.cpu():
        asset = FieldAsset(generator.kind, generator.size, surface, samples)
        generator.put(one, asset.field)
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
    generator = make_generator(settings, width, seed)
    field = settings["surface"], settings["samples"]
    return GeneratedAssets(generator, encode, schedule, size, background, *field)


def text_width(shapes: dict) -> int:
    """Of the text among the shapes of conditions; a UserError where there is none."""
    if TEXT not in shapes:
        raise UserError(
            "student.asset.generator", "the teacher has no text as a sequence", "use another teacher"
        )
    return shapes[TEXT][-1]
