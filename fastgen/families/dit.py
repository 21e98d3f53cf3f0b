"""Transformer families with classes (DiT), with cross-attention to text (PixArt, SANA, SANA-Sprint) and with
text and image in one sequence (Lumina2, Z-Image).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.diffusion.schedules import expand
from fastgen.families.base import Family
from fastgen.families.parts import DiffusersModel, fold_tokens, rebuilt

MASKED = ("encoder_hidden_states", "encoder_attention_mask")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class DiT(Family):
    """DiTTransformer2DModel: VP, ImageNet classes with 1000 as the null class; the output's second half is a
    learned variance.
    """

    name, net_class, pipelines = "dit", "DiTTransformer2DModel", ("DiTPipeline",)
    keys, kind, label_key, divisor = ("class_labels",), "labels", "class_labels", 2
    schedules, latent_statistics = ("VP",), "none"
    lora_targets = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
    final_layers = ("proj_out_1", "proj_out_2", "*norm1.*", "pos_embed.*")
    lora_loader, square = False, True

    def size_call(self, codec) -> dict:
        return {}

    def has_null(self, net: DiffusersModel, classes: int) -> bool:
        return classes > 0  # the embedding that label dropout adds


class Masked(Family):
    """Families conditioned on the states of one text encoder and their mask."""

    keys: tuple[str, ...] = MASKED
    text_width = "caption_channels"
    """entry of the network's config that is the width of the states"""

    def cond_shapes(self, net: DiffusersModel, codec) -> dict:
        shape = (codec.max_length, net.config[self.text_width])
        return {"encoder_hidden_states": shape, "encoder_attention_mask": (shape[:1], torch.long)}

    @torch.no_grad()
    def encode_prompt(self, codec, *args) -> tuple:
        """The values returned by the pipeline's encode_prompt."""
        length = codec.max_length
        return codec.pipe.encode_prompt(*args, device=codec.device, max_sequence_length=length)

    def encode(self, codec, prompts: list[str]) -> Cond:
        states, mask, *_ = self.encode_prompt(codec, prompts, False)
        return {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask}


