"""UNet families: UNet2DModel (class labels or unconditional), and the text-conditioned Stable Diffusion."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.families.base import Family
from fastgen.families.parts import DiffusersModel, rebuilt

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")


def guidance_features(w: Tensor, dim: int) -> Tensor:
    """The embedding [B, dim] that Stable Diffusion pipelines pass as `timestep_cond`: sin and cos of
    1000 (w - 1) at frequencies from 1 down to 1e-4 (LCM, arXiv 2310.04378).
    """
    frequency = torch.exp(torch.arange(dim // 2, device=w.device) * (-math.log(1e4) / (dim // 2 - 1)))
    phase = (1000 * (w.float() - 1))[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], 1)


class UNet(Family):
    """Common base of the UNets of diffusers."""

    component = "unet"
    schedules: tuple[str, ...] = ("VP", "Flow", "EDM")
    sample_key = "sample"
    final_layers: tuple[str, ...] = ("time_embedding.*", "conv_in", "conv_out", "add_embedding.*")

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        return [*net.down_blocks, net.mid_block]

    def default_taps(self, net: DiffusersModel) -> tuple[int, ...]:
        return (-1,)

    def feature_map(self, net: DiffusersModel, out: Tensor, x: Tensor) -> Tensor:
        return out

    def feature_channels(self, net: DiffusersModel) -> list[int]:
        widths = list(net.config.block_out_channels)
        return [*widths, widths[-1]]


class UNet2D(UNet):
    """UNet2DModel: class labels or unconditional; the scheduler decides between VP, flow and EDM."""

    name, net_class = "unet2d", "UNet2DModel"
    pipelines: tuple[str, ...] = ("DDPMPipeline", "DDIMPipeline")
    kind: Literal["text", "labels", "scans", "pictures"] = "labels"
    factor = 1
    keys: tuple[str, ...] = ("class_labels",)
    lora_targets = ATTENTION + RESNET
    lora_loader = False


class ConsistencyUNet(UNet2D):
    """UNet2DModel as a consistency model: EDM preconditioning with D(x, sigma_min) = x, time 250 ln sigma."""

    name, pipelines = "consistency", ("ConsistencyModelPipeline",)
    edm_time, boundary, schedules = 250.0, True, ("EDM",)

    def matches(self, index: dict, config: dict) -> bool:
        scheduler = (index.get("scheduler") or [None, ""])[1]
        return index.get("_class_name") in self.pipelines or scheduler == "CMStochasticIterativeScheduler"


class SD(UNet):
    """UNet2DConditionModel as in Stable Diffusion 1.x / 2.x, eps or v: text states [B, L, C]."""

    name, net_class, pipelines = "sd", "UNet2DConditionModel", ("StableDiffusionPipeline",)
    lora_targets = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", *RESNET)
    kohya_prefix = "lora_unet"
    keys = ("encoder_hidden_states", "timestep_cond")
    latent_statistics: Literal["none", "shift", "channels"] = "none"
    guidance_layers = ("time_embedding.cond_proj",)
    index_extra = {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }

    def matches(self, index: dict, config: dict) -> bool:
        bare_lcm = not index and config.get("time_cond_proj_dim")
        return not (config.get("addition_embed_type") or bare_lcm)

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        dim = net.config.time_cond_proj_dim
        if dim and "guidance" in cond:
            cond = {**cond, "timestep_cond": guidance_features(cond["guidance"], dim)}
        return super().call(net, x, time, cond)

    @torch.no_grad()
    def add_guidance(self, net: DiffusersModel) -> DiffusersModel:
        """The input `timestep_cond` of latent consistency models, by which the pipeline passes w."""
        if net.config.time_cond_proj_dim:
            return net
        with_guidance = rebuilt(net, time_cond_proj_dim=256)
        with_guidance.time_embedding.cond_proj.weight.zero_()
        return with_guidance

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (codec.max_length, net.config.cross_attention_dim)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        states, _ = codec.pipe.encode_prompt(prompts, codec.device, 1, False)
        return {"encoder_hidden_states": states.float()}


class LCM(SD):
    """Stable Diffusion's UNet that also embeds the guidance scale (arXiv 2310.04378)."""

    name, pipelines = "lcm", ("LatentConsistencyModelPipeline",)
    default_guidance = 8.0
    final_layers = (*UNet.final_layers, "time_embedding.cond_proj")

    def matches(self, index: dict, config: dict) -> bool:
        bare = not index and bool(config.get("time_cond_proj_dim"))
        return not config.get("addition_embed_type") and (index.get("_class_name") in self.pipelines or bare)


