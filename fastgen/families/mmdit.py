"""Transformer families with separate streams of text and image: SD3, FLUX.1, FLUX.2, Qwen-Image."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.families.base import Family
from fastgen.families.dit import pad_rows
from fastgen.families.parts import DiffusersModel, channel_statistics, fold_tokens

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAST_TEXT = ("attn.add_q_proj.", "attn.norm_added_q.")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class SD3(Family):
    """SD3Transformer2DModel (SD3 and 3.5): flow; two CLIPs zero-padded to T5's width, then T5; no mask."""

    name, net_class, pipelines = "sd3", "SD3Transformer2DModel", ("StableDiffusion3Pipeline",)
    keys = ("encoder_hidden_states", "pooled_projections")
    divisor, max_length, tokenizer, tap_output = 2, 256, "tokenizer_3", 1
    lora_targets = (
        *JOINT,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    final_layers = ("proj_out", "norm_out.*", "time_text_embed.*", "context_embedder", "pos_embed.*")
    unreached = {
        f"transformer_blocks.{{last}}.{part}*": "the text is not used after the last block"
        for part in LAST_TEXT
    }

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        clip = 77 if codec.pipe is None else codec.pipe.tokenizer_max_length
        width, pooled = net.config.joint_attention_dim, net.config.pooled_projection_dim
        return {"encoder_hidden_states": (clip + codec.max_length, width), "pooled_projections": (pooled,)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        pipe = codec.pipe
        if pipe.text_encoder_3 is None:  # the pipeline reads the width of its zeros off the transformer
            width = codec.cond_shapes["encoder_hidden_states"][-1]
            vars(pipe)["transformer"] = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        more = {"device": codec.device, "do_classifier_free_guidance": False}
        states, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, max_sequence_length=codec.max_length, **more
        )
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}