class PixArt(Masked):
    """PixArtTransformer2DModel of PixArt-sigma: VP, T5 states with a mask; the variance is not used."""

    name, net_class, pipelines = "pixart-sigma", "PixArtTransformer2DModel", ("PixArtSigmaPipeline",)
    divisor, max_length, schedules, latent_statistics = 2, 300, ("VP",), "none"
    lora_targets = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
    final_layers = ("proj_out", "adaln_single.*", "caption_projection.*", "pos_embed.*")
    lora_loader = False
    call_arguments = {"use_resolution_binning": False}

    def inputs(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        sizes = {"resolution": None, "aspect_ratio": None}
        return super().inputs(x, cond) | {"added_cond_kwargs": sizes}


class PixArtAlpha(PixArt):
    """PixArt-alpha; the 1024-pixel network also takes the size and the aspect ratio."""

    name, pipelines, max_length = "pixart-alpha", ("PixArtAlphaPipeline",), 120

    def matches(self, index: dict, config: dict) -> bool:
        declared = config.get("use_additional_conditions")
        has_size = config.get("sample_size") == 128 if declared is None else declared
        return index.get("_class_name") in self.pipelines or (not index and has_size)

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if not net.use_additional_conditions:
            return super().call(net, x, time, cond)
        size = [side * self.factor for side in x.shape[-2:]]
        resolution = torch.tensor(size, dtype=x.dtype, device=x.device).expand(len(x), 2)
        aspect = torch.full((len(x), 1), size[0] / size[1], dtype=x.dtype, device=x.device)
        given = super().inputs(x, cond)
        given["added_cond_kwargs"] = {"resolution": resolution, "aspect_ratio": aspect}
        return net(x, timestep=time, **given, return_dict=False)[0][:, : x.shape[1]]


class Sana(Masked):
    """SanaTransformer2DModel: flow, Gemma states with a mask; time is 1000 t times the config's
    timestep_scale.
    """

    name, net_class, pipelines = "sana", "SanaTransformer2DModel", ("SanaPipeline",)
    keys, factor, max_length, latent_statistics = (*MASKED, "guidance"), 32, 300, "none"
    lora_targets = (*ATTENTION, "conv_inverted", "conv_point")
    final_layers = ("proj_out", "time_embed.*", "caption_projection.*", "patch_embed.*")
    time_layers = ("time_embed.emb.time_proj", "time_embed.emb.timestep_embedder")
    input_layer = "patch_embed.proj"
    guidance_layers = ("time_embed.guidance_embedder.linear_1", "time_embed.guidance_embedder.linear_2")
    guidance_option = "sprint"
    call_arguments = {"complex_human_instruction": None, "use_resolution_binning": False}

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return super().call(net, x, time * net.config.timestep_scale, self.scaled(net, x, cond))

    def scaled(self, net: DiffusersModel, x: Tensor, cond: Cond) -> Cond:
        """cond with the guidance scale (default 1) in SanaSprintPipeline's units, if the network takes it."""
        if not net.config.guidance_embeds:
            return {k: v for k, v in cond.items() if k != "guidance"}
        w = cond.get("guidance", torch.ones(len(x), device=x.device))
        return {**cond, "guidance": w.float() * net.config.guidance_embeds_scale}

    @torch.no_grad()
    def add_guidance(self, net: DiffusersModel) -> DiffusersModel:
        """SANA-Sprint's guidance embedder: first layer copied from the time embedder, last layer zero."""
        if net.config.guidance_embeds:
            return net
        with_guidance = rebuilt(net, ("time_embed.emb.", "time_embed."), guidance_embeds=True)
        embedder = with_guidance.time_embed.guidance_embedder
        embedder.linear_1.load_state_dict(with_guidance.time_embed.timestep_embedder.linear_1.state_dict())
        embedder.linear_2.weight.zero_()
        embedder.linear_2.bias.zero_()
        return with_guidance


class SanaSprint(Sana):
    """SANA-Sprint (arXiv 2503.09641, Sec. 3.1): SANA's flow network, fine-tuned at times s in [0, 1] and with
    the guidance scale as an input, used as a TrigFlow network.

    x_t = cos(t) x0 + sin(t) eps is the flow's (1 - s) x0 + s eps up to the factor sqrt(s^2 + (1 - s)^2), at
    s = sin t / (sin t + cos t); its velocity F = cos(t) eps - sin(t) x0 follows from the network's eps - x0.
    """

    name, pipelines = "sana-sprint", ("SanaSprintPipeline",)
    flow_time, default_guidance, supports_guidance, schedules = "unit", 4.5, False, ("TrigFlow",)
    keys = (*MASKED, "guidance")

    def matches(self, index: dict, config: dict) -> bool:
        return bool(config.get("guidance_embeds")) and index.get("_class_name") in (None, *self.pipelines)

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        s = expand(time, x)
        norm = (s**2 + (1 - s) ** 2).sqrt()
        x_s = (x * norm).to(x.dtype)
        cond = cond | {"guidance": cond["guidance"] * net.config.guidance_embeds_scale}
        out = Family.call(self, net, x_s, time, cond)
        return ((1 - 2 * s) * x_s + (1 - 2 * s + 2 * s**2) * out) / norm

    def encode(self, codec, prompts: list[str]) -> Cond:
        states, mask = self.encode_prompt(codec, prompts)
        return {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask}


class Lumina2(Masked):
    """Lumina2Transformer2DModel: flow, Gemma states with a mask; its time is 0 at noise and 1 at data."""

    name, net_class, pipelines = "lumina2", "Lumina2Transformer2DModel", ("Lumina2Pipeline",)
    flow_time, sign, divisor, max_length, text_width = "reversed", -1, 2, 256, "cap_feat_dim"
    lora_targets = (*ATTENTION, "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")
    final_layers = ("norm_out.*", "time_caption_embed.*", "x_embedder", "*norm1.*")
    default_sigmas, guidance_keeps_norm = True, True

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if not x.is_meta:
            return super().call(net, x, time, cond)

        def all_words(_module, args):  # a mask on the meta device has no lengths to read
            return args[0], torch.ones_like(args[1], device="cpu")

        with net.rope_embedder.register_forward_pre_hook(all_words):
            return super().call(net, x, time, cond)

    def null(self, codec) -> Cond:
        """An empty prompt without the system prompt that precedes all others."""
        _, _, states, mask = self.encode_prompt(codec, [""], True)
        return {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask}

    def guidance_norm(self, out: Tensor) -> Tensor:
        return out.norm(dim=-1, keepdim=True)  # of each row of pixels

    def tokens(self, net: DiffusersModel, grid: tuple[int, ...]) -> int:
        """The number that Lumina2Pipeline uses as sequence length: the size of axis 1 of the latents."""
        return net.config.in_channels

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        return list(net.layers)

    def image_tokens(self, net: DiffusersModel, out: Tensor, x: Tensor, cond: Cond) -> Tensor:
        """The image of a row follows its own text."""
        num = x.shape[-2] * x.shape[-1] // net.config.patch_size**2
        index = cond["encoder_attention_mask"].sum(1, keepdim=True) + torch.arange(num, device=out.device)
        return out.gather(1, index[..., None].expand(-1, -1, out.shape[-1]))

    def feature_channels(self, net: DiffusersModel) -> list[int]:
        return [net.config.hidden_size] * len(net.layers)


class ZImage(Family):
    """ZImageTransformer2DModel: flow, lists as input and output; its time is 0 at noise and 1 at data. The
    padding of the text is cut off, as the network itself pads to multiples of 32 with a learned token.
    """

    name, net_class, pipelines = "z-image", "ZImageTransformer2DModel", ("ZImagePipeline",)
    flow_time, sign, divisor, max_length = "reversed", -1, 2, 512
    default_grid, default_sigmas = (128, 128), True
    lora_targets = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    final_layers = (
        "all_final_layer.*",
        "t_embedder.*",
        "cap_embedder.*",
        "all_x_embedder.*",
        "*adaLN_modulation*",
    )
    guidance_off = {"guidance_scale": 0.0}
    unreached = {"x_pad_token": "pads an image to a multiple of 32 tokens, which most sizes already have"}

    def guided_call(self, w: float) -> dict:
        return {"guidance_scale": w - 1.0}  # it adds w (D - D_uncond) to D

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        states = cond["cap_feats"].to(x.dtype)
        texts = list(states)
        if not states.is_meta:
            texts = [text[: int(mask.sum())] for text, mask in zip(states, cond["cap_mask"])]
        out = net(list(x[:, :, None]), time, texts, return_dict=False)[0]
        return -torch.stack(out)[:, :, 0]

    def cond_shapes(self, net: DiffusersModel, codec) -> dict:
        shape = (codec.max_length, net.config.cap_feat_dim)
        return {"cap_feats": shape, "cap_mask": ((codec.max_length,), torch.bool)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        length = {"max_sequence_length": codec.max_length}
        found, _ = codec.pipe.encode_prompt(prompts, codec.device, False, **length)
        states, mask = pad_rows([text.float() for text in found], codec.max_length)
        return {"cap_feats": states, "cap_mask": mask}

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        return list(net.layers)

    def image_tokens(self, net: DiffusersModel, out: Tensor, x: Tensor, cond: Cond) -> Tensor:
        """The image comes first, before its padding and the text."""
        return out[:, : x.shape[-2] * x.shape[-1] // net.config.all_patch_size[0] ** 2]

    def feature_map(self, net: DiffusersModel, out: Tensor, x: Tensor) -> Tensor:
        return fold_tokens(out, x, net.config.all_patch_size[0])

    def feature_channels(self, net: DiffusersModel) -> list[int]:
        return [net.config.dim] * len(net.layers)


def pad_rows(rows: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Texts of different lengths as one [B, length, C] with its bool mask."""
    states = torch.stack([nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=states.device)
    return states, torch.arange(length, device=states.device) < lengths[:, None]


FAMILIES = (DiT(), PixArtAlpha(), PixArt(), SanaSprint(), Sana(), Lumina2(), ZImage())
