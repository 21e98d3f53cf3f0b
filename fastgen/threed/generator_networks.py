"""Networks that make the asset of any prompt in one pass (amortised text-to-3D), one for each kind of field.

  z = SiLU(norm(A mean(text)))
  grid:      h = B z as [4 width, 4, 4, 4];  blocks, each of twice the side and half the channels:
             h = up(SiLU((1 + a(z)) norm(conv(h)) + b(z)));  conv(h): the four values of a dense grid
  hash:      tables that all prompts share; the weights of the two layers behind them are W z
  triplane:  h = learned tokens;  blocks:  h += cross(norm(h), text), h += self(norm(h)), h += mlp(norm(h))
             upward convolution of norm(h): three planes; the two layers behind them are shared

Paper: Ma et al. 2024, arXiv 2407.02040 (ScaleDreamer), with such networks: 3DConv-net,
Hyper-iNGP, and a transformer in the form of OpenLRM (arXiv 2311.04400).

Differs: no noise beside the text, so one asset for a prompt; 3D convolutions have a scale and a shift of
normalised channels in the place of modulated weights, and give density and colour themselves; of a hash grid
and of planes one small network gives both; features of planes are added, not joined; four blocks, not twelve.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.threed.fields import DenseGrid, HashGrid, HashTables, Triplane, plane_features, small_net

COARSEST, LEAST = 4, 16
"""points of a side where 3D convolutions begin; fewest channels"""
CHANNELS, HIDDEN, DEPTH = 16, 32, 4
"""of planes; between the two layers behind planes and tables; blocks of the transformer"""


class Generator(nn.Module):
    """Text [B, L, text_width] to what the field of each prompt is read from, one tensor [B, ...]: here the
    values [B, 4, size, size, size] of dense grids.
    """

    kind = "grid"
    size: int

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask [B, L]: which places of the text count; all without one."""
        raise NotImplementedError

    def read(self, made: Tensor, p: Tensor) -> Tensor:
        """The four values [B, N, 4] of fields at points [B, N, 3], each its own."""
        found = F.grid_sample(made, p[:, :, None, None], align_corners=True, padding_mode="border")
        return found[..., 0, 0].mT

    @torch.no_grad()
    def put(self, made: Tensor, field: nn.Module) -> None:
        """Let a field of this kind be that of one prompt, from its part of what was made."""
        assert isinstance(field, DenseGrid), type(field)
        field.table.copy_(made[None] / DenseGrid.UNIT)


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


class GridGenerator(Generator):
    """By 3D convolutions (3DConv-net)."""

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
        z = self.told(mean_of(text, mask))
        h = self.start(z).unflatten(1, (-1, COARSEST, COARSEST, COARSEST))
        for block in self.blocks:
            h = block(h, z)
        return DenseGrid.UNIT * self.out(h)


