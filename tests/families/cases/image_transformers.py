"""Tiny random image-transformer pipelines of the real diffusers classes, each saved as a folder, offline."""

import json
from pathlib import Path
from unittest import mock

import torch

from tests.families.cases import Case
from tests.families.cases.image_transformers_real import REAL
from tests.families.cases.parts import (
    FLOW_KL,
    autoencoder,
    clip_text,
    clip_tokenizer,
    flow_kl,
    gemma_text,
    gemma_tokenizer,
    qwen3_text,
    qwen_tokenizer,
    qwen_vl_text,
    t5_text,
    t5_tokenizer,
)
from tests.support.tiny import perturb_zero_layers


def lumina_kl():
    """Eight pixels per latent side, which Lumina2Pipeline takes for granted."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **FLOW_KL,
    ).eval()


def _save(pipe, folder: Path, **info) -> Path:
    pipe.save_pretrained(folder)
    (folder / "fastgen.json").write_text(json.dumps(info))
    return folder


def _flow(**more):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def dit_folder(folder: Path) -> Path:
    """DiTPipeline: 1000 classes and the null class 1000, learned variance, 16x16 images."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(11)
    net = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    perturb_zero_layers(net)
    scheduler = DDIMScheduler(clip_sample=False)
    return _save(DiTPipeline(transformer=net.eval(), vae=autoencoder(), scheduler=scheduler), folder)


def pixart_folder(folder: Path, sigma: bool = True, additional: bool = False) -> Path:
    """PixArt-sigma (or alpha): T5 states with a mask, learned variance, 16x16 images."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    torch.manual_seed(12)
    net = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        use_additional_conditions=additional,
    )
    perturb_zero_layers(net)
    cls = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    parts = {"tokenizer": t5_tokenizer(), "text_encoder": t5_text(), "vae": autoencoder()}
    pipe = cls(transformer=net.eval(), scheduler=DPMSolverMultistepScheduler(), **parts)
    return _save(pipe, folder, max_sequence_length=24)


def pixart_alpha_folder(folder: Path) -> Path:
    """PixArtAlphaPipeline."""
    return pixart_folder(folder, sigma=False)


def sana_sprint_folder(folder: Path) -> Path:
    """SanaSprintPipeline: TrigFlow steps, embedded guidance, 32x32 images."""
    from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    torch.manual_seed(13)
    net = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,  # its rectified attention has poles where a whole head is negative
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=8,
        sample_size=16,
        patch_size=1,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
        guidance_embeds_scale=0.1,
        timestep_scale=0.001,
    )
    perturb_zero_layers(net)
    blocks = {f"{side}_block_types": ("ResBlock", "EfficientViTBlock") for side in ("encoder", "decoder")}
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
        **blocks,
    )
    parts = {"tokenizer": gemma_tokenizer(), "text_encoder": gemma_text(), "vae": vae.eval()}
    pipe = SanaSprintPipeline(transformer=net.eval(), scheduler=SCMScheduler(sigma_data=0.5), **parts)
    return _save(pipe, folder, max_sequence_length=24)


def lumina2_folder(folder: Path) -> Path:
    """Lumina2Pipeline: the network's time runs from noise to data; 64x64 images from 8x8 latents."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(14)
    net = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(256, 64, 64),
        cap_feat_dim=8,
    )
    perturb_zero_layers(net)
    parts = {"tokenizer": gemma_tokenizer(), "text_encoder": gemma_text(), "vae": lumina_kl()}
    pipe = Lumina2Pipeline(transformer=net.eval(), scheduler=_flow(shift=6.0), **parts)
    return _save(pipe, folder, max_sequence_length=224)


