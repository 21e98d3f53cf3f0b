"""UNet families: pixel or latent UNet2DModel (class labels), and the text-conditioned UNet of Stable
Diffusion.
"""

import math

import torch
from torch import Tensor, nn

from fastgen.backbones.base import Cond, Family, rebuilt

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")


def guidance_features(w: Tensor, dim: int) -> Tensor:
    """What Stable Diffusion pipelines pass as `timestep_cond` [B, dim]: sin and cos of 1000 (w - 1) at
    frequencies from 1 down to 1e-4 (LCM, arXiv 2310.04378).
    """
    frequency = torch.exp(torch.arange(dim // 2, device=w.device) * (-math.log(1e4) / (dim // 2 - 1)))
    phase = (1000 * (w.float() - 1))[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], 1)


class UNet2D(Family):
    """UNet2DModel: class labels or nothing; whether it is VP, flow or EDM is read off the scheduler."""

    name, net_class, pipeline = "unet2d", "UNet2DModel", "DDPMPipeline"
    lora_targets = ATTENTION + RESNET

    def call(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return net(x, time, class_labels=cond.get("class_labels"), return_dict=False)[0]

    def taps(self, net: nn.Module) -> list[nn.Module]:
        return [*net.down_blocks, net.mid_block]

    def feature_channels(self, net: nn.Module) -> list[int]:
        widths = list(net.config.block_out_channels)
        return [*widths, widths[-1]]

    def default_taps(self, net: nn.Module) -> tuple[int, ...]:
        return (-1,)


class SDUNet(UNet2D):
    """UNet2DConditionModel as in Stable Diffusion 1.x / 2.x: text states [B, L, C]."""

    name, net_class, pipeline = "sd", "UNet2DConditionModel", "StableDiffusionPipeline"
    lora_targets = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", *RESNET)
    kohya_prefix = "lora_unet"
    guidance_layers = ("time_embedding.cond_proj",)

    def call(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        states, dim, told = cond["encoder_hidden_states"].to(x.dtype), net.config.time_cond_proj_dim, None
        if dim and "guidance" in cond:
            told = guidance_features(cond["guidance"], dim).to(x.dtype)
        return net(x, time, encoder_hidden_states=states, timestep_cond=told, return_dict=False)[0]

    @torch.no_grad()
    def add_guidance(self, net: nn.Module) -> nn.Module:
        """`time_cond_proj_dim` of latent consistency models: the pipeline then tells w, without guiding."""
        if net.config.time_cond_proj_dim:
            return net
        told = rebuilt(net, time_cond_proj_dim=256)
        told.time_embedding.cond_proj.weight.zero_()
        return told
