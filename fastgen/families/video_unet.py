"""Video UNets: AnimateDiff's motion UNet (VP, text) and Stable Video Diffusion (EDM form, a first frame)."""

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.families.base import Family
from fastgen.families.frames import per_frame
from fastgen.families.parts import DiffusersModel
from fastgen.families.wan import pictures

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class VideoUNet(Family):
    """Base of the video UNets: an image autoencoder encodes every frame."""

    component, sample_key, temporal = "unet", "sample", 1
    latent_statistics = "none"
    final_layers = ("time_embedding.*", "add_embedding.*", "conv_in", "conv_out")

    def taps(self, net: DiffusersModel) -> list[nn.Module]:
        return [*net.down_blocks, net.mid_block]

    def default_taps(self, net: DiffusersModel) -> tuple[int, ...]:
        return (-1,)

    def feature_map(self, net: DiffusersModel, out: Tensor, x: Tensor) -> Tensor:
        return per_frame(out, x)

    def feature_channels(self, net: DiffusersModel) -> list[int]:
        widths = list(net.config.block_out_channels)
        return [*widths, widths[-1]]

    def channels(self, net: DiffusersModel) -> int:
        return net.config.out_channels

    def to_latents(self, vae: DiffusersModel, images: Tensor) -> Tensor:
        frames = super().to_latents(vae, images.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(images), images.shape[2])).transpose(1, 2)


class AnimateDiff(VideoUNet):
    """UNetMotionModel: an SD UNet with motion modules; all frames have the same text states."""

    name, net_class, pipelines = "animatediff", "UNetMotionModel", ("AnimateDiffPipeline",)
    schedules = ("VP",)
    default_grid = (16, 64, 64)
    # without proj_in and proj_out, which motion modules call with a keyword that peft's layers do not take
    lora_targets = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
    added_layers, added_at_zero = ("*motion_modules*",), ("*motion_modules.*.proj_out.*",)

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        states = self.inputs(x, cond)["encoder_hidden_states"].repeat_interleave(x.shape[2], 0)
        return net(x, time, encoder_hidden_states=states, return_dict=False)[0]

    def grid(self, net: DiffusersModel) -> tuple[int, ...]:
        return (self.default_grid[0], net.config.sample_size, net.config.sample_size)

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (codec.max_length, net.config.cross_attention_dim)}

    def encode(self, codec, prompts: list[str]) -> Cond:
        states, _ = codec.pipe.encode_prompt(prompts, codec.device, 1, False)
        return {"encoder_hidden_states": states.float()}

    def decode(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        frames = vae.decode(z.transpose(1, 2).flatten(0, 1), return_dict=False)[0]
        return frames.unflatten(0, (len(z), z.shape[2])).transpose(1, 2)


class SVD(VideoUNet):
    """UNetSpatioTemporalConditionModel: frames before channels, [noisy, image latents], CLIP image state, and
    fps, motion and noise augmentation as micro-conditions. Its output is minus the "edm" prediction.

    As in the pipeline, noise is added to the image before it is encoded; here always that of seed 0, so that
    an image has one condition. All frames have the same guidance scale; the pipeline raises it from the first
    frame to the last.
    """

    name, net_class = "svd", "UNetSpatioTemporalConditionModel"
    schedules = ("EDM",)
    pipelines, takes_text, needs_image, sign = ("StableVideoDiffusionPipeline",), False, True, -1
    keys, max_length = ("encoder_hidden_states", "added_time_ids"), 0
    default_grid = (25, 72, 128)  # frames of 576 x 1024
    lora_targets = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    lora_loader = False
    unreached = dict.fromkeys(
        ("*.attn2.to_q.*", "*.attn2.to_k.*", "*transformer_blocks.*.norm2.*"),
        "attention to the single token of the image has weight 1 whatever the query",
    )
    guidance_off = {"min_guidance_scale": 1.0, "max_guidance_scale": 1.0}
    micro = {"fps": 7, "motion_bucket_id": 127, "noise_aug_strength": 0.02}

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        image = cond["image_latents"].to(x.dtype)[:, None].expand(-1, x.shape[2], -1, -1, -1)
        out = net(torch.cat([x.transpose(1, 2), image], 2), time, **self.inputs(x, cond), return_dict=False)[
            0
        ]
        return self.sign * out.transpose(1, 2)

    def grid(self, net: DiffusersModel) -> tuple[int, ...]:
        return (net.config.num_frames, *self.default_grid[1:])

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (1, net.config.cross_attention_dim),
            "image_latents": (codec.shape[0], *codec.shape[2:]),
            "added_time_ids": (3,),
        }

    def encode(self, codec, prompts: list[str]) -> Cond:
        ids = [self.micro["fps"] - 1.0, self.micro["motion_bucket_id"], self.micro["noise_aug_strength"]]
        return {"added_time_ids": torch.tensor([ids], device=codec.device).expand(len(prompts), 3)}

    def encode_image(self, codec, images: Tensor) -> Cond:
        states = codec.pipe._encode_image(pictures(images), codec.device, 1, False)
        noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
        noised = images + self.micro["noise_aug_strength"] * noise
        latents = codec.vae.encode(noised.to(codec.vae.dtype)).latent_dist.mode()
        return {"encoder_hidden_states": states.float(), "image_latents": latents.float()}

    def nulled(self, cond: Cond) -> Cond:
        return cond | {k: torch.zeros_like(cond[k]) for k in ("encoder_hidden_states", "image_latents")}

    def decode(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        frames = z.transpose(1, 2).flatten(0, 1)
        return vae.decode(frames, num_frames=z.shape[2]).sample.unflatten(0, (len(z), -1)).transpose(1, 2)

    def pipeline_latents(self, noise: Tensor, schedule) -> Tensor:
        return noise.transpose(1, 2)


FAMILIES: tuple[Family, ...] = (AnimateDiff(), SVD())
