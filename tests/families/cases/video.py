"""Tiny random video pipelines of the real diffusers classes but Wan's, as folders on disk."""

from pathlib import Path

import torch

from tests.families.cases.parts import clip_text, clip_tokenizer, t5_tokenizer
from tests.families.cases.video_parts import (
    FRAMES,
    SIZE,
    alive,
    case,
    clip_vision,
    llama_tokenizer,
    save,
    t5_encoder,
)
from tests.families.cases.video_real import REAL


# -- CogVideoX -------------------------------------------------------------------------------------------
def _cogvideox(folder: Path, pipeline: str, channels: int, **net) -> Path:
    import diffusers

    kinds = {f"{d}_block_types": (f"CogVideoX{d.title()}Block3D",) * 4 for d in ("down", "up")}
    vae = diffusers.AutoencoderKLCogVideoX(
        **kinds,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=SIZE,
        sample_width=SIZE,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=FRAMES,
        max_text_seq_length=16,
        **net,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipe = getattr(diffusers, pipeline)(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae,
        transformer=alive(transformer),
        scheduler=scheduler,
    )
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def cogvideox(folder: Path) -> Path:
    """CogVideoX text to video, sine position table (the 2B form)."""
    torch.manual_seed(21)
    return _cogvideox(folder, "CogVideoXPipeline", 4)


def cogvideox_5b(folder: Path) -> Path:
    """CogVideoX text to video, rotary positions (the 5B form)."""
    torch.manual_seed(22)
    more = {"use_rotary_positional_embeddings": True}
    return _cogvideox(folder, "CogVideoXPipeline", 4, **more, spatial_interpolation_scale=1.0)


def cogvideox_i2v(folder: Path) -> Path:
    """CogVideoX image to video."""
    torch.manual_seed(23)
    more = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    return _cogvideox(folder, "CogVideoXImageToVideoPipeline", 8, **more)


# -- HunyuanVideo, LTX -----------------------------------------------------------------------------------
def hunyuan_video(folder: Path) -> Path:
    """HunyuanVideo, guidance embedded."""
    import diffusers
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(31)
    kinds = {f"{d}_block_types": (f"HunyuanVideo{d.title()}Block3D",) * 4 for d in ("down", "up")}
    vae = diffusers.AutoencoderKLHunyuanVideo(
        **kinds,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    )
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
        guidance_embeds=True,
    )
    tokenizer = _templated(llama_tokenizer())
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=len(tokenizer),
        pad_token_id=0,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=tokenizer,
        transformer=alive(net),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(),
    )
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def _templated(tokenizer):
    """The tokenizer taught to read HunyuanVideo's prompt template in about the 95 tokens it crops."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as template

    prefix, num = template["template"].partition("{}")[0], template["crop_start"] - 1
    bounds = [len(prefix) * i // num for i in range(num + 1)]
    tokenizer.add_tokens(sorted({prefix[a:b] for a, b in zip(bounds, bounds[1:])}))
    return tokenizer


def ltx(folder: Path) -> Path:
    """LTX-Video: packed tokens, dynamic shift, per-channel statistics as buffers."""
    import diffusers

    torch.manual_seed(32)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1, 1, 1, 1),
        patch_size=2,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=32,
        num_layers=2,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    pipe = diffusers.LTXPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=alive(net),
    )
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


# -- UNets -----------------------------------------------------------------------------------------------
def animatediff(folder: Path) -> Path:
    """AnimateDiff: an SD UNet with motion modules, four frames of 16 x 16."""
    import diffusers

    torch.manual_seed(41)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=2,
        attention_head_dim=4,
    )
    motion = diffusers.MotionAdapter(
        block_out_channels=(8, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
    pipe = diffusers.AnimateDiffPipeline(
        vae=vae,
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        motion_adapter=motion,
        scheduler=diffusers.DDIMScheduler(**betas, clip_sample=False, steps_offset=1),
    )
    alive(pipe.unet)
    return save(pipe, folder, height=16, width=16, num_frames=4)


def svd(folder: Path) -> Path:
    """Stable Video Diffusion: image to video in the EDM form, three frames of 16 x 16."""
    import diffusers

    torch.manual_seed(42)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
        num_frames=3,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
    )
    encoder, processor = clip_vision(32, projection=True, size=224, patch=56)  # the pipeline resizes to 224
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=encoder,
        unet=alive(unet),
        scheduler=scheduler,
        feature_extractor=processor,
    )
    return save(pipe, folder, height=16, width=16, num_frames=3)


CASES = [
    case("cogvideox", cogvideox, ("CogVideoX 2B", REAL["cogvideox-2b"], "2")),
    case("cogvideox", cogvideox_5b, ("CogVideoX 5B", REAL["cogvideox-5b"], "5.6"), name="cogvideox-rotary"),
    case("cogvideox-i2v", cogvideox_i2v, ("CogVideoX 5B I2V", REAL["cogvideox-i2v"], "5.6"), image=SIZE),
    case("hunyuan-video", hunyuan_video, ("HunyuanVideo", REAL["hunyuan-video"], "13")),
    case("ltx", ltx, ("LTX-Video", REAL["ltx"], "2")),
    case("animatediff", animatediff, ("AnimateDiff v1.5", REAL["animatediff"], "1.3")),
    case("svd", svd, ("Stable Video Diffusion", REAL["svd"], "1.5"), image=16),
]