class HashGenerator(Generator):
    """The weights [B, K] of the two layers, without biases, behind shared tables (Hyper-iNGP)."""

    kind = "hash"

    def __init__(self, text_width: int, size: int, width: int, seed: int = 0):
        """size: of the finest level; width: a quarter of what the text becomes."""
        super().__init__()
        self.size, told = size, 4 * width
        self.tables = HashTables(size, torch.Generator().manual_seed(seed))
        self.features = 2 * len(self.tables.resolutions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.told = nn.Sequential(nn.Linear(text_width, told, bias=False), nn.LayerNorm(told), nn.SiLU())
            self.weights = nn.Linear(told, HIDDEN * self.features + 4 * HIDDEN)
            nn.init.xavier_normal_(self.weights.weight)
            nn.init.zeros_(self.weights.bias)

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.weights(self.told(mean_of(text, mask)))

    def layers(self, made: Tensor) -> tuple[Tensor, Tensor]:
        """([..., HIDDEN, features], [..., 4, HIDDEN]) of weights [..., K]."""
        first, last = made.split([HIDDEN * self.features, 4 * HIDDEN], -1)
        return first.unflatten(-1, (HIDDEN, self.features)), last.unflatten(-1, (4, HIDDEN))

    def read(self, made: Tensor, p: Tensor) -> Tensor:
        first, last = self.layers(made)
        found = self.tables.features(p.flatten(0, 1)).unflatten(0, p.shape[:2])
        return F.relu(found @ first.mT) @ last.mT

    @torch.no_grad()
    def put(self, made: Tensor, field: nn.Module) -> None:
        assert isinstance(field, HashGrid), type(field)
        field.tables.copy_(self.tables.tables)
        for layer, weight in zip((field.net[0], field.net[2]), self.layers(made)):
            layer.get_parameter("weight").copy_(weight)
            nn.init.zeros_(layer.get_parameter("bias"))


class TokenBlock(nn.Module):
    """Tokens [B, T, width] look at a text and at each other."""

    def __init__(self, width: int, text_width: int):
        super().__init__()
        heads = next(n for n in range(max(1, width // 32), 0, -1) if width % n == 0)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.cross = nn.MultiheadAttention(width, heads, kdim=text_width, vdim=text_width, batch_first=True)
        self.own = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, text: Tensor, unread: Tensor | None) -> Tensor:
        """unread [B, L]: places of the text that do not count."""
        asked = self.norms[0](h)
        h = h + self.cross(asked, text, text, key_padding_mask=unread, need_weights=False)[0]
        asked = self.norms[1](h)
        h = h + self.own(asked, asked, asked, need_weights=False)[0]
        return h + self.mlp(self.norms[2](h))


class PlaneGenerator(Generator):
    """Three planes [B, 3, CHANNELS, size, size] by a transformer, with shared layers behind them."""

    kind = "triplane"

    def __init__(self, text_width: int, size: int, width: int, seed: int = 0):
        """size: even, the tokens are half as many a side; width: a quarter of that of the tokens."""
        super().__init__()
        self.size, self.side, wide = size, size // 2, 4 * width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = nn.Parameter(torch.randn(3 * self.side**2, wide) / wide**0.5)
            self.blocks = nn.ModuleList(TokenBlock(wide, text_width) for _ in range(DEPTH))
            self.norm = nn.LayerNorm(wide)
            self.up = nn.ConvTranspose2d(wide, CHANNELS, 2, stride=2)
        self.net = small_net(CHANNELS, HIDDEN, 4, torch.Generator().manual_seed(seed))

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        text, unread = text.float(), None if mask is None else mask == 0
        h = self.tokens.expand(len(text), -1, -1)
        for block in self.blocks:
            h = block(h, text, unread)
        planes = self.norm(h).mT.unflatten(2, (3, self.side, self.side))  # [B, wide, 3, side, side]
        return self.up(planes.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(text), 3))

    def read(self, made: Tensor, p: Tensor) -> Tensor:
        return self.net(plane_features(made, p))

    @torch.no_grad()
    def put(self, made: Tensor, field: nn.Module) -> None:
        assert isinstance(field, Triplane), type(field)
        field.planes.copy_(made)
        field.net.load_state_dict(self.net.state_dict())


def mean_of(text: Tensor, mask: Tensor | None) -> Tensor:
    """Mean [B, C] in float32 of the places of a text [B, L, C] that count."""
    if mask is None:
        return text.mean(1).float()
    counts = mask.to(text)[..., None]
    return ((text * counts).sum(1) / counts.sum(1).clamp(min=1)).float()


def make_generator(settings: dict, text_width: int, seed: int = 0) -> Generator:
    """Untrained, by the kind of the config's section `student.asset`, for texts of a width."""
    forms = {form.kind: form for form in (GridGenerator, HashGenerator, PlaneGenerator)}
    return forms[settings["kind"]](text_width, settings["size"], settings["generator"]["width"], seed)
