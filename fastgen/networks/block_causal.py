"""Block-causal attention for WanTransformer3DModel, with a cache of keys and values: clips block after block.

A block is some latent frames that are denoised together; its tokens attend to their own block and to those
before it, at most `window` blocks with its own. All of a clip at once under that mask (each frame may have a
time of its own), or one block at a time over what the cache holds of the blocks before: the same numbers.

    from diffusers import WanPipeline
    from block_causal import generate
    pipe = WanPipeline.from_pretrained(".")
    frames = generate(pipe, "a red dress moving left", num_frames=18)

The network's own forward runs throughout: its self-attention has another processor, and its rotary embedding
is asked for the frames of the cache too. Without a `Pass` it computes what it always did. This file needs
torch and diffusers only and is part of exports.

Source: CausVid, arXiv 2412.07772; Self-Forcing, arXiv 2506.08009.

Differs
- the cache holds keys before their rotation, and positions count from the oldest block that it still holds.
  Rotary attention sees differences of positions alone, so nothing changes, but a clip of any length stays
  within the positions of training.
- the first latent frame of a clip is never kept beside a rolling window.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ATTRIBUTE = "block_causal"
"""name under which a network holds its control"""
Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(eq=False)
class Pass:
    """One call of the network for whole blocks.

    past: what the blocks before left, (key, value) [B, tokens, heads, channels] of each layer; never changed.
    """

    block: int
    """latent frames of a block"""
    window: int = 0
    """blocks that attention spans, the own included; 0: all"""
    past: Layers = ()
    write: bool = False
    """whether to keep keys and values, for `memory`"""
    per_frame: int = 0
    """tokens of a latent frame; known once the call has begun"""
    patch: int = 1
    """latent frames of a token"""
    written: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def per_block(self) -> int:
        """Tokens of a block."""
        return self.per_frame * self.block // self.patch

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Which keys each query attends to, bool [1, 1, queries, keys]; None where it is all of them. The
        last `queries` keys are their own.
        """
        if queries == self.per_block and (not self.window or keys <= self.window * self.per_block):
            return None
        key = torch.arange(keys, device=device) // self.per_block
        back = key[-queries:, None] - key
        allowed = back >= 0
        return (allowed & (back < self.window) if self.window else allowed)[None, None]

    def memory(self) -> Layers:
        """What the cache holds after this call: the blocks that the next one may attend to."""
        past = self.past or [(k[:, :0], v[:, :0]) for k, v in self.written]
        joined = [[torch.cat(pair, 1) for pair in zip(*both)] for both in zip(past, self.written)]
        first = -(self.window - 1) * self.per_block if self.window else 0
        none = self.window == 1
        return tuple((k[:, :0], v[:, :0]) if none else (k[:, first:], v[:, first:]) for k, v in joined)


class Control:
    """What the processors of one network share: the pass that it is in, if any."""

    def __init__(self, patch: int):
        self.patch, self.now = patch, None

    now: Pass | None

    @contextmanager
    def acting(self, now: Pass | None) -> Iterator[None]:
        """Run the network's calls as this pass inside the block; None: as the network without this file."""
        before, self.now = self.now, now
        try:
            yield
        finally:
            self.now = before

    def rotary(self, rope: nn.Module, args: tuple, output: tuple[Tensor, Tensor]):
        """Forward hook of the rotary embedding: that of the frames in the cache, then of the call's."""
        now = self.now
        if now is None:
            return None
        x = args[0]
        now.patch, now.per_frame = self.patch, output[0].shape[1] * self.patch // x.shape[2]
        held = now.past[0][0].shape[1] // now.per_frame * self.patch if now.past else 0
        if not held:
            return None
        return rope.forward(x[:, :, :1].expand(-1, -1, x.shape[2] + held, -1, -1))


