"""UNet families: UNet2DModel (class labels or nothing), and the text-conditioned ones of Stable Diffusion."""

import torch
from torch import Tensor, nn

from fastgen.backbones.family import Cond, Family

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")


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
    index_extra = {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }

    def cond_shapes(self, net: nn.Module, codec) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (codec.max_length, net.config.cross_attention_dim)}

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        states, _ = codec.pipe.encode_prompt(prompts, codec.device, 1, False)
        return {"encoder_hidden_states": states.float()}


FAMILIES = (SD(), UNet2D())
