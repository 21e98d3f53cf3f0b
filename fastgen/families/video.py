"""Video transformers: CogVideoX (VP), HunyuanVideo and LTX-Video (flow)."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.families.base import Family
from fastgen.families.parts import DiffusersModel

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FRAME_RATE = 25.0  # frames per second, the default of LTXPipeline


class CogVideoX(Family):
    """CogVideoXTransformer3DModel: VP with zero terminal SNR, v; frames before channels; rotary positions
    are computed outside the network, by the pipeline's own code.
    """

    name, net_class, pipelines = "cogvideox", "CogVideoXTransformer3DModel", ("CogVideoXPipeline",)
    schedules = ("VP",)
    temporal, divisor, max_length = 4, 2, 226
    latent_statistics = "none"
    lora_targets = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
    final_layers = ("time_embedding.*", "ofs_embedding.*", "patch_embed.*", "norm_out.*", "proj_out")

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.frames_first(net, x.transpose(1, 2), time, cond).transpose(1, 2)

    def frames_first(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The network's own layout, [B, f, C, h, w]."""
        given = self.inputs(x, cond)
        if net.config.use_rotary_positional_embeddings:
            given["image_rotary_emb"] = rotary(net, x)
        if net.config.ofs_embed_dim is not None:
            given["ofs"] = x.new_full((1,), 2.0)
        return net(hidden_states=x, timestep=time, **given, return_dict=False)[0]

    def channels(self, net: DiffusersModel) -> int:
        return net.config.out_channels

    def grid(self, net: DiffusersModel) -> tuple[int, ...]:
        frames = (net.config.sample_frames - 1) // self.temporal + 1
        return frames, net.config.sample_height, net.config.sample_width

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (codec.max_length, net.config.text_embed_dim)}

    def encode(self, codec, prompts: list[str]) -> Cond:
        given = {"max_sequence_length": codec.max_length, "device": codec.device}
        states, _ = codec.pipe.encode_prompt(prompts, None, False, **given)
        return {"encoder_hidden_states": states.float()}

    def pipeline_latents(self, noise: Tensor, schedule) -> Tensor:
        return noise.transpose(1, 2)