def sd3_folder(folder: Path) -> Path:
    """StableDiffusion3Pipeline in the 3.5 form (dual attention, normalised queries and keys)."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(15)
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    perturb_zero_layers(net)
    pipe = StableDiffusion3Pipeline(
        transformer=net.eval(),
        scheduler=_flow(shift=3.0),
        vae=flow_kl(),
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(64),
        tokenizer_3=t5_tokenizer(),
    )
    return _save(pipe, folder, max_sequence_length=24)


def flux_folder(folder: Path, guidance: bool = True) -> Path:
    """FluxPipeline as dev (embedded guidance, shift by resolution) or schnell (neither); 16x16 images."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(16)
    net = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    perturb_zero_layers(net)
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    pipe = FluxPipeline(
        transformer=net.eval(),
        scheduler=_flow(**dynamic) if guidance else _flow(shift=1.0),
        vae=flow_kl(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(),
    )
    return _save(pipe, folder, max_sequence_length=24, height=16, width=16)


def flux_schnell_folder(folder: Path) -> Path:
    """FluxPipeline without embedded guidance."""
    return flux_folder(folder, guidance=False)


def flux2_folder(folder: Path) -> Path:
    """Flux2KleinPipeline: latents whitened by the autoencoder's batch norm, states of a language model."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(17)
    net = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    perturb_zero_layers(net)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.bn.running_mean.normal_(0, 0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    pipe = Flux2KleinPipeline(
        transformer=net.eval(),
        scheduler=_flow(use_dynamic_shifting=True, shift=3.0),
        vae=vae.eval(),
        text_encoder=qwen3_text("Qwen3ForCausalLM", 28),
        tokenizer=qwen_tokenizer(),
    )
    return _save(pipe, folder, max_sequence_length=64, height=16, width=16)


def z_image_folder(folder: Path) -> Path:
    """ZImagePipeline: lists in, lists out; the network's time runs from noise to data; 16x16 images."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(18)
    net = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 64, 64],
    )
    perturb_zero_layers(net)
    pipe = ZImagePipeline(
        transformer=net.eval(),
        scheduler=_flow(shift=3.0),
        vae=flow_kl(),
        text_encoder=qwen3_text(),
        tokenizer=qwen_tokenizer(),
    )
    return _save(pipe, folder, max_sequence_length=64, height=16, width=16)


def qwen_image_folder(folder: Path) -> Path:
    """QwenImagePipeline: latents normalised channel by channel, shift by resolution; 32x32 images."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(19)
    net = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    perturb_zero_layers(net)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.2, 0.1, -0.4],
        latents_std=[2.8, 1.9, 2.2, 1.4],
    )
    dynamic = {"use_dynamic_shifting": True, "max_image_seq_len": 8192, "max_shift": 0.9}
    pipe = QwenImagePipeline(
        transformer=net.eval(),
        scheduler=_flow(**dynamic, shift_terminal=0.02),
        vae=vae.eval(),
        text_encoder=qwen_vl_text(),
        tokenizer=qwen_tokenizer(),
    )
    return _save(pipe, folder, max_sequence_length=256, height=32, width=32)


def dit_call(world, pipe, info, noise, guidance: float = 1.0):
    """DiTPipeline, which takes no latents; steps off its scheduler's grid are set on the scheduler."""
    if info["timestep_arguments"]:
        set_timesteps = pipe.scheduler.set_timesteps
        pipe.scheduler.set_timesteps = lambda num: set_timesteps(**info["timestep_arguments"])
    labels = world.cond["class_labels"].tolist()
    with mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", return_value=noise):
        return pipe(labels, guidance_scale=guidance, num_inference_steps=info["steps"], output_type="pt")[0]


def _case(family: str, build, *models: str, **more) -> Case:
    """A case with its released models."""
    return Case(family, build, published=[(m, *REAL[m]) for m in models], **more)


FOLDERS = {
    "dit": dit_folder,
    "pixart-alpha": pixart_alpha_folder,
    "pixart-sigma": pixart_folder,
    "sana-sprint": sana_sprint_folder,
    "lumina2": lumina2_folder,
    "sd3": sd3_folder,
    "flux": flux_folder,
    "flux-schnell": flux_schnell_folder,
    "flux2": flux2_folder,
    "z-image": z_image_folder,
    "qwen-image": qwen_image_folder,
}
CASES = [
    _case("dit", dit_folder, plain=dit_call),
    _case("pixart-alpha", pixart_alpha_folder, "PixArt-alpha XL"),
    _case("pixart-sigma", pixart_folder, "PixArt-sigma XL"),
    _case("sana-sprint", sana_sprint_folder, "SANA-Sprint 0.6B", "SANA-Sprint 1.6B", sampler="renoise"),
    _case("lumina2", lumina2_folder, "Lumina-Image 2.0"),
    _case("sd3", sd3_folder, "SD3 medium", "SD3.5 medium", "SD3.5 large"),
    _case("flux", flux_folder, "FLUX.1 dev"),
    _case("flux", flux_schnell_folder, "FLUX.1 schnell", name="flux-schnell"),
    _case("flux2", flux2_folder, "FLUX.2 klein 4B", "FLUX.2 klein 9B"),
    _case("z-image", z_image_folder, "Z-Image"),
    _case("qwen-image", qwen_image_folder, "Qwen-Image"),
]
