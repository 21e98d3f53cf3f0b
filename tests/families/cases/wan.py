"""Tiny random Wan and AnyFlow pipelines of the real diffusers classes, as folders on disk."""

from pathlib import Path

import torch

from tests.families.cases.parts import t5_tokenizer
from tests.families.cases.video_parts import FRAMES, SIZE, alive, case, clip_vision, save, t5_encoder
from tests.families.cases.video_real import REAL


def wan_vae():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def wan_net(cls: str = "WanTransformer3DModel", **other):
    import diffusers

    sizes = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32}
    sizes |= {"in_channels": 16, "out_channels": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2}
    return alive(getattr(diffusers, cls)(**{**sizes, "rope_max_seq_len": 32, **other}))


def wan_parts(seed: int):
    torch.manual_seed(seed)
    from diffusers import UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(True),
        "scheduler": UniPCMultistepScheduler(**flow),
    }


def wan(folder: Path) -> Path:
    """Wan 2.1 text to video."""
    from diffusers import WanPipeline

    pipe = WanPipeline(**wan_parts(11), vae=wan_vae(), transformer=wan_net())
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan22(folder: Path) -> Path:
    """Wan 2.2 text to video: two experts, split at 0.875."""
    from diffusers import WanPipeline

    parts = wan_parts(12)
    pipe = WanPipeline(
        **parts, vae=wan_vae(), transformer=wan_net(), transformer_2=wan_net(), boundary_ratio=0.875
    )
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan_i2v(folder: Path) -> Path:
    """Wan 2.1 image to video: CLIP image states, mask and image latents beside the noise."""
    from diffusers import WanImageToVideoPipeline

    parts = wan_parts(13)
    encoder, processor = clip_vision(4)
    net = wan_net(in_channels=36, image_dim=4)
    more = {"image_encoder": encoder, "image_processor": processor}
    pipe = WanImageToVideoPipeline(**parts, vae=wan_vae(), transformer=net, **more)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan_flf2v(folder: Path) -> Path:
    """Wan 2.1 with a first and a last frame: its CLIP states are those of both."""
    from diffusers import WanImageToVideoPipeline

    parts = wan_parts(18)
    encoder, processor = clip_vision(4)
    net = wan_net(in_channels=36, image_dim=4, pos_embed_seq_len=2 * 17)
    more = {"image_encoder": encoder, "image_processor": processor}
    pipe = WanImageToVideoPipeline(**parts, vae=wan_vae(), transformer=net, **more)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan22_i2v(folder: Path) -> Path:
    """Wan 2.2 image to video: two experts without CLIP image states."""
    from diffusers import WanImageToVideoPipeline

    parts = wan_parts(14)
    nets = {"transformer": wan_net(in_channels=36), "transformer_2": wan_net(in_channels=36)}
    pipe = WanImageToVideoPipeline(**parts, vae=wan_vae(), **nets, boundary_ratio=0.9)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan_5b_vae():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        decoder_base_dim=3,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        latents_mean=[0.1] * 48,
        latents_std=[1.5] * 48,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )


def wan_ti2v(folder: Path) -> Path:
    """Wan 2.2 TI2V-5B with text as its condition."""
    from diffusers import WanPipeline

    parts = wan_parts(15)
    net = wan_net(in_channels=48, out_channels=48)
    pipe = WanPipeline(**parts, vae=wan_5b_vae(), transformer=net, expand_timesteps=True)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan_ti2v_image(folder: Path) -> Path:
    """Wan 2.2 TI2V-5B with text and a first frame as conditions, whose tokens have time zero."""
    from diffusers import WanImageToVideoPipeline

    parts = wan_parts(16)
    net = wan_net(in_channels=48, out_channels=48)
    pipe = WanImageToVideoPipeline(**parts, vae=wan_5b_vae(), transformer=net, expand_timesteps=True)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def anyflow(folder: Path) -> Path:
    """AnyFlow: a Wan that also knows where its step goes."""
    from diffusers import AnyFlowPipeline, FlowMapEulerDiscreteScheduler

    parts = wan_parts(17) | {"scheduler": FlowMapEulerDiscreteScheduler(shift=5.0)}
    net = wan_net("AnyFlowTransformer3DModel", deltatime_type="r", gate_value=0.25)
    pipe = AnyFlowPipeline(**parts, vae=wan_vae(), transformer=net)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


CASES = [
    case("wan", wan, ("Wan 2.1 1.3B", REAL["wan-1.3b"], "1.42"), ("Wan 2.1 14B", REAL["wan-14b"], "14")),
    case("wan", wan22, name="wan22"),
    case("wan-i2v", wan_i2v, ("Wan 2.1 I2V 14B", REAL["wan-i2v-14b"], "16.4"), image=SIZE),
    case("wan-i2v", wan22_i2v, name="wan22-i2v", image=SIZE),
    case("wan-flf2v", wan_flf2v, image=SIZE, last=True),
    case("wan-ti2v", wan_ti2v, ("Wan 2.2 TI2V 5B", REAL["wan-5b"], "5")),
    case("wan-ti2v-image", wan_ti2v_image, image=SIZE),
    case("anyflow", anyflow, ("AnyFlow 14B", REAL["anyflow"], "14")),
]