class CogVideoXImage(CogVideoX):
    """Image to video: the latents of the first frame, zero for the others, are further input channels.

    As in the pipeline, the image's latent is a sample of the autoencoder's posterior; here always that of
    seed 0, so that an image has one condition.
    """

    name, pipelines, needs_image = "cogvideox-i2v", ("CogVideoXImageToVideoPipeline",), True

    def matches(self, index: dict, config: dict) -> bool:
        return config.get("in_channels") != config.get("out_channels")

    def frames_first(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return super().frames_first(net, torch.cat([x, cond["image_latents"].to(x.dtype)], 2), time, cond)

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        channels, frames, *sides = codec.shape
        return super().cond_shapes(net, codec) | {"image_latents": (frames, channels, *sides)}

    def encode_image(self, codec, images: Tensor) -> Cond:
        pipe, vae, (channels, frames, *sides) = codec.pipe, codec.vae, codec.shape
        found = []
        for image in images:
            posterior = vae.encode(image[None, :, None].to(vae.dtype)).latent_dist
            z = posterior.sample(torch.Generator().manual_seed(0)).float()
            scale = pipe.vae_scaling_factor_image
            scale = 1 / scale if vae.config.invert_scale_latents else scale
            first = (z * scale).transpose(1, 2)
            found.append(torch.cat([first, first.new_zeros(1, frames - 1, channels, *sides)], 1))
        return {"image_latents": torch.cat(found)}


def rotary(net: DiffusersModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the token positions of x [B, f, C, h, w], in units of latents."""
    from diffusers import CogVideoXPipeline

    pipe = SimpleNamespace(vae_scale_factor_spatial=1, transformer=net)
    size = (x.shape[3], x.shape[4], x.shape[1])
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, *size, x.device)


class HunyuanVideo(Family):
    """HunyuanVideoTransformer3DModel: Llama states with a mask, the pooled state of CLIP, and the guidance
    scale as the input 1000 w.
    """

    name, net_class, pipelines = "hunyuan-video", "HunyuanVideoTransformer3DModel", ("HunyuanVideoPipeline",)
    keys = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
    temporal, divisor, max_length = 4, 2, 256
    latent_statistics = "none"
    default_grid = (33, 90, 160)  # 129 frames of 720 x 1280
    default_guidance, default_sigmas = 6.0, True
    lora_targets = (
        *ATTENTION,
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    )
    final_layers = ("time_text_embed.*", "context_embedder.*", "x_embedder.*", "norm_out.*", "proj_out")

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        given = self.inputs(x, cond)
        if net.config.guidance_embeds:
            given["guidance"] = 1000 * cond["guidance"].to(x.dtype)
        return net(hidden_states=x, timestep=time, **given, return_dict=False)[0]

    def guidance_embedded(self, net: DiffusersModel) -> bool:
        return net.config.guidance_embeds

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        return [*net.transformer_blocks, *net.single_transformer_blocks]

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (codec.max_length, net.config.text_embed_dim),
            "encoder_attention_mask": (codec.max_length,),
            "pooled_projections": (net.config.pooled_projection_dim,),
        }

    def encode(self, codec, prompts: list[str]) -> Cond:
        given = {"max_sequence_length": codec.max_length, "device": codec.device}
        states, pooled, mask = codec.pipe.encode_prompt(prompts, **given)
        found = {"encoder_hidden_states": states, "pooled_projections": pooled}
        return {k: v.float() for k, v in found.items()} | {"encoder_attention_mask": mask.float()}


class LTX(Family):
    """LTXVideoTransformer3DModel: packed tokens, T5 states with a mask, rotary positions in pixels and
    seconds.
    """

    name, net_class, pipelines = "ltx", "LTXVideoTransformer3DModel", ("LTXPipeline",)
    keys = ("encoder_hidden_states", "encoder_attention_mask")
    factor, temporal, max_length = 32, 8, 128
    default_grid = (21, 16, 22)  # 161 frames of 512 x 704
    default_sigmas = True
    call_arguments = {"frame_rate": FRAME_RATE}
    lora_targets = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
    final_layers = ("time_embed.*", "caption_projection.*", "proj_in", "proj_out")

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        frames, h, w = x.shape[2:]
        out = net(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=time,
            **self.inputs(x, cond),
            num_frames=frames,
            height=h,
            width=w,
            rope_interpolation_scale=cond["rope_scale"][0],
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (frames, h, w))

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (codec.max_length, net.config.caption_channels),
            "encoder_attention_mask": (codec.max_length,),
            "rope_scale": (3,),
        }

    def encode(self, codec, prompts: list[str]) -> Cond:
        given = {"max_sequence_length": codec.max_length, "device": codec.device}
        states, mask, _, _ = codec.pipe.encode_prompt(prompts, None, False, **given)
        side = float(codec.pipe.vae_spatial_compression_ratio)
        scale = torch.tensor([[codec.pipe.vae_temporal_compression_ratio / FRAME_RATE, side, side]])
        return {
            "encoder_hidden_states": states.float(),
            "encoder_attention_mask": mask,
            "rope_scale": scale.expand(len(prompts), 3).to(codec.device),
        }

    def normalise(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        mean, std = (b.to(z).view(1, -1, 1, 1, 1) for b in (vae.latents_mean, vae.latents_std))
        return (z - mean) * vae.config.scaling_factor / std

    def denormalise(self, vae: DiffusersModel, x0: Tensor) -> Tensor:
        mean, std = (b.to(x0).view(1, -1, 1, 1, 1) for b in (vae.latents_mean, vae.latents_std))
        return x0 * std / vae.config.scaling_factor + mean

    def decode(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        time = z.new_zeros(len(z)) if vae.config.timestep_conditioning else None
        return vae.decode(z, time, return_dict=False)[0]

    def pipeline_latents(self, noise: Tensor, schedule) -> Tensor:
        return noise.flatten(2).transpose(1, 2)


FAMILIES: tuple[Family, ...] = (CogVideoXImage(), CogVideoX(), HunyuanVideo(), LTX())
