"""Wan video transformers and AnyFlow, their flow-map descendant: flow, UMT5 states without a mask.

Wan 2.2's 14B models have two experts, one for times above `boundary_ratio` and one for those below.
`Experts` is the denoiser of both: each row of a batch is computed by the expert of its time, in training as
in sampling. A training step therefore updates an expert by its own rows only, and gives the other no
gradient if it has none. Both belong to one student (one adapter each) and are exported together.
"""

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.families.base import Family
from fastgen.families.parts import DiffusersModel, Parts

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class Experts(Parts):
    """A high-noise and a low-noise network; the modules `taps` output the features of both, merged."""

    def __init__(self, boundary: float, **parts: DiffusersModel):
        super().__init__(**parts)
        self.boundary = boundary
        first = getattr(self, self.names[0])
        self.taps = nn.ModuleList([nn.Identity() for _ in first.blocks])

    def rows(self, time: Tensor) -> dict[str, Tensor]:
        """Indices of the rows of a batch for each expert by name, by the comparison of the pipelines."""
        if time.is_meta:  # --dry_run: a time has no value
            return {self.names[0]: torch.arange(len(time))}
        high = time >= 1000 * self.boundary
        found = {n: r.nonzero()[:, 0] for n, r in zip(self.names, (high, ~high))}
        return {n: r for n, r in found.items() if len(r)}


class Wan(Family):
    """WanTransformer3DModel with text: Wan 2.1, and the two experts of Wan 2.2."""

    name, net_class, pipelines = "wan", "WanTransformer3DModel", ("WanPipeline",)
    extra: tuple[str, ...] = ("transformer_2",)
    lora_parts = ("transformer", "transformer_2")
    keys: tuple[str, ...] = ("encoder_hidden_states", "encoder_hidden_states_image")
    temporal, frame_chunk, divisor, max_length = 4, 4, 2, 512
    latent_statistics = "channels"
    frame_times = True
    default_grid = (21, 60, 104)  # 81 frames of 480 x 832
    lora_targets = (*ATTENTION, "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2")
    final_layers = ("condition_embedder.*", "patch_embedding", "proj_out")

    def assemble(self, parts: dict[str, DiffusersModel], index: dict) -> DiffusersModel:
        if len(parts) == 1:
            return super().assemble(parts, index)
        return Experts(index["boundary_ratio"], **parts)

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if not isinstance(net, Experts):
            return self.call_network(net, x, time, cond)
        rows = net.rows(time)
        tapped = [i for i, tap in enumerate(net.taps) if tap._forward_hooks]
        outs: list[Tensor] = []
        kept: dict[int, list[Tensor]] = {i: [] for i in tapped}
        handles = []
        try:
            for name, index in rows.items():
                expert = getattr(net, name)
                keep = {i: (lambda _m, _a, out, i=i: kept[i].append(out)) for i in tapped}
                handles += [expert.blocks[i].register_forward_hook(keep[i]) for i in tapped]
                picked = (x, time, cond) if len(rows) == 1 else _rows(index, x, time, cond)
                outs.append(self.call_network(expert, *picked))
        finally:
            for handle in handles:
                handle.remove()
        order = torch.cat(list(rows.values())).argsort()
        for i in tapped:
            net.taps[i](_merge(kept[i], order))
        return _merge(outs, order)

    def call_network(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """One of the experts, or the only network; time [B], or that of every frame, [B, F]."""
        time = per_token(net, x, time) if time.ndim == 2 else time
        return net(hidden_states=x, timestep=time, **self.inputs(x, cond), return_dict=False)[0]

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        return list(net.taps if isinstance(net, Experts) else net.blocks)

    def channels(self, net: DiffusersModel) -> int:
        return net.config.out_channels

    def size_call(self, codec) -> dict:
        """WanPipeline takes a frame count that is 1 modulo the autoencoder's factor, and rounds others to the
        next. Nothing is 1 modulo 1: of an autoencoder that keeps all frames it wants one more than was said.
        """
        call, keeps_all = super().size_call(codec), temporal_factor(codec) == 1
        return call | ({"num_frames": call["num_frames"] - 1} if keeps_all else {})

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (codec.max_length, net.config.text_dim)}

    def encode(self, codec, prompts: list[str]) -> Cond:
        given = {"max_sequence_length": codec.max_length, "device": codec.device}
        states, _ = codec.pipe.encode_prompt(prompts, None, False, **given)
        return {"encoder_hidden_states": states.float()}