class SDXL(SD):
    """UNet2DConditionModel of SDXL: two text encoders' states, pooled text, and sizes as micro-conditions."""

    name, pipelines = "sdxl", ("StableDiffusionXLPipeline",)
    index_extra: dict[str, Any] = {}
    latent_statistics = "channels"

    def matches(self, index: dict, config: dict) -> bool:
        return config.get("addition_embed_type") == "text_time"

    def inputs(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        added = {"text_embeds": cond["text_embeds"].to(x.dtype), "time_ids": cond["time_ids"].to(x.dtype)}
        return super().inputs(x, cond) | {"added_cond_kwargs": added}

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        pooled = net.config.projection_class_embeddings_input_dim - 6 * net.config.addition_time_embed_dim
        return super().cond_shapes(net, codec) | {"text_embeds": (pooled,), "time_ids": (6,)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        states, _, pooled, _ = codec.pipe.encode_prompt(
            prompts, device=codec.device, do_classifier_free_guidance=False
        )
        return self._with_sizes(codec, states, pooled)

    @torch.no_grad()
    def null(self, codec) -> Cond:
        _, states, _, pooled = codec.pipe.encode_prompt(
            [""], device=codec.device
        )  # zeros if force_zeros_for_empty_prompt
        return self._with_sizes(codec, states, pooled)

    def _with_sizes(self, codec, states: Tensor, pooled: Tensor) -> Cond:
        (h, w), num = codec.pixels, len(states)  # original size, no crop, target size
        ids = torch.tensor([[h, w, 0, 0, h, w]], dtype=torch.float32, device=states.device)
        return {
            "encoder_hidden_states": states.float(),
            "text_embeds": pooled.float(),
            "time_ids": ids.repeat(num, 1),
        }


class ControlSD(SD):
    """Stable Diffusion with a ControlNet: both networks are the denoiser, cond contains the control image."""

    name, pipelines = "controlnet", ("StableDiffusionControlNetPipeline",)
    extra = ("controlnet",)
    needs_image = True

    def matches(self, index: dict, config: dict) -> bool:
        return "controlnet" in index and super().matches(index, config)

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        states = cond["encoder_hidden_states"].to(x.dtype)
        inputs = {"encoder_hidden_states": states, "controlnet_cond": cond["control"].to(x.dtype)}
        down, mid = net.controlnet(x, time, **inputs, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return net.unet(x, time, encoder_hidden_states=states, **residuals, return_dict=False)[0]

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return super().cond_shapes(net, codec) | {"control": (3, *codec.pixels)}

    def encode_image(self, codec, images: Tensor) -> Cond:
        return {"control": images / 2 + 0.5}

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        return super().taps(net.unet)


class InstructPix2Pix(SD):
    """Stable Diffusion whose first convolution also reads the latents of an image (arXiv 2211.09800): for
    editing, and for super-resolution of an enlarged picture. cond["image_latents"] [B, C, h, w] are not
    scaled.

    Guidance leads away from the text alone: the null condition keeps the image, as the pipeline does with
    image_guidance_scale 1.
    """

    name, pipelines = "instruct-pix2pix", ("StableDiffusionInstructPix2PixPipeline",)
    needs_image = True
    index_extra = {**SD.index_extra, "image_encoder": [None, None]}
    call_arguments = {"image_guidance_scale": 1.0}

    def matches(self, index: dict, config: dict) -> bool:
        return index.get("_class_name") in self.pipelines

    def channels(self, net: DiffusersModel) -> int:
        return net.config.out_channels

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        channels = self.channels(net)  # those after them are a second time's
        image = cond["image_latents"].to(x.dtype)
        out = super().call(net, torch.cat([x[:, :channels], image, x[:, channels:]], 1), time, cond)
        return out[:, : x.shape[1]]

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return super().cond_shapes(net, codec) | {"image_latents": tuple(codec.shape)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        states = codec.pipe._encode_prompt(prompts, codec.device, 1, False)
        return {"encoder_hidden_states": states.float()}

    def encode_image(self, codec, images: Tensor) -> Cond:
        return {"image_latents": self.to_latents(codec.vae, images.to(codec.vae.dtype)).float()}

    def size_call(self, codec) -> dict:
        return {}  # that of the image


class Restorer(UNet2D):
    """UNet2DModel that reads x_t beside a picture to restore, cond["shown"] [B, C, h, w]: a rectified flow
    from that picture, noised, to the one it was made of (OFTSR, arXiv 2412.09465).
    """

    name, kind = "restorer", "pictures"
    pipelines: tuple[str, ...] = ()
    begins_at_noise, takes_text, needs_image = False, False, True
    schedules, keys, input_layer = ("Flow",), (), ""

    def matches(self, index: dict, config: dict) -> bool:
        labels = config.get("num_class_embeds")
        return config.get("in_channels") == 2 * config.get("out_channels", 0) and not labels

    def channels(self, net: DiffusersModel) -> int:
        return net.config.out_channels

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return net(torch.cat([x, cond["shown"].to(x.dtype)], 1), time, return_dict=False)[0]

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {"shown": tuple(codec.shape)}

    def encode_image(self, codec, images: Tensor) -> Cond:
        return {"shown": codec.encode(images)}

    def start_noise(self, info: dict) -> float:
        share = info.get("start_noise")
        if share is None or not 0 <= share <= 1:
            found = (
                f"fastgen.json has start_noise {share!r}; {self.name} begins at a picture with noise added"
            )
            raise UserError("teacher.path", found, "give the share of noise it was trained with, 0 to 1")
        return float(share)

    def source(self, noise: Tensor, cond: Cond, start_noise: float) -> Tensor:
        """The picture with noise added so that unit variance stays: sqrt(1 - p^2) c + p n."""
        return (1 - start_noise**2) ** 0.5 * cond["shown"] + start_noise * noise


FAMILIES = (ControlSD(), InstructPix2Pix(), SD(), LCM(), SDXL(), ConsistencyUNet(), Restorer(), UNet2D())