class Flux(Family):
    """FluxTransformer2DModel (FLUX.1 dev and schnell): flow on 2x2 patches as tokens; T5 states and a pooled
    CLIP; dev takes its guidance as an input.
    """

    name, net_class, pipelines = "flux", "FluxTransformer2DModel", ("FluxPipeline",)
    keys = ("encoder_hidden_states", "pooled_projections", "guidance")
    flow_time, divisor, max_length, tokenizer, tap_output = "unit", 2, 512, "tokenizer_2", 1
    default_grid, default_sigmas, default_guidance = (128, 128), True, 3.5
    lora_targets = JOINT
    kohya_prefix, kohya_layers = "lora_transformer", ("*.attn.*",)
    final_layers = ("proj_out", "norm_out.*", "time_text_embed.*", "*_embedder", "*norm*.linear")

    def matches(self, index: dict, config: dict) -> bool:
        width = config.get("in_channels", 64)
        return config.get("out_channels") in (None, width)  # fill and control networks also take an image

    def channels(self, net: DiffusersModel) -> int:
        return net.config.in_channels // 4

    def guided_call(self, w: float) -> dict:
        return {"true_cfg_scale": float(w), "negative_prompt": ""}

    def guidance_embedded(self, net: DiffusersModel) -> bool:
        return net.config.guidance_embeds

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        given = self.inputs(x, cond)
        text = torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=x.device)
        ids = {"img_ids": grid_ids(0, h, w, device=x.device), "txt_ids": text}
        out = net(pack(x), timestep=time, **given, **ids, return_dict=False)[0]
        return unpack(out, h, w)

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        width, pooled = net.config.joint_attention_dim, net.config.pooled_projection_dim
        return {"encoder_hidden_states": (codec.max_length, width), "pooled_projections": (pooled,)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        length = {"max_sequence_length": codec.max_length}
        states, pooled, _ = codec.pipe.encode_prompt(prompts, device=codec.device, **length)
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def pipeline_latents(self, noise: Tensor, schedule) -> Tensor:
        return pack(noise)

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        return [*net.transformer_blocks, *net.single_transformer_blocks]

    def feature_map(self, net: DiffusersModel, out: Tensor, x: Tensor) -> Tensor:
        return fold_tokens(out, x, 2)


class Flux2(Family):
    """Flux2Transformer2DModel (klein): flow on 2x2 patches as channels, normalised by the autoencoder's batch
    norm; states of several layers of a language model.
    """

    name, net_class, pipelines = "flux2", "Flux2Transformer2DModel", ("Flux2KleinPipeline",)
    flow_time, max_length, tap_output = "unit", 512, 1
    factor, folded, default_grid, default_sigmas = 16, 2, (64, 64), True
    lora_targets = (*JOINT, "to_out", "to_qkv_mlp_proj", "linear_in", "linear_out")
    final_layers = ("proj_out", "norm_out.*", "*_modulation*", "time_guidance_embed.*", "*_embedder")
    layers: tuple[int, ...] = (9, 18, 27)
    """layers of the language model whose states are used, the pipeline's default"""

    def matches(self, index: dict, config: dict) -> bool:
        return not config.get("guidance_embeds", True)  # dev has another text encoder

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        h, w = x.shape[-2:]
        given = self.inputs(x, cond)
        text = torch.zeros(given["encoder_hidden_states"].shape[1], 4, device=x.device)
        text[:, 3] = torch.arange(len(text), device=x.device)
        image = F.pad(grid_ids(0, h, w, device=x.device), (0, 1))
        tokens = x.flatten(2).transpose(1, 2)
        out = net(tokens, timestep=time, img_ids=image, txt_ids=text, **given, return_dict=False)[0]
        return out.transpose(1, 2).unflatten(2, (h, w))

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (codec.max_length, net.config.joint_attention_dim)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        states, _ = codec.pipe.encode_prompt(
            prompts,
            device=codec.device,
            max_sequence_length=codec.max_length,
            text_encoder_out_layers=self.layers,
        )
        return {"encoder_hidden_states": states.float()}

    def normalise(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        mean, std = self._whitening(vae)
        return (F.pixel_unshuffle(z, 2) - mean) / std

    def denormalise(self, vae: DiffusersModel, x0: Tensor) -> Tensor:
        mean, std = self._whitening(vae)
        return F.pixel_shuffle(x0 * std + mean, 2)

    @staticmethod
    def _whitening(vae: DiffusersModel) -> tuple[Tensor, Tensor]:
        norm, eps = vae.bn, vae.config.batch_norm_eps
        return norm.running_mean.view(1, -1, 1, 1), (norm.running_var.view(1, -1, 1, 1) + eps).sqrt()

    def shift(self, scheduler, net: DiffusersModel, grid: tuple[int, ...]) -> float:
        """The pipeline's empirical shift at 50 steps, its default."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        if not scheduler.config.get("use_dynamic_shifting"):
            return super().shift(scheduler, net, grid)
        mu = compute_empirical_mu(image_seq_len=self.tokens(net, grid), num_steps=50)
        return float(torch.tensor(mu, dtype=torch.float64).exp())

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        return [*net.transformer_blocks, *net.single_transformer_blocks]

    def image_tokens(self, net: DiffusersModel, out: Tensor, x: Tensor, cond: Cond) -> Tensor:
        """In the later blocks the text comes before the image."""
        return out[:, -x.shape[-2] * x.shape[-1] :]


class QwenImage(Family):
    """QwenImageTransformer2DModel: flow on 2x2 patches as tokens, latents normalised channel by channel,
    Qwen2.5-VL states with a mask.
    """

    name, net_class, pipelines = "qwen-image", "QwenImageTransformer2DModel", ("QwenImagePipeline",)
    keys = ("encoder_hidden_states", "encoder_hidden_states_mask")
    flow_time, divisor, max_length, tap_output = "unit", 2, 512, 1
    default_grid, default_sigmas = (128, 128), True
    lora_targets = (*JOINT, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    final_layers = ("proj_out", "norm_out.*", "time_text_embed.*", "img_in", "txt_in", "*_mod.1")
    guidance_off, guidance_keeps_norm = {"true_cfg_scale": 1.0}, True
    unreached = {
        f"transformer_blocks.{{last}}.{part}*": "the text is not used after the last block"
        for part in (*LAST_TEXT, "txt_mlp.", "attn.to_add_out.")
    }

    def matches(self, index: dict, config: dict) -> bool:
        other = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")  # edit and layered networks
        return not any(config.get(key) for key in other)

    def channels(self, net: DiffusersModel) -> int:
        return net.config.in_channels // 4

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        given = self.inputs(x, cond)
        if not x.is_meta:  # padding common to all rows is cut off
            length = int(given["encoder_hidden_states_mask"].sum(1).max())
            given = {k: v[:, :length] for k, v in given.items()}
        shapes = [[(1, h, w)]] * len(x)
        out = net(pack(x), timestep=time, img_shapes=shapes, **given, return_dict=False)[0]
        return unpack(out, h, w)

    def cond_shapes(self, net: DiffusersModel, codec) -> dict:
        shape = (codec.max_length, net.config.joint_attention_dim)
        return {"encoder_hidden_states": shape, "encoder_hidden_states_mask": ((shape[0],), torch.bool)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        length = {"max_sequence_length": codec.max_length}
        states, mask = codec.pipe.encode_prompt(prompts, codec.device, **length)
        lengths = [states.shape[1]] * len(states) if mask is None else mask.sum(1).tolist()
        rows = [row[:n].float() for row, n in zip(states, lengths)]
        states, mask = pad_rows(rows, codec.max_length)
        return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}

    def null(self, codec) -> Cond:
        """A blank, as in the model card; the pipeline has no default."""
        return self.encode(codec, [" "])

    def to_latents(self, vae: DiffusersModel, images: Tensor) -> Tensor:
        return super().to_latents(vae, images[:, :, None])

    def guided_call(self, w: float) -> dict:
        return {"true_cfg_scale": float(w), "negative_prompt": " "}

    def guidance_norm(self, out: Tensor) -> Tensor:
        """Norm of each token."""
        return F.interpolate(F.pixel_unshuffle(out, 2).norm(dim=1, keepdim=True), scale_factor=2)

    def normalise(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        mean, std = channel_statistics(vae, z)
        return ((z - mean) / std)[:, :, 0]

    def denormalise(self, vae: DiffusersModel, x0: Tensor) -> Tensor:
        mean, std = channel_statistics(vae, x0[:, :, None])
        return x0[:, :, None] * std + mean

    def decode(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        return vae.decode(z, return_dict=False)[0][:, :, 0]

    def pipeline_latents(self, noise: Tensor, schedule) -> Tensor:
        return pack(noise)

    def feature_map(self, net: DiffusersModel, out: Tensor, x: Tensor) -> Tensor:
        return fold_tokens(out, x, 2)


def pack(x: Tensor) -> Tensor:
    """[B, C, h, w] to tokens [B, h w / 4, 4 C] of 2x2 patches, channel by channel."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`, for h x w patches."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (h, w)), 2)


def grid_ids(time: int, h: int, w: int, device) -> Tensor:
    """Position ids (time, row, column) of h w tokens, row by row."""
    axes = [torch.arange(n, device=device) for n in (h, w)]
    return F.pad(torch.cartesian_prod(*axes).float(), (1, 0), value=float(time))


FAMILIES = (SD3(), Flux(), Flux2(), QwenImage())