class BlockCausalProcessor:
    """WanAttnProcessor with a cache and a mask, while its control is in a pass."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, control: Control, layer: int, plain: Any):
        self.control, self.layer, self.plain = control, layer, plain

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        now = self.control.now
        if now is None:
            self.plain._attention_backend = self._attention_backend
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        value = attn.to_v(hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if now.write:
            now.written.append((key.detach(), value.detach()))
        if now.past:
            past_key, past_value = now.past[self.layer]
            key, value = torch.cat([past_key, key], 1), torch.cat([past_value, value], 1)
        num, (cos, sin) = query.shape[1], rotary_emb
        query, key = rotated(query, cos[:, -num:], sin[:, -num:]), rotated(key, cos, sin)
        mask = now.mask(num, key.shape[1], query.device)
        out = dispatch_attention_fn(
            query, key, value, attn_mask=mask, dropout_p=0.0, backend=self._attention_backend
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of x [B, N, heads, channels] turned by the angles of their token."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


def attach(net: Any) -> Control:
    """Make a Wan transformer able to act block by block; once is enough. It computes the same until it is in
    a `Pass`. ValueError for other networks.
    """
    control = net.__dict__.get(ATTRIBUTE)
    if control is not None:
        return control
    blocks, rope = getattr(net, "blocks", None), getattr(net, "rope", None)
    if blocks is None or rope is None or any(getattr(b.attn1, "fused_projections", False) for b in blocks):
        raise ValueError(f"{type(net).__name__} is no WanTransformer3DModel with separate projections")
    control = Control(net.config.patch_size[0])
    for layer, block in enumerate(blocks):
        block.attn1.set_processor(BlockCausalProcessor(control, layer, block.attn1.processor))
    rope.register_forward_hook(control.rotary)
    net.__dict__[ATTRIBUTE] = control
    return control


# -- sampling with diffusers alone ---------------------------------------------------------------------------
@torch.no_grad()
def generate(pipe, prompt, num_frames: int = 0, generator=None, window: int = 0, output_type: str = "pil"):
    """Clips of a WanPipeline whose transformer (or LoRA) is the causal student of this folder.

    num_frames: 0 is as trained; longer clips roll on with the window. window: blocks, 0 is as trained.
    ValueError for frames that are no whole blocks.
    """
    with open(Path(__file__).with_name("fastgen.json"), encoding="utf-8") as file:
        said = json.load(file)
    export, settings = said["export"], said["export"]["causal"]
    net, vae, per = pipe.transformer, pipe.vae, pipe.vae_scale_factor_temporal
    frames = (num_frames - 1) // per + 1 if num_frames else settings["frames"]
    if frames % settings["block"]:
        raise ValueError(f"{frames} latent frames are no whole blocks of {settings['block']}")
    prompts, place = [prompt] if isinstance(prompt, str) else list(prompt), pipe._execution_device
    length = {"max_sequence_length": n} if (n := said.get("max_sequence_length")) else {}
    states = pipe.encode_prompt(prompts, None, False, device=place, **length)[0].to(net.dtype)

    def randn(num: int) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        shape = (len(prompts), net.config.out_channels, num, settings["height"], settings["width"])
        return randn_tensor(shape, generator=generator, device=place, dtype=torch.float32)

    latents = rollout(
        net, randn(frames), states, export["times"], settings["block"], window or settings["window"], randn
    )
    mean, std = (
        torch.tensor(vae.config[k], device=place).reshape(1, -1, 1, 1, 1)
        for k in ("latents_mean", "latents_std")
    )
    video = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
    return pipe.video_processor.postprocess_video(video.float(), output_type=output_type)


def rollout(net, noise: Tensor, states: Tensor, times, block: int, window: int, randn) -> Tensor:
    """Latents from noise [B, C, F, h, w]: each block walks the times, noised anew in between, over the cache;
    then the network sees it once more, clean, and its keys and values are kept.
    """
    past: Layers = ()
    control, made = attach(net), []

    def velocity(x: Tensor, t: float, now: Pass) -> Tensor:
        with control.acting(now):
            time = torch.full((len(x),), 1000 * t, device=x.device)
            return net(x.to(net.dtype), time, states, return_dict=False)[0].float()

    for x_t in noise.split(block, 2):
        for i, t in enumerate(times):
            x = x_t - t * velocity(x_t, t, Pass(block, window, past))
            if i + 1 < len(times):
                x_t = (1 - times[i + 1]) * x + times[i + 1] * randn(block)
        made.append(x)
        if len(made) * block < noise.shape[2]:
            now = Pass(block, window, past, write=True)
            velocity(x, 0.0, now)
            past = now.memory()
    return torch.cat(made, 2)
