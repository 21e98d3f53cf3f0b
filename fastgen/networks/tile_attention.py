"""Self-attention of video transformers in tiles: a frame attends to itself and to a few global frames.

Tokens are ordered frame by frame, so that attention between F latent frames is a grid of F x F tiles. With a
set G of m global frames

    frame i attends to frame j  iff  i = j, or j in G, or i in G

which is F (2 m + 1) - m^2 - m of the F^2 tiles. Text tokens beside those of the frames attend to everything,
and everything to them.

    from diffusers import WanPipeline
    from tile_attention import load_tiles
    pipe = WanPipeline.from_pretrained(".")
    load_tiles(pipe.transformer, ".")

The network's own forward runs throughout, its self-attention has another processor. This file needs torch and
diffusers only and is part of exports.

Source: Efficient-vDiT, arXiv 2502.06155.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ATTRIBUTE = "tile_attention"
"""name under which a network holds its control"""
FILE = "tile_masks.json"
FORMAT = 1
LONG = 512
"""tokens from which leaving tiles out saves more than gathering the others costs"""
Watch = Callable[[int, Tensor, Tensor, Tensor, int, Tensor], None]
"""(layer, query, key, value, text tokens, what it gave)"""


# -- masks ---------------------------------------------------------------------------------------------------
def evenly(frames: int, num: int) -> tuple[int, ...]:
    """That many of so many frames, evenly spaced from the first, which image conditions fill."""
    return tuple(i * frames // num for i in range(num))


def tile_mask(frames: int, chosen: Sequence[int]) -> Tensor:
    """Which frames each one attends to under these global ones, bool [F, F]."""
    is_global = torch.zeros(frames, dtype=torch.bool)
    is_global[list(chosen)] = True
    return torch.eye(frames, dtype=torch.bool) | is_global | is_global[:, None]


def tile_count(frames: int, num: int) -> int:
    """Tiles that a mask with so many global frames keeps."""
    return frames * (2 * num + 1) - num**2 - num


def share_of_tiles(frames: int, layers: Sequence[int]) -> float:
    """Tiles that layers of so many global frames keep, as a share of dense attention's."""
    return sum(tile_count(frames, num) for num in layers) / (frames**2 * len(layers))


@cache
def token_mask(frames: int, per_frame: int, chosen: tuple[int, ...], text: int, place: str) -> Tensor:
    """The same between tokens, text first, bool [N, N]."""
    tiles = tile_mask(frames, chosen)
    tokens = tiles.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
    return nn.functional.pad(tokens, (text, 0, text, 0), value=True).to(place)


# -- attention -----------------------------------------------------------------------------------------------
def kernel_for(device: torch.device, tokens: int) -> str:
    """How masked attention over so many tokens is computed: FlexAttention's block masks on CUDA. Elsewhere a
    boolean mask over all tiles ("boolean"), or from `LONG` tokens on the kept ones alone ("parts").
    """
    return "flex" if device.type == "cuda" else "parts" if tokens >= LONG else "boolean"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frames: int,
    chosen: tuple[int, ...],
    text: int = 0,
    kernel: str | None = None,
    backend: Any = None,
) -> Tensor:
    """Attention [B, N, heads, channels] under a mask of global frames; of all frames it is plain."""
    if len(chosen) >= frames:
        return _plain(query, key, value, backend=backend)
    per_frame = (query.shape[1] - text) // frames
    kernel = kernel or kernel_for(query.device, query.shape[1])
    if kernel == "flex":
        return _flex(query, key, value, frames, per_frame, chosen, text)
    if kernel == "parts":
        return _parts(query, key, value, frames, chosen, text, backend)
    mask = token_mask(frames, per_frame, chosen, text, str(query.device))
    return _plain(query, key, value, mask[None, None], backend)


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, backend=None) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(query, key, value, attn_mask=mask, dropout_p=0.0, backend=backend)


