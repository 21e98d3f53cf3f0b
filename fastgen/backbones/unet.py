"""UNet families: UNet2DModel (class labels or nothing), and the text-conditioned ones of Stable Diffusion."""

import math

import torch
from torch import Tensor, nn

from fastgen.backbones.family import Cond, Family, rebuilt

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")


def guidance_features(w: Tensor, dim: int) -> Tensor:
    """What Stable Diffusion pipelines pass as `timestep_cond` [B, dim]: sin and cos of 1000 (w - 1) at
    frequencies from 1 down to 1e-4 (LCM, arXiv 2310.04378).
    """
    frequency = torch.exp(torch.arange(dim // 2, device=w.device) * (-math.log(1e4) / (dim // 2 - 1)))
    phase = (1000 * (w.float() - 1))[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], 1)


class UNet(Family):
    """What every UNet of diffusers shares."""

    component = "unet"
    sample_key = "sample"
    final_layers = ("time_embedding.*", "conv_in", "conv_out", "add_embedding.*")

    def taps(self, net: nn.Module) -> list[nn.Module]:
        return [*net.down_blocks, net.mid_block]

    def default_taps(self, net: nn.Module) -> tuple[int, ...]:
        return (-1,)

    def feature_map(self, net: nn.Module, out: Tensor, x: Tensor) -> Tensor:
        return out

    def feature_channels(self, net: nn.Module) -> list[int]:
        widths = list(net.config.block_out_channels)
        return [*widths, widths[-1]]


class UNet2D(UNet):
    """UNet2DModel: class labels or nothing; VP, flow or EDM is read off the scheduler."""

    name, net_class, pipelines = "unet2d", "UNet2DModel", ("DDPMPipeline", "DDIMPipeline")
    kind = "labels"
    factor = 1
    keys = ("class_labels",)
    lora_targets = ATTENTION + RESNET
    lora_loader = False


class SD(UNet):
    """UNet2DConditionModel as in Stable Diffusion 1.x / 2.x, eps or v: text states [B, L, C]."""

    name, net_class, pipelines = "sd", "UNet2DConditionModel", ("StableDiffusionPipeline",)
    lora_targets = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", *RESNET)
    kohya_prefix = "lora_unet"
    keys = ("encoder_hidden_states", "timestep_cond")
    guidance_layers = ("time_embedding.cond_proj",)
    index_extra = {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }

    def call(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        dim = net.config.time_cond_proj_dim
        if dim and "guidance" in cond:
            cond = {**cond, "timestep_cond": guidance_features(cond["guidance"], dim)}
        return super().call(net, x, time, cond)

    @torch.no_grad()
    def add_guidance(self, net: nn.Module) -> nn.Module:
        """`time_cond_proj_dim` of latent consistency models: the pipeline then tells w, without guiding."""
        if net.config.time_cond_proj_dim:
            return net
        told = rebuilt(net, time_cond_proj_dim=256)
        told.time_embedding.cond_proj.weight.zero_()
        return told

    def cond_shapes(self, net: nn.Module, codec) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (codec.max_length, net.config.cross_attention_dim)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        states, _ = codec.pipe.encode_prompt(prompts, codec.device, 1, False)
        return {"encoder_hidden_states": states.float()}


FAMILIES = (SD(), UNet2D())