class WanImage(Wan):
    """Image to video: a mask and the latents of the first frame as further input channels; in 2.1 also CLIP
    states.
    """

    name, pipelines, needs_image = "wan-i2v", ("WanImageToVideoPipeline",), True
    frame_times = False

    def matches(self, index: dict, config: dict) -> bool:
        wider = config.get("in_channels") != config.get("out_channels")
        return wider and not config.get("pos_embed_seq_len")

    def call_network(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return super().call_network(net, torch.cat([x, cond["image_latents"].to(x.dtype)], 1), time, cond)

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        extra = net.config.in_channels - net.config.out_channels
        shapes = super().cond_shapes(net, codec) | {"image_latents": (extra, *codec.shape[1:])}
        if net.config.image_dim is None:
            return shapes
        encoder = getattr(codec.pipe, "image_encoder", None)
        side = 16 if encoder is None else encoder.config.image_size // encoder.config.patch_size
        return shapes | {"encoder_hidden_states_image": (side**2 + 1, net.config.image_dim)}

    def encode_image(self, codec, images: Tensor) -> Cond:
        pipe = codec.pipe
        size = (*images.shape[-2:], codec.num_frames, torch.float32, codec.device)
        found = [pipe.prepare_latents(i[None], 1, codec.shape[0], *size)[1] for i in images]
        cond = {"image_latents": torch.cat(found)}
        if getattr(pipe, "image_encoder", None) is not None:
            states = pipe.encode_image(pictures(images), codec.device)
            cond["encoder_hidden_states_image"] = states.float()
        return cond


class WanFirstLast(WanImage):
    """Wan 2.1 FLF2V: a first and a last frame, both clean in the mask and both as CLIP states."""

    name, needs_last_image = "wan-flf2v", True

    def matches(self, index: dict, config: dict) -> bool:
        return bool(config.get("pos_embed_seq_len"))

    def call_network(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        states = cond["encoder_hidden_states_image"]  # [B, 2 S, C], which the network takes as [2 B, S, C]
        apart = {"encoder_hidden_states_image": states.unflatten(1, (2, -1)).flatten(0, 1)}
        return super().call_network(net, x, time, cond | apart)

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        shapes = super().cond_shapes(net, codec)
        tokens, width = shapes["encoder_hidden_states_image"]
        return shapes | {"encoder_hidden_states_image": (2 * tokens, width)}

    def encode_image(self, codec, images: Tensor) -> Cond:
        """Of first and last frames [B, 3, 2, H, W]."""
        pipe, (first, last) = codec.pipe, images.unbind(2)
        size = (*images.shape[-2:], codec.num_frames, torch.float32, codec.device)
        found = [
            pipe.prepare_latents(a[None], 1, codec.shape[0], *size, last_image=b[None])[1]
            for a, b in zip(first, last)
        ]
        states = pipe.encode_image(pictures(images.transpose(1, 2).flatten(0, 1)), codec.device)
        both = states.float().unflatten(0, (-1, 2)).flatten(1, 2)
        return {"image_latents": torch.cat(found), "encoder_hidden_states_image": both}


class WanTokens(Wan):
    """Wan 2.2 TI2V-5B with text: every token has its own time."""

    name = "wan-ti2v"
    factor, default_grid = 16, (31, 44, 80)  # 121 frames of 704 x 1280

    def matches(self, index: dict, config: dict) -> bool:
        return bool(index.get("expand_timesteps", config.get("in_channels") == 48))

    def call_network(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        inputs = {"hidden_states": x, "timestep": self.times(net, x, time), **self.inputs(x, cond)}
        return net(**inputs, return_dict=False)[0]

    def times(self, net: DiffusersModel, x: Tensor, time: Tensor) -> Tensor:
        """The time of every token, [B, tokens]."""
        return per_token(net, x, time if time.ndim == 2 else time[:, None].expand(-1, x.shape[2]))


class WanTokensImage(WanTokens):
    """Wan 2.2 TI2V-5B with a first frame: its tokens are clean and have time 0, so that D returns it."""

    name, pipelines, needs_image = "wan-ti2v-image", ("WanImageToVideoPipeline",), True
    frame_times = False

    def matches(self, index: dict, config: dict) -> bool:
        return super().matches(index, config) and index.get("_class_name") in self.pipelines

    def call_network(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        first = cond["image_latents"].to(x.dtype)
        out = super().call_network(net, torch.cat([first, x[:, :, 1:]], 2), time, cond)
        t = (time / 1000).to(x.dtype).reshape(-1, 1, 1, 1, 1)
        return torch.cat([(x[:, :, :1] - first) / t, out[:, :, 1:]], 2)  # x - t v = first

    def times(self, net: DiffusersModel, x: Tensor, time: Tensor) -> Tensor:
        every = super().times(net, x, time)
        first = torch.arange(every.shape[1], device=x.device) < every.shape[1] // x.shape[2]
        return every.masked_fill(first, 0.0)

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        frame = (codec.shape[0], 1, *codec.shape[2:])
        return super().cond_shapes(net, codec) | {"image_latents": frame}

    def encode_image(self, codec, images: Tensor) -> Cond:
        size = (*images.shape[-2:], 1, torch.float32, codec.device)
        found = [codec.pipe.prepare_latents(i[None], 1, codec.shape[0], *size)[1] for i in images]
        return {"image_latents": torch.cat(found)}


class AnyFlow(Wan):
    """AnyFlowTransformer3DModel: frames before channels, and a second time r at which the step ends.

    The denoiser is its instantaneous velocity, r = t, with which the pipeline samples if use_mean_velocity is
    False. With cond["r_timestep"] [B], from 0 to 1000, it is the average velocity from t to r.
    """

    name, net_class, pipelines = "anyflow", "AnyFlowTransformer3DModel", ("AnyFlowPipeline",)
    frame_times = False
    extra = ()
    keys = ("encoder_hidden_states",)
    call_arguments = {"use_mean_velocity": False}

    def call_network(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        per_frame = [v[:, None].expand(-1, x.shape[2]) for v in (time, cond.get("r_timestep", time))]
        out = net(x.transpose(1, 2), *per_frame, **self.inputs(x, cond), return_dict=False)[0]
        return out.transpose(1, 2)


def per_token(net: DiffusersModel, x: Tensor, time: Tensor) -> Tensor:
    """Times of every frame of x [B, C, F, H, W], [B, F], as those of every token, [B, tokens]."""
    frames, *sizes = (side // patch for side, patch in zip(x.shape[2:], net.config.patch_size))
    first = time[:, :: net.config.patch_size[0]]
    return first[:, :frames, None].expand(-1, -1, sizes[0] * sizes[1]).flatten(1)


def temporal_factor(codec) -> int:
    """Frames per latent frame by the pipeline; 0 without one."""
    return getattr(codec.pipe, "vae_scale_factor_temporal", 0)


def _rows(index: Tensor, x: Tensor, time: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Cond]:
    return x[index], time[index], {k: v[index] for k, v in cond.items()}


def _merge(parts: list[Tensor], order: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)[order]


def pictures(images: Tensor) -> list:
    """Images [B, 3, H, W] in [-1, 1] as PIL images, which pipelines take."""
    from PIL import Image

    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


FAMILIES: tuple[Family, ...] = (
    WanTokensImage(),
    WanTokens(),
    WanFirstLast(),
    WanImage(),
    Wan(),
    AnyFlow(),
)