def _parts(query, key, value, frames: int, chosen: tuple[int, ...], text: int, backend) -> Tensor:
    """Global frames and text over all keys; each other frame over its own, the global ones' and the text."""
    q, k, v = (x[:, text:].unflatten(1, (frames, -1)) for x in (query, key, value))
    others = [i for i in range(frames) if i not in chosen]
    kept = list(chosen)
    rows = torch.cat([query[:, :text], q[:, kept].flatten(1, 2)], 1)
    dense = _plain(rows, key, value, backend=backend) if rows.shape[1] else rows

    def seen(every: Tensor, x: Tensor) -> Tensor:
        """Keys or values of each other frame, [B F', tokens, heads, channels]."""
        shared = torch.cat([every[:, :text], x[:, kept].flatten(1, 2)], 1)
        shared = shared[:, None].expand(-1, len(others), -1, -1, -1)
        return torch.cat([x[:, others], shared], 2).flatten(0, 1)

    sparse = _plain(q[:, others].flatten(0, 1), seen(key, k), seen(value, v), backend=backend)
    rows = dense[:, text:].unflatten(1, (len(kept), q.shape[2]))
    made = torch.cat([rows, sparse.unflatten(0, (len(query), len(others)))], 1)
    order = torch.tensor([*kept, *others], device=query.device).argsort()
    return torch.cat([dense[:, :text], made[:, order].flatten(1, 2)], 1)


@cache
def _block_mask(frames: int, per_frame: int, chosen: tuple[int, ...], text: int, place: str):
    """The mask of FlexAttention: its kernel leaves out blocks of tokens that it fills with nothing."""
    from torch.nn.attention.flex_attention import create_block_mask

    is_global = torch.zeros(frames, dtype=torch.bool)
    is_global[list(chosen)] = True
    every = torch.cat([torch.ones(text, dtype=torch.bool), is_global.repeat_interleave(per_frame)]).to(place)
    frame = torch.cat([torch.full((text,), -1), torch.arange(frames).repeat_interleave(per_frame)]).to(place)

    def allowed(_batch, _head, q, k):
        return (frame[q] == frame[k]) | every[q] | every[k]

    num = text + frames * per_frame
    return create_block_mask(allowed, None, None, num, num, device=place)


@cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(query, key, value, frames: int, per_frame: int, chosen: tuple[int, ...], text: int) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    mask = _block_mask(frames, per_frame, chosen, text, str(query.device))
    run = _compiled() if query.device.type == "cuda" else flex_attention
    return run(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=mask).transpose(1, 2)


# -- networks ------------------------------------------------------------------------------------------------
class Control:
    """What the processors of one network share: its masks, and the call that it is in.

    `plans` has for each adapter under which it is sparse (None: none) the latent frames of its clips, then
    the number of global frames of every layer, int64 [1 + layers]. No frames: dense.
    """

    def __init__(self, names: Sequence[str], axis: int, patch: int):
        self.names, self.axis, self.patch = list(names), axis, patch
        self.plans: dict[str | None, Tensor] = {}
        self.acting: str | None = None
        self.frames = 0
        self.watch: Watch | None = None

    def plan(self, adapter: str | None = None) -> Tensor:
        """The plan of an adapter, to be changed in place; dense at first."""
        return self.plans.setdefault(adapter, torch.zeros(1 + len(self.names), dtype=torch.int64))

    def chosen(self, layer: int) -> tuple[int, ...] | None:
        """The global frames of a layer in this call; None where it is dense."""
        plan = self.plans.get(self.acting)
        if plan is None or plan[1 + layer] >= plan[0]:
            return None
        return evenly(int(plan[0]), int(plan[1 + layer]))

    def begin(self, _net: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the network's call: how many frames it is of. ValueError where the masks are of others."""
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.frames = x.shape[self.axis] // self.patch
        plan = self.plans.get(self.acting)
        if plan is not None and int(plan[0]) not in (0, self.frames):
            raise ValueError(f"masks of {int(plan[0])} latent frames, and a clip of {self.frames}")

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Show every layer's attention to `watch` inside the block."""
        self.watch = watch
        try:
            yield
        finally:
            self.watch = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, text: int, backend) -> Tensor:
        """The attention of a layer, under its mask."""
        chosen = self.chosen(layer)
        chosen = tuple(range(self.frames)) if chosen is None else chosen
        out = attend(query, key, value, self.frames, chosen, text, backend=backend)
        if self.watch is not None:
            self.watch(layer, query, key, value, text, out)
        return out


class TileProcessor:
    """A processor of self-attention under its control's mask; where that is dense, the network's own."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, control: Control, layer: int, plain: Any):
        self.control, self.layer, self.plain = control, layer, plain

    @property
    def dense(self) -> bool:
        """Whether nothing asks more of this layer than the network's own processor does."""
        for name in ("_attention_backend", "_parallel_config"):
            if hasattr(self.plain, name):
                setattr(self.plain, name, getattr(self, name))
        plain = self.control.watch is None and self.control.chosen(self.layer) is None
        if not plain and self._parallel_config is not None:
            raise ValueError("masks between frames, and tokens that are spread over processes")
        return plain


