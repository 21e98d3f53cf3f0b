"""UNet families: pixel or latent UNet2DModel (class labels), and the text-conditioned UNet of Stable
Diffusion.
"""

from torch import Tensor, nn

from fastgen.backbones.base import Cond, Family

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")


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

    def call(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        states = cond["encoder_hidden_states"].to(x.dtype)
        return net(x, time, encoder_hidden_states=states, return_dict=False)[0]