class WanTiles(TileProcessor):
    """WanAttnProcessor; its text is in other layers."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> Tensor:
        if self.dense:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        query, key = (_rotated(x, *rotary_emb) for x in (query, key))
        out = self.control.attend(self.layer, query, key, value, 0, self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))


class CogVideoXTiles(TileProcessor):
    """CogVideoXAttnProcessor2_0; its text comes before the frames in every layer."""

    def __call__(  # diffusers passes what this signature names, and drops the rest
        self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb

        if self.dense:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        text = encoder_hidden_states.shape[1]
        joined = torch.cat([encoder_hidden_states, hidden_states], 1)
        projected = (layer(joined) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projected)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:

            def turned(x: Tensor) -> Tensor:
                moved: Any = apply_rotary_emb(x[:, text:].transpose(1, 2), image_rotary_emb)
                return torch.cat([x[:, :text], moved.transpose(1, 2)], 1)

            query, key = turned(query), turned(key)
        out = self.control.attend(self.layer, query, key, value, text, None)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))
        return out[:, text:], out[:, :text]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of x [B, N, heads, channels] turned by the angles of their token."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


KINDS: dict[str, tuple[str, int, type[TileProcessor]]] = {
    "WanTransformer3DModel": ("blocks", 2, WanTiles),
    "CogVideoXTransformer3DModel": ("transformer_blocks", 1, CogVideoXTiles),
}
"""by class: where its blocks are, the axis of frames in its input, and the processor of its self-attention"""


def layers_of(net: Any) -> dict[str, Any]:
    """The self-attention layers of a network by name; none where its class has no processor here."""
    path = KINDS.get(type(net).__name__, ("",))[0]
    return {
        f"{path}.{i}.attn1": block.attn1 for i, block in enumerate(getattr(net, path, ()) if path else ())
    }


def patch_of(net: Any) -> int:
    """Latent frames of a token."""
    size = net.config.patch_size
    return size[0] if isinstance(size, (tuple, list)) else net.config.patch_size_t or 1


def attach(net: Any) -> Control:
    """Make a network able to attend in tiles; once is enough. It computes the same until it has masks.
    ValueError for networks of other classes.
    """
    control = net.__dict__.get(ATTRIBUTE)
    if control is not None:
        return control
    layers = layers_of(net)
    if not layers or any(getattr(a, "fused_projections", False) for a in layers.values()):
        raise ValueError(f"{type(net).__name__} is none of {', '.join(KINDS)} with separate projections")
    _, axis, processor = KINDS[type(net).__name__]
    control = Control(list(layers), axis, patch_of(net))
    for layer, attention in enumerate(layers.values()):
        attention.set_processor(processor(control, layer, attention.processor))
    net.register_forward_pre_hook(control.begin, with_kwargs=True)
    net.__dict__[ATTRIBUTE] = control
    return control


# -- files ---------------------------------------------------------------------------------------------------
def document(names: Sequence[str], plan: Tensor) -> dict[str, Any]:
    """A plan as JSON: the number of global frames of each layer by name."""
    frames, *layers = plan.tolist()
    return {"format": FORMAT, "frames": frames, "layers": dict(zip(names, layers))}


def parse(said: Any, names: Sequence[str]) -> Tensor:
    """The plan of such a document. ValueError where it is of another network, or none."""
    layers = said.get("layers") if isinstance(said, dict) else None
    if not isinstance(layers, dict) or said.get("format") != FORMAT:
        raise ValueError(f"no tile masks of format {FORMAT}")
    if list(layers) != list(names):
        raise ValueError(f"masks of {len(layers)} layers, and a network of other {len(names)}")
    values = [said.get("frames"), *layers.values()]
    if not all(isinstance(n, int) and 0 < n <= values[0] for n in values):
        raise ValueError("numbers of global frames that are none")
    return torch.tensor(values)


def load_tiles(net: Any, folder: str | Path = ".") -> Control:
    """Put the masks of an export on its network, which then makes clips of their number of frames alone."""
    control = attach(net)
    said = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    control.plan().copy_(parse(said, control.names))
    return control
